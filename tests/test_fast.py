"""Compiled passes and rounded sizes make a model fast. They must not change its results."""
import copy

import pytest
import torch

from engine.speed.fast import QUICK_METHODS, RoundedHidden, frozen, make_fast
from engine.speed.sampler import Sampler
from grpo import micro_batches
from model import GPT, token_logprobs
from train import Config

COMPILED = Config(device="cpu", compile="on", micro_batch=4_096)
PLAIN = Config(device="cpu", compile="off", micro_batch=4_096)


def every_token(idx):
    """A mask for token_logprobs that selects every token."""
    return torch.ones(idx.size(0), idx.size(1) - 1, dtype=torch.bool)


def assert_same_pass(model, plain, shapes):
    """Compare logits, log-probabilities and gradients of two models on batches of these shapes."""
    for shape in shapes:
        idx = torch.randint(11, shape)
        mask = torch.rand(shape[0], shape[1] - 1) < 0.5
        for picked in (every_token(idx), mask):
            found = []
            for gpt in (plain, model):
                gpt.zero_grad()
                found.append(token_logprobs(gpt, idx, picked))
                found[-1].sum().backward()
            assert torch.allclose(found[0], found[1], atol=1e-4)
            for p, expected in zip(model.parameters(), plain.parameters()):
                assert torch.allclose(p.grad, expected.grad, rtol=1e-3, atol=1e-3)
        assert torch.allclose(model(idx), plain(idx), atol=1e-4)


def test_a_compiled_block_is_the_same_block(make_gpt):
    """The compiled pass must not differ from the plain one, or be compiled again for each batch size."""
    plain, model = make_gpt(), make_fast(make_gpt(), COMPILED, training=True)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_same_pass(model, plain, ((3, 20), (85, 48), (2, 3)))


def test_rounded_sizes_give_the_same(make_gpt):
    """Padding must not count as tokens: not in the logits, in the log-probabilities, or in the gradients."""
    plain, model = make_gpt(), make_fast(make_gpt(), PLAIN, training=True)
    assert_same_pass(model, plain, ((3, 20), (85, 48), (2, 3), (1, 48)))
    idx = torch.randint(11, (5, 20))
    mask = torch.rand(5, 20) < 0.5
    assert torch.allclose(model(idx, mask), plain(idx)[mask], atol=1e-4)
    with pytest.raises(ValueError, match="block_size"):
        model(torch.zeros(2, 49, dtype=torch.long))


def test_rounded_sizes_fit_the_compiled_code(make_gpt, monkeypatch):
    """A micro-batch must not be rounded up to more tokens than the code is compiled for, because it would silently run
    uncompiled. Sizes that are not rounded up would cost a new kernel each."""
    class Rollout:
        prompts = [[1] * (3 + i % 7) for i in range(400)]
        completions = [[2] * (1 + (i * 11) % 38) for i in range(400)]
        sampler_logp = completions

    model, computed = make_gpt(), []

    def hidden(self, idx):
        computed.append(tuple(idx.shape))
        return torch.zeros(*idx.shape, 32)

    monkeypatch.setattr(GPT, "hidden", hidden)
    for max_tokens in (4_096, 1_000):
        model.hidden = RoundedHidden(model, max_tokens)
        computed.clear()
        batches = micro_batches(Rollout(), list(range(400)), max_tokens, torch.device("cpu"))
        for batch in batches:
            hidden = model.hidden(batch.idx[:, :-1])
            assert hidden.shape[:2] == batch.idx[:, :-1].shape
        assert len(computed) == len(batches) > 2
        assert all(n * T <= max_tokens and T % 8 == 0 for n, T in computed)
        assert all(n % 16 == 0 or n == max_tokens // T for n, T in computed)


def test_compiled_sampling_is_the_same_distribution(make_gpt):
    """The compiled step must have the attention, padding and rotation of training, and use the weights after an update.
    It must not be compiled again for each batch size, length or model."""
    plain, prompts = make_gpt(), [[1], [2, 3, 4], [5, 6]]
    for model in (make_fast(make_gpt(), COMPILED, sampling=True), make_fast(make_gpt(seed=1), COMPILED, sampling=True)):
        with torch.no_grad():
            for p, other in zip(model.parameters(), plain.parameters()):
                p.copy_(other)
        for samples, new in ((5, 30), (100, 12)):
            with torch.compiler.set_stance("fail_on_recompile"):
                completions, logp = model.generate(prompts, new, stop_ids=(0,), samples=samples,
                                                   generator=torch.Generator().manual_seed(0))
            assert len({len(c) for c in completions}) > 3, "rows must leave at different times"
            for i, (completion, found) in enumerate(zip(completions, logp)):
                prompt = prompts[i // samples]
                idx = torch.tensor([prompt + completion])
                expected = token_logprobs(plain, idx, every_token(idx))[len(prompt) - 1:]
                assert torch.allclose(torch.tensor(found), expected, atol=1e-4)
    greedy = [gpt.generate(prompts, 20, stop_ids=(0,), temperature=0)[0] for gpt in (model, plain)]
    assert greedy[0] == greedy[1]


def outputs(model):
    """The results of each method of a model that make_fast may replace."""
    idx = torch.arange(12).view(2, 6) % 11
    with torch.no_grad():
        return [model.hidden(idx), model(idx, idx > 3), token_logprobs(model, idx, every_token(idx)),
                model.generate([[1, 2]], 12, stop_ids=(0,), temperature=0)[0]]


def equal(some, others):
    return [torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(some, others)]


def test_a_copy_computes_with_its_own_weights(make_gpt):
    """The fast methods of a copy must not use the weights of the original. Otherwise the reference would follow the
    policy, and the KL penalty would always be 0."""
    model = make_fast(make_gpt(), PLAIN, training=True, sampling=True)
    before = outputs(model)
    copies = [copy.deepcopy(model), frozen(model, PLAIN)]
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    for copied in copies:
        assert equal(outputs(copied), before) == [True] * 4
    assert equal(outputs(model), before) == [False] * 4
    with torch.no_grad():
        for copied in copies:
            for p, mine in zip(copied.parameters(), model.parameters()):
                p.copy_(mine)
            assert equal(outputs(copied), outputs(model)) == [True] * 4


def test_a_frozen_copy_leaves_the_model_as_it_was(make_gpt):
    """frozen() must not remove the policy's fast methods or share them with the copy, and the copy must not share the
    policy's parameters."""
    model = make_fast(make_gpt(), PLAIN, training=True, sampling=True)
    quick = {name: vars(model)[name] for name in QUICK_METHODS if name in vars(model)}
    assert isinstance(quick["generate"], Sampler) and "hidden" in quick

    class Recorded(RoundedHidden):
        """Stands in for CUDA graphs, which cannot be copied."""
        def __deepcopy__(self, memo):
            raise AssertionError("copied")

    model.hidden = quick["hidden"] = Recorded(model, 4_096)
    copied = frozen(model, PLAIN)
    assert all(vars(model)[name] is method for name, method in quick.items())
    assert all(vars(copied)[name].model is copied for name in quick)
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in copied.parameters()}
    assert model.state_dict().keys() == copied.state_dict().keys() == make_gpt().state_dict().keys()
