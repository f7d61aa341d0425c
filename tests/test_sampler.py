"""Two ways to sample: GPT.generate, which reads the whole text again for each token, and engine.speed.sampler.generate,
which every run uses. Most tests check both."""
import itertools

import pytest
import torch

from engine.speed import sampler
from engine.speed.reader import make_readers
from engine.speed.sampler import Cache, Sampler, batch_size, draw, read
from model import GPT, token_logprobs
from tests.test_model import FAMILIES, make_family, next_logits

EOS = 0
PROMPTS = [[3], [1, 2, 3, 4, 2], [4, 4, 1, 3, 2, 1, 2, 3, 3]]
WAYS = {"plain": GPT.generate, "quick": sampler.generate}


@pytest.fixture(params=WAYS)
def sample(request):
    """One of the two ways, with arguments that most tests share -> (completions, log-probabilities)."""
    def call(model, prompts=PROMPTS, seed=0, **options):
        options = {"max_new_tokens": 12, "stop_ids": (EOS,)} | options
        return WAYS[request.param](model, prompts, generator=torch.Generator().manual_seed(seed), **options)
    call.many = {"plain": 5_000, "quick": 20_000}[request.param]  # samples that take a fraction of a second
    return call


# The cache


@torch.no_grad()
def test_cache_gives_the_logits_of_the_full_pass(make_gpt):
    """With a wrong cache, padding shifts the positions or is attended to, or a row that moves gets another row's
    keys."""
    model, longest = make_gpt(vocab_size=5), 9
    rows = [list(p) for p in PROMPTS]
    cache = Cache(model, torch.tensor([longest - len(p) for p in rows]), longest + 12)
    logits = read(model, torch.tensor([[EOS] * (longest - len(p)) + p for p in rows]), cache)
    keep_at = {2: [2, 0, 1, 1], 6: [2, 0], 8: [1]}  # reordered, repeated, dropped
    moved_at = {4: ([0], [3], 3)}  # the last row takes the place of the first
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
        logits = read(model, token[:, None], cache)


@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch(make_gpt):
    """If padding or a neighbouring row leaks into a row, the sampler's distribution is not the one that is trained."""
    model = make_gpt()
    alone = next_logits(model, [5, 6])
    for padding, neighbour in itertools.product((0, 7), ([1, 2, 3, 4], [9, 9, 9, 9])):
        batch = torch.tensor([[padding, padding, 5, 6], neighbour])
        assert torch.allclose(read(model, batch, Cache(model, torch.tensor([2, 0]), 4))[0], alone, atol=1e-5)
        assert torch.allclose(model(torch.tensor([[5, 6], neighbour[:2]]))[0, -1], alone, atol=1e-5)
        right = torch.tensor([[5, 6, padding, padding], neighbour])
        assert torch.allclose(model(right)[0, 1], alone, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_keeps_the_shared_heads_once(family):
    """If keys and values were copied for each head that shares them, they would fill the memory of a pretrained
    model."""
    model = make_family(family)
    cache = Cache(model, torch.zeros(2, dtype=torch.long), 8)
    with torch.inference_mode():
        read(model, torch.zeros(2, 5, dtype=torch.long), cache)
    keys, values = cache.kv[0]
    heads = getattr(model.config, "n_kv_head", model.config.n_head)
    assert keys.shape == values.shape == (2, heads, 8, model.config.head_size)
    assert cache.length == 5 and len(cache.kv) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reader_multiplies_by_the_matrices_of_its_block(family):
    """If the matrices were joined in another order, a query's matrix would make keys. If the sampler rounded at another
    place, its distribution would be further from the training pass than necessary."""
    model = make_family(family)
    for model.dtype in (torch.float32, torch.bfloat16):
        block, reader = model.blocks[1], make_readers(model)[1]
        for names in ("q", "k", "v"), ("o",), ("gate", "up"), ("down",):
            x = torch.randn(5, getattr(block, names[0]).in_features).to(model.dtype)
            assert torch.equal(reader.project(x, *names), block.project(x, *names))


@pytest.mark.parametrize("family", ("made here", "qwen2"))
def test_in_bfloat16_the_cache_rounds_as_the_model_does(sample, family):
    """If the sampler had another compute dtype than training, the two would differ by more than the rounding of one
    pass. Keys and values in float32 would take twice the memory."""
    model = make_family(family)
    model.dtype = torch.bfloat16
    for i, (completion, found) in enumerate(zip(*sample(model, samples=4))):
        idx = torch.tensor([PROMPTS[i // 4] + completion])
        mask = torch.arange(1, idx.size(1))[None] >= len(PROMPTS[i // 4])
        assert torch.allclose(torch.tensor(found), token_logprobs(model, idx, mask), atol=0.1)
    cache = Cache(model, torch.zeros(2, dtype=torch.long), 8)
    with torch.inference_mode():
        logits = read(model, torch.zeros(2, 5, dtype=torch.long), cache)
    assert logits.dtype == cache.kv[1][0].dtype == cache.kv[1][1].dtype == torch.bfloat16


# The distribution


@torch.no_grad()
def logprobs_at(model, prompt, completion, temperature):
    """The log-probability of each token of a completion under softmax(logits / temperature)."""
    logits = model(torch.tensor([prompt + completion]))[0, len(prompt) - 1:-1].double() / temperature
    return logits.log_softmax(dim=-1)[torch.arange(len(completion)), completion]


@pytest.mark.parametrize("temperature", (0.7, 1.0, 1.5))
def test_generate_and_token_logprobs_agree_while_rows_leave(make_gpt, sample, temperature):
    """If the sampler uses a temperature, a top-k or a stale cache row that training does not know of, the ratio of a
    policy that has not moved is not 1."""
    model = make_gpt(vocab_size=5)
    completions, logp = sample(model, samples=8, max_new_tokens=30, temperature=temperature)
    assert len({len(c) for c in completions}) > 5, "rows should end at different times here"
    for i, (completion, sampled) in enumerate(zip(completions, logp)):
        prompt = PROMPTS[i // 8]
        expected = logprobs_at(model, prompt, completion, temperature)
        assert torch.allclose(torch.tensor(sampled).double(), expected, atol=1e-5)
        if temperature == 1.0:
            idx = torch.tensor([prompt + completion])
            mask = torch.arange(1, idx.size(1))[None] >= len(prompt)
            assert torch.allclose(torch.tensor(sampled), token_logprobs(model, idx, mask), atol=1e-5)


@pytest.mark.parametrize("family, temperature", [("made here", 0.4), ("made here", 1.0), ("qwen3", 2.0)])
@torch.no_grad()
def test_samples_have_the_models_frequencies(sample, assert_frequencies, family, temperature):
    """A sampler may cut off the tail of the distribution (top-k, top-p), or forget the temperature after the first
    token. Both change the frequencies of its samples."""
    V, prompt = 6, [2, 5]
    model = make_family(family, vocab_size=V)

    def probs(tokens):
        return (next_logits(model, tokens).double() / temperature).softmax(-1).tolist()

    first = probs(prompt)
    expected = {(EOS,): first[EOS]}
    for a in range(1, V):
        expected |= {(a, b): first[a] * p for b, p in enumerate(probs(prompt + [a]))}
    counts = dict.fromkeys(expected, 0)
    for completion in sample(model, [prompt], max_new_tokens=2, temperature=temperature, samples=sample.many)[0]:
        counts[tuple(completion)] += 1
    assert_frequencies(list(counts.values()), list(expected.values()))


@pytest.mark.parametrize("family", FAMILIES)
def test_temperature_0_takes_the_likeliest(sample, family):
    """Temperature 0 must not be a division by 0.0001, which sometimes takes another token, or by 0, which gives NaN.
    The log-probabilities must be those of temperature 1: at temperature 0 all would be 0, and would say nothing."""
    model = make_family(family)
    completions, logp = sample(model, temperature=0.0)
    for prompt, completion, found in zip(PROMPTS, completions, logp, strict=True):
        expected = []
        while len(expected) < 12 and EOS not in expected:
            expected.append(next_logits(model, prompt + expected).argmax().item())
        assert completion == expected
        assert torch.allclose(torch.tensor(found).double(), logprobs_at(model, prompt, completion, 1.0), atol=1e-5)


def test_draw_takes_no_token_of_probability_0():
    """The drawn token is the number of cumulative probabilities <= u. With "<", u = 0 would take the first token, even
    if its probability is 0. With rounding, the number may be V, which is no token."""
    logits = torch.tensor([[float("-inf"), 2.0, 1.0, float("-inf")]])
    for u, expected in ((0.0, 1), (0.7, 1), (0.75, 2), (1 - 2**-24, 2)):
        token, logp = draw(logits, 1.0, torch.tensor([[u]]))
        assert token.item() == expected
        assert logp.item() == pytest.approx(logits.log_softmax(dim=-1)[0, expected].item(), abs=1e-6)
    token, logp = draw(torch.zeros(1, 3), 1.0, torch.ones(1, 1))
    assert token.item() == 2 and logp.isfinite().all()


# What a completion is


def test_completions_end_with_the_stop_token_they_sampled(make_gpt, sample):
    """If the generator drops the stop token, stopping gets no gradient, and the policy never learns to end."""
    completions, _ = sample(make_gpt(vocab_size=5), samples=20, max_new_tokens=6)
    ended = [c for c in completions if c[-1] == EOS]
    assert all(c.count(EOS) == 1 for c in ended) and {1, 6} <= {len(c) for c in ended}
    cut = [c for c in completions if c[-1] != EOS]
    assert cut and all(len(c) == 6 and EOS not in c for c in cut)


def cut_after(completion, stops):
    """The tokens up to and with the first stop token."""
    ends = [i + 1 for i, token in enumerate(completion) if token in stops]
    return completion[:ends[0] if ends else None]


@pytest.mark.parametrize("stops", ((3,), (0, 3), (3, 0), (2, 3), (4, 0, 2)))
def test_each_of_several_stop_tokens_ends_a_completion(make_gpt, sample, stops):
    """If the sampler knows only the first of several stop tokens, the others do not end a completion, or are followed
    by tokens that the model never sampled. The expected completions are those of a sampler that never stops, cut by
    hand."""
    model = make_gpt(vocab_size=5)
    endless, _ = sample(model, temperature=0.0, stop_ids=(-1,), samples=3, max_new_tokens=20)
    assert {len(c) for c in endless} == {20} and set(stops) & {token for c in endless for token in c}
    found, _ = sample(model, temperature=0.0, stop_ids=stops, samples=3, max_new_tokens=20)
    assert found == [cut_after(c, stops) for c in endless]
    completions, logp = sample(model, samples=20, stop_ids=stops, max_new_tokens=6)
    assert completions == [cut_after(c, stops) for c in completions] and [*map(len, logp)] == [*map(len, completions)]
    assert all(c[-1] in stops or len(c) == 6 for c in completions)
    ends = {c[-1] for c in completions if c[-1] in stops}
    assert ends == set(stops), "every stop token should end some completion here"


def test_the_generator_decides_the_samples(make_gpt, sample):
    """If the samples depended on the global random state, a resumed run could not repeat what it did."""
    model = make_gpt()
    torch.manual_seed(1)
    one = sample(model, samples=4)
    torch.manual_seed(2)
    assert sample(model, samples=4) == one
    assert sample(model, samples=4, seed=1) != one


def test_samples_of_a_prompt_are_side_by_side(make_gpt, sample):
    """If rows were interleaved the other way, completions would be scored against another prompt's problem."""
    model = make_gpt()
    greedy = [sample(model, [p], temperature=0.0)[0][0] for p in PROMPTS]
    assert len({tuple(g) for g in greedy}) == 3, "the prompts should differ in their answers here"
    assert sample(model, temperature=0.0, samples=3)[0] == [g for g in greedy for _ in range(3)]


@pytest.mark.parametrize("prompts, new", [([[]], 4), ([[1], []], 4), ([[1] * 45], 4), ([[1], [1] * 60], 1)])
def test_prompts_that_cannot_be_answered_are_refused(make_gpt, sample, prompts, new):
    """Without a check, an empty prompt is sampled from padding, and a prompt that is too long fails halfway."""
    with pytest.raises(ValueError, match="block_size 48"):
        sample(make_gpt(), prompts, max_new_tokens=new)


def test_a_prompt_that_just_fits_is_answered(make_gpt, sample):
    """A limit that is off by one would refuse the longest prompt that fits. An empty list of prompts is no error: it
    gives an empty list of completions."""
    completions, logp = sample(make_gpt(), [[1] * 44], max_new_tokens=4)
    assert 1 <= len(completions[0]) == len(logp[0]) <= 4
    assert sample(make_gpt(), []) == ([], [])


# Rows that leave the batch


class Counting:
    """sampler.next_token, which also records the sizes of its batches."""

    def __init__(self):
        self.sizes = []

    def __call__(self, model, token, *rest):
        self.sizes.append(len(token))
        return sampler.next_token(model, token, *rest)


def test_rows_that_ended_with_any_stop_token_leave_the_batch(make_gpt):
    """If a row that ended with the second stop token stayed in the batch, it would be sampled to the end for
    nothing."""
    model, none, some = make_gpt(vocab_size=5), Counting(), Counting()
    options = dict(max_new_tokens=12, generator=torch.Generator().manual_seed(0))
    completions, _ = Sampler(model, none)(PROMPTS, samples=8, stop_ids=(0, 1, 2, 3, 4), **options)
    assert {len(c) for c in completions} == {1} and not none.sizes
    Sampler(model, some)(PROMPTS, samples=64, stop_ids=(0, 3), **options)
    assert min(some.sizes) < 64 < max(some.sizes) and some.sizes == sorted(some.sizes, reverse=True)


def test_a_sampler_is_generate_of_its_model(make_gpt):
    """If Sampler, which replaces model.generate, left out an argument, a run would train on other samples than it asked
    for."""
    model, options = make_gpt(), dict(stop_ids=(EOS, 3), samples=3, temperature=0.8)
    found, expected = (one(PROMPTS, 9, generator=torch.Generator().manual_seed(5), **options)
                       for one in (Sampler(model), lambda *args, **more: sampler.generate(model, *args, **more)))
    assert found == expected


def test_batches_shrink_in_few_sizes():
    """If every number of rows had a batch size of its own, the CPU's library would make new kernels for nearly every
    token."""
    for device, room in (("cpu", 1.5), ("cuda", 2.0)):
        sizes = [batch_size(n, torch.device(device)) for n in range(1, 1025)]
        assert all(n <= size for n, size in enumerate(sizes, start=1))
        assert all(size <= room * n for n, size in enumerate(sizes, start=1) if n > 8)
        assert len(set(sizes)) == {"cpu": 16, "cuda": 8}[device] and sizes == sorted(sizes)
