"""GRPO is compared with slow versions of the papers' formulas and with exact sums over a vocabulary. It must also solve
a bandit."""
import copy
import dataclasses
import itertools
import math
import random

import pytest
import torch

import grpo
from data.arithmetic import Arithmetic, parse
from engine.optimizer import Optimizer
from engine.speed.fast import RoundedHidden
from grpo import (GRPOConfig, Metrics, Rollout, group_advantages, grpo_loss, grpo_step, grpo_update, make_batch,
                  make_minibatch, micro_batches, random_minibatches, sample_rollout, token_loss, token_weights)
from model import GPT, token_logprobs
from tests.conftest import Descent

TASK = Arithmetic()
CPU = torch.device("cpu")
NORMALIZE = ("sequence", "token", "constant")
MAX_LEN = 9
LENGTHS = [7, 1, 4, 5, 2, 7, 3, 6]  # of the completions in `batch`, 35 tokens
ADVANTAGES = [1.2, -0.7, 0.5, -1.0, 0.0, 0.9, -1.4, 0.5]
ROW = torch.arange(8).repeat_interleave(torch.tensor(LENGTHS))  # (35,)
PLAIN = {"clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.0}


@pytest.fixture
def batch():
    """The 35 tokens of eight completions. The policy has changed since it sampled them: the ratios are from about 0.4
    to 2.5."""
    torch.manual_seed(0)
    logp_old = -2 * torch.rand(35)
    return {"logp": logp_old + 0.5 * torch.randn(35), "logp_old": logp_old,
            "logp_ref": logp_old + 0.3 * torch.randn(35), "adv": torch.tensor(ADVANTAGES)[ROW]}


def weights(normalize):
    """The weight of each token of `batch`, (35,)."""
    return token_weights(torch.tensor(LENGTHS), normalize, MAX_LEN)[ROW]


def loss_and_gradient(batch, normalize="token", tokens=slice(None), **options):
    """grpo_loss of some tokens of the batch, and its gradient with respect to logp -> (scalar, (M,), sums)."""
    logp = batch["logp"][tokens].clone().requires_grad_()
    logp_ref = None if batch["logp_ref"] is None else batch["logp_ref"][tokens]
    loss, sums = grpo_loss(logp, batch["logp_old"][tokens], logp_ref, batch["adv"][tokens], weights(normalize)[tokens],
                           **PLAIN | options)
    gradient, = torch.autograd.grad(loss, logp)
    return loss.detach(), gradient, sums


# The loss


def slow_loss(batch, clip_low, clip_high, kl_coef, normalize):
    """Eq. 3 of DeepSeekMath token by token in plain Python -> (loss, numbers of clipped tokens, sums of ratio and
    KL)."""
    lists = {name: value.tolist() for name, value in batch.items()}
    objectives, n_low, n_high, ratio, kl = [], 0, 0, 0.0, 0.0
    for i in range(8):
        terms, A = [], ADVANTAGES[i]
        for t in (t for t in range(35) if ROW[t] == i):
            rho = math.exp(lists["logp"][t] - lists["logp_old"][t])
            clipped = 1 - clip_low if rho < 1 - clip_low else 1 + clip_high if rho > 1 + clip_high else rho
            r = math.exp(lists["logp_ref"][t]) / math.exp(lists["logp"][t])
            terms.append(min(rho * A, clipped * A) - kl_coef * (r - math.log(r) - 1))
            n_low += A < 0 and rho < 1 - clip_low
            n_high += A > 0 and rho > 1 + clip_high
            ratio += rho
            kl += r - math.log(r) - 1
        objectives.append(terms)
    objective = {"sequence": sum(sum(terms) / len(terms) for terms in objectives) / 8,
                 "token": sum(map(sum, objectives)) / 35,
                 "constant": sum(map(sum, objectives)) / (8 * MAX_LEN)}[normalize]
    return -objective, n_low, n_high, ratio, kl


@pytest.mark.parametrize("kl_coef", (0.0, 0.3))
@pytest.mark.parametrize("clip_low, clip_high", ((0.2, 0.2), (0.2, 0.5), (0.4, 0.1), (0.99, 1e9)))
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_loss_is_the_papers(batch, normalize, clip_low, clip_high, kl_coef):
    """A policy would still learn with max in place of min, a clip on the wrong side, another average, or a KL of the
    wrong sign, so only the formula itself shows such a bug. The logged values must be sums, because means would be
    divided twice."""
    expected, n_low, n_high, ratio, kl = slow_loss(batch, clip_low, clip_high, kl_coef, normalize)
    assert (n_low > 0 and n_high > 0) or clip_high == 1e9, "both clips should be active here"
    loss, _, sums = loss_and_gradient(batch, normalize, clip_low=clip_low, clip_high=clip_high, kl_coef=kl_coef)
    assert abs(loss.item() - expected) < 1e-5
    assert sums["clip_fraction_low"] == n_low and sums["clip_fraction_high"] == n_high
    assert sums["ratio"].item() == pytest.approx(ratio, rel=1e-5) and sums["kl"].item() == pytest.approx(kl, rel=1e-4)
    assert not any(value.requires_grad for value in sums.values())


def test_token_weights_are_the_papers():
    """DeepSeekMath, eq. 3: 1/N sum_i 1/|o_i| sum_t. DAPO: 1/(sum_i |o_i|) sum_i sum_t. Dr. GRPO: 1/(N max_len), with
    the generation budget. A policy would still learn if a weight used the longest answer instead of the budget, or the
    answer's own length instead of the mean length."""
    lengths = torch.tensor([1, 4, 3])
    assert torch.allclose(token_weights(lengths, "sequence", 10), torch.tensor([1 / 3, 1 / 12, 1 / 9]))
    assert torch.allclose(token_weights(lengths, "token", 10), torch.tensor([1 / 8, 1 / 8, 1 / 8]))
    assert torch.allclose(token_weights(lengths, "constant", 10), torch.tensor([1 / 30, 1 / 30, 1 / 30]))
    for normalize, total in (("sequence", 1.0), ("token", 1.0), ("constant", 8 / 30)):
        assert (token_weights(lengths, normalize, 10) * lengths).sum().item() == pytest.approx(total)
        assert token_weights(lengths[:0], normalize, 10).shape == (0,), "a minibatch may have no rows"


def test_clipped_tokens_have_no_gradient(batch):
    """The clip must not stop the gradient on both sides. A token with a positive advantage that became less likely must
    still become more likely. A token with a negative advantage that became more likely must still become less
    likely."""
    _, gradient, _ = loss_and_gradient(batch)
    ratio, adv = (batch["logp"] - batch["logp_old"]).exp(), batch["adv"]
    still = (adv == 0) | ((adv > 0) & (ratio > 1.2)) | ((adv < 0) & (ratio < 0.8))
    assert torch.equal(gradient != 0, ~still)
    assert ((gradient != 0) & (ratio < 0.8)).any() and ((gradient != 0) & (ratio > 1.2)).any()


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_on_policy_loss_and_gradient(batch, normalize):
    """On policy the loss may be 0, but the gradient must not be. DeepSeekMath, eq. 21, gives the gradient of each token
    on policy: -(A + beta (pi_ref/pi_theta - 1)) * weight."""
    batch["logp_old"] = batch["logp"]
    lengths = torch.tensor(LENGTHS)[ROW]
    weight = {"sequence": 1 / lengths / 8, "token": torch.full((35,), 1 / 35),
              "constant": torch.full((35,), 1 / (8 * MAX_LEN))}[normalize]  # (35,)
    for kl_coef in (0.0, 0.3):
        _, gradient, sums = loss_and_gradient(batch, normalize, kl_coef=kl_coef)
        pull = (batch["logp_ref"] - batch["logp"]).exp() - 1
        assert torch.allclose(gradient, -(batch["adv"] + kl_coef * pull) * weight, atol=1e-6)
        assert sums["ratio"].item() == 35 and sums["clip_fraction_low"] == sums["clip_fraction_high"] == 0

    # On policy the "sequence" loss is 0, and yet there is something to learn.
    assert abs(sum(ADVANTAGES)) < 1e-6
    loss, gradient, _ = loss_and_gradient(batch, normalize)
    length_weighted = -(batch["adv"] * weight).sum().item()
    assert abs(loss.item() - length_weighted) < 1e-6 and gradient.abs().max() > 0.01
    assert abs(loss.item()) < 1e-6 if normalize == "sequence" else abs(loss.item()) > 0.01


def test_k3_as_a_loss_has_the_gradient_of_kl_ref_policy():
    """As a loss term, k1 has a gradient of 0 on average, and k2 has the gradient of KL(policy || ref). Exact sums over
    a vocabulary must show that our penalty has the gradient of KL(ref || policy), as grpo.py says."""
    torch.manual_seed(0)
    z, log_ref = torch.randn(6, requires_grad=True), torch.randn(6).log_softmax(0)

    def gradient(x):
        return torch.autograd.grad(x, z, retain_graph=True)[0]

    log_pi = z.log_softmax(0)
    expected = torch.zeros(6)
    for x in range(6):  # E_{x ~ pi} of the gradient of the loss of sampling x, with reward 0
        logp = log_pi[x].view(1)
        loss, _ = grpo_loss(logp, logp.detach(), log_ref[x].view(1), torch.zeros(1), torch.ones(1),
                            **PLAIN | {"kl_coef": 1.0})
        expected += log_pi[x].exp().detach() * gradient(loss)
    assert torch.allclose(expected, gradient((log_ref.exp() * (log_ref - log_pi)).sum()), atol=1e-6)
    assert not torch.allclose(expected, gradient((log_pi.exp() * (log_pi - log_ref)).sum()), atol=1e-2)


def test_kl_to_oneself_is_nothing(batch):
    """The penalty must not move a policy that equals its reference: KL and gradient are 0 there. For another policy the
    logged KL must be positive, and must not be multiplied by kl_coef."""
    kl = (batch["logp_ref"] - batch["logp"]).exp() - 1 - (batch["logp_ref"] - batch["logp"])
    for kl_coef in (0.0, 1.0):
        _, _, sums = loss_and_gradient(batch, kl_coef=kl_coef)
        assert abs(sums["kl"] - kl.sum()) < 1e-5 and sums["kl"] > 0
    batch |= {"logp_old": batch["logp"], "logp_ref": batch["logp"], "adv": torch.zeros(35)}
    loss, gradient, sums = loss_and_gradient(batch, kl_coef=1.0)
    assert loss == sums["kl"] == 0 and not gradient.any()


def test_no_reference_is_no_kl(batch):
    """Without a penalty, a step must not need the reference, whose pass costs time, and the log must not have a KL of
    0. A penalty without a reference must not be silently left out."""
    expected, *_ = loss_and_gradient(batch)
    loss, _, sums = loss_and_gradient(batch | {"logp_ref": None})
    assert loss == expected and "kl" not in sums
    with pytest.raises(AssertionError, match="reference"):
        loss_and_gradient(batch | {"logp_ref": None}, kl_coef=0.1)


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_micro_batches_add_up(batch, normalize):
    """If each micro-batch took its own mean, the tokens of a micro-batch of short completions would weigh more than
    others."""
    loss, gradient, sums = loss_and_gradient(batch, normalize, kl_coef=0.3)
    tokens = [torch.isin(ROW, torch.tensor(rows)).nonzero()[:, 0] for rows in ([4], [0, 7, 2], [1, 3, 5, 6])]
    parts = [loss_and_gradient(batch, normalize, part, kl_coef=0.3) for part in tokens]
    assert torch.allclose(sum(part[0] for part in parts), loss, atol=1e-6)
    assert torch.allclose(torch.cat([part[1] for part in parts]), gradient[torch.cat(tokens)], atol=1e-6)
    assert all(torch.allclose(sum(part[2][name] for part in parts), sums[name]) for name in sums)


def test_no_tokens_are_no_loss(batch):
    """A batch without tokens must not divide by zero."""
    loss, gradient, sums = loss_and_gradient(batch, tokens=slice(0), kl_coef=0.3)
    assert loss == 0 and gradient.shape == (0,) and all(value == 0 for value in sums.values())


def test_inputs_are_left_alone(batch):
    """If a function changed a caller's tensor in place, the logged reward would become the advantage, and the next step
    would see other data."""
    rewards, lengths, weight = torch.rand(2, 4), torch.tensor([3, 4, 5]), torch.rand(35)
    inputs = [*batch.values(), rewards, lengths, weight]
    copies, versions = [x.clone() for x in inputs], [x._version for x in inputs]
    for normalize in NORMALIZE:
        token_weights(lengths, normalize, MAX_LEN)
    grpo_loss(*batch.values(), weight, **PLAIN | {"kl_coef": 0.3})
    group_advantages(rewards, "std"), group_advantages(rewards, "none")
    assert all(torch.equal(x, y) for x, y in zip(inputs, copies)) and [x._version for x in inputs] == versions


def test_unknown_normalizers_are_refused():
    """A misspelt normalizer must not silently become another one."""
    with pytest.raises(ValueError, match="mean"):
        token_weights(torch.tensor([3, 4]), "mean", MAX_LEN)


# Advantages


@pytest.mark.parametrize("scale", ("std", "none"))
def test_advantages_are_trls(scale):
    """A standard deviation with G in place of G - 1, a mean over the batch in place of the group, or a missing 1e-4
    would change the size of every advantage."""
    rewards = torch.rand(5, 4)
    rewards[3] = 0.7 + torch.tensor([0.0, 1e-4, 0.0, 0.0])  # rewards so close that the 1e-4 matters
    for group, adv in zip(rewards.double().tolist(), group_advantages(rewards, scale)):
        mean = sum(group) / 4
        std = (sum((r - mean) ** 2 for r in group) / 3) ** 0.5
        expected = torch.tensor([(r - mean) / (std + 1e-4 if scale == "std" else 1) for r in group])
        assert torch.allclose(adv, expected, atol=2e-3)
    with pytest.raises(ValueError):
        group_advantages(rewards, "variance")


def test_a_group_of_one_is_refused():
    """The standard deviation of one number is NaN, and the weights would become NaN too."""
    with pytest.raises(ValueError, match="two or more"):
        group_advantages(torch.ones(3, 1))


@pytest.mark.parametrize("scale", ("std", "none"))
def test_equal_rewards_are_no_advantage(scale):
    """0/0 is NaN. If the mean is off by a rounding error, division by 1e-4 gives an advantage of 0.001. Adam would turn
    it into a full step if no group of the batch has a signal."""
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
    """A rollout of given tokens. Each token has another log-probability of the sampler, from -8 to 0."""
    count, n = itertools.count(1), len(prompts)
    logp = [[-(next(count) * 997 % 8191) / 1024 for _ in c] for c in completions]
    return Rollout(prompts, completions, logp, [""] * n, [True] * n,
                   [{"reward": float(i % 2), "accuracy": 1.0} for i in range(n)])


def random_rollout(n=24, longest=12):
    """A rollout of random tokens of a vocabulary of 11, prompts and completions of many lengths."""
    rng = random.Random(0)
    return make_rollout(*([[rng.randrange(11) for _ in range(rng.randint(1, most))] for _ in range(n)]
                          for most in (9, longest)))


def assert_holds(batch, rollout, rows):
    """The batch must have exactly these rows in this order, complete, padded on the right, and with each sampled token
    once."""
    n, T = len(rows), max(len(rollout.prompts[i] + rollout.completions[i]) for i in rows)
    assert batch.idx.shape == (n, T) and batch.mask.shape == (n, T - 1) and batch.mask.dtype == torch.bool
    for i, tokens, on in zip(rows, batch.idx, batch.mask):
        first, end = len(rollout.prompts[i]), len(rollout.prompts[i] + rollout.completions[i])
        assert tokens[:end].tolist() == rollout.prompts[i] + rollout.completions[i] and not tokens[end:].any()
        assert on.nonzero()[:, 0].tolist() == list(range(first - 1, end - 1))
    assert batch.row.tolist() == [i for i in rows for _ in rollout.completions[i]]
    assert batch.sampler_logp.tolist() == [logp for i in rows for logp in rollout.sampler_logp[i]]
    assert batch.idx[:, 1:][batch.mask].tolist() == [token for i in rows for token in rollout.completions[i]]


def test_a_batch_trains_every_sampled_token_and_no_other():
    """A mask from `token != pad` would leave out the stop token if it is also the pad, and include a stop token in the
    prompt. Here the stop token is 0 (like the pad) or 9, and is in prompts and completions."""
    for stop in (0, 9):
        prompts, completions = [[1, stop, 2], [3], [4, 5]], [[6, 7, stop], [stop], [6, stop, 6, 6]]
        rollout = make_rollout(prompts, completions)
        for rows in ([0, 1, 2], [2, 0], [1]):
            assert_holds(make_batch(rollout, rows, CPU), rollout, rows)


def test_micro_batches_hold_each_row_once_and_keep_the_budget():
    """Sorting must not lose or repeat a row. The budget must include the padding, or long rows would run out of memory:
    a length counts as the multiple of 8 to which it is rounded up. Fewer batches must not be possible, because a batch
    costs time. A last batch of few rows would leave much padding in the others."""
    rng = random.Random(0)
    for _ in range(100):
        n = rng.randint(1, 120)
        rollout = make_rollout([[1] * rng.randint(3, 20) for _ in range(n)],
                               [[2] * rng.randint(1, 60) for _ in range(n)])
        chosen, seen, sizes = rng.sample(range(n), rng.randint(1, n)), [], []
        length = [math.ceil((len(p + c) - 1) / 8) * 8 for p, c in zip(rollout.prompts, rollout.completions)]
        for batch in micro_batches(rollout, chosen, 1000, CPU):
            rows = batch.row.unique_consecutive().tolist()
            assert_holds(batch, rollout, rows)
            assert len(rows) * max(length[row] for row in rows) <= 1000
            sizes.append(len(rows))
            seen += rows
        assert sorted(seen) == sorted(chosen) and max(sizes) - sizes[-1] < len(sizes) and len(set(sizes[:-1])) <= 1
        assert [length[row] for row in seen] == sorted(length[row] for row in seen)
        if len(sizes) > 1:
            size = math.ceil(len(seen) / (len(sizes) - 1))  # of one batch fewer
            fewer = [seen[i:i + size] for i in range(0, len(seen), size)]
            assert any(len(rows) * length[rows[-1]] > 1000 for rows in fewer), "fewer batches would have been enough"
        everything, = micro_batches(rollout, chosen, 0, CPU)  # 0: of any size
        assert sorted(everything.row.unique_consecutive().tolist()) == sorted(chosen)


def test_micro_batches_have_few_sizes(make_gpt, monkeypatch):
    """Without rounding there would be a hundred sizes, and a CPU would need new kernels for each. If rounded sizes
    exceeded the budget, they would not fit the compiled code."""
    rng, sizes = random.Random(0), set()

    def noted(model, idx):
        sizes.add(tuple(idx.shape))
        return torch.zeros(*idx.shape, 1)

    monkeypatch.setattr(GPT, "hidden", noted)
    model = make_gpt(block_size=128)
    model.hidden = RoundedHidden(model, 1000)
    for _ in range(100):
        n = rng.randint(1, 120)
        rollout = make_rollout([[1] * rng.randint(3, 20) for _ in range(n)],
                               [[2] * rng.randint(1, 60) for _ in range(n)])
        for batch in micro_batches(rollout, list(range(n)), 1000, CPU):
            assert model.hidden(batch.idx[:, :-1]).shape[:2] == batch.mask.shape
    assert all(rows * length <= 1000 for rows, length in sizes)
    assert len(sizes) < 40, f"{len(sizes)} different sizes"


def test_a_row_over_the_budget_goes_alone():
    """A row that is longer than the budget must not be dropped, or end the run."""
    rollout = make_rollout([[1] * 400, [1] * 2, [1] * 300], [[2] * 100, [2], [2] * 90])
    batches = micro_batches(rollout, [0, 1, 2], 120, CPU)
    assert [batch.row.unique().tolist() for batch in batches] == [[1], [2], [0]]
    assert [len(batch.idx) for batch in batches] == [1, 1, 1]


def test_no_rows_are_no_micro_batch():
    """A minibatch without rows must give no micro-batch. It has no longest row to pad to."""
    assert micro_batches(make_rollout([[1, 2, 3], [4]], [[5], [6, 7]]), [], 120, CPU) == []


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_each_token_has_what_its_row_has(normalize):
    """The tokens of several rows are in one vector. If an index were off by a row, a token would get the advantage, the
    weight or the sampler's log-probability of another completion. If a weight counted only the rows with a signal
    instead of all rows of the minibatch, it would grow as signals become rare."""
    rollout, adv, rows = random_rollout(), torch.tensor([0.0, 1.2, -0.7, 0.4] * 6), torch.tensor([13, 2, 8, 3, 0, 21])
    cfg = GRPOConfig(normalize=normalize, micro_batch=50, rl_max_new_tokens=12)
    batches, share = make_minibatch(rollout, rows, adv, cfg, CPU)
    lengths = [len(rollout.completions[i]) for i in rows]
    assert share == (sum(lengths) if normalize == "token" else 6)
    assert len(batches) > 1 and sorted(i for b in batches for i in b.row.unique().tolist()) == [2, 3, 13, 21]
    for batch in batches:
        assert_holds(batch, rollout, batch.row.unique_consecutive().tolist())
        for i, a, weight in zip(batch.row.tolist(), batch.adv.tolist(), batch.weight.tolist()):
            n = len(rollout.completions[i])
            expected = {"sequence": 1 / (6 * n), "token": 1 / sum(lengths), "constant": 1 / (6 * 12)}[normalize]
            assert a == adv[i] and weight == pytest.approx(expected)
        assert len(batch.adv) == len(batch.weight) == int(batch.mask.sum())
        assert batch.logp_old is None and batch.logp_ref is None


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_a_row_without_tokens_does_no_harm(make_gpt, normalize):
    """A row without tokens must not cause a division by zero. It counts as a row, and adds nothing to the loss."""
    rollout = make_rollout([[1, 2], [3]], [[4, 5, 6], []])
    cfg, policy = GRPOConfig(normalize=normalize, rl_max_new_tokens=5, rl_samples=2, kl_coef=0.0), make_gpt(spread=3.0)
    batches, _ = make_minibatch(rollout, torch.tensor([0, 1]), torch.tensor([1.0, -1.0]), cfg, CPU)
    assert [batch.row.tolist() for batch in batches] == [[0, 0, 0]]
    weight = {"sequence": 1 / 6, "token": 1 / 3, "constant": 1 / 10}[normalize]
    assert torch.allclose(batches[0].weight, torch.full((3,), weight))
    optimizer = Descent(policy, distance=0.1)
    metrics = grpo_update(policy, None, optimizer, rollout, torch.tensor([1.0, -1.0]),
                          dataclasses.replace(cfg, rl_minibatches=1)).means()
    assert metrics["loss"] == pytest.approx(-3 * weight) and optimizer.gradients[0].isfinite().all()


class Poisoned:
    """A model's `hidden`, with junk at all positions where no token was sampled: in prompts and in the padding."""

    def __init__(self, model, batches, junk):
        self.model, self.batches, self.junk, self.reads = model, batches, junk, 0

    def __call__(self, idx):
        hidden = GPT.hidden(self.model, idx)
        if torch.is_inference_mode_enabled():
            return hidden  # it samples
        self.reads += 1
        mask = next(batch.mask for batch in self.batches if torch.equal(batch.idx[:, :-1], idx))
        return hidden.masked_fill(~mask[..., None], self.junk)


def poison(monkeypatch, module, junk, *models):
    """From here on, the hidden states are junk outside the completions, for all micro-batches that the module makes."""
    batches = []

    def noted(*args):
        made = micro_batches(*args)
        batches.extend(made)
        return made

    monkeypatch.setattr(module, "micro_batches", noted)
    for model in models:
        model.hidden = Poisoned(model, batches, junk)


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("junk", (float("nan"), float("inf"), -float("inf"), 1e4, 0.0))
def test_padding_changes_nothing(make_gpt, monkeypatch, normalize, junk):
    """A mean must not include padding. Since 0 * NaN is NaN, a mask that multiplies would let one bad number in the
    padding destroy the weights. Here the hidden states of all positions outside the completions are junk."""
    cfg = GRPOConfig(normalize=normalize, rl_samples=8, rl_max_new_tokens=12, rl_minibatches=2, kl_coef=0.3,
                     micro_batch=120)
    rollout, adv, found = random_rollout(), torch.tensor([0.0, 1.2, -0.7, 0.4] * 6), []
    for poisoned in (False, True):
        policy, reference = make_gpt(spread=3.0), make_gpt(seed=1, spread=3.0)
        if poisoned:
            poison(monkeypatch, grpo, junk, policy, reference)
        optimizer = Descent(policy, distance=1.0)
        metrics = grpo_update(policy, reference, optimizer, rollout, adv, cfg, torch.Generator().manual_seed(0))
        found.append((metrics.means(), optimizer.gradients))
    (metrics, gradients), (poisoned_metrics, poisoned_gradients) = found
    assert policy.hidden.reads > reference.hidden.reads > 3, "both models should be poisoned"
    assert metrics == poisoned_metrics
    assert all(torch.equal(a, b) for a, b in zip(gradients, poisoned_gradients)) and gradients[1].any()


def test_other_tokens_in_the_padding_change_nothing(make_gpt):
    """If a token could attend to the tokens on its right, its log-probability would depend on the lengths of the other
    rows in its batch."""
    model, rollout = make_gpt(spread=3.0), random_rollout()
    batch = make_batch(rollout, list(range(24)), CPU)
    logp = token_logprobs(model, batch.idx, batch.mask)
    end = torch.tensor([len(p + c) for p, c in zip(rollout.prompts, rollout.completions)])[:, None]
    idx = torch.where(torch.arange(batch.idx.size(1)) < end, batch.idx, torch.randint(11, batch.idx.shape))
    assert (idx != batch.idx).sum() > 50
    assert torch.allclose(token_logprobs(model, idx, batch.mask), logp, atol=1e-6)
    for i in range(24):
        alone = make_batch(rollout, [i], CPU)
        assert torch.allclose(token_logprobs(model, alone.idx, alone.mask), logp[batch.row == i], atol=1e-5)


def test_masks_of_any_type(make_gpt):
    """A mask of uint8 must not be used as an index itself, because it would select rows instead of tokens."""
    model, batch = make_gpt(), make_batch(random_rollout(), list(range(24)), CPU)
    logp = token_logprobs(model, batch.idx, batch.mask)
    for dtype in (torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32):
        assert torch.equal(token_logprobs(model, batch.idx, batch.mask.to(dtype)), logp), dtype


def test_minibatches_deal_each_row_once():
    """If rows were sampled with replacement, or if the remainder were dropped, some completions would not be trained
    on."""
    def deal(n, k, seed):
        return [part.tolist() for part in random_minibatches(n, k, torch.Generator().manual_seed(seed))]

    for n, k in ((16, 4), (10, 3), (5, 5), (3, 5), (0, 2)):
        parts = deal(n, k, seed=0)
        assert len(parts) == k and sorted(sum(parts, [])) == list(range(n))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1 and parts == deal(n, k, seed=0)
        assert parts != deal(n, k, seed=1) or n < 4
    assert sorted(torch.cat(random_minibatches(9, 2, None)).tolist()) == list(range(9)), "without a generator, too"


def test_a_rollout_trains_the_tokens_that_were_sampled(make_gpt):
    """Decoding and encoding again does not give the sampled tokens back, as the random bytes here show. A text that
    still has its end-of-text token would not be well formed, so stopping would cost the reward."""
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
    for batch in micro_batches(rollout, list(range(16)), 80, CPU):
        rows, logp = batch.row.unique_consecutive().tolist(), token_logprobs(model, batch.idx, batch.mask)
        assert_holds(batch, rollout, rows)
        for i, tokens in zip(rows, batch.idx):
            assert encoding.decode(tokens[:len(rollout.prompts[i])].tolist()) == problems[i // 8].prompt
            assert torch.allclose(logp[batch.row == i], torch.tensor(rollout.sampler_logp[i]), atol=1e-4)
        seen += rows
    assert sorted(seen) == list(range(16))


class TwoStops(Arithmetic):
    """The task with two stop tokens, as a chat model has them. The second is a word piece, which has a text of its
    own."""
    stop_ids = (*Arithmetic.stop_ids, TASK.encoding.encode_ordinary("<answer>")[0])

    def encode_prompt(self, problem):
        return super().encode_prompt(problem)[::-1]


def test_a_task_decides_prompts_and_stop_tokens(make_gpt):
    """If a rollout knew only the encoding's end-of-text token, it would score texts that contain other stop tokens, and
    count these completions as truncated. If it encoded the prompt itself, the prompt would lack the text that the task
    puts around a problem."""
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

STEP = GRPOConfig(rl_samples=8, rl_max_new_tokens=6, rl_minibatches=1, clip_low=0.2, clip_high=0.2, kl_coef=0.0,
                  normalize="token", scale="std", micro_batch=4096)
QUESTIONS = ("1+2", "3*4", "20-7")


def step(model, reward_fn, reference=None, seed=0, optimizer=None, lr_scale=1.0, loss_fn=token_loss, **options):
    """grpo_step with the settings of STEP, changed by the options -> (the logged means, the rollout)."""
    metrics, rollout = grpo_step(model, reference, optimizer or Optimizer(model, adam_lr=0.01, muon_lr=0.02),
                                 [parse(q) for q in QUESTIONS], reward_fn, TASK, dataclasses.replace(STEP, **options),
                                 torch.Generator().manual_seed(seed), lr_scale, loss_fn)
    return metrics.means(), rollout


def test_a_step_takes_a_loss_of_ones_own(make_gpt):
    """A fork gives its loss to grpo_step. It must not be dropped on the way."""
    def doubled(logp, batch, cfg):
        loss, sums = token_loss(logp, batch, cfg)
        return 2 * loss, sums

    once, twice = (step(chatty(make_gpt), wordy, loss_fn=loss_fn)[0]["grad_norm"]
                   for loss_fn in (token_loss, doubled))
    assert once > 0 and twice == pytest.approx(2 * once)


def wordy(text, problem):
    """A reward with groups of all kinds: "1+2" is always rewarded, "3*4" never, and "20-7" if the first character is
    ASCII."""
    right = float(problem.question == "1+2" or problem.question == "20-7" and "\0" < text[:1] < "\x7f")
    return {"reward": right, "accuracy": right}


def equal_rewards(text, problem):
    """The same reward for every answer, which gives no signal."""
    return {"reward": 0.1, "accuracy": 0.0}


def slow_logprobs(model, rollout, i):
    """The log-probabilities of the tokens of completion i, from all logits of this row alone, (n,)."""
    tokens, n = torch.tensor(rollout.prompts[i] + rollout.completions[i]), len(rollout.completions[i])
    logits = model(tokens[None, :-1])[0, -n:]  # (n, V)
    return logits.log_softmax(dim=-1)[torch.arange(n), tokens[-n:]]


def slow_update(policy, reference, optimizer, rollout, adv, cfg, minibatches, lr_scale, everything):
    """grpo_update as in the papers: one row at a time without padding, every row of a minibatch in its average, and a
    copy of the policy as pi_old -> metrics. Rows with advantage 0 are skipped. With `everything` the penalty acts on
    them too."""
    old, sums, losses, norm_sum = copy.deepcopy(policy), {}, [], 0.0
    for rows in minibatches:
        lengths = [len(rollout.completions[i]) for i in rows]
        n_tokens, loss_sum = sum(lengths), 0.0
        for i, n in zip(rows, lengths):
            if adv[i] == 0 and not everything:
                continue
            weight = {"sequence": 1 / len(rows) / n, "token": 1 / n_tokens,
                      "constant": 1 / len(rows) / cfg.rl_max_new_tokens}[cfg.normalize]
            logp = slow_logprobs(policy, rollout, i)  # (n,)
            with torch.no_grad():
                logp_old, logp_ref = (slow_logprobs(model, rollout, i) for model in (old, reference))
            loss, found = grpo_loss(logp, logp_old, logp_ref if cfg.kl_coef else None, adv[i].expand(n),
                                    torch.full((n,), weight), clip_low=cfg.clip_low, clip_high=cfg.clip_high,
                                    kl_coef=cfg.kl_coef)
            loss.backward()
            loss_sum += loss.item()
            found["sampler_gap"] = (logp_old - torch.tensor(rollout.sampler_logp[i])).abs().sum()
            for name, value in found.items():
                total, count = sums.get(name, (0.0, 0))
                sums[name] = total + value.item(), count + n
        losses.append((loss_sum, n_tokens if cfg.normalize == "token" else len(rows)))
        norm_sum += optimizer.step(lr_scale).item() / len(minibatches)
    means = {name: total / count for name, (total, count) in sums.items()}
    loss = sum(loss * share for loss, share in losses) / sum(share for _, share in losses)
    return means | {"loss": loss, "grad_norm": norm_sum} | ({} if cfg.kl_coef else {"kl": None})


@pytest.mark.parametrize("micro_batch", (4096, 60))
@pytest.mark.parametrize("minibatches", (1, 3))
@pytest.mark.parametrize("kl_coef, everything", ((0.0, False), (0.3, False), (0.3, True)))
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_update_is_the_slow_one(make_gpt, normalize, kl_coef, everything, minibatches, micro_batch):
    """Each of these bugs still trains a policy: a shifted mask, training on padding, advantages of other rows, an
    average over only the rows with a signal, an average for each micro-batch, a pi_old that moves with the policy,
    swapped clips, a penalty on rows that should be skipped, or metrics of the last micro-batch. The slow update, one
    row at a time, has none of these bugs. With a tiny advantage in place of 0, an update must compute all rows, so that
    the penalty acts on all (Algorithm 1 of DeepSeekMath)."""
    cfg = dataclasses.replace(STEP, normalize=normalize, kl_coef=kl_coef, rl_minibatches=minibatches,
                              micro_batch=micro_batch, rl_max_new_tokens=12, clip_low=0.15, clip_high=0.3)
    rollout, reference = random_rollout(), make_gpt(seed=1, spread=3.0)
    adv = torch.tensor([0.0, 1.2, -0.7, 0.4, 0.0, -1.5, 0.9, -0.3] * 3)

    policy = make_gpt(spread=3.0)
    optimizer, generator = Descent(policy, distance=1.4), torch.Generator().manual_seed(3)
    metrics = grpo_update(policy, reference, optimizer, rollout, adv.where(adv != 0, 1e-30) if everything else adv, cfg,
                          generator, 0.5).means()
    policy = make_gpt(spread=3.0)
    slow_optimizer, generator = Descent(policy, distance=1.4), torch.Generator().manual_seed(3)
    parts = [part.tolist() for part in random_minibatches(24, minibatches, generator)]
    slow_metrics = slow_update(policy, reference, slow_optimizer, rollout, adv, cfg, parts, 0.5, everything)

    assert len(optimizer.gradients) == len(slow_optimizer.gradients) == minibatches
    for gradient, slow in zip(optimizer.gradients, slow_optimizer.gradients):
        assert (gradient - slow).norm() < 1e-4 * slow.norm()
    if minibatches > 1:
        both = slow_metrics["clip_fraction_low"], slow_metrics["clip_fraction_high"]
        assert min(both) > 0, "both clips should be active here"
    if everything:
        # rows with a tiny advantage are clipped too, and then counted
        assert metrics.pop("clip_fraction_high") >= slow_metrics.pop("clip_fraction_high")
    for name, value in slow_metrics.items():
        assert metrics[name] == (value if value is None else pytest.approx(value, rel=1e-4, abs=1e-6)), name


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_loss_is_averaged_over_all_completions(make_gpt, normalize):
    """Rows with advantage 0 are skipped, but must count in the average. Otherwise a minibatch with a signal in one
    group of a hundred would have as large a gradient as one with a signal in all groups."""
    policy = chatty(make_gpt)
    rollout = sample_rollout(policy, [parse(q) for q in QUESTIONS], wordy, TASK, samples=8, max_new_tokens=6,
                             generator=torch.Generator().manual_seed(0))
    adv = torch.zeros(24)
    adv[5], n = 1.5, [len(c) for c in rollout.completions]
    weight = {"sequence": 1 / 24, "token": n[5] / sum(n), "constant": n[5] / (24 * 6)}[normalize]
    metrics = grpo_update(policy, None, Optimizer(policy, adam_lr=0.0), rollout, adv,
                          dataclasses.replace(STEP, normalize=normalize), torch.Generator().manual_seed(0)).means()
    assert metrics["loss"] == pytest.approx(-1.5 * weight, rel=1e-4)
    policy = chatty(make_gpt)
    (-1.5 * weight * slow_logprobs(policy, rollout, 5).mean()).backward()
    norm = torch.stack([p.grad.norm() for p in policy.parameters()]).norm().item()
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-3)


class Still:
    """An optimizer that changes no weights, and keeps the arguments of each step."""

    def __init__(self, model):
        self.model, self.told = model, []

    def step(self, lr_scale, share, has_gradient):
        assert has_gradient == any(p.grad is not None for p in self.model.parameters())
        self.told.append((lr_scale, share, has_gradient))
        self.model.zero_grad()
        return torch.ones(())


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_the_logged_loss_is_the_mean_over_everything(make_gpt, normalize):
    """Minibatches differ in their numbers of rows or tokens. If they had equal weights in the logged loss, it would
    depend on how the rows were dealt. With several ranks, the optimizer weights a gradient by the number of rows or
    tokens that it is a mean over, so this number must be correct."""
    policy, rollout, found = make_gpt(spread=3.0), random_rollout(), {}
    adv = torch.randn(24, generator=torch.Generator().manual_seed(0))
    adv[:3] = 0.0
    for minibatches in (1, 5, 30):
        losses, optimizer = [], Still(policy)

        def noted(logp, batch, cfg):
            loss, sums = grpo.token_loss(logp, batch, cfg)
            losses.append(loss.item())
            return loss, sums

        cfg = dataclasses.replace(STEP, normalize=normalize, rl_minibatches=minibatches, rl_max_new_tokens=12)
        metrics = grpo_update(policy, None, optimizer, rollout, adv, cfg, torch.Generator().manual_seed(0), 0.25, noted)
        found[minibatches] = metrics.means()["loss"]
        lr_scales, shares, has_gradient = zip(*optimizer.told)
        n_tokens = sum(map(len, rollout.completions))
        assert len(shares) == minibatches and sum(shares) == (n_tokens if normalize == "token" else 24)
        assert set(lr_scales) == {0.25} and sum(has_gradient) == len(losses) == min(minibatches, 21)
        if minibatches == 5:
            assert abs(sum(losses) / 5 - found[5]) > 1e-3 * abs(found[5]), "the minibatches should differ here"
    assert found[5] == pytest.approx(found[1], rel=1e-4) and found[30] == pytest.approx(found[1], rel=1e-4)


def sequence_loss(logp, batch, cfg):
    """GSPO (arXiv 2507.18071) clips the ratio of a whole completion, the geometric mean of its tokens' ratios."""
    rows, position = batch.row.unique(return_inverse=True)  # (n,), (M,)
    n_tokens = position.bincount()                          # (n,)
    log_ratio = torch.zeros(len(rows)).index_add(0, position, logp - batch.logp_old) / n_tokens
    ratio = log_ratio.exp()[position]  # (M,)
    clipped = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    loss = -torch.min(ratio * batch.adv, clipped * batch.adv)
    return (loss * batch.weight).sum(), {"clipped": (clipped != ratio).sum()}


@pytest.mark.parametrize("micro_batch", (4096, 60))
def test_a_fork_needs_no_more_than_a_loss_function(make_gpt, micro_batch):
    """A loss on whole completions needs to know which tokens belong to one completion. If a batch did not say so or cut
    a row in two, or if an update used its own loss somewhere, a fork would have to copy the whole update."""
    cfg = dataclasses.replace(STEP, normalize="sequence", rl_minibatches=3, micro_batch=micro_batch, clip_low=0.05,
                              clip_high=0.05)
    rollout, adv = random_rollout(), torch.tensor([0.0, 1.2, -0.7, 0.4, 0.0, -1.5, 0.9, -0.3] * 3)
    policy, slow = make_gpt(spread=3.0), make_gpt(spread=3.0)
    optimizer, slow_optimizer = Descent(policy, distance=1.0), Descent(slow, distance=1.0)
    metrics = grpo_update(policy, None, optimizer, rollout, adv, cfg, torch.Generator().manual_seed(3),
                          loss_fn=sequence_loss).means()

    old, n_clipped, n_tokens = copy.deepcopy(slow), 0, 0
    for part in random_minibatches(24, 3, torch.Generator().manual_seed(3)):
        for i in (i for i in part.tolist() if adv[i]):
            ratio = (slow_logprobs(slow, rollout, i) - slow_logprobs(old, rollout, i).detach()).mean().exp()
            clipped = ratio.clamp(0.95, 1.05)
            (-torch.min(ratio * adv[i], clipped * adv[i]) / len(part)).backward()
            n_clipped += len(rollout.completions[i]) if clipped != ratio else 0
            n_tokens += len(rollout.completions[i])
        slow_optimizer.step()
    assert 0 < n_clipped < n_tokens and metrics["clipped"] == pytest.approx(n_clipped / n_tokens)
    for gradient, slow_gradient in zip(optimizer.gradients, slow_optimizer.gradients):
        assert (gradient - slow_gradient).norm() < 1e-4 * slow_gradient.norm()
    assert metrics["ratio"] is None, "what the loss does not count has no mean"


@pytest.mark.parametrize("scale", ("std", "none"))
def test_a_step_is_a_rollout_its_advantages_and_an_update(make_gpt, scale):
    """A step that ignores a setting of the advantages would still learn. The tests with several processes call
    grpo_update on a given rollout. So grpo_step must not do anything else to the policy, which these tests could not
    see."""
    options = {"rl_minibatches": 2, "kl_coef": 0.1, "scale": scale}
    stepped, updated, reference = chatty(make_gpt), chatty(make_gpt), chatty(make_gpt, seed=1)
    metrics, rollout = step(stepped, wordy, reference, seed=4, **options)
    generator = torch.Generator().manual_seed(4)
    again = sample_rollout(updated, [parse(q) for q in QUESTIONS], wordy, TASK, samples=8, max_new_tokens=6,
                           generator=generator)
    assert again == rollout
    adv = group_advantages(rollout.column("reward").view(3, 8), scale).flatten()
    assert grpo_update(updated, reference, Optimizer(updated, adam_lr=0.01, muon_lr=0.02), rollout, adv,
                       dataclasses.replace(STEP, **options), generator).means() == metrics
    assert all(torch.equal(updated.state_dict()[name], value) for name, value in stepped.state_dict().items())


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_step_reports_what_happened(make_gpt, normalize):
    """A metric must not be that of the last micro-batch or a mean of normalized rewards, and the ratio must be 1 if the
    policy has not changed. The test computes every metric a second time."""
    encoding, model = TASK.encoding, chatty(make_gpt)
    reference, untouched = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    metrics, rollout = step(model, wordy, reference, normalize=normalize, kl_coef=0.1, micro_batch=100)
    lengths = torch.tensor([len(c) for c in rollout.completions])
    rewards = torch.tensor([wordy(text, parse(q))["reward"] for text, q in zip(
        rollout.texts, [q for q in QUESTIONS for _ in range(8)])])
    truncated = [c[-1] != encoding.eot_token for c in rollout.completions]
    assert 0 < sum(truncated) < 24 and 0 < rewards[16:].sum() < 8, "all kinds should occur here"
    with torch.no_grad():
        logp_sum = sum(slow_logprobs(reference, rollout, i).sum().item() for i in range(24))

    adv = torch.cat([(g - g.mean()) / (g.std() + 1e-4) for g in rewards.view(3, 8)])
    weight = {"sequence": torch.full((24,), 1 / 24), "token": lengths / lengths.sum(), "constant": lengths / (24 * 6)}
    expected = {"reward": rewards.mean(), "accuracy": rewards.mean(), "length": lengths.float().mean(),
                "length_wrong": lengths[rewards == 0].float().mean(), "truncated": sum(truncated) / 24,
                "tokens": lengths.sum(), "entropy": -logp_sum / lengths.sum(), "no_signal": 2 / 3, "ratio": 1,
                "clip_fraction_low": 0, "clip_fraction_high": 0, "kl": 0, "loss": -(adv * weight[normalize]).sum()}
    assert metrics.keys() == {*expected, "sampler_gap", "grad_norm"}
    for name, value in expected.items():
        assert abs(metrics[name] - float(value)) < 1e-5, name
    assert metrics["sampler_gap"] < 1e-5 and metrics["grad_norm"] > 0
    assert all(torch.equal(untouched[name], value) for name, value in reference.state_dict().items())
    assert all(p.grad is None for p in reference.parameters()), "no gradient flows to the reference"
    assert not torch.equal(untouched["norm.weight"], model.norm.weight)


def test_a_reward_may_have_parts_of_its_own(make_gpt):
    """A step must not need a "format", which a task may not have, and must log all scores that a task of your own
    returns. If no answer is wrong, the mean length of wrong answers must be None."""
    model = chatty(make_gpt)
    metrics, rollout = step(model, lambda text, problem: {"reward": len(text) / 7, "accuracy": 1.0, "depth": 3.0})
    assert metrics["depth"] == 3 and metrics["reward"] == pytest.approx(sum(map(len, rollout.texts)) / 7 / 24)
    assert metrics["length_wrong"] is None and metrics["kl"] is None and "format" not in metrics
    assert metrics["grad_norm"] > 0


def test_a_reward_may_be_an_integer(make_gpt):
    """A reward function of your own may count something, or return True. torch has no mean of integers."""
    model = chatty(make_gpt)
    metrics, rollout = step(model, lambda text, problem: {"reward": len(text), "accuracy": len(text) > 3})
    assert metrics["reward"] == pytest.approx(sum(map(len, rollout.texts)) / 24) and metrics["grad_norm"] > 0
    assert metrics["accuracy"] == sum(len(text) > 3 for text in rollout.texts) / 24


def test_metrics_leave_what_they_are_given_alone():
    """If a sum were kept as a tensor and changed in place, it would change the caller's tensor. The mean of no values
    must be None."""
    metrics, given = Metrics(), torch.tensor(2.0)
    for _ in range(3):
        metrics.add("loss", given, 1)
    metrics.add("kl", 0.0, 0)
    assert metrics.means() == {"loss": 2.0, "kl": None} and given == 2


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_ratio_of_a_policy_that_has_not_moved_is_exactly_1(make_gpt, dtype):
    """If pi_old came from the sampler's pass, or from a pass with another compute dtype, the ratio would only be close
    to 1, and in bfloat16 not even that. The first update changes the policy before the second minibatch, unless the
    learning rate is 0."""
    found = []
    for options in ({}, {"rl_minibatches": 2}, {"rl_minibatches": 2, "lr_scale": 0.0}):
        model = make_gpt(TASK.encoding.n_vocab)
        model.dtype = dtype
        metrics, _ = step(model, wordy, **options)
        found.append(metrics["ratio"])
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert found[0] == found[2] == 1.0 != found[1]


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_memory_budget_does_not_change_the_step(make_gpt, normalize):
    """A budget with fewer rows at a time must give the same loss and the same gradient."""
    V, found = TASK.encoding.n_vocab, []
    for micro_batch in (0, 10_000, 60):
        metrics, _ = step(make_gpt(V), wordy, make_gpt(V, seed=1), normalize=normalize, kl_coef=0.3,
                          micro_batch=micro_batch)
        found.append([metrics[name] for name in ("loss", "grad_norm", "kl", "entropy", "ratio")])
    assert found[0] == found[1], "0 is no budget"
    assert torch.allclose(*map(torch.tensor, found[1:]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("muon_lr", (0.0, 0.02))
def test_equal_rewards_change_nothing(make_gpt, muon_lr):
    """Without a signal there is nothing to learn. An optimizer step without a gradient, or with a gradient of zeros,
    would still move the weights by the momentum buffer of earlier steps."""
    model = chatty(make_gpt)
    optimizer, fresh = Optimizer(model, adam_lr=0.01, muon_lr=muon_lr), copy.deepcopy(model.state_dict())
    step(model, wordy, optimizer=optimizer)
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    assert not torch.equal(before["norm.weight"], fresh["norm.weight"])
    metrics, _ = step(model, equal_rewards, optimizer=optimizer, seed=1, rl_minibatches=2)
    assert metrics["no_signal"] == 1 and metrics["length_wrong"] == metrics["length"]
    assert metrics["loss"] == metrics["grad_norm"] == 0
    nulls = "kl", "ratio", "clip_fraction_low", "clip_fraction_high", "sampler_gap"
    assert {metrics[name] for name in nulls} == {None}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for part, old in zip(optimizer.state_dict(), state):  # the momentum buffers do not change either
        for key, values in old["state"].items():
            assert all(torch.equal(value, part["state"][key][name]) for name, value in values.items())


def test_a_minibatch_without_a_signal_takes_no_step(make_gpt):
    """If one row of four minibatches has a signal, the other three minibatches must not make a step with the momentum
    buffer alone. The logged loss and norm are means over all four. Each minibatch must call the optimizer, because
    another rank may have a signal in it."""
    policy = chatty(make_gpt)
    rollout = sample_rollout(policy, [parse(q) for q in QUESTIONS], wordy, TASK, samples=8, max_new_tokens=6,
                             generator=torch.Generator().manual_seed(0))
    adv = torch.zeros(24)
    adv[9] = 2.0
    cfg = dataclasses.replace(STEP, rl_minibatches=4, normalize="sequence")
    optimizer = Descent(policy, distance=0.1)
    for seed in range(4):
        optimizer.gradients.clear()
        metrics = grpo_update(policy, None, optimizer, rollout, adv, cfg, torch.Generator().manual_seed(seed)).means()
        assert len(optimizer.gradients) == 1 and metrics["ratio"] == 1
        assert metrics["loss"] == pytest.approx(-2.0 / 6 / 4, rel=1e-5)
        assert metrics["grad_norm"] == pytest.approx(optimizer.gradients[0].norm().item() / 4, rel=1e-5)
    still = Still(policy)
    grpo_update(policy, None, still, rollout, adv, cfg)
    assert sorted(still.told) == [(1.0, 6, False)] * 3 + [(1.0, 6, True)]


def test_without_a_penalty_the_reference_is_not_asked(make_gpt):
    """A pass of the reference costs time, and without a penalty nothing uses its result."""
    reference = chatty(make_gpt)
    reference.forward = reference.hidden = None  # a call of one of them would be an error
    assert step(chatty(make_gpt), wordy, reference)[0]["kl"] is None
    with pytest.raises(TypeError):
        step(chatty(make_gpt), wordy, reference, kl_coef=0.1)


def test_a_tiny_advantage_lets_the_penalty_act_on_every_row(make_gpt):
    """Rows with advantage 0 are skipped. If a fork wants the penalty on all rows (Algorithm 1 of DeepSeekMath), a tiny
    advantage in place of 0 must be enough, without another update."""
    found, rollout = {}, random_rollout()
    cfg = dataclasses.replace(STEP, rl_minibatches=1, kl_coef=0.1, rl_max_new_tokens=12)
    for adv in (torch.zeros(24), torch.zeros(24).where(torch.zeros(24, dtype=torch.bool), 1e-30)):
        policy, reference = make_gpt(spread=3.0), make_gpt(seed=1, spread=3.0)
        before = copy.deepcopy(policy.state_dict())
        metrics = grpo_update(policy, reference, Descent(policy, distance=0.1), rollout, adv, cfg).means()
        moved = not torch.equal(before["norm.weight"], policy.norm.weight)
        found[bool(adv.any())] = metrics, moved
    metrics, moved = found[False]
    assert metrics["kl"] is None and metrics["loss"] == 0 and not moved
    metrics, moved = found[True]
    assert metrics["kl"] > 0 and metrics["ratio"] == 1 and moved
    assert metrics["loss"] == pytest.approx(0.1 * metrics["kl"], rel=1e-5)


@pytest.mark.parametrize("honest", (True, False))
def test_bandit(make_gpt, honest):
    """The policy samples one token, and a letter is rewarded. A few steps must be enough to learn this. They are not if
    the gradient has the wrong sign, or if a row gets the reward of another row. From a random reward, the policy must
    learn nothing."""
    encoding, rng = TASK.encoding, random.Random(0)
    model, prompt = make_gpt(encoding.n_vocab), TASK.encode_prompt(parse("1+2"))
    cfg = dataclasses.replace(STEP, rl_samples=64, rl_max_new_tokens=1)

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
    assert 0.1 < before < 0.3 and (after > 0.9 if honest else after < 0.5), (before, after)
