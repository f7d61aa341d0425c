"""GRPO against the papers' formulas written out slowly, exact sums over a vocabulary, and a bandit it must win."""
import copy
import itertools
import math
import random

import pytest
import torch

from data.arithmetic import parse
from data.tokenizer import get_tokenizer
from grpo import (Rollout, cut, group_advantages, grpo_loss, grpo_step, micro_batches, normalizer, pack, sample_rollout,
                  shuffled_minibatches)
from model import Optimizer, token_logprobs

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
    """max for min, a clip on the wrong side, one normaliser for another, a KL of the wrong sign: all of them train."""
    expected, n_low, n_high, n_tokens = slow_loss(batch, clip_low, clip_high, kl_coef, normalize)
    assert (n_low > 0 and n_high > 0) or clip_high == 1e9, "both clips should be active here"
    loss, _, metrics = loss_and_gradient(batch, clip_low=clip_low, clip_high=clip_high, kl_coef=kl_coef,
                                         normalize=normalize, max_len=MAX_LEN)
    assert abs(loss.item() - expected) < 1e-5
    assert abs(metrics["clip_low"].item() - n_low / n_tokens) < 1e-6
    assert abs(metrics["clip_high"].item() - n_high / n_tokens) < 1e-6


def test_clipped_tokens_have_no_gradient(batch):
    """A clip that also stops the way back: a good token that became unlikely must move, as a bad one made likely."""
    _, gradient, _ = loss_and_gradient(batch)
    ratio, adv = (batch["logp"] - batch["logp_old"]).exp(), batch["adv"][:, None].expand(8, MAX_LEN)
    still = (adv == 0) | ((adv > 0) & (ratio > 1.2)) | ((adv < 0) & (ratio < 0.8)) | ~batch["mask"]
    assert torch.equal(gradient != 0, ~still)
    assert ((gradient != 0) & (ratio < 0.8)).any() and ((gradient != 0) & (ratio > 1.2)).any()


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_on_policy_loss_and_gradient(batch, normalize):
    """DeepSeekMath eq. 21: at first the gradient of each token is -(A + beta (pi_ref/pi_theta - 1)) * weight."""
    batch["logp_old"] = batch["logp"]
    lengths = batch["mask"].sum(1, keepdim=True)
    weight = {"sequence": 1 / lengths / 8, "token": 1 / lengths.sum(), "constant": 1 / (8 * MAX_LEN)}[normalize]
    weight = batch["mask"] * weight  # (N, T)
    for kl_coef in (0.0, 0.3):
        _, gradient, metrics = loss_and_gradient(batch, normalize=normalize, max_len=MAX_LEN, kl_coef=kl_coef)
        pull = (batch["logp_ref"] - batch["logp"]).exp() - 1
        assert torch.allclose(gradient, -(batch["adv"][:, None] + kl_coef * pull) * weight, atol=1e-6)
        assert metrics["ratio"].item() == 1 and metrics["clip_low"] == metrics["clip_high"] == 0

    # "loss is 0 at the first step": the sequence loss of a group is, and yet there is something to learn
    assert abs(batch["adv"].sum()) < 1e-6
    loss, gradient, _ = loss_and_gradient(batch, normalize=normalize, max_len=MAX_LEN)
    length_weighted = -(batch["adv"][:, None] * weight).sum().item()
    assert abs(loss.item() - length_weighted) < 1e-6 and gradient.abs().max() > 0.01
    assert abs(loss.item()) < 1e-6 if normalize == "sequence" else abs(loss.item()) > 0.01


def test_k3_as_a_loss_has_the_gradient_of_kl_ref_policy():
    """k1 as a loss teaches nothing, k2 teaches KL(policy || ref): exact sums over a vocabulary say which KL this is."""
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
    """A reference that is the policy must not push: KL 0, gradient 0; elsewhere k3 is positive, logged unweighted."""
    kl = (batch["logp_ref"] - batch["logp"]).exp() - 1 - (batch["logp_ref"] - batch["logp"])
    for kl_coef in (0.0, 1.0):
        _, _, metrics = loss_and_gradient(batch, kl_coef=kl_coef)
        assert abs(metrics["kl"] - kl[batch["mask"]].mean()) < 1e-6 and metrics["kl"] > 0
    batch |= {"logp_old": batch["logp"], "logp_ref": batch["logp"], "adv": torch.zeros(8)}
    loss, gradient, metrics = loss_and_gradient(batch, kl_coef=1.0)
    assert loss == metrics["kl"] == 0 and not gradient.any()


def test_no_reference_is_no_kl(batch):
    """kl_coef 0 must not need a second model's pass."""
    expected, *_ = loss_and_gradient(batch)
    loss, _, metrics = loss_and_gradient(batch | {"logp_ref": None})
    assert loss == expected and metrics["kl"] == 0


# Masks and batches


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("junk", (float("nan"), float("inf"), -float("inf"), 1e4, 0.0))
def test_padding_changes_nothing(batch, normalize, junk):
    """Means over padding; and 0 * NaN, which is NaN: one bad number in the padding and the weights are gone."""
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
    """A uint8 mask that indexes rows, a half mask that rounds the token count, a bool that cannot be multiplied."""
    for normalize in NORMALIZE:
        options = {"normalize": normalize, "max_len": MAX_LEN, "kl_coef": 0.3}
        loss, gradient, _ = loss_and_gradient(batch, **options)
        for dtype in (torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32):
            other_loss, other_gradient, _ = loss_and_gradient(batch | {"mask": batch["mask"].to(dtype)}, **options)
            assert torch.equal(other_loss, loss) and torch.equal(other_gradient, gradient), dtype


def test_nothing_that_counts_is_no_loss(batch):
    """A row or a batch without tokens divides by zero."""
    batch["mask"][3] = False
    assert all(loss_and_gradient(batch, normalize=n, max_len=MAX_LEN)[0].isfinite() for n in NORMALIZE)
    batch["mask"][:] = False
    for normalize in NORMALIZE:
        loss, gradient, metrics = loss_and_gradient(batch, normalize=normalize, max_len=MAX_LEN)
        assert loss == 0 and not gradient.any() and all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_micro_batches_add_up(batch, normalize):
    """Averaging micro-batches' own means weighs a short completion's tokens more than a long one's."""
    options = {"normalize": normalize, "max_len": MAX_LEN, "kl_coef": 0.3}
    loss, gradient, _ = loss_and_gradient(batch, **options)
    denominator = normalizer(8, int(batch["mask"].sum()), normalize, MAX_LEN)
    parts = [loss_and_gradient({name: x[rows] for name, x in batch.items()}, **options, denominator=denominator)
             for rows in ([4], [0, 7, 2], [1, 3, 5, 6])]
    assert torch.allclose(sum(part[0] for part in parts), loss, atol=1e-6)
    assert torch.allclose(torch.cat([part[1] for part in parts]), gradient[[4, 0, 7, 2, 1, 3, 5, 6]], atol=1e-6)


def test_inputs_are_left_alone(batch):
    """In-place edits of a caller's tensor: the logged reward becomes the advantage, the next step sees other data."""
    rewards = torch.rand(2, 4)
    inputs = [*batch.values(), rewards]
    copies, versions = [x.clone() for x in inputs], [x._version for x in inputs]
    for normalize in NORMALIZE:
        loss_and_gradient(batch, normalize=normalize, max_len=MAX_LEN, kl_coef=0.3)
    group_advantages(rewards, "std"), group_advantages(rewards, "none")
    assert all(torch.equal(x, y) for x, y in zip(inputs, copies)) and [x._version for x in inputs] == versions


@pytest.mark.parametrize("options", ({"normalize": "mean"}, {"normalize": "constant"}))
def test_unknown_normalisers_are_refused(batch, options):
    """A misspelt normaliser that silently becomes the default; "constant" without its constant."""
    with pytest.raises(ValueError):
        loss_and_gradient(batch, **options)


# Advantages


@pytest.mark.parametrize("scale", ("std", "none"))
def test_advantages_are_trls(scale):
    """ddof 0 for ddof 1, a mean over the batch for one over the group, a forgotten 1e-4."""
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
    """REINFORCE with the batch's mean, and not a group's own."""
    rewards = torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    assert group_advantages(rewards, "none", "batch").tolist() == (rewards - 0.5).tolist()
    everything = rewards.flatten()
    assert torch.allclose(group_advantages(rewards, "std", "batch"), (rewards - 0.5) / (everything.std() + 1e-4))
    with pytest.raises(ValueError, match="baseline"):
        group_advantages(rewards, baseline="prompt")


def test_a_group_of_one_is_refused():
    """The deviation of one number is NaN, and so would the weights be."""
    with pytest.raises(ValueError, match="two or more"):
        group_advantages(torch.ones(3, 1))


@pytest.mark.parametrize("scale", ("std", "none"))
def test_equal_rewards_are_no_advantage(scale):
    """0/0 is NaN; and a mean that is off by a rounding error, divided by 1e-4, is an advantage of 0.001, which Adam
    blows up to a whole step when no group of a batch has a signal."""
    for G, reward in itertools.product((2, 3, 8, 12, 16), (0.0, 0.1, 0.2, 1.0, 1.1, 1.2)):
        assert not group_advantages(torch.full((2, G), reward), scale).any(), (G, reward)


# Rows of tokens


def chatty(make_gpt):
    """A model of the real vocabulary that ends some of its completions and is cut off in others."""
    model = make_gpt(get_tokenizer().n_vocab, spread=4.0)
    with torch.no_grad():
        model.embedding.weight[get_tokenizer().eot_token] *= 30
    return model


def test_pack_trains_every_sampled_token_and_no_other():
    """A mask from `token != pad` leaves the stop token, which is the pad, untrained, and trains stops in the prompt."""
    eos = 9
    prompts, completions = [[1, eos, 2], [3], [4, 5]], [[6, 7, eos], [eos], [6, 6, 6, 6]]
    idx, mask = pack(prompts, completions, pad_id=eos)
    assert idx.shape == (3, 6) and mask.shape == (3, 5)
    for row, on, prompt, completion in zip(idx, mask, prompts, completions):
        assert row[:len(prompt + completion)].tolist() == prompt + completion
        assert on.nonzero()[:, 0].tolist() == list(range(len(prompt) - 1, len(prompt + completion) - 1))
        assert row[1:][on].tolist() == completion


def test_micro_batches_hold_each_row_once_and_keep_the_budget():
    """Rows lost or doubled by the sorting; a budget that forgets the padding runs out of memory on long rows."""
    rng = random.Random(0)
    for _ in range(200):
        lengths = [rng.randint(1, 50) for _ in range(40)]
        rows = rng.sample(range(40), rng.randint(1, 40))
        parts = micro_batches(lengths, rows, max_tokens=120)
        assert sorted(i for part in parts for i in part) == sorted(rows)
        assert all(len(part) * max(lengths[i] for i in part) <= 120 for part in parts)
    assert micro_batches([500, 3], [0, 1], max_tokens=120) == [[1], [0]], "a row over the budget goes alone"


def test_cut_rounds_sizes_and_trains_no_padding():
    """Padding that is trained, padding over the budget, or a hundred sizes that cost a CPU new kernels each."""
    rng, sizes = random.Random(0), set()
    for _ in range(100):
        n = rng.randint(1, 120)
        prompts = [[1] * rng.randint(3, 20) for _ in range(n)]
        completions = [[2] * rng.randint(1, 60) for _ in range(n)]
        rows = rng.sample(range(n), rng.randint(1, n))
        rollout = Rollout(prompts, completions, [], [], [], [])
        parts = cut(rollout, rows, pad_id=0, max_tokens=1000, device=torch.device("cpu"))
        assert sorted(i for part, _, _ in parts for i in part) == sorted(rows)
        for part, idx, mask in parts:
            assert idx.numel() <= 1000 and mask.shape == (idx.size(0), idx.size(1) - 1)
            for i, row, on in itertools.zip_longest(part, idx, mask):
                expected = prompts[i] + completions[i] if i is not None else []
                assert row.tolist() == expected + [0] * (len(row) - len(expected))
                assert row[1:][on].tolist() == (completions[i] if i is not None else [])
            sizes.add(tuple(idx.shape))
    assert len(sizes) < 40, f"{len(sizes)} different sizes"


def test_minibatches_deal_each_row_once():
    """Sampling with replacement, or a remainder that is dropped."""
    for n, k in ((16, 4), (10, 3), (5, 5)):
        parts = shuffled_minibatches(n, k, torch.Generator().manual_seed(0))
        assert sorted(sum(parts, [])) == list(range(n)) and max(map(len, parts)) - min(map(len, parts)) <= 1
        assert parts == shuffled_minibatches(n, k, torch.Generator().manual_seed(0))


def test_a_rollout_trains_the_tokens_that_were_sampled(make_gpt):
    """decode and encode again does not give the sampled tokens back (here random bytes are sampled to prove it); and a
    text that still holds its end of text is not well formed, so that stopping costs the reward."""
    encoding, model = get_tokenizer(), chatty(make_gpt)
    problems = [parse("1+2"), parse("13*4-20")]
    rollout = sample_rollout(model, problems, lambda text, problem: {"reward": float(len(problem.question))}, encoding,
                             samples=8, max_new_tokens=12, generator=torch.Generator().manual_seed(0))
    assert rollout.column("reward").tolist() == [3.0] * 8 + [7.0] * 8
    assert any(encoding.encode_ordinary(text) != c for text, c in zip(rollout.texts, rollout.completions))
    for text, c, truncated in zip(rollout.texts, rollout.completions, rollout.truncated):
        assert truncated == (encoding.eot_token not in c)
        assert text == encoding.decode(c if truncated else c[:-1])
    assert 0 < sum(rollout.truncated) < 16
    seen = []
    for rows, idx, mask in cut(rollout, list(range(16)), encoding.eot_token, 80, "cpu"):
        for i, tokens, on, logp in zip(rows, idx, mask, token_logprobs(model, idx)):
            assert encoding.decode(tokens[:len(rollout.prompts[i])].tolist()) == problems[i // 8].prompt
            assert tokens[1:][on].tolist() == rollout.completions[i]
            assert torch.allclose(logp[on], torch.tensor(rollout.logp[i]), atol=1e-4)
            seen.append(i)
    assert sorted(seen) == list(range(16)) and len(seen) == 16


# The whole step

STEP = {"samples": 8, "max_new_tokens": 6, "minibatches": 1, "clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.0,
        "normalize": "token", "scale": "std"}


def step(model, reward_fn, reference=None, seed=0, problems=("1+2", "3*4", "20-7"), **options):
    optimizer = Optimizer(model, adam_lr=0.01, muon_lr=0.02)
    return grpo_step(model, reference, optimizer, [parse(p) for p in problems], reward_fn, get_tokenizer(),
                     generator=torch.Generator().manual_seed(seed), **STEP | options)


def wordy(text, problem):
    """A reward with groups of all kinds: "1+2" always earns, "3*4" never does, "20-7" for an ASCII first letter."""
    right = float(problem.question == "1+2" or problem.question == "20-7" and "\0" < text[:1] < "\x7f")
    return {"reward": right, "accuracy": right}


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_step_reports_what_happened(make_gpt, normalize):
    """Metrics that nobody recomputes: the last micro-batch's loss, normalised rewards, a ratio that is not 1."""
    encoding, model = get_tokenizer(), chatty(make_gpt)
    reference, untouched = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    metrics, rollout = step(model, wordy, reference, normalize=normalize, kl_coef=0.1, max_tokens=100)
    lengths = torch.tensor([len(c) for c in rollout.completions])
    rewards = torch.tensor([wordy(text, parse(q))["reward"] for text, q in zip(
        rollout.texts, [q for q in ("1+2", "3*4", "20-7") for _ in range(8)])])
    truncated = [c[-1] != encoding.eot_token for c in rollout.completions]
    assert 0 < sum(truncated) < 24 and 0 < rewards[16:].sum() < 8, "all kinds should occur here"

    adv = torch.cat([(g - g.mean()) / (g.std() + 1e-4) for g in rewards.view(3, 8)])
    weight = {"sequence": torch.full((24,), 1 / 24), "token": lengths / lengths.sum(), "constant": lengths / (24 * 6)}
    expected = {"reward": rewards.mean(), "accuracy": rewards.mean(), "length": lengths.float().mean(),
                "length_wrong": lengths[rewards == 0].float().mean(), "truncated": sum(truncated) / 24,
                "no_signal": 2 / 3, "ratio": 1, "clip_low": 0, "clip_high": 0, "kl": 0,
                "loss": -(adv * weight[normalize]).sum()}
    for name, value in expected.items():
        assert abs(metrics[name] - float(value)) < 1e-5, name
    assert metrics["sampler_gap"] < 1e-5 and metrics["grad_norm"] > 0
    assert all(torch.equal(untouched[name], value) for name, value in reference.state_dict().items())
    assert not torch.equal(untouched["norm.weight"], model.norm.weight)


def test_the_ratio_of_an_untouched_policy_is_exactly_1(make_gpt):
    """With pi_old from another pass (the sampler's, another type) it is near 1. An update moves the second minibatch,
    one of size 0 does not."""
    V = get_tokenizer().n_vocab
    assert step(make_gpt(V), wordy)[0]["ratio"] == 1.0
    assert step(make_gpt(V), wordy, minibatches=2)[0]["ratio"] != 1.0
    assert step(make_gpt(V), wordy, minibatches=2, lr_scale=0.0)[0]["ratio"] == 1.0


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_memory_budget_does_not_change_the_step(make_gpt, normalize):
    """A budget that only fits fewer rows at a time must give the same loss and the same gradient."""
    V, found = get_tokenizer().n_vocab, []
    for max_tokens in (10_000, 60):
        metrics, _ = step(make_gpt(V), wordy, make_gpt(V, seed=1), normalize=normalize, kl_coef=0.3,
                          max_tokens=max_tokens)
        found.append([metrics[name] for name in ("loss", "grad_norm", "kl", "entropy", "ratio")])
    assert torch.allclose(*map(torch.tensor, found), rtol=1e-4, atol=1e-6)


def test_equal_rewards_change_nothing(make_gpt):
    """Without a signal and without KL there is nothing to learn: the weights must not drift."""
    model = make_gpt(get_tokenizer().n_vocab)
    before = copy.deepcopy(model.state_dict())
    metrics, _ = step(model, lambda text, problem: {"reward": 0.1, "accuracy": 0.0})
    assert metrics["no_signal"] == 1 and metrics["length_wrong"] == metrics["length"]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("honest, shuffle, baseline", (
    (True, False, "group"), (True, False, "batch"), (False, False, "group"), (True, True, "group")))
def test_bandit(make_gpt, honest, shuffle, baseline):
    """One token, a reward for letters: a few steps must find them. The wrong sign, or credit given to the wrong row,
    cannot; and a reward dealt at random, or to another answer than the one that earned it, must not."""
    encoding, rng = get_tokenizer(), random.Random(0)
    model, prompt = make_gpt(encoding.n_vocab), encoding.encode_ordinary(parse("1+2").prompt)

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
        grpo_step(model, None, optimizer, [parse("1+2")], reward_fn, encoding,
                  generator=torch.Generator().manual_seed(seed), baseline=baseline, shuffle=shuffle,
                  **STEP | {"samples": 64, "max_new_tokens": 1})
    after = chance()
    assert 0.1 < before < 0.3 and (after > 0.9 if honest and not shuffle else after < 0.5), (before, after)
