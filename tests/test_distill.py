"""Distillation against torch.distributions, Hinton's limit, and a student that must come nearer to its teacher."""
import copy
import dataclasses
import random
from math import log

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

import distill
from data.arithmetic import Arithmetic, parse
from distill import DIVERGENCES, distill_loss, distill_step, sft_loss
from grpo import random_minibatches, sample_rollout
from model import GPT, Optimizer
from run import Config
from tests.conftest import Descent

TASK = Arithmetic()


@pytest.fixture
def batch():
    """Student and teacher (N, T, V), and the mask (N, T) of rows of several lengths. The logits differ in size, as
    those of a wider teacher do."""
    torch.manual_seed(0)
    mask = torch.arange(6) < torch.tensor([[6], [2], [4]])
    mask[2, 0] = False
    return torch.randn(3, 6, 8), 2 * torch.randn(3, 6, 8) + 5, mask


def loss_and_gradient(student, teacher, mask, **options):
    student = student.clone().requires_grad_()
    loss = distill_loss(student, teacher, mask, **{"divergence": "forward"} | options)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


def oracle(student, teacher, mask, divergence, temperature=1.0):
    """The mean over the counted tokens of a divergence by torch.distributions, in float64."""
    P, Q = (Categorical(logits=x[mask].double() / temperature) for x in (teacher, student))
    M = Categorical(probs=(P.probs + Q.probs) / 2)
    value = {"forward": kl_divergence(P, Q), "reverse": kl_divergence(Q, P),
             "jsd": (kl_divergence(P, M) + kl_divergence(Q, M)) / 2}[divergence]
    return value.mean().item() * temperature**2


@pytest.mark.parametrize("temperature", (0.5, 1.0, 2.0, 4.0))
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences_are_torchs(batch, divergence, temperature):
    """F.kl_div takes its arguments in an order that is easily mistaken. A divergence in bits, or a mean over the
    vocabulary, would also still train."""
    loss, _ = loss_and_gradient(*batch, divergence=divergence, temperature=temperature)
    assert abs(loss.item() - oracle(*batch, divergence, temperature)) < 1e-4


def test_jsd_by_hand():
    """A jsd without its mixture, or with a wrong beta, differs from the value worked out by hand for P = (1/2, 1/2), Q
    = (3/4, 1/4) and M = (5/8, 3/8). Two distributions that never say the same are log 2 apart, not infinitely far."""
    P, Q = torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[0.75, 0.25]]]).log()
    by_hand = (0.5 * log(4 / 5) + 0.5 * log(4 / 3)) / 2 + (0.75 * log(6 / 5) + 0.25 * log(2 / 3)) / 2  # P/M, then Q/M
    for a, b in ((P, Q), (Q, P)):
        assert abs(distill_loss(a, b, torch.ones(1, 1), divergence="jsd") - by_hand) < 1e-6
    far = torch.tensor([[[100.0, 0.0]]])
    assert abs(distill_loss(far, far.flip(-1), torch.ones(1, 1), divergence="jsd").item() - log(2)) < 1e-5


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_like_its_teacher_has_nothing_to_learn(batch, divergence):
    """A divergence whose gradient is not 0 at equality would pull a perfect student away from its teacher."""
    _, teacher, mask = batch
    loss, gradient = loss_and_gradient(teacher + 3.0, teacher, mask, divergence=divergence, temperature=2.0)
    assert abs(loss) < 1e-5 and gradient.abs().max() < 1e-6


@pytest.mark.parametrize("divergence, share", (("forward", 1.0), ("reverse", 1.0), ("jsd", 0.25)))
def test_high_temperature_matches_logits(batch, divergence, share):
    """Without the factor T^2, the gradient would vanish at high temperatures. With it, the gradient tends to (z_s -
    z_t) / V of centred logits (Hinton et al., section 2.1)."""
    student, teacher, mask = batch
    _, gradient = loss_and_gradient(student, teacher, mask, divergence=divergence, temperature=1000.0)
    difference = student - student.mean(-1, keepdim=True) - teacher + teacher.mean(-1, keepdim=True)
    assert torch.allclose(gradient[mask], share * difference[mask] / 8 / mask.sum(), atol=2e-3 / mask.sum().item())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_gradient_flows_to_the_teacher(batch, divergence):
    """The teacher must not learn from its student."""
    student, teacher, mask = batch
    student.requires_grad_(), teacher.requires_grad_()
    distill_loss(student, teacher, mask, divergence=divergence).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


@pytest.mark.parametrize("divergence", (*DIVERGENCES, "sft"))
def test_padding_and_mask_types(batch, divergence):
    """A mean that includes padding is wrong, 0 * NaN in the padding is NaN, and a mask of integers would index rows
    instead of choosing tokens."""
    student, teacher, mask = batch

    def loss_of(student, teacher, mask):
        student = student.clone().requires_grad_()
        if divergence == "sft":
            loss = sft_loss(student, teacher.argmax(-1), mask)
        else:
            loss = distill_loss(student, teacher, mask, divergence=divergence)
        return loss.detach(), torch.autograd.grad(loss, student)[0]

    loss, gradient = loss_of(student, teacher, mask)
    assert not gradient[~mask].any() and gradient[mask].abs().amax(dim=-1).min() > 0
    for junk in (float("nan"), float("inf")):
        other = [x.masked_fill(~mask[..., None], junk) for x in (student, teacher)]
        for dtype in (torch.bool, torch.uint8, torch.int64, torch.float16, torch.float32):
            other_loss, other_gradient = loss_of(*other, mask.to(dtype))
            assert torch.equal(other_loss, loss) and torch.equal(other_gradient, gradient), (junk, dtype)
    nothing, gradient = loss_of(student, teacher, torch.zeros_like(mask))
    assert nothing == 0 and not gradient.any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_denominators_add_up(batch, divergence):
    """If each micro-batch took its own mean, the tokens of short rows would weigh more than those of long ones."""
    student, teacher, mask = batch
    loss, gradient = loss_and_gradient(*batch, divergence=divergence, temperature=2.0)
    parts = [loss_and_gradient(student[rows], teacher[rows], mask[rows], divergence=divergence, temperature=2.0,
                               denominator=int(mask.sum())) for rows in ([0], [1, 2])]
    assert torch.allclose(sum(part[0] for part in parts), loss, atol=1e-5)
    assert torch.allclose(torch.cat([part[1] for part in parts]), gradient, atol=1e-6)


def test_inputs_are_left_alone(batch):
    """If the logits were divided by the temperature in place, the next epoch would see other logits."""
    copies = [x.clone() for x in batch]
    for divergence in DIVERGENCES:
        distill_loss(*batch, divergence=divergence, temperature=2.0)
    assert all(torch.equal(x, y) and x._version == 0 for x, y in zip(batch, copies) if x.is_floating_point())
    assert torch.equal(batch[2], copies[2])


def test_an_unknown_divergence_is_refused(batch):
    """A misspelt divergence must not silently become another one."""
    with pytest.raises(ValueError):
        distill_loss(*batch, divergence="kl")


def test_sft_is_cross_entropy(batch):
    """The sequence-level loss is minus the mean log-probability of the counted tokens. A shifted target, or a mean over
    padding, would still train."""
    student, _, mask = batch
    target = torch.randint(8, mask.shape)
    terms = [-Categorical(logits=student[i, t]).log_prob(target[i, t]) for i, t in mask.nonzero().tolist()]
    assert abs(sft_loss(student, target, mask) - sum(terms) / len(terms)) < 1e-6
    halves = [sft_loss(student[rows], target[rows], mask[rows], len(terms)) for rows in ([0, 1], [2])]
    assert abs(sum(halves) - sum(terms) / len(terms)) < 1e-6


# The step

PROBLEMS = [parse("1+2"), parse("20-7*3")]
STEP = Config(divergence="forward", on_policy=False, rl_max_new_tokens=5, distill_minibatches=2, distill_epochs=1,
              distill_temperature=1.0, micro_batch=4096)


def accept_all(text, problem):
    return {"reward": 1.0, "accuracy": 1.0, "format": 1.0}


def accept_some(text, problem):
    """Reject by the text's content: some of the teacher's answers have a wrong sum, others a wrong form."""
    kind = sum(text.encode()) % 4
    return {"reward": 0.0, "accuracy": float(kind != 1), "format": float(kind != 2)}


def step(student, teacher, optimizer, reward_fn=accept_all, seed=0, copies=16, **options):
    """distill_step with the settings of STEP, changed by the options."""
    return distill_step(student, teacher, optimizer, PROBLEMS * copies, reward_fn, TASK,
                        dataclasses.replace(STEP, **options), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("divergence, on_policy", [
    ("forward", False), ("forward", True), ("reverse", True), ("jsd", True), ("sft", False)])
def test_step_brings_the_student_nearer(make_gpt, divergence, on_policy):
    """A gradient of the wrong sign, or teacher logits of other rows, may lower the loss that is logged. So the distance
    is measured by the KL on the prompts, not by the loss."""
    V = TASK.encoding.n_vocab
    student, teacher = make_gpt(V, seed=1), make_gpt(V, spread=5.0)
    before, optimizer = copy.deepcopy(teacher.state_dict()), Optimizer(student, adam_lr=0.003, muon_lr=0.02)

    @torch.no_grad()
    def distance():
        last = [torch.stack([model(torch.tensor([TASK.encode_prompt(p)]))[0, -1] for p in PROBLEMS])
                for model in (student, teacher)]
        return oracle(*last, torch.ones(2, dtype=torch.bool), "forward")

    start = distance()
    for seed in range(12):
        metrics = step(student, teacher, optimizer, seed=seed, divergence=divergence, on_policy=on_policy)
        assert metrics["accepted"] == 1 and metrics["loss"] > 0
    assert distance() < 0.6 * start
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def slow_step(student, teacher, optimizer, reward_fn, cfg, generator):
    """distill_step one row at a time, without padding, from the definitions in distill.py -> (mean loss, norm)."""
    rollout = sample_rollout(student if cfg.on_policy else teacher, PROBLEMS * 16, reward_fn, TASK, samples=1,
                             max_new_tokens=cfg.rl_max_new_tokens, generator=generator)
    rows = [i for i, score in enumerate(rollout.scores) if cfg.on_policy or score["accuracy"] == score["format"] == 1]
    assert cfg.on_policy or 8 < len(rows) < 28, "some should be rejected here"
    minibatches = random_minibatches(len(rows), cfg.distill_minibatches, generator)
    losses, tokens, norms = 0.0, 0, []
    for picks in minibatches * cfg.distill_epochs:
        n_tokens = sum(len(rollout.completions[rows[i]]) for i in picks)
        for i in picks:
            prompt, completion = rollout.prompts[rows[i]], rollout.completions[rows[i]]
            idx = torch.tensor([prompt + completion[:-1]])
            Q, P = (model(idx)[0, len(prompt) - 1:] / (cfg.divergence == "sft" or cfg.distill_temperature)
                    for model in (student, teacher))  # (tokens, V) each
            Q, P = Categorical(logits=Q), Categorical(logits=P.detach())
            if cfg.divergence == "sft":
                total = -Q.log_prob(torch.tensor(completion)).sum()
            else:
                total = (kl_divergence(P, Q) if cfg.divergence == "forward" else kl_divergence(Q, P)).sum()
                total = total * cfg.distill_temperature**2
            (total / n_tokens).backward()
            losses += total.item()
        tokens += n_tokens
        norms.append(optimizer.step(0.5).item())
    return losses / tokens, sum(norms) / len(norms)


@pytest.mark.parametrize("micro_batch", (4096, 60))
@pytest.mark.parametrize("divergence, temperature, on_policy", [
    ("forward", 2.0, False), ("reverse", 0.5, False), ("forward", 2.0, True), ("sft", 2.0, False)])
def test_step_is_the_slow_one(make_gpt, divergence, temperature, on_policy, micro_batch):
    """Each of these faults still trains a student: a mask or a target that is shifted, padding rows or rejected answers
    that are learnt, a temperature that is forgotten, a denominator for each micro-batch, an epoch with other
    minibatches, a learning rate without its schedule, or a loss of the last micro-batch. The same step computed slowly,
    one row at a time, has none."""
    cfg = dataclasses.replace(STEP, divergence=divergence, distill_temperature=temperature, on_policy=on_policy,
                              micro_batch=micro_batch, distill_minibatches=3, distill_epochs=2)
    V, found = TASK.encoding.n_vocab, []
    for slow in (False, True):
        student, teacher = make_gpt(V, seed=1, spread=3.0), make_gpt(V, spread=3.0)
        with torch.no_grad():
            for model in (student, teacher):
                model.embedding.weight[TASK.encoding.eot_token] *= 20  # so that the lengths differ
        optimizer, generator = Descent(student, distance=1.0), torch.Generator().manual_seed(0)
        if slow:
            result = slow_step(student, teacher, optimizer, accept_some, cfg, generator)
        else:
            metrics = distill_step(student, teacher, optimizer, PROBLEMS * 16, accept_some, TASK, cfg, generator, 0.5)
            result = metrics["loss"], metrics["grad_norm"]
        found.append((result, optimizer.gradients))
    (result, gradients), (slow_result, slow_gradients) = found
    assert result == pytest.approx(slow_result, rel=1e-4) and len(gradients) == len(slow_gradients) == 6
    for gradient, slow in zip(gradients, slow_gradients):
        assert (gradient - slow).norm() < 1e-3 * slow.norm()


def test_epochs_repeat_the_updates_and_not_the_teacher(make_gpt, monkeypatch):
    """A second epoch may take other minibatches than the first, ask the teacher again, which costs a pass, or count the
    loss twice. And teacher's logits that carry a graph keep all that led to them in memory until the step has ended."""
    V, asked, kept, losses = TASK.encoding.n_vocab, [], [], {}

    def noted_loss(student_logits, teacher_logits, mask, **options):
        kept.append(teacher_logits.requires_grad)
        return distill_loss(student_logits, teacher_logits, mask, **options)

    monkeypatch.setattr(distill, "distill_loss", noted_loss)
    for epochs in (1, 2):
        student, teacher = make_gpt(V, seed=1), make_gpt(V, spread=5.0)
        teacher.hidden = lambda idx, cache=None: (cache or asked.append(epochs), GPT.hidden(teacher, idx, cache))[1]
        norms, optimizer = [], Optimizer(student, adam_lr=0.0)  # nothing is learnt: both epochs must find the same loss

        def noted(scale):
            norms.append(Optimizer.step(optimizer, scale))
            return norms[-1]

        monkeypatch.setattr(optimizer, "step", noted)
        losses[epochs] = step(student, teacher, optimizer, distill_epochs=epochs, distill_minibatches=4)["loss"]
        assert len(norms) == 4 * epochs and norms[4:] == norms[:4 * (epochs - 1)]
    assert losses[2] == pytest.approx(losses[1]) and asked == [1] * 4 + [2] * 4
    assert len(kept) == 4 + 8 and not any(kept)


def test_sft_does_not_ask_the_teacher(make_gpt):
    """A pass of the teacher over its own samples costs time, and "sft" uses nothing of it."""
    student, teacher = make_gpt(TASK.encoding.n_vocab, seed=1), make_gpt(TASK.encoding.n_vocab)
    asked = []
    teacher.hidden = lambda idx, cache=None: (cache or asked.append(1), GPT.hidden(teacher, idx, cache))[1]
    assert step(student, teacher, Optimizer(student, adam_lr=0.003), divergence="sft")["loss"] > 0 and not asked


def test_only_accepted_samples_teach(make_gpt):
    """If rejected answers or their prompts were learnt, a student of a teacher of whom only letters are accepted would
    not learn letters."""
    encoding = TASK.encoding
    student, teacher = make_gpt(encoding.n_vocab, seed=1), make_gpt(encoding.n_vocab)
    optimizer, prompt = Optimizer(student, adam_lr=0.01, muon_lr=0.02), TASK.encode_prompt(PROBLEMS[0])

    def accept_letters(text, problem):
        right = float(len(text) == 1 and "a" <= text <= "z")
        return {"reward": right, "accuracy": right, "format": 1.0}

    for seed in range(15):
        metrics = step(student, teacher, optimizer, accept_letters, seed, divergence="sft", copies=64,
                       rl_max_new_tokens=1)
        assert 0 < metrics["accepted"] < 0.5 and metrics["accepted"] == metrics["accuracy"]
    with torch.no_grad():
        assert student(torch.tensor([prompt]))[0, -1].softmax(-1)[ord("a"):ord("z") + 1].sum() > 0.8


def test_a_reward_without_a_format_is_enough(make_gpt):
    """A task of your own may have no format. A step that asks for one fails, or accepts nothing: accuracy alone must
    then decide, and so must the format where there is one."""
    student, teacher = make_gpt(TASK.encoding.n_vocab, seed=1), make_gpt(TASK.encoding.n_vocab)

    def plain(text, problem):
        score = accept_some(text, problem)
        return {name: score[name] for name in ("reward", "accuracy")}

    optimizer = Optimizer(student, adam_lr=0.003)
    metrics = step(student, teacher, optimizer, plain)
    assert 0 < metrics["accepted"] == metrics["accuracy"] < 1 and "format" not in metrics and metrics["loss"] > 0
    both = step(student, teacher, optimizer, accept_some)
    assert both["accepted"] == pytest.approx(both["accuracy"] + both["format"] - 1)
    assert both["accepted"] < min(both["accuracy"], both["format"])


def test_policies_differ_only_in_who_samples(make_gpt):
    """On-policy distillation might have a loss, a mask or a filter of its own. Where student and teacher are one model
    and all is accepted, both ways must learn the same from the same samples, bit for bit."""
    found = []
    for on_policy in (False, True):
        student, teacher = (make_gpt(TASK.encoding.n_vocab, spread=5.0) for _ in range(2))
        step(student, teacher, Optimizer(student, adam_lr=0.003), divergence="sft", on_policy=on_policy)
        assert not torch.equal(student.embedding.weight, teacher.embedding.weight)
        found.append(student.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("wrong", ("accuracy", "format"))
def test_nothing_accepted_is_nothing_learnt(make_gpt, wrong):
    """An empty batch may put 0/0 into the weights, or make a step of momentum alone. On policy nothing is rejected."""
    V = TASK.encoding.n_vocab
    student, teacher = make_gpt(V, seed=1), make_gpt(V)
    optimizer = Optimizer(student, adam_lr=0.003, muon_lr=0.02)
    step(student, teacher, optimizer)
    before = copy.deepcopy(student.state_dict())

    def reject(text, problem):
        return accept_all(text, problem) | {wrong: 0.0}

    metrics = step(student, teacher, optimizer, reject)
    assert "loss" not in metrics and metrics["accepted"] == 0 and metrics["length"] > 0
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    assert step(student, teacher, optimizer, reject, on_policy=True)["loss"] > 0


def test_fewer_accepted_samples_than_minibatches(make_gpt):
    """A minibatch that gets no sample must take no step: there would be no gradient, but momentum, and a division by no
    tokens."""
    student, teacher = make_gpt(TASK.encoding.n_vocab, seed=1), make_gpt(TASK.encoding.n_vocab)
    optimizer, left = Descent(student, distance=0.1), [3]

    def accept_three(text, problem):
        left[0] -= 1
        return accept_all(text, problem) | {"accuracy": float(left[0] >= 0)}

    metrics = step(student, teacher, optimizer, accept_three, distill_minibatches=8, distill_epochs=2)
    assert metrics["accepted"] == 3 / 32 and len(optimizer.gradients) == 6 and metrics["loss"] > 0
    assert metrics["grad_norm"] == pytest.approx(sum(g.norm().item() for g in optimizer.gradients) / 6)


def test_a_step_refuses_an_unknown_divergence(make_gpt):
    """A misspelt divergence must end the step, and not train with another one."""
    model = make_gpt(TASK.encoding.n_vocab)
    with pytest.raises(ValueError, match="one of"):
        step(model, model, Optimizer(model, adam_lr=0.0), divergence="forwards")


@pytest.mark.parametrize("divergence", ("forward", "sft"))
def test_loss_is_the_mean_over_the_tokens(make_gpt, divergence):
    """The loss that is logged may be the last micro-batch's, or an average of minibatches of different sizes as if they
    were equal."""
    V, rng = TASK.encoding.n_vocab, random.Random(0)

    def accept_at_random(text, problem):
        return accept_all(text, problem) | {"format": float(rng.random() < 0.4)}

    found = []
    for micro_batch, minibatches in ((10_000, 1), (60, 1), (60, 3)):
        rng.seed(0)
        student, teacher = make_gpt(V, seed=1), make_gpt(V)
        optimizer = Optimizer(student, adam_lr=0.0)  # nothing moves: all parts see one student
        metrics = step(student, teacher, optimizer, accept_at_random, divergence=divergence, micro_batch=micro_batch,
                       distill_minibatches=minibatches)
        found.append(metrics["loss"])
    assert max(found) - min(found) < 1e-4 * max(found)
