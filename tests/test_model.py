"""The model against slow, independent oracles: Llama's formulas in float64, and log-softmax written out. Then the
quick methods of engine/speed/fast.py against the model's own."""
import copy
import dataclasses
import itertools
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from data.arithmetic import Arithmetic
from distill import distill_step
from engine.speed import fast
from engine.speed.fast import LogprobsInParts, RoundedHidden, RoundedLogits, make_fast
from engine.speed.sampler import Sampler
from grpo import group_advantages, grpo_update, sample_rollout
from engine.pretrained.families import FamilyConfig, FamilyGPT
from model import GPT, GPTConfig, select, token_logprobs
from tests.conftest import Descent
from train import Config

# How published families differ from the models that are made here.
FAMILIES = {
    "made here": {},
    "llama": dict(n_hidden=40, rope_theta=500.0, eps=1e-3, tied=False),
    "grouped keys": dict(n_kv_head=2),
    "one key": dict(n_kv_head=1),
    "qwen2": dict(n_kv_head=2, qkv_bias=True),
    "qwen3": dict(n_kv_head=2, qk_norm=True, head_size=16, tied=False),
}


def make_family(name: str, vocab_size: int = 11, seed: int = 0) -> GPT:
    """A small model of a family. Its weights are large, so that its outputs depend strongly on its inputs."""
    torch.manual_seed(seed)
    kind, config = (FamilyGPT, FamilyConfig) if FAMILIES[name] else (GPT, GPTConfig)
    model = kind(config(vocab_size, 48, n_layer=2, n_head=4, n_embd=32, **FAMILIES[name]))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8.0) if p.dim() == 2 else p.add_(torch.randn_like(p) / 3)
    return model


def next_logits(model, tokens):
    """The logits of the token after one row, which is read whole and alone, (V,)."""
    return model(torch.tensor([tokens]))[0, -1]


# The forward pass


def llama(model: GPT, idx):
    """Llama's forward pass from its paper, in float64, with the rotation as a product of complex numbers, and with
    the additions of Qwen2 and Qwen3."""
    w = {name: p.detach().double() for name, p in model.state_dict().items()}
    c = FamilyConfig(**dataclasses.asdict(model.config))
    x = w["embedding.weight"][idx]
    B, T, _ = x.shape
    D = c.head_size
    turn = torch.outer(torch.arange(T).double(), c.rope_theta ** (-torch.arange(0, D, 2).double() / D))  # (T, D/2)

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.eps).sqrt() * weight

    def rope(x):  # pairs (i, i + D/2), as transformers' Llama has them
        z = torch.complex(x[..., : D // 2], x[..., D // 2:]) * torch.polar(torch.ones_like(turn), turn)
        return torch.cat((z.real, z.imag), -1)

    def heads(h, layer, n):
        h = h @ w[f"{layer}.weight"].T + w.get(f"{layer}.bias", 0.0)
        return h.view(B, T, n, D).transpose(1, 2)

    for i in range(c.n_layer):
        b = f"blocks.{i}."
        h = norm(x, w[b + "norm1.weight"])
        q, k, v = heads(h, b + "q", c.n_head), heads(h, b + "k", c.n_kv_head), heads(h, b + "v", c.n_kv_head)
        if c.qk_norm:
            q, k = norm(q, w[b + "q_norm.weight"]), norm(k, w[b + "k_norm.weight"])
        k, v = (y.repeat_interleave(c.n_head // c.n_kv_head, dim=1) for y in (rope(k), v))
        y = F.scaled_dot_product_attention(rope(q), k, v, is_causal=True)
        x = x + y.transpose(1, 2).reshape(B, T, c.n_head * D) @ w[b + "o.weight"].T
        h = norm(x, w[b + "norm2.weight"])
        g = h @ w[b + "gate.weight"].T
        x = x + (g * g.sigmoid() * (h @ w[b + "up.weight"].T)) @ w[b + "down.weight"].T
    return norm(x, w["norm.weight"]) @ w["embedding.weight" if c.tied else "output.weight"].T


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_is_llama(family):
    """A model with a swapped sign in the rotation, without 1/sqrt(D), or with keys that the wrong heads share, still
    trains. It is only a little worse, so that nobody notices."""
    model, idx = make_family(family), torch.randint(11, (3, 20))
    assert torch.allclose(model(idx).double(), llama(model, idx), atol=1e-4)


def test_bfloat16_is_of_the_products_only(make_gpt):
    """If weights or gradients were bfloat16, an update of 0.1 % would be rounded away. If bfloat16 copies of the
    weights outlived an update, every minibatch of a step except the first would get the gradient of old weights."""
    exact, model, idx = make_gpt(spread=2.0), make_gpt(spread=2.0), torch.randint(11, (3, 20))
    model.dtype = torch.bfloat16
    logits = model(idx)
    assert logits.dtype == torch.bfloat16 and 0 < (logits - exact(idx)).abs().max() < 0.05
    logits.float().logsumexp(dim=-1).sum().backward()
    for p in model.parameters():
        assert p.dtype == p.grad.dtype == torch.float32 and p.grad.any()
        with torch.no_grad():
            p.mul_(-1)
            assert not torch.equal(model(idx), logits)
            p.mul_(-1)
    assert torch.equal(model(idx), logits)


def test_causality(make_gpt):
    """If the mask is off by one, each position sees the token that it predicts. The loss is then very low, and the
    samples are noise."""
    model, idx = make_gpt(), torch.randint(11, (2, 12))
    logits = model(idx)
    for t in range(12):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % 11
        after = model(changed)
        assert torch.equal(after[:, :t], logits[:, :t])
        assert (after[:, t:] - logits[:, t:]).abs().amax(dim=-1).min() > 1e-3, "every later token reads this one"


def test_too_long_a_sequence_is_refused(make_gpt):
    """Without a check, a sequence that is too long fails deep inside the model, or not at all if a table broadcasts."""
    model = make_gpt(block_size=8)
    model(torch.ones(1, 8, dtype=torch.long))
    with pytest.raises(ValueError, match="block_size 8"):
        model(torch.ones(1, 9, dtype=torch.long))


@pytest.mark.parametrize("sizes, named", [
    (dict(n_kv_head=2), "n_kv_head"), (dict(head_size=7), "head_size"), (dict(n_embd=97), "n_embd"),
    (dict(n_embd=99), "n_embd")])
def test_shapes_that_do_not_fit(sizes, named):
    """If the heads do not divide the width, the user must see which setting is wrong. Without a check, the model would
    fail with an error about a matrix."""
    with pytest.raises(ValueError, match=named):
        FamilyConfig(11, **dict(n_head=3, n_embd=96) | sizes)
    if "n_embd" in sizes:
        with pytest.raises(ValueError, match=named):
            GPTConfig(11, **dict(n_head=3, n_embd=96) | sizes)


def test_an_embedding_that_is_also_the_output_matrix_counts_once():
    """The results compare the teacher and the student by their numbers of parameters. A shared matrix that counts twice
    would make this comparison wrong."""
    sizes = [model.n_params() for model in (make_family("qwen3"), make_family("made here"))]
    qkv_and_norms = 2 * (32 * 16 * 4 + 2 * 16)  # in both layers: wider q and o, fewer heads of k and v, two norms
    assert sizes[0] - sizes[1] == 11 * 32 + qkv_and_norms


# Log-probabilities


def test_a_mask_takes_rows_of_the_whole_logits(make_gpt):
    """If the masked rows came in another order, each token would get the log-probability of another one. The mask of a
    batch is on the CPU, whatever the device of the model."""
    model, idx = make_gpt(), torch.randint(11, (4, 9))
    mask = torch.rand(4, 9) < 0.4
    assert 1 < mask.sum() < 36 and mask.device.type == "cpu"
    whole = model(idx)
    assert torch.allclose(model(idx, mask), whole[mask], atol=1e-5)
    assert torch.equal(select(whole, mask), whole[mask]) and torch.equal(select(idx, mask), idx[mask])
    assert model(idx, torch.zeros(4, 9, dtype=torch.bool)).shape == (0, 11)


@torch.no_grad()
def test_token_logprobs_is_the_log_of_the_softmax(make_gpt):
    """The log-probabilities must not be shifted by one token, or normalised over the wrong dimension. The probabilities
    of all possible next tokens must add up to 1."""
    model, idx = make_gpt(), torch.randint(11, (3, 7))
    every = torch.ones(3, 6, dtype=torch.bool)
    logp = token_logprobs(model, idx, every)
    assert logp.shape == (18,) and logp.dtype == torch.float32
    for value, (b, t) in zip(logp, itertools.product(range(3), range(6))):
        weights = next_logits(model, idx[b, :t + 1].tolist()).double().exp()
        assert abs(value.item() - (weights[idx[b, t + 1]] / weights.sum()).log().item()) < 1e-5
    mask = torch.rand(3, 6) < 0.5
    assert torch.allclose(token_logprobs(model, idx, mask), logp[mask.flatten()], atol=1e-5)
    last = torch.arange(6).eq(5).expand(11, 6)
    endings = torch.cat((idx[:1, :6].repeat(11, 1), torch.arange(11)[:, None]), dim=1)  # (V, 7), all last tokens
    assert abs(token_logprobs(model, endings, last).exp().sum().item() - 1) < 1e-5


def test_logprobs_are_of_the_targets(make_gpt):
    """The result must be float32: in bfloat16 a log-probability of -7 is off by up to 0.02, and every ratio with it."""
    model, target = make_gpt(), torch.randint(11, (13,))
    model.dtype = torch.bfloat16
    hidden = torch.randn(13, 32, dtype=torch.bfloat16)
    found = model.logprobs(hidden, target)
    expected = model.logits(hidden).double().log_softmax(dim=-1)[torch.arange(13), target]
    assert found.dtype == torch.float32 and torch.allclose(found.double(), expected, atol=1e-5)


# The quick methods of engine/speed/fast.py


CFG = Config(device="cpu", compile="off", micro_batch=90, rl_max_new_tokens=12)


def values_and_gradient(model, idx, mask, weight):
    """token_logprobs, and the gradient of their weighted sum."""
    model.zero_grad()
    logp = token_logprobs(model, idx, mask)
    (logp * weight).sum().backward()
    return logp.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def assert_equal_but_for_rounding(model, other, idx, mask):
    weight = torch.randn(int(mask.sum()))
    (logp, gradient), (found, its_gradient) = (values_and_gradient(one, idx, mask, weight) for one in (model, other))
    assert torch.allclose(found, logp, atol=1e-5) and torch.allclose(its_gradient, gradient, atol=1e-4)


@pytest.mark.parametrize("n, T", ((1, 2), (3, 20), (4, 17), (16, 9), (7, 48)))
def test_rounded_sizes_change_nothing(make_gpt, monkeypatch, n, T):
    """If padding leaked into a row, or got a gradient, training would learn from tokens that nobody sampled."""
    plain, model = make_gpt(), make_gpt()
    model.hidden, model.logits = RoundedHidden(model, max_tokens=320), RoundedLogits(model)
    sizes, hidden, logits = [], GPT.hidden, GPT.logits
    monkeypatch.setattr(GPT, "hidden", lambda self, idx: (sizes.append(tuple(idx.shape)), hidden(self, idx))[1])
    monkeypatch.setattr(GPT, "logits", lambda self, h: (sizes.append(h.shape[:-1].numel()), logits(self, h))[1])
    mask = torch.rand(n, T - 1) < 0.6
    mask[0, 0] = True
    assert_equal_but_for_rounding(plain, model, torch.randint(11, (n, T)), mask)
    (rows, length), M = sizes[2:]
    assert length % 8 == 0 and 0 <= length - (T - 1) < 8 and rows >= n
    assert M == 256 and (rows % 16 == 0 or (rows + 1) * length > 320) and (rows == n or rows * length <= 320)


def test_quick_methods_take_what_the_plain_ones_take(make_gpt):
    """The quick methods must take whole rows, as in pretraining, and no rows at all. A sequence that is too long must
    be refused: if it were silently cut to block_size, its hidden states would be those of other tokens."""
    plain, model = make_gpt(block_size=24), make_fast(make_gpt(block_size=24), CFG, training=True)
    idx = torch.randint(11, (3, 24))
    assert torch.allclose(model(idx), plain(idx), atol=1e-5) and model(idx).shape == (3, 24, 11)
    for logprobs in (model.logprobs, LogprobsInParts(model)):
        assert logprobs(torch.zeros(0, 32), torch.zeros(0, dtype=torch.long)).shape == (0,)
    with pytest.raises(ValueError, match="25 tokens"):
        model.hidden(torch.ones(2, 25, dtype=torch.long))


@pytest.mark.parametrize("part", (1, 7, 1000))
def test_logits_in_parts(make_gpt, monkeypatch, part):
    """With a large vocabulary, the logits are computed in parts, and once more in the backward pass. Values and
    gradients must equal those of one piece. If the parts were kept for the backward pass, they would take the memory of
    all logits."""
    plain, model, idx = make_gpt(), make_gpt(), torch.randint(11, (3, 20))
    mask = torch.rand(3, 19) < 0.4
    monkeypatch.setattr(fast, "LOGITS_AT_A_TIME", part * 11 + 5)
    model.logprobs = LogprobsInParts(model)
    sizes, logits = [], GPT.logits
    monkeypatch.setattr(GPT, "logits", lambda self, h: (sizes.append(len(h)), logits(self, h))[1])
    assert_equal_but_for_rounding(plain, model, idx, mask)
    M = int(mask.sum())
    assert sizes[0] == M and max(sizes[1:]) == min(part, M) and sum(sizes[1:]) == 2 * M  # forward, and backward again


def test_make_fast_takes_what_the_vocabulary_asks_for(make_gpt, monkeypatch):
    """Rounding up would make the logits of a large vocabulary larger still. Computing in parts would make those of a
    small one slower. A model that only samples must get a new generate and nothing else."""
    found = {}
    for limit in (11, 10):
        monkeypatch.setattr(fast, "LARGE_VOCABULARY", limit)
        for training in (True, False):
            model = make_fast(make_gpt(), CFG, training=training, sampling=True)
            found[limit, training] = {name: type(quick) for name, quick in vars(model).items()
                                      if name in fast.QUICK_METHODS}
    sampling = {"generate": Sampler}
    assert found[11, False] == found[10, False] == sampling
    assert found[11, True] == sampling | {"hidden": RoundedHidden, "logits": RoundedLogits}
    assert found[10, True] == sampling | {"hidden": RoundedHidden, "logprobs": LogprobsInParts}


@pytest.mark.parametrize("limit", (4_096, 4))
def test_a_copy_of_a_quick_model_learns_by_itself(make_gpt, monkeypatch, limit):
    """If a quick method kept a reference to its first model, every copy would compute with the weights of that model,
    and would add its gradients there."""
    monkeypatch.setattr(fast, "LARGE_VOCABULARY", limit)
    model = make_fast(make_gpt(), CFG, training=True, sampling=True)
    idx, mask = torch.randint(11, (3, 20)), torch.rand(3, 19) < 0.5

    def outputs(one):
        return token_logprobs(one, idx, mask).tolist(), one.generate([[1, 2], [3]], 20, stop_ids=(0,), temperature=0.0)

    before, copied = outputs(model), copy.deepcopy(model)
    assert outputs(copied) == before
    values_and_gradient(copied, idx, mask, 1.0)
    assert all(p.grad is None for p in model.parameters()) and all(p.grad is not None for p in copied.parameters())
    with torch.no_grad():
        for p in copied.parameters():
            p.add_(torch.randn_like(p) / 3)
    alone = make_gpt()
    alone.load_state_dict(copied.state_dict())
    after = outputs(make_fast(alone, CFG, training=True, sampling=True))
    assert outputs(model) == before and outputs(copied) == after
    assert before[0] != after[0] and before[1] != after[1]


def gradients(make_gpt, update, limit, monkeypatch):
    """The gradient of each update of a model that is plain (limit 0) or quick."""
    task = Arithmetic()
    trained, other = (make_gpt(task.encoding.n_vocab, seed, spread=3.0) for seed in (1, 2))
    trained.generate, other.generate = Sampler(trained), Sampler(other)  # so that all models draw the same answers
    if limit:
        monkeypatch.setattr(fast, "LARGE_VOCABULARY", limit)
        make_fast(trained, CFG, training=True, sampling=True)
        make_fast(other, CFG, training=True, sampling=True)
    optimizer = Descent(trained, distance=0.1)
    problems = [task.make_problem(random.Random(n)) for n in range(8)]
    update(trained, other, optimizer, problems, task)
    return torch.stack(optimizer.gradients)


@pytest.mark.parametrize("divergence", ("forward", "jsd", "sft"))
def test_distillation_with_a_large_vocabulary(make_gpt, monkeypatch, divergence):
    """With a small and a large vocabulary, the quick methods must give the student the gradient of the plain ones."""
    cfg = SimpleNamespace(**vars(CFG) | dict(divergence=divergence, distill_minibatches=2))

    def update(student, teacher, optimizer, problems, task):
        distill_step(student, teacher, optimizer, problems, lambda text, problem: {"accuracy": 1.0}, task, cfg,
                     torch.Generator().manual_seed(0))

    plain, small, large = (gradients(make_gpt, update, limit, monkeypatch) for limit in (0, 4_096, 4))
    assert len(plain) == 2 * cfg.distill_epochs and plain.norm(dim=1).min() > 0
    assert torch.allclose(plain, small, atol=1e-5) and torch.allclose(plain, large, atol=1e-5)


def test_grpo_with_a_large_vocabulary(make_gpt, monkeypatch):
    """With a small and a large vocabulary, the quick methods must give the policy the gradient of the plain ones. The
    loss includes the KL to a reference."""
    def update(policy, reference, optimizer, problems, task):
        def reward_fn(text, problem):
            return {"reward": float(len(text) % 3), "accuracy": 0.0}
        generator = torch.Generator().manual_seed(0)
        rollout = sample_rollout(policy, problems, reward_fn, task, 8, CFG.rl_max_new_tokens, generator)
        adv = group_advantages(rollout.column("reward").view(-1, 8)).flatten()
        grpo_update(policy, reference, optimizer, rollout, adv, CFG, generator)

    plain, small, large = (gradients(make_gpt, update, limit, monkeypatch) for limit in (0, 4_096, 4))
    assert len(plain) == CFG.rl_minibatches and plain.norm(dim=1).min() > 0
    assert torch.allclose(plain, small, atol=1e-5) and torch.allclose(plain, large, atol=1e-5)
