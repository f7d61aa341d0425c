"""GRPO against the papers' formulas written out slowly, exact sums over a vocabulary, and a bandit it must win."""
import copy
import dataclasses
import itertools
import math
import random

import pytest
import torch

from data.arithmetic import Arithmetic, parse
from grpo import (Rollout, group_advantages, grpo_loss, grpo_step, grpo_update, micro_batches, normalizer,
                  random_minibatches, sample_rollout, shuffle_in_groups)
from model import Optimizer, token_logprobs
from run import Config
from tests.conftest import Descent

TASK = Arithmetic()
NORMALIZE = ("sequence", "token", "constant")
MAX_LEN = 9
PLAIN = {"clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.0, "normalize": "token"}


@pytest.fixture
def batch():
    """Eight completions, up to 7 tokens of 9 columns, of a policy that has moved: ratios from about 0.4 to 2.5."""
    torch.manual_seed(0)
    N, T = 8, MAX_LEN
    position, start = torch.arange(T), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    length = torch.tensor([7, 1, 4, 5, 2, 7, 3, 6])
    logp_old = -2 * torch.rand(N, T)
    return {"logp": logp_old + 0.5 * torch.randn(N, T), "logp_old": logp_old,
            "logp_ref": logp_old + 0.3 * torch.randn(N, T),
            "adv": torch.tensor([1.2, -0.7, 0.5, -1.0, 0.0, 0.9, -1.4, 0.5]),
            "mask": (position >= start[:, None]) & (position < (start + length)[:, None])}


def loss_and_gradient(batch, **options):
    """grpo_loss and its gradient with respect to logp, (scalar, (N, T), metrics)."""
    logp = batch["logp"].clone().requires_grad_()
    fixed = (batch[name] for name in ("logp_old", "logp_ref", "adv", "mask"))
    loss, metrics = grpo_loss(logp, *fixed, **PLAIN | options)
    gradient, = torch.autograd.grad(loss, logp)
    return loss.detach(), gradient, metrics


# The loss


def slow_loss(batch, clip_low, clip_high, kl_coef, normalize):
    """Eq. 3 of DeepSeekMath token by token in plain Python -> (loss, counts of clipped tokens and of all)."""
    lists = {name: value.tolist() for name, value in batch.items()}
    N, sums, n_low, n_high = len(lists["adv"]), [], 0, 0
    for i in range(N):
        terms, A = [], lists["adv"][i]
        for t in (t for t, on in enumerate(lists["mask"][i]) if on):
            rho = math.exp(lists["logp"][i][t] - lists["logp_old"][i][t])
            clipped = 1 - clip_low if rho < 1 - clip_low else 1 + clip_high if rho > 1 + clip_high else rho
            r = math.exp(lists["logp_ref"][i][t]) / math.exp(lists["logp"][i][t])
            terms.append(min(rho * A, clipped * A) - kl_coef * (r - math.log(r) - 1))
            n_low += A < 0 and rho < 1 - clip_low
            n_high += A > 0 and rho > 1 + clip_high
        sums.append(terms)
    n_tokens = sum(map(len, sums))
    objective = {"sequence": sum(sum(s) / len(s) for s in sums) / N,
                 "token": sum(map(sum, sums)) / n_tokens,
                 "constant": sum(map(sum, sums)) / (N * MAX_LEN)}[normalize]
    return -objective, n_low, n_high, n_tokens


@pytest.mark.parametrize("kl_coef", (0.0, 0.3))
@pytest.mark.parametrize("clip_low, clip_high", ((0.2, 0.2), (0.2, 0.5), (0.4, 0.1), (0.99, 1e9)))
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_loss_is_the_papers(batch, normalize, clip_low, clip_high, kl_coef):
    """A policy trains also with max in place of min, a clip on the wrong side, another normalizer, or a KL of the wrong
    sign, so that only the formula itself shows the fault."""
    expected, n_low, n_high, n_tokens = slow_loss(batch, clip_low, clip_high, kl_coef, normalize)
    assert (n_low > 0 and n_high > 0) or clip_high == 1e9, "both clips should be active here"
    loss, _, metrics = loss_and_gradient(batch, clip_low=clip_low, clip_high=clip_high, kl_coef=kl_coef,
                                         normalize=normalize, max_len=MAX_LEN)
    assert abs(loss.item() - expected) < 1e-5
    assert abs(metrics["clip_low"].item() - n_low / n_tokens) < 1e-6
    assert abs(metrics["clip_high"].item() - n_high / n_tokens) < 1e-6


def test_clipped_tokens_have_no_gradient(batch):
    """A clip that works on both sides would also stop the way back. A good token that became unlikely must still become
    likelier, and a bad one that became likely must still become unlikelier."""
    _, gradient, _ = loss_and_gradient(batch)
    ratio, adv = (batch["logp"] - batch["logp_old"]).exp(), batch["adv"][:, None].expand(8, MAX_LEN)
    still = (adv == 0) | ((adv > 0) & (ratio > 1.2)) | ((adv < 0) & (ratio < 0.8)) | ~batch["mask"]
    assert torch.equal(gradient != 0, ~still)
    assert ((gradient != 0) & (ratio < 0.8)).any() and ((gradient != 0) & (ratio > 1.2)).any()


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_on_policy_loss_and_gradient(batch, normalize):
    """A loss of 0 in the first step may be taken for a sign that nothing is learnt. DeepSeekMath, eq. 21, says what the
    gradient of each token must be on policy: -(A + beta (pi_ref/pi_theta - 1)) * weight."""
    batch["logp_old"] = batch["logp"]
    lengths = batch["mask"].sum(1, keepdim=True)
    weight = {"sequence": 1 / lengths / 8, "token": 1 / lengths.sum(), "constant": 1 / (8 * MAX_LEN)}[normalize]
    weight = batch["mask"] * weight  # (N, T)
    for kl_coef in (0.0, 0.3):
        _, gradient, metrics = loss_and_gradient(batch, normalize=normalize, max_len=MAX_LEN, kl_coef=kl_coef)
        pull = (batch["logp_ref"] - batch["logp"]).exp() - 1
        assert torch.allclose(gradient, -(batch["adv"][:, None] + kl_coef * pull) * weight, atol=1e-6)
        assert metrics["ratio"].item() == 1 and metrics["clip_low"] == metrics["clip_high"] == 0

    # The sequence loss is 0 at the first step, and yet there is something to learn.
    assert abs(batch["adv"].sum()) < 1e-6
    loss, gradient, _ = loss_and_gradient(batch, normalize=normalize, max_len=MAX_LEN)
    length_weighted = -(batch["adv"][:, None] * weight).sum().item()
    assert abs(loss.item() - length_weighted) < 1e-6 and gradient.abs().max() > 0.01
    assert abs(loss.item()) < 1e-6 if normalize == "sequence" else abs(loss.item()) > 0.01


def test_k3_as_a_loss_has_the_gradient_of_kl_ref_policy():
    """As a loss term, k1 has no gradient on average, and k2 has that of KL(policy || ref). Exact sums over a vocabulary
    show that our penalty has the gradient of KL(ref || policy), as grpo.py says."""
    torch.manual_seed(0)
    z, log_ref = torch.randn(6, requires_grad=True), torch.randn(6).log_softmax(0)

    def gradient(x):
        return torch.autograd.grad(x, z, retain_graph=True)[0]

    log_pi = z.log_softmax(0)
    expected = torch.zeros(6)
    for x in range(6):  # E_{x ~ pi} of the gradient of the loss of sampling x, with reward 0
        logp = log_pi[x].view(1, 1)
        loss, _ = grpo_loss(logp, logp.detach(), log_ref[x].view(1, 1), torch.zeros(1), torch.ones(1, 1),
                            **PLAIN | {"kl_coef": 1.0})
        expected += log_pi[x].exp().detach() * gradient(loss)
    assert torch.allclose(expected, gradient((log_ref.exp() * (log_ref - log_pi)).sum()), atol=1e-6)
    assert not torch.allclose(expected, gradient((log_pi.exp() * (log_pi - log_ref)).sum()), atol=1e-2)


def test_kl_to_oneself_is_nothing(batch):
    """A penalty must not move a policy that equals its reference: KL and gradient are 0 there. Elsewhere the logged KL
    is positive, and is not multiplied by its weight."""
    kl = (batch["logp_ref"] - batch["logp"]).exp() - 1 - (batch["logp_ref"] - batch["logp"])
    for kl_coef in (0.0, 1.0):
        _, _, metrics = loss_and_gradient(batch, kl_coef=kl_coef)
        assert abs(metrics["kl"] - kl[batch["mask"]].mean()) < 1e-6 and metrics["kl"] > 0
    batch |= {"logp_old": batch["logp"], "logp_ref": batch["logp"], "adv": torch.zeros(8)}
    loss, gradient, metrics = loss_and_gradient(batch, kl_coef=1.0)
    assert loss == metrics["kl"] == 0 and not gradient.any()


def test_no_reference_is_no_kl(batch):
    """Without a penalty, a step must not need the reference, whose pass would cost time for nothing."""
    expected, *_ = loss_and_gradient(batch)
    loss, _, metrics = loss_and_gradient(batch | {"logp_ref": None})
    assert loss == expected and metrics["kl"] == 0


# Masks and batches


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("junk", (float("nan"), float("inf"), -float("inf"), 1e4, 0.0))
def test_padding_changes_nothing(batch, normalize, junk):
    """A mean that includes padding is wrong. And since 0 * NaN is NaN, one bad number in the padding would destroy the
    weights."""
    options = {"normalize": normalize, "max_len": MAX_LEN, "kl_coef": 0.3}
    loss, gradient, metrics = loss_and_gradient(batch, **options)
    for name in ("logp", "logp_old", "logp_ref"):
        values = torch.where(batch["mask"], batch[name], torch.tensor(junk))
        batch[name] = torch.cat((values, torch.full((8, 3), junk)), dim=1)  # and three columns more of it
    batch["mask"] = torch.cat((batch["mask"], torch.zeros(8, 3, dtype=torch.bool)), dim=1)
    padded_loss, padded_gradient, padded_metrics = loss_and_gradient(batch, **options)
    assert torch.allclose(padded_loss, loss, atol=1e-6)
    assert torch.allclose(padded_gradient[:, :MAX_LEN], gradient, atol=1e-6)
    assert not padded_gradient[~batch["mask"]].any()
    assert all(torch.allclose(padded_metrics[name], metrics[name], atol=1e-6) for name in metrics)


def test_masks_of_any_type(batch):
    """A mask of uint8 would index rows instead of choosing tokens, a mask of half precision would round the number of
    tokens, and a mask of bool cannot be multiplied."""
    for normalize in NORMALIZE:
        options = {"normalize": normalize, "max_len": MAX_LEN, "kl_coef": 0.3}
        loss, gradient, _ = loss_and_gradient(batch, **options)
        for dtype in (torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32):
            other_loss, other_gradient, _ = loss_and_gradient(batch | {"mask": batch["mask"].to(dtype)}, **options)
            assert torch.equal(other_loss, loss) and torch.equal(other_gradient, gradient), dtype


def test_nothing_that_counts_is_no_loss(batch):
    """A row or a batch without tokens must not divide by zero."""
    batch["mask"][3] = False
    assert all(loss_and_gradient(batch, normalize=n, max_len=MAX_LEN)[0].isfinite() for n in NORMALIZE)
    batch["mask"][:] = False
    for normalize in NORMALIZE:
        loss, gradient, metrics = loss_and_gradient(batch, normalize=normalize, max_len=MAX_LEN)
        assert loss == 0 and not gradient.any() and all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_micro_batches_add_up(batch, normalize):
    """If each micro-batch took its own mean, the tokens of a micro-batch of short completions would weigh more than
    others."""
    options = {"normalize": normalize, "max_len": MAX_LEN, "kl_coef": 0.3}
    loss, gradient, _ = loss_and_gradient(batch, **options)
    denominator = normalizer(8, int(batch["mask"].sum()), normalize, MAX_LEN)
    parts = [loss_and_gradient({name: x[rows] for name, x in batch.items()}, **options, denominator=denominator)
             for rows in ([4], [0, 7, 2], [1, 3, 5, 6])]
    assert torch.allclose(sum(part[0] for part in parts), loss, atol=1e-6)
    assert torch.allclose(torch.cat([part[1] for part in parts]), gradient[[4, 0, 7, 2, 1, 3, 5, 6]], atol=1e-6)


def test_inputs_are_left_alone(batch):
    """If a function edited a caller's tensor in place, the logged reward would become the advantage, and the next step
    would see other data."""
    rewards = torch.rand(2, 4)
    inputs = [*batch.values(), rewards]
    copies, versions = [x.clone() for x in inputs], [x._version for x in inputs]
    for normalize in NORMALIZE:
        loss_and_gradient(batch, normalize=normalize, max_len=MAX_LEN, kl_coef=0.3)
    group_advantages(rewards, "std"), group_advantages(rewards, "none")
    assert all(torch.equal(x, y) for x, y in zip(inputs, copies)) and [x._version for x in inputs] == versions


@pytest.mark.parametrize("options", ({"normalize": "mean"}, {"normalize": "constant"}))
def test_unknown_normalizers_are_refused(batch, options):
    """A misspelt normalizer must not silently become another one, and "constant" needs its constant."""
    with pytest.raises(ValueError):
        loss_and_gradient(batch, **options)


# Advantages


@pytest.mark.parametrize("scale", ("std", "none"))
def test_advantages_are_trls(scale):
    """A deviation with G in place of G - 1, a mean over the batch in place of the group, or a forgotten 1e-4 would
    scale every step."""
    rewards = torch.rand(5, 4)
    rewards[3] = 0.7 + torch.tensor([0.0, 1e-4, 0.0, 0.0])  # here the 1e-4 is all that matters
    for group, adv in zip(rewards.double().tolist(), group_advantages(rewards, scale)):
        mean = sum(group) / 4
        std = (sum((r - mean) ** 2 for r in group) / 3) ** 0.5
        expected = torch.tensor([(r - mean) / (std + 1e-4 if scale == "std" else 1) for r in group])
        assert torch.allclose(adv, expected, atol=2e-3)
    with pytest.raises(ValueError):
        group_advantages(rewards, "variance")


def test_the_batch_as_baseline():
    """The control that compares with the batch would show nothing if it used the mean or the deviation of the group."""
    rewards = torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    assert group_advantages(rewards, "none", "batch").tolist() == (rewards - 0.5).tolist()
    everything = rewards.flatten()
    assert torch.allclose(group_advantages(rewards, "std", "batch"), (rewards - 0.5) / (everything.std() + 1e-4))
    with pytest.raises(ValueError, match="baseline"):
        group_advantages(rewards, baseline="prompt")


def test_a_group_of_one_is_refused():
    """The deviation of one number is NaN, and the weights would become NaN too."""
    with pytest.raises(ValueError, match="two or more"):
        group_advantages(torch.ones(3, 1))


@pytest.mark.parametrize("scale", ("std", "none"))
def test_equal_rewards_are_no_advantage(scale):
    """0/0 is NaN. And a mean that is off by a rounding error, divided by 1e-4, is an advantage of 0.001, which Adam
    turns into a whole step if no group of the batch has a signal."""
    for G, reward in itertools.product((2, 3, 8, 12, 16), (0.0, 0.1, 0.2, 1.0, 1.1, 1.2)):
        assert not group_advantages(torch.full((2, G), reward), scale).any(), (G, reward)


# Rows of tokens


def chatty(make_gpt, **options):
    """A model of the real vocabulary that ends some of its completions and is cut off in others."""
    model = make_gpt(TASK.encoding.n_vocab, **{"spread": 4.0} | options)
    with torch.no_grad():
        model.embedding.weight[TASK.encoding.eot_token] *= 30
    return model


def make_rollout(prompts, completions):
    """A rollout of given tokens. The sampler's log-probability of each token is a number from -8 to 0 of its own."""
    count, n = itertools.count(1), len(prompts)
    logp = [[-(next(count) * 997 % 8191) / 1024 for _ in c] for c in completions]
    return Rollout(prompts, completions, logp, [""] * n, [True] * n,
                   [{"reward": float(i % 2), "accuracy": 1.0} for i in range(n)])


def test_micro_batches_train_every_sampled_token_and_no_other():
    """A mask from `token != pad` leaves the stop token untrained if it is also the pad, and trains a stop token in the
    prompt. Here the stop token, 0 as the pad is or 9, stands in prompts and completions."""
    for stop in (0, 9):
        prompts, completions = [[1, stop, 2], [3], [4, 5]], [[6, 7, stop], [stop], [6, stop, 6, 6]]
        rollout = make_rollout(prompts, completions)
        batch, = micro_batches(rollout, [0, 1, 2], 1000, torch.device("cpu"))
        assert sorted(batch.rows[:3].tolist()) == [0, 1, 2]
        for i, row, on, logp in list(zip(batch.rows.tolist(), batch.idx, batch.mask, batch.sampler_logp))[:3]:
            first, end = len(prompts[i]), len(prompts[i] + completions[i])
            assert row[:end].tolist() == prompts[i] + completions[i] and not row[end:].any()
            assert on.nonzero()[:, 0].tolist() == list(range(first - 1, end - 1))
            assert row[1:][on].tolist() == completions[i] and logp[on].tolist() == rollout.sampler_logp[i]
            assert not logp[~on].any()


def test_micro_batches_hold_each_row_once_and_keep_the_budget():
    """Sorting may lose or double a row, and a budget that forgets the padding runs out of memory on long rows. Padding
    rows must not be trained. And without rounding there would be a hundred sizes, each of which costs a CPU new
    kernels."""
    rng, sizes = random.Random(0), set()
    for _ in range(100):
        n = rng.randint(1, 120)
        rollout = make_rollout([[1] * rng.randint(3, 20) for _ in range(n)],
                               [[2] * rng.randint(1, 60) for _ in range(n)])
        chosen, seen = rng.sample(range(n), rng.randint(1, n)), []
        for batch in micro_batches(rollout, chosen, 1000, torch.device("cpu")):
            rows, T = batch.rows.tolist(), batch.idx.size(1)
            assert batch.idx.numel() <= 1000 and batch.idx.shape == (len(rows), T)
            assert batch.mask.shape == batch.sampler_logp.shape == (len(rows), T - 1) and batch.mask.dtype == torch.bool
            assert (T - 1) % 8 == 0 and (len(rows) % 16 == 0 or len(rows) == 1000 // T)
            real = batch.mask.any(dim=1).tolist()
            assert real == sorted(real, reverse=True), "padding rows come last"
            for i, is_real, row, on, logp in zip(rows, real, batch.idx, batch.mask, batch.sampler_logp):
                tokens = rollout.prompts[i] + rollout.completions[i]
                assert row.tolist() == tokens + [0] * (T - len(tokens)) and i in chosen
                assert row[1:][on].tolist() == (rollout.completions[i] if is_real else [])
                assert logp[on].tolist() == (rollout.sampler_logp[i] if is_real else [])
            seen += rows[:sum(real)]
            sizes.add(tuple(batch.idx.shape))
        assert sorted(seen) == sorted(chosen)
    assert len(sizes) < 40, f"{len(sizes)} different sizes"


def test_a_row_over_the_budget_goes_alone():
    """A row that is longer than the budget must neither be dropped nor end the run."""
    rollout = make_rollout([[1] * 400, [1] * 2, [1] * 300], [[2] * 100, [2], [2] * 90])
    batches = list(micro_batches(rollout, [0, 1, 2], 120, torch.device("cpu")))
    assert [batch.rows[batch.mask.any(dim=1)].tolist() for batch in batches] == [[1], [2], [0]]
    assert [len(batch.rows) for batch in batches[1:]] == [1, 1]


def test_no_rows_are_a_micro_batch_that_teaches_nothing(make_gpt):
    """A rank without a row of a minibatch must still have a gradient, of zeros, to add to those of the other ranks.
    Without one it would wait for ever, or fail."""
    model, rollout = make_gpt(), make_rollout([[1, 2, 3], [4]], [[5], [6, 7]])
    batch, = micro_batches(rollout, [], 120, torch.device("cpu"))
    assert not batch.mask.any() and len(batch.rows) == 1
    logp = token_logprobs(model, batch.idx)
    loss, _ = grpo_loss(logp, logp.detach(), None, torch.ones(len(batch.rows)), batch.mask, denominator=5, **PLAIN)
    loss.backward()
    assert loss == 0 and all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_minibatches_deal_each_row_once():
    """Sampling with replacement, or dropping the remainder, would leave completions untrained."""
    for n, k in ((16, 4), (10, 3), (5, 5)):
        parts = random_minibatches(n, k, torch.Generator().manual_seed(0))
        assert sorted(sum(parts, [])) == list(range(n)) and max(map(len, parts)) - min(map(len, parts)) <= 1
        assert parts == random_minibatches(n, k, torch.Generator().manual_seed(0))
        assert parts != random_minibatches(n, k, torch.Generator().manual_seed(1))


def test_shuffling_keeps_each_groups_rewards():
    """A control that mixes rewards between prompts changes which groups have a signal, and so tests something else."""
    rewards = torch.arange(40.0).view(5, 8)
    shuffled = shuffle_in_groups(rewards, torch.Generator().manual_seed(0))
    assert torch.equal(shuffled.sort(dim=1).values, rewards) and not (shuffled == rewards).all(dim=1).any()
    assert len({tuple((row - row.min()).tolist()) for row in shuffled}) == 5, "each group has its own order"
    assert torch.equal(shuffle_in_groups(rewards, torch.Generator().manual_seed(0)), shuffled)
    assert torch.equal(rewards, torch.arange(40.0).view(5, 8))


def test_a_rollout_trains_the_tokens_that_were_sampled(make_gpt):
    """To decode and encode again does not give the sampled tokens back, as the random bytes sampled here prove. And a
    text that still held its end of text would not be well formed, so that stopping would cost the reward."""
    encoding, model = TASK.encoding, chatty(make_gpt)
    problems = [parse("1+2"), parse("13*4-20")]
    rollout = sample_rollout(model, problems, lambda text, problem: {"reward": float(len(problem.question))}, TASK,
                             samples=8, max_new_tokens=12, generator=torch.Generator().manual_seed(0))
    assert rollout.column("reward").tolist() == [3.0] * 8 + [7.0] * 8
    assert any(encoding.encode_ordinary(text) != c for text, c in zip(rollout.texts, rollout.completions))
    for text, c, truncated in zip(rollout.texts, rollout.completions, rollout.truncated):
        assert truncated == (encoding.eot_token not in c)
        assert text == encoding.decode(c if truncated else c[:-1])
    assert 0 < sum(rollout.truncated) < 16
    seen = []
    for batch in micro_batches(rollout, list(range(16)), 80, torch.device("cpu")):
        for i, tokens, on, logp in zip(batch.rows.tolist(), batch.idx, batch.mask, token_logprobs(model, batch.idx)):
            if on.any():
                assert encoding.decode(tokens[:len(rollout.prompts[i])].tolist()) == problems[i // 8].prompt
                assert tokens[1:][on].tolist() == rollout.completions[i]
                assert torch.allclose(logp[on], torch.tensor(rollout.sampler_logp[i]), atol=1e-4)
                seen.append(i)
    assert sorted(seen) == list(range(16))


class TwoStops(Arithmetic):
    """The task with two stop tokens, as a chat model has them. The second is a word piece that has its own text."""
    stop_ids = (*Arithmetic.stop_ids, TASK.encoding.encode_ordinary("<answer>")[0])

    def encode_prompt(self, problem):
        return super().encode_prompt(problem)[::-1]


def test_a_task_decides_prompts_and_stop_tokens(make_gpt):
    """A rollout that knows only the encoding's end of text scores texts with the other stop tokens in them, and takes
    these completions for cut off. And a prompt that it encodes itself lacks what the task puts around a problem."""
    encoding, model, task = TASK.encoding, chatty(make_gpt), TwoStops()
    stops = task.stop_ids
    with torch.no_grad():
        model.embedding.weight[stops[1]] *= 30
    problems = [parse("1+2"), parse("13*4-20")]
    rollout = sample_rollout(model, problems, lambda text, problem: {"reward": 0.0}, task, samples=32,
                             max_new_tokens=6, generator=torch.Generator().manual_seed(0))
    assert rollout.prompts == [TASK.encode_prompt(p)[::-1] for p in problems for _ in range(32)]
    ends = [c[-1] if c[-1] in stops else None for c in rollout.completions]
    assert min(ends.count(end) for end in (None, *stops)) > 3, "all three ends should occur here"
    for c, text, truncated, end in zip(rollout.completions, rollout.texts, rollout.truncated, ends):
        assert truncated == (end is None) and (len(c) == 6 or end)
        assert not set(stops) & set(c[:-1]) and text == encoding.decode(c if truncated else c[:-1])


# The whole step

STEP = Config(rl_samples=8, rl_max_new_tokens=6, rl_minibatches=1, clip_low=0.2, clip_high=0.2, kl_coef=0.0,
              normalize="token", scale="std", baseline="group", shuffle_rewards=False, micro_batch=4096)
QUESTIONS = ("1+2", "3*4", "20-7")


def step(model, reward_fn, reference=None, seed=0, optimizer=None, lr_scale=1.0, **options):
    """grpo_step with the settings of STEP, changed by the options."""
    return grpo_step(model, reference, optimizer or Optimizer(model, adam_lr=0.01, muon_lr=0.02),
                     [parse(q) for q in QUESTIONS], reward_fn, TASK, dataclasses.replace(STEP, **options),
                     torch.Generator().manual_seed(seed), lr_scale)


def wordy(text, problem):
    """A reward with groups of all kinds: "1+2" always earns, "3*4" never does, "20-7" for an ASCII first letter."""
    right = float(problem.question == "1+2" or problem.question == "20-7" and "\0" < text[:1] < "\x7f")
    return {"reward": right, "accuracy": right}


def equal_rewards(text, problem):
    """A reward that teaches nothing."""
    return {"reward": 0.1, "accuracy": 0.0}


def slow_update(policy, reference, optimizer, rollout, adv, cfg, minibatches, lr_scale):
    """grpo_update as the papers have it: one row at a time without padding, every row of a minibatch in its average,
    and a copy of the policy as pi_old -> metrics. Rows of advantage 0 are left out, unless the penalty acts on them."""
    old, sums, loss_sum, norm_sum = copy.deepcopy(policy), {}, 0.0, 0.0
    for rows in minibatches:
        lengths = [len(rollout.completions[i]) for i in rows]
        denominator = normalizer(len(rows), sum(lengths), cfg.normalize, cfg.rl_max_new_tokens)
        kept = [(i, n) for i, n in zip(rows, lengths) if adv[i] or cfg.kl_coef and not cfg.skip_no_signal]
        for i, n in kept:
            idx = torch.tensor([rollout.prompts[i] + rollout.completions[i]])
            logp = token_logprobs(policy, idx)[:, -n:]  # (1, n)
            with torch.no_grad():
                logp_old, logp_ref = (token_logprobs(model, idx)[:, -n:] for model in (old, reference))
            loss, metrics = grpo_loss(logp, logp_old, logp_ref, adv[i:i + 1], torch.ones(1, n),
                                      clip_low=cfg.clip_low, clip_high=cfg.clip_high, kl_coef=cfg.kl_coef,
                                      normalize=cfg.normalize, denominator=denominator)
            loss.backward()
            loss_sum += loss.item() / len(minibatches)
            metrics["sampler_gap"] = (logp_old[0] - torch.tensor(rollout.sampler_logp[i])).abs().mean()
            for name, value in metrics.items():
                total, count = sums.get(name, (0.0, 0))
                sums[name] = total + value.item() * n, count + n
        norm_sum += optimizer.step(lr_scale).item() / len(minibatches)
    means = {name: total / count for name, (total, count) in sums.items()}
    return means | {"loss": loss_sum, "grad_norm": norm_sum} | ({} if cfg.kl_coef else {"kl": None})


@pytest.mark.parametrize("micro_batch", (4096, 60))
@pytest.mark.parametrize("minibatches", (1, 3))
@pytest.mark.parametrize("kl_coef, skip", ((0.0, True), (0.3, True), (0.3, False)))
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_update_is_the_slow_one(make_gpt, normalize, kl_coef, skip, minibatches, micro_batch):
    """Each of these faults still trains a policy: a mask that is shifted, padding rows that are trained, advantages of
    other rows, an average over the rows with a signal alone, a denominator for each micro-batch, a pi_old that moves
    with the policy, clips that change places, a penalty on rows that are to be skipped, or metrics of the last
    micro-batch. The same update computed slowly, one row at a time, has none."""
    cfg = dataclasses.replace(STEP, normalize=normalize, kl_coef=kl_coef, skip_no_signal=skip,
                              rl_minibatches=minibatches, micro_batch=micro_batch, rl_max_new_tokens=12, clip_low=0.15,
                              clip_high=0.3)
    rng, reference, found = random.Random(0), make_gpt(seed=1, spread=3.0), []
    rollout = make_rollout(*([[rng.randrange(11) for _ in range(rng.randint(1, most))] for _ in range(24)]
                             for most in (9, 12)))
    adv = torch.tensor([0.0, 1.2, -0.7, 0.4, 0.0, -1.5, 0.9, -0.3] * 3)
    for update in (grpo_update, slow_update):
        policy = make_gpt(spread=3.0)
        optimizer, generator = Descent(policy, distance=1.4), torch.Generator().manual_seed(3)
        last = generator if update is grpo_update else random_minibatches(24, minibatches, generator)
        found.append((update(policy, reference, optimizer, rollout, adv, cfg, last, 0.5), optimizer.gradients))
    (metrics, gradients), (slow_metrics, slow_gradients) = found
    assert len(gradients) == len(slow_gradients) == minibatches
    for gradient, slow in zip(gradients, slow_gradients):
        assert (gradient - slow).norm() < 1e-4 * slow.norm()
    for name, value in slow_metrics.items():
        assert metrics[name] == (value if value is None else pytest.approx(value, rel=1e-4, abs=1e-6)), name
    if minibatches > 1:
        assert slow_metrics["clip_low"] > 0 and slow_metrics["clip_high"] > 0, "both clips should be active here"


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_loss_is_averaged_over_all_completions(make_gpt, normalize):
    """Rows of advantage 0 are not computed. If they did not count in the average either, a minibatch in which one group
    of a hundred has a signal would have as large a gradient as one in which all have."""
    policy = chatty(make_gpt)
    rollout = sample_rollout(policy, [parse(q) for q in QUESTIONS], wordy, TASK, samples=8, max_new_tokens=6,
                             generator=torch.Generator().manual_seed(0))
    adv = torch.zeros(24)
    adv[5], n = 1.5, [len(c) for c in rollout.completions]
    weight = {"sequence": 1 / 24, "token": n[5] / sum(n), "constant": n[5] / (24 * 6)}[normalize]
    metrics = grpo_update(policy, None, Optimizer(policy, adam_lr=0.0), rollout, adv,
                          dataclasses.replace(STEP, normalize=normalize), torch.Generator().manual_seed(0))
    assert metrics["loss"] == pytest.approx(-1.5 * weight, rel=1e-4)
    policy, tokens = chatty(make_gpt), torch.tensor([rollout.prompts[5] + rollout.completions[5]])
    (-1.5 * weight * token_logprobs(policy, tokens)[0, -n[5]:].mean()).backward()
    norm = torch.stack([p.grad.norm() for p in policy.parameters()]).norm().item()
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize("scale, baseline", (("std", "group"), ("none", "group"), ("std", "batch"), ("none", "batch")))
def test_a_step_is_a_rollout_its_advantages_and_an_update(make_gpt, scale, baseline):
    """A step that forgets a setting of the advantages still learns. And several processes are tested with grpo_update
    on a given rollout: if grpo_step did anything else to the policy, those tests would say nothing about it."""
    options = {"rl_minibatches": 2, "kl_coef": 0.1, "scale": scale, "baseline": baseline}
    stepped, updated, reference = chatty(make_gpt), chatty(make_gpt), chatty(make_gpt, seed=1)
    metrics, rollout = step(stepped, wordy, reference, seed=4, **options)
    generator = torch.Generator().manual_seed(4)
    again = sample_rollout(updated, [parse(q) for q in QUESTIONS], wordy, TASK, samples=8, max_new_tokens=6,
                           generator=generator)
    assert again == rollout
    adv = group_advantages(rollout.column("reward").view(3, 8), scale, baseline).flatten()
    assert grpo_update(updated, reference, Optimizer(updated, adam_lr=0.01, muon_lr=0.02), rollout, adv,
                       dataclasses.replace(STEP, **options), generator) == metrics
    assert all(torch.equal(updated.state_dict()[name], value) for name, value in stepped.state_dict().items())


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_step_reports_what_happened(make_gpt, normalize):
    """A metric that nobody computes a second time may be the last micro-batch's, a mean of normalized rewards, or a
    ratio that is not 1 where the policy has not moved."""
    encoding, model = TASK.encoding, chatty(make_gpt)
    reference, untouched = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    metrics, rollout = step(model, wordy, reference, normalize=normalize, kl_coef=0.1, micro_batch=100)
    lengths = torch.tensor([len(c) for c in rollout.completions])
    rewards = torch.tensor([wordy(text, parse(q))["reward"] for text, q in zip(
        rollout.texts, [q for q in QUESTIONS for _ in range(8)])])
    truncated = [c[-1] != encoding.eot_token for c in rollout.completions]
    assert 0 < sum(truncated) < 24 and 0 < rewards[16:].sum() < 8, "all kinds should occur here"
    with torch.no_grad():
        logp_sum = sum(token_logprobs(reference, torch.tensor([p + c]))[0, -len(c):].sum().item()
                       for p, c in zip(rollout.prompts, rollout.completions))

    adv = torch.cat([(g - g.mean()) / (g.std() + 1e-4) for g in rewards.view(3, 8)])
    weight = {"sequence": torch.full((24,), 1 / 24), "token": lengths / lengths.sum(), "constant": lengths / (24 * 6)}
    expected = {"reward": rewards.mean(), "accuracy": rewards.mean(), "length": lengths.float().mean(),
                "length_wrong": lengths[rewards == 0].float().mean(), "truncated": sum(truncated) / 24,
                "entropy": -logp_sum / lengths.sum(), "no_signal": 2 / 3, "ratio": 1, "clip_low": 0, "clip_high": 0,
                "kl": 0, "loss": -(adv * weight[normalize]).sum()}
    assert metrics.keys() == {*expected, "sampler_gap", "grad_norm"}
    for name, value in expected.items():
        assert abs(metrics[name] - float(value)) < 1e-5, name
    assert metrics["sampler_gap"] < 1e-5 and metrics["grad_norm"] > 0
    assert all(torch.equal(untouched[name], value) for name, value in reference.state_dict().items())
    assert all(p.grad is None for p in reference.parameters()), "no gradient flows to the reference"
    assert not torch.equal(untouched["norm.weight"], model.norm.weight)


def test_a_reward_may_have_parts_of_its_own(make_gpt):
    """A step that asks for a "format" fails with a task that has none, and one that logs fixed names hides what a task
    of your own returns. And where no answer is wrong, the length of the wrong ones is no number."""
    model = chatty(make_gpt)
    metrics, rollout = step(model, lambda text, problem: {"reward": len(text) / 7, "accuracy": 1.0, "depth": 3.0})
    assert metrics["depth"] == 3 and metrics["reward"] == pytest.approx(sum(map(len, rollout.texts)) / 7 / 24)
    assert metrics["length_wrong"] is None and metrics["kl"] is None and "format" not in metrics
    assert metrics["grad_norm"] > 0


def test_the_ratio_of_a_policy_that_has_not_moved_is_exactly_1(make_gpt):
    """If pi_old came from another pass, the sampler's or one of another type, the ratio would only be near to 1. The
    first update moves the policy that the second minibatch meets, unless its size is 0."""
    V = TASK.encoding.n_vocab
    assert step(make_gpt(V), wordy)[0]["ratio"] == 1.0
    assert step(make_gpt(V), wordy, rl_minibatches=2)[0]["ratio"] != 1.0
    assert step(make_gpt(V), wordy, rl_minibatches=2, lr_scale=0.0)[0]["ratio"] == 1.0


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_memory_budget_does_not_change_the_step(make_gpt, normalize):
    """A budget that lets fewer rows be computed at a time must give the same loss and the same gradient."""
    V, found = TASK.encoding.n_vocab, []
    for micro_batch in (10_000, 60):
        metrics, _ = step(make_gpt(V), wordy, make_gpt(V, seed=1), normalize=normalize, kl_coef=0.3,
                          micro_batch=micro_batch)
        found.append([metrics[name] for name in ("loss", "grad_norm", "kl", "entropy", "ratio")])
    assert torch.allclose(*map(torch.tensor, found), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("muon_lr", (None, 0.02))
def test_equal_rewards_change_nothing(make_gpt, muon_lr):
    """Without a signal and without a KL penalty there is nothing to learn. But an optimizer step without a gradient, or
    with one of zeros, would still move the weights by the momentum of the steps before."""
    model = chatty(make_gpt)
    optimizer, fresh = Optimizer(model, adam_lr=0.01, muon_lr=muon_lr), copy.deepcopy(model.state_dict())
    step(model, wordy, optimizer=optimizer)
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    assert not torch.equal(before["norm.weight"], fresh["norm.weight"])
    metrics, _ = step(model, equal_rewards, optimizer=optimizer, seed=1, rl_minibatches=2)
    assert metrics["no_signal"] == 1 and metrics["length_wrong"] == metrics["length"]
    assert metrics["loss"] == metrics["grad_norm"] == 0 and metrics["kl"] is None
    assert not metrics.keys() & {"ratio", "clip_low", "clip_high", "sampler_gap"}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for part, old in zip(optimizer.state_dict(), state):  # nor does the momentum fade
        for key, values in old["state"].items():
            assert all(torch.equal(value, part["state"][key][name]) for name, value in values.items())


def test_a_minibatch_without_a_signal_takes_no_step(make_gpt):
    """If one row of four minibatches has a signal, three updates would be made of momentum alone. The loss and the norm
    that are logged are means over all four."""
    policy = chatty(make_gpt)
    optimizer = Descent(policy, distance=0.1)
    rollout = sample_rollout(policy, [parse(q) for q in QUESTIONS], wordy, TASK, samples=8, max_new_tokens=6,
                             generator=torch.Generator().manual_seed(0))
    adv = torch.zeros(24)
    adv[9] = 2.0
    for seed in range(4):
        optimizer.gradients.clear()
        metrics = grpo_update(policy, None, optimizer, rollout, adv, dataclasses.replace(
            STEP, rl_minibatches=4, normalize="sequence"), torch.Generator().manual_seed(seed))
        assert len(optimizer.gradients) == 1 and metrics["ratio"] == 1
        assert metrics["loss"] == pytest.approx(-2.0 / 6 / 4, rel=1e-5)
        assert metrics["grad_norm"] == pytest.approx(optimizer.gradients[0].norm().item() / 4, rel=1e-5)


def test_without_a_penalty_the_reference_is_not_asked(make_gpt):
    """A pass of the reference costs time, and without a penalty nothing uses its result."""
    reference = chatty(make_gpt)
    reference.forward = None  # a call of it would be an error
    assert step(chatty(make_gpt), wordy, reference)[0]["kl"] is None


def test_a_kl_penalty_works_without_a_signal(make_gpt):
    """Rows of advantage 0 are left out although the penalty is to act on all rows (Algorithm 1 to the letter)."""
    model, reference = chatty(make_gpt), chatty(make_gpt, seed=1)
    before = copy.deepcopy(model.state_dict())
    metrics, rollout = step(model, equal_rewards, reference, kl_coef=0.1, skip_no_signal=False)
    assert metrics["kl"] > 0 and metrics["loss"] > 0 and metrics["no_signal"] == metrics["ratio"] == 1
    assert not torch.equal(before["norm.weight"], model.norm.weight)


@pytest.mark.parametrize("honest, shuffle, baseline", (
    (True, False, "group"), (True, False, "batch"), (False, False, "group"), (True, True, "group")))
def test_bandit(make_gpt, honest, shuffle, baseline):
    """A few steps must find the letters if one token is sampled and a letter is rewarded. They cannot with a gradient
    of the wrong sign, or with credit for the wrong row. And nothing must be learnt from a reward that is random, or
    that is given to another answer than the one that earned it."""
    encoding, rng = TASK.encoding, random.Random(0)
    model, prompt = make_gpt(encoding.n_vocab), TASK.encode_prompt(parse("1+2"))
    cfg = dataclasses.replace(STEP, rl_samples=64, rl_max_new_tokens=1, baseline=baseline, shuffle_rewards=shuffle)

    def is_letter(text):
        return len(text) == 1 and text.isascii() and text.isalpha()

    def reward_fn(text, problem):
        right = float(is_letter(text) if honest else rng.random() < 0.2)
        return {"reward": right, "accuracy": right}

    def chance():
        with torch.no_grad():
            probs = model(torch.tensor([prompt]))[0, -1].softmax(-1)
        return sum(p for t, p in enumerate(probs.tolist()) if is_letter(encoding.decode([t])))

    before = chance()
    optimizer = Optimizer(model, adam_lr=0.01, muon_lr=0.02)
    for seed in range(12):
        grpo_step(model, None, optimizer, [parse("1+2")], reward_fn, TASK, cfg, torch.Generator().manual_seed(seed))
    after = chance()
    assert 0.1 < before < 0.3 and (after > 0.9 if honest and not shuffle else after < 0.5), (before, after)
