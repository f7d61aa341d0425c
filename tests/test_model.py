"""The model against slow, independent oracles: Llama's formulas, the uncached pass, and the frequencies of samples."""
import copy
import itertools

import pytest
import torch
import torch.nn.functional as F

from model import GPT, KVCache, Muon, Optimizer, generate, token_logprobs

EOS = 0
PROMPTS = [[3], [1, 2, 3, 4, 2], [4, 4, 1, 3, 2, 1, 2, 3, 3]]


def sample(model, prompts=PROMPTS, seed=0, **options):
    options = {"max_new_tokens": 12, "eos_id": EOS} | options
    return generate(model, prompts, generator=torch.Generator().manual_seed(seed), **options)


def next_logits(model, tokens):
    """Logits of what follows one row, read whole and alone: no cache, no padding, (V,)."""
    return model(torch.tensor([tokens]))[0, -1]


# The forward pass


def llama(model: GPT, idx):
    """Llama's forward pass from its paper, in float64, with the rotation as a product of complex numbers."""
    w = {name: p.detach().double() for name, p in model.state_dict().items()}
    H, x = model.config.n_head, w["embedding.weight"][idx]
    B, T, C = x.shape
    D = C // H
    turn = torch.outer(torch.arange(T).double(), 10_000.0 ** (-torch.arange(0, D, 2).double() / D))  # (T, D/2)

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    def rope(x):  # pairs (i, i + D/2), as transformers' Llama has them
        z = torch.complex(x[..., : D // 2], x[..., D // 2:]) * torch.polar(torch.ones_like(turn), turn)
        return torch.cat((z.real, z.imag), -1)

    for i in range(model.config.n_layer):
        b = f"blocks.{i}."
        h = norm(x, w[b + "norm1.weight"])
        q, k, v = ((h @ w[b + f"{n}.weight"].T).view(B, T, H, D).transpose(1, 2) for n in "qkv")
        y = F.scaled_dot_product_attention(rope(q), rope(k), v, is_causal=True)
        x = x + y.transpose(1, 2).reshape(B, T, C) @ w[b + "o.weight"].T
        h = norm(x, w[b + "norm2.weight"])
        g = h @ w[b + "gate.weight"].T
        x = x + (g * g.sigmoid() * (h @ w[b + "up.weight"].T)) @ w[b + "down.weight"].T
    return norm(x, w["norm.weight"]) @ w["embedding.weight"].T


def test_forward_is_llama(make_gpt):
    """A model with a swapped sign in the rotation, or without 1/sqrt(D), still trains. It is only a little worse, so
    that nobody notices."""
    model, idx = make_gpt(), torch.randint(11, (3, 20))
    assert torch.allclose(model(idx).double(), llama(model, idx), atol=1e-4)


def test_bfloat16_is_of_the_products_only(make_gpt):
    """If weights or gradients were bfloat16, an update of 0.1 % would be rounded away. If copies of the weights
    outlived an update, every minibatch of a step but the first would get the gradient of weights that are gone."""
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
    with pytest.raises(ValueError):
        model(torch.ones(1, 9, dtype=torch.long))


# The cache


@torch.no_grad()
def test_cache_gives_the_logits_of_the_full_pass(make_gpt):
    """With a wrong cache, padding shifts the positions or is attended to, or a row that moves gets another row's
    keys."""
    model, longest = make_gpt(vocab_size=5), 9
    rows = [list(p) for p in PROMPTS]
    cache = KVCache(model, torch.tensor([longest - len(p) for p in rows]), longest + 12)
    logits = model(torch.tensor([[EOS] * (longest - len(p)) + p for p in rows]), cache)[:, -1]
    keep_at = {2: [2, 0, 1, 1], 6: [2, 0], 8: [1]}  # reordered, repeated, dropped
    moved_at = {4: ([0], [3], 3)}  # the last takes the first one's place
    for t in range(11):
        full = torch.stack([next_logits(model, row) for row in rows])
        assert torch.allclose(logits, full, atol=1e-5), f"step {t}"
        if t in keep_at:
            rows = [list(rows[i]) for i in keep_at[t]]
            cache.select(torch.tensor(keep_at[t]))
        if t in moved_at:
            free, late, size = moved_at[t]
            for to, row in zip(free, late):
                rows[to] = rows[row]
            rows = rows[:size]
            cache.replace(torch.tensor(free), torch.tensor(late), size)
        token = torch.randint(1, 5, (len(rows),))
        for row, new in zip(rows, token.tolist()):
            row.append(new)
        logits = model(token[:, None], cache)[:, -1]


@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch(make_gpt):
    """If padding or a neighbouring row leaks into a row, the sampler's distribution is not the one that is trained."""
    model = make_gpt()
    alone = next_logits(model, [5, 6])
    for padding, neighbour in itertools.product((0, 7), ([1, 2, 3, 4], [9, 9, 9, 9])):
        batch = torch.tensor([[padding, padding, 5, 6], neighbour])
        assert torch.allclose(model(batch, KVCache(model, torch.tensor([2, 0]), 4))[0, -1], alone, atol=1e-5)
        assert torch.allclose(model(torch.tensor([[5, 6], neighbour[:2]]))[0, -1], alone, atol=1e-5)


@pytest.mark.parametrize("temperature", (0.7, 1.0, 1.5))
def test_generate_and_token_logprobs_agree_while_rows_leave(make_gpt, temperature):
    """If the sampler uses a temperature, a top-k or a stale cache row that training does not know of, the ratio of a
    policy that has not moved is not 1."""
    model = make_gpt(vocab_size=5)
    completions, logp = sample(model, samples=8, max_new_tokens=30, temperature=temperature, return_logprobs=True)
    assert len({len(c) for c in completions}) > 5, "rows should end at different times here"
    for i, (completion, sampled) in enumerate(zip(completions, logp)):
        prompt = PROMPTS[i // 8]
        trained = token_logprobs(model, torch.tensor([prompt + completion]), temperature=temperature)[0]
        assert torch.allclose(torch.tensor(sampled), trained[len(prompt) - 1:], atol=1e-5)


# Sampling


@pytest.mark.parametrize("temperature", (0.4, 1.0, 2.0))
@torch.no_grad()
def test_samples_have_the_models_frequencies(make_gpt, assert_frequencies, temperature):
    """A sampler may cut off the tail of the distribution (top-k, top-p), or forget the temperature after the first
    token. Both change the frequencies of its samples."""
    V, prompt = 6, [2, 5]
    model = make_gpt(vocab_size=V)

    def probs(tokens):
        return (next_logits(model, tokens).double() / temperature).softmax(-1).tolist()

    first = probs(prompt)
    expected = {(EOS,): first[EOS]}
    for a in range(1, V):
        expected |= {(a, b): first[a] * p for b, p in enumerate(probs(prompt + [a]))}
    counts = dict.fromkeys(expected, 0)
    for completion in sample(model, [prompt], max_new_tokens=2, temperature=temperature, samples=20_000):
        counts[tuple(completion)] += 1
    assert_frequencies(list(counts.values()), list(expected.values()))


def test_completions_end_with_the_stop_token_they_sampled(make_gpt):
    """If the generator drops the stop token, stopping gets no gradient, and the policy never learns to end."""
    completions = sample(make_gpt(vocab_size=5), samples=20, max_new_tokens=6)
    ended = [c for c in completions if c[-1] == EOS]
    assert all(c.count(EOS) == 1 for c in ended) and {1, 6} <= {len(c) for c in ended}
    cut = [c for c in completions if c[-1] != EOS]
    assert cut and all(len(c) == 6 and EOS not in c for c in cut)


def cut_after(completion, stops):
    """The tokens up to and with the first stop token."""
    ends = [i + 1 for i, token in enumerate(completion) if token in stops]
    return completion[:ends[0] if ends else None]


@pytest.mark.parametrize("stops", (3, (3,), (0, 3), (3, 0), (2, 3), (4, 0, 2)))
def test_each_of_several_stop_tokens_ends_a_completion(make_gpt, stops):
    """If the sampler knows only the first of several stop tokens, the others do not end a completion, or are followed
    by tokens that the model never sampled. The expected completions are those of a sampler that never stops, cut by
    hand."""
    model, ids = make_gpt(vocab_size=5), stops if isinstance(stops, tuple) else (stops,)
    endless = sample(model, temperature=0.0, eos_id=-1, samples=3, max_new_tokens=20)
    assert {len(c) for c in endless} == {20} and set(ids) & {token for c in endless for token in c}
    assert sample(model, temperature=0.0, eos_id=stops, samples=3, max_new_tokens=20) == [
        cut_after(c, ids) for c in endless]
    completions, logp = sample(model, samples=20, eos_id=stops, max_new_tokens=6, return_logprobs=True)
    assert completions == [cut_after(c, ids) for c in completions] and [*map(len, logp)] == [*map(len, completions)]
    assert all(c[-1] in ids or len(c) == 6 for c in completions)
    assert {c[-1] for c in completions if c[-1] in ids} == set(ids), "every stop token should end some completion here"


def test_rows_that_ended_with_any_stop_token_leave_the_batch(make_gpt, monkeypatch):
    """If a row that ended with the second stop token stays in the batch, sampling goes on to the budget for nothing."""
    model, sizes = make_gpt(vocab_size=5), []
    monkeypatch.setattr(model, "next_token", lambda token, *rest: (
        sizes.append(len(token)), GPT.next_token(model, token, *rest))[1])
    assert {len(c) for c in sample(model, samples=8, eos_id=(0, 1, 2, 3, 4))} == {1} and not sizes
    sample(model, samples=64, eos_id=(0, 3))
    assert min(sizes) < 64 < max(sizes)


def test_the_generator_decides_the_samples(make_gpt):
    """If the samples depended on the global random state, a resumed run could not repeat what it did."""
    model = make_gpt()
    torch.manual_seed(1)
    one = sample(model, samples=4)
    torch.manual_seed(2)
    assert sample(model, samples=4) == one
    assert sample(model, samples=4, seed=1) != one


def test_temperature_0_takes_the_likeliest(make_gpt):
    """Temperature 0 as a division by 0.0001 takes another token now and then, and as a division by 0 it gives NaN."""
    model = make_gpt()
    for prompt, completion in zip(PROMPTS, sample(model, temperature=0.0)):
        expected = []
        while len(expected) < 12 and EOS not in expected:
            expected.append(next_logits(model, prompt + expected).argmax().item())
        assert completion == expected


def test_samples_of_a_prompt_are_side_by_side(make_gpt):
    """If rows were interleaved the other way, completions would be scored against another prompt's problem."""
    model = make_gpt()
    greedy = [sample(model, [p], temperature=0.0)[0] for p in PROMPTS]
    assert len({tuple(g) for g in greedy}) == 3, "the prompts should differ in their answers here"
    assert sample(model, temperature=0.0, samples=3) == [g for g in greedy for _ in range(3)]


@pytest.mark.parametrize("prompts, new", [([[]], 4), ([[1], []], 4), ([[1] * 45], 4), ([[1], [1] * 60], 1)])
def test_prompts_that_cannot_be_answered_are_refused(make_gpt, prompts, new):
    """Without a check, an empty prompt is sampled from padding, and a prompt that is too long fails halfway."""
    with pytest.raises(ValueError):
        sample(make_gpt(), prompts, max_new_tokens=new)


def test_a_prompt_that_just_fits_is_answered(make_gpt):
    """A limit that is off by one refuses the longest prompt that fits. And an empty list of prompts is no error: it
    gives an empty list of completions."""
    assert 1 <= len(sample(make_gpt(), [[1] * 44], max_new_tokens=4)[0]) <= 4
    assert sample(make_gpt(), []) == []
    assert sample(make_gpt(), [], return_logprobs=True) == ([], [])


@pytest.mark.parametrize("temperature", (0.5, 1.0, 3.0))
@torch.no_grad()
def test_token_logprobs_is_the_log_of_the_softmax(make_gpt, temperature):
    """The log-probabilities may be shifted by one token, or normalised over the wrong dimension. Those of all next
    tokens must add up to probability 1."""
    model, idx = make_gpt(), torch.randint(11, (3, 7))
    logp = token_logprobs(model, idx, temperature=temperature)
    assert logp.shape == (3, 6) and logp.dtype == torch.float32
    for b, t in itertools.product(range(3), range(6)):
        weights = (next_logits(model, idx[b, :t + 1].tolist()).double() / temperature).exp()
        assert abs(logp[b, t].item() - (weights[idx[b, t + 1]] / weights.sum()).log().item()) < 1e-5
    every = torch.cat((idx[:1, :6].repeat(11, 1), torch.arange(11)[:, None]), dim=1)  # (V, 7), all last tokens
    assert abs(token_logprobs(model, every, temperature=temperature)[:, -1].exp().sum().item() - 1) < 1e-5


# The optimizer


def train(model, optimizer, batches):
    for idx in batches:
        (-token_logprobs(model, idx).mean()).backward()
        optimizer.step(scale=0.5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_muon_is_torchs(make_gpt, dtype):
    """With a wrong scale for a shape, a wrong momentum or a wrong coefficient, Muon still learns, but worse. torch's
    own computes in bfloat16, hence the tolerance."""
    matrices, others = ([p for p in make_gpt().blocks.parameters() if p.dim() == 2] for _ in range(2))
    ours, torchs = Muon(matrices, 0.02, dtype), torch.optim.Muon(others, lr=0.02, weight_decay=0.0)
    for _ in range(5):
        before = torch.cat([p.flatten() for p in others])
        for p, other in zip(matrices, others):
            p.grad = torch.randn_like(p)
            other.grad = p.grad.clone()
        ours.step(), torchs.step()
        moved = torch.cat([p.flatten() for p in others]) - before
        apart = torch.cat([p.flatten() for p in matrices]) - before - moved
        assert apart.norm() < 0.05 * moved.norm()
        with torch.no_grad():
            for p, other in zip(matrices, others):
                p.copy_(other)


@pytest.mark.parametrize("muon_lr", (None, 0.02))
def test_optimizer_goes_on_from_a_checkpoint_bit_for_bit(make_gpt, muon_lr):
    """If a checkpoint forgets a moment or a step count, a resumed run goes on to other weights."""
    model, batches = make_gpt(), torch.randint(11, (6, 4, 10))
    optimizer = Optimizer(model, adam_lr=0.003, muon_lr=muon_lr)
    train(model, optimizer, batches[:3])
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, batches[3:])

    resumed = make_gpt(seed=1)
    resumed.load_state_dict(weights)
    resumed_optimizer = Optimizer(resumed, adam_lr=0.003, muon_lr=muon_lr)
    resumed_optimizer.load_state_dict(state)
    train(resumed, resumed_optimizer, batches[3:])
    for name, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
        assert not torch.equal(weights[name], value), f"{name} did not learn"


def test_optimizer_step_scales_clears_and_reports_the_norm(make_gpt):
    """Gradients may pile up over steps, the schedule may not be applied, or the norm may be taken after clipping."""
    model, idx = make_gpt(), torch.randint(11, (4, 10))
    optimizer = Optimizer(model, adam_lr=0.003, muon_lr=0.02)
    (-100 * token_logprobs(model, idx).mean()).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    before = copy.deepcopy(model.state_dict())
    assert norm > 1 and abs(optimizer.step(scale=0.0) / norm - 1) < 1e-5
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("muon_lr", (None, 0.02))
def test_gradients_are_clipped(make_gpt, muon_lr):
    """One minibatch with a huge gradient would fill the momentum, so that the updates after it go its way. Adam's first
    step has the same size whatever the gradient's, so that only a later step shows whether it was clipped."""
    ours, others = (make_gpt() for _ in range(2))
    optimizer, by_hand = (Optimizer(model, adam_lr=0.003, muon_lr=muon_lr) for model in (ours, others))
    for size in (100.0, 0.3, 5.0, 0.7):
        for p, other in zip(optimizer.parameters, by_hand.parameters):
            p.grad = torch.randn_like(p)
            other.grad = p.grad.clone()
        norm = torch.stack([p.grad.norm() for p in others.parameters()]).norm()
        for p, other in zip(optimizer.parameters, by_hand.parameters):
            p.grad *= size / norm
            other.grad *= min(size, 1.0) / norm
        assert optimizer.step().item() == pytest.approx(size, rel=1e-4)
        for part in by_hand.parts:
            part.step()
    for p, other in zip(optimizer.parameters, by_hand.parameters):
        assert torch.allclose(p, other, atol=1e-5)
