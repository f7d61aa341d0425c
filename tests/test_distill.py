"""Distillation is compared with torch.distributions, with the limit of Hinton et al., and with a slow step. A student
must come closer to its teacher."""
import copy
import dataclasses
import random
from math import log

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

import distill
from data.arithmetic import Arithmetic, parse
from distill import DistillConfig, distill_loss, distill_step, is_good
from engine.optimizer import Optimizer
from grpo import micro_batches, random_minibatches, sample_rollout
from model import GPT, token_logprobs
from tests.conftest import Descent

TASK = Arithmetic()
DIVERGENCES = ("forward", "reverse", "jsd")


@pytest.fixture
def logits():
    """Logits of a student and of its teacher, (12, 8) each. The teacher's are larger, as those of a wider model are."""
    torch.manual_seed(0)
    return torch.randn(12, 8), 2 * torch.randn(12, 8) + 5


def loss_and_gradient(student, teacher, **options):
    """The mean over the tokens of distill_loss, and its gradient with respect to the student's logits."""
    student = student.clone().requires_grad_()
    loss = distill_loss(student, teacher, **{"divergence": "forward"} | options).mean()
    return loss.detach(), torch.autograd.grad(loss, student)[0]


def oracle(student, teacher, divergence, temperature=1.0):
    """A divergence by torch.distributions at each token, in float64, (M,)."""
    P, Q = (Categorical(logits=x.double() / temperature) for x in (teacher, student))
    M = Categorical(probs=(P.probs + Q.probs) / 2)
    value = {"forward": kl_divergence(P, Q), "reverse": kl_divergence(Q, P),
             "jsd": (kl_divergence(P, M) + kl_divergence(Q, M)) / 2}[divergence]
    return value * temperature**2


@pytest.mark.parametrize("temperature", (0.5, 1.0, 2.0, 4.0))
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences_are_torchs(logits, divergence, temperature):
    """The arguments of F.kl_div are easily swapped. With swapped arguments, with a divergence in bits, or with a mean
    over the vocabulary, a student would still learn something."""
    loss = distill_loss(*logits, divergence=divergence, temperature=temperature)
    assert loss.shape == (12,) and loss.dtype == torch.float32
    assert (loss - oracle(*logits, divergence, temperature)).abs().max() < 1e-4


def test_jsd_by_hand():
    """A JSD without its mixture M, or with a wrong beta, differs from the value computed by hand for P = (1/2, 1/2), Q
    = (3/4, 1/4) and M = (5/8, 3/8). The JSD of two distributions without common tokens is log 2, not infinite."""
    P, Q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
    by_hand = (0.5 * log(4 / 5) + 0.5 * log(4 / 3)) / 2 + (0.75 * log(6 / 5) + 0.25 * log(2 / 3)) / 2  # P/M, then Q/M
    for a, b in ((P, Q), (Q, P)):
        assert abs(distill_loss(a, b, "jsd") - by_hand) < 1e-6
    far = torch.tensor([[100.0, 0.0]])
    assert abs(distill_loss(far, far.flip(-1), "jsd").item() - log(2)) < 1e-5


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_like_its_teacher_has_nothing_to_learn(logits, divergence):
    """If the gradient were not 0 at equality, a perfect student would move away from its teacher."""
    _, teacher = logits
    loss, gradient = loss_and_gradient(teacher + 3.0, teacher, divergence=divergence, temperature=2.0)
    assert abs(loss) < 1e-5 and gradient.abs().max() < 1e-6


@pytest.mark.parametrize("divergence, share", (("forward", 1.0), ("reverse", 1.0), ("jsd", 0.25)))
def test_high_temperature_matches_logits(logits, divergence, share):
    """Without the factor T^2, the gradient would vanish at high temperatures. With it, the gradient tends to (z_s -
    z_t) / V for centred logits z of student and teacher (Hinton et al., section 2.1)."""
    student, teacher = logits
    _, gradient = loss_and_gradient(student, teacher, divergence=divergence, temperature=1000.0)
    difference = student - student.mean(-1, keepdim=True) - teacher + teacher.mean(-1, keepdim=True)
    assert torch.allclose(gradient, share * difference / 8 / 12, atol=2e-3 / 12)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_gradient_flows_to_the_teacher(logits, divergence):
    """The teacher must not learn from its student."""
    student, teacher = logits
    student.requires_grad_(), teacher.requires_grad_()
    distill_loss(student, teacher, divergence).sum().backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_tokens_do_not_depend_on_each_other(logits, divergence):
    """If a loss were a mean over its tokens, the tokens of a small micro-batch would weigh more than those of a large
    one. The loss of no tokens must be empty."""
    student, teacher = logits
    loss = distill_loss(student, teacher, divergence, temperature=2.0)
    parts = [distill_loss(student[part], teacher[part], divergence, temperature=2.0)
             for part in (slice(5), slice(5, 5), slice(5, 12))]
    assert [len(part) for part in parts] == [5, 0, 7]
    assert torch.allclose(torch.cat(parts), loss, atol=1e-6) and loss.min() > 0


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_half_precision_logits_are_compared_in_float32(logits, divergence):
    """bfloat16 logits have three digits. A softmax in bfloat16 would round away the small differences between student
    and teacher, and these are all that the student has to learn."""
    half = [x.bfloat16() for x in logits]
    loss = distill_loss(*half, divergence, temperature=2.0)
    assert loss.dtype == torch.float32 and torch.equal(loss, distill_loss(*[x.float() for x in half], divergence, 2.0))


def test_inputs_are_left_alone(logits):
    """If the logits were divided by the temperature in place, the next epoch would see other logits."""
    copies = [x.clone() for x in logits]
    for divergence in DIVERGENCES:
        distill_loss(*logits, divergence, temperature=2.0)
    assert all(torch.equal(x, y) and x._version == 0 for x, y in zip(logits, copies))


def test_an_unknown_divergence_is_refused(logits):
    """A misspelt divergence must not silently become another one."""
    with pytest.raises(ValueError, match="must be"):
        distill_loss(*logits, divergence="kl")


def test_sft_is_cross_entropy(make_gpt):
    """The loss of "sft" is minus the log-probability of the tokens in the mask. With a shifted target, a student would
    still learn something."""
    torch.manual_seed(1)
    model, idx, mask = make_gpt(spread=4.0), torch.randint(11, (3, 7)), torch.rand(3, 6) < 0.5
    logits = model(idx[:, :-1])
    terms = [Categorical(logits=logits[i, t]).log_prob(idx[i, t + 1]) for i, t in mask.nonzero().tolist()]
    assert 5 < len(terms) < 15
    assert torch.allclose(token_logprobs(model, idx, mask), torch.stack(terms), atol=1e-5)


# The step

PROBLEMS = [parse("1+2"), parse("20-7*3")]
STEP = DistillConfig(divergence="forward", on_policy=False, rl_max_new_tokens=5, distill_minibatches=2,
                     distill_epochs=1, distill_temperature=1.0, micro_batch=4096)


def accept_all(text, problem):
    return {"reward": 1.0, "accuracy": 1.0, "format": 1.0}


def accept_some(text, problem):
    """Reject some completions by their text: some count as wrong, others as not well formed."""
    kind = sum(text.encode()) % 4
    return {"reward": 0.0, "accuracy": float(kind != 1), "format": float(kind != 2)}


def step(student, teacher, optimizer, reward_fn=accept_all, seed=0, copies=16, **options):
    """distill_step with the settings of STEP, changed by the options -> the logged means."""
    return distill_step(student, teacher, optimizer, PROBLEMS * copies, reward_fn, TASK,
                        dataclasses.replace(STEP, **options), torch.Generator().manual_seed(seed)).means()


class Asked:
    """A model's `hidden`, which counts its calls, except those for sampling."""

    def __init__(self, model):
        self.model, self.times = model, 0

    def __call__(self, idx):
        if not torch.is_inference_mode_enabled():
            self.times += 1
        return GPT.hidden(self.model, idx)


@pytest.mark.parametrize("divergence, on_policy", [
    ("forward", False), ("forward", True), ("reverse", True), ("jsd", True), ("sft", False)])
def test_step_brings_the_student_nearer(make_gpt, divergence, on_policy):
    """With a gradient of the wrong sign, or with teacher logits of other rows, the logged loss may still fall. So the
    test measures the distance by the KL on the prompts, not by the loss."""
    V = TASK.encoding.n_vocab
    student, teacher = make_gpt(V, seed=1), make_gpt(V, spread=5.0)
    before, optimizer = copy.deepcopy(teacher.state_dict()), Optimizer(student, adam_lr=0.003, muon_lr=0.02)

    @torch.no_grad()
    def distance():
        last = [torch.stack([model(torch.tensor([TASK.encode_prompt(p)]))[0, -1] for p in PROBLEMS])
                for model in (student, teacher)]
        return oracle(*last, "forward").mean().item()

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
    minibatches = [part.tolist() for part in random_minibatches(len(rows), cfg.distill_minibatches, generator)]
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
    """Each of these bugs still trains a student: a shifted mask or target, learning from padding or from rejected
    answers, a missing temperature, a denominator for each micro-batch, other minibatches in the second epoch, a
    learning rate without its schedule, or a logged loss of the last micro-batch. The slow step, one row at a time, has
    none of these bugs."""
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
            metrics = distill_step(student, teacher, optimizer, PROBLEMS * 16, accept_some, TASK, cfg, generator,
                                   0.5).means()
            result = metrics["loss"], metrics["grad_norm"]
        found.append((result, optimizer.gradients))
    (result, gradients), (slow_result, slow_gradients) = found
    assert result == pytest.approx(slow_result, rel=1e-4) and len(gradients) == len(slow_gradients) == 6
    for gradient, slow in zip(gradients, slow_gradients):
        assert (gradient - slow).norm() < 1e-3 * slow.norm()


def test_epochs_repeat_the_updates_and_not_the_teacher(make_gpt, monkeypatch):
    """The second epoch must have the same minibatches as the first, must not run the teacher again, which costs a pass,
    and must not count the loss twice. The teacher's hidden states must carry no graph, which would keep memory until
    the step ends."""
    V, asked, kept, kept_hidden, losses = TASK.encoding.n_vocab, [], [], [], {}

    def noted_loss(student_logits, teacher_logits, *options):
        kept.append(teacher_logits.requires_grad)
        return distill_loss(student_logits, teacher_logits, *options)

    def noted_logits(hidden):
        kept_hidden.append(hidden.requires_grad)
        return GPT.logits(teacher, hidden)

    monkeypatch.setattr(distill, "distill_loss", noted_loss)
    for epochs in (1, 2):
        student, teacher = make_gpt(V, seed=1), make_gpt(V, spread=5.0)
        teacher.hidden, teacher.logits = Asked(teacher), noted_logits
        norms, optimizer = [], Optimizer(student, adam_lr=0.0)  # nothing is learnt, so both epochs must have one loss

        def noted(*told, **named):
            norms.append(Optimizer.step(optimizer, *told, **named))
            return norms[-1]

        monkeypatch.setattr(optimizer, "step", noted)
        losses[epochs] = step(student, teacher, optimizer, distill_epochs=epochs, distill_minibatches=4)["loss"]
        assert len(norms) == 4 * epochs and norms[4:] == norms[:4 * (epochs - 1)]
        asked.append(teacher.hidden.times)
    assert losses[2] == pytest.approx(losses[1]) and asked == [4, 4]
    assert len(kept) == 4 + 8 and not any(kept) and len(kept_hidden) > 4 + 8 and not any(kept_hidden)


def test_sft_does_not_ask_the_teacher(make_gpt):
    """A pass of the teacher over its own samples costs time, and "sft" does not use its result."""
    student, teacher = make_gpt(TASK.encoding.n_vocab, seed=1), make_gpt(TASK.encoding.n_vocab)
    teacher.hidden = Asked(teacher)
    assert step(student, teacher, Optimizer(student, adam_lr=0.003), divergence="sft")["loss"] > 0
    assert teacher.hidden.times == 0
    step(student, teacher, Optimizer(student, adam_lr=0.003))
    assert teacher.hidden.times == 2, "the other losses ask it once for each minibatch"


def test_only_accepted_samples_teach(make_gpt):
    """The student must not learn from rejected answers. Here only single letters are accepted, so the student must
    learn letters."""
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
    """A task of your own may have no format. The step must not fail or reject everything there: accuracy alone decides.
    If there is a format, both decide."""
    student, teacher = make_gpt(TASK.encoding.n_vocab, seed=1), make_gpt(TASK.encoding.n_vocab)

    def plain(text, problem):
        score = accept_some(text, problem)
        return {name: score[name] for name in ("reward", "accuracy")}

    optimizer = Optimizer(student, adam_lr=0.003)
    metrics = step(student, teacher, optimizer, plain)
    assert 0 < metrics["accepted"] == metrics["accuracy"] < 1 and "format" not in metrics and metrics["loss"] > 0
    assert is_good({"accuracy": 1, "format": 1}) and is_good({"accuracy": 1})
    assert not is_good({"accuracy": 1, "format": 0}) and not is_good({"accuracy": 0})
    both = step(student, teacher, optimizer, accept_some)
    assert both["accepted"] == pytest.approx(both["accuracy"] + both["format"] - 1)
    assert both["accepted"] < min(both["accuracy"], both["format"])


def test_policies_differ_only_in_who_samples(make_gpt):
    """On-policy distillation must not have another loss, mask or filter. If student and teacher are the same model and
    all answers are accepted, both ways must learn the same from the same samples, bit for bit."""
    found = []
    for on_policy in (False, True):
        student, teacher = (make_gpt(TASK.encoding.n_vocab, spread=5.0) for _ in range(2))
        step(student, teacher, Optimizer(student, adam_lr=0.003), divergence="sft", on_policy=on_policy)
        assert not torch.equal(student.embedding.weight, teacher.embedding.weight)
        found.append(student.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("wrong", ("accuracy", "format"))
def test_nothing_accepted_is_nothing_learnt(make_gpt, wrong):
    """An empty batch must not put 0/0 into the weights, or make a step with the momentum buffer alone. On policy
    nothing is rejected."""
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
    """A minibatch without samples must make no step. It has no gradient, but the momentum buffer would move the
    weights, and the loss would be divided by 0 tokens."""
    student, teacher = make_gpt(TASK.encoding.n_vocab, seed=1), make_gpt(TASK.encoding.n_vocab)
    optimizer, left = Descent(student, distance=0.1), [3]

    def accept_three(text, problem):
        left[0] -= 1
        return accept_all(text, problem) | {"accuracy": float(left[0] >= 0)}

    metrics = step(student, teacher, optimizer, accept_three, distill_minibatches=8, distill_epochs=2)
    assert metrics["accepted"] == 3 / 32 and len(optimizer.gradients) == 6 and metrics["loss"] > 0
    assert metrics["grad_norm"] == pytest.approx(sum(g.norm().item() for g in optimizer.gradients) / 6)


def test_the_optimizer_is_told_of_each_minibatch(make_gpt, monkeypatch):
    """All ranks wait for each other in the optimizer. If a rank did not call the optimizer for a minibatch without
    samples, the others would wait for ever. If it passed a wrong number of tokens, its gradient would get a wrong
    weight."""
    student, teacher = make_gpt(TASK.encoding.n_vocab, seed=1), make_gpt(TASK.encoding.n_vocab)
    with torch.no_grad():
        teacher.embedding.weight[TASK.encoding.eot_token] *= 20  # so that the lengths differ
    told, lengths, optimizer, left = [], [], Descent(student, distance=0.1), [3]
    plain_step = optimizer.step

    def noted_step(lr_scale, share, has_gradient):
        told.append((share, has_gradient))
        return plain_step(lr_scale, share, has_gradient)

    def noted_batches(rollout, rows, *rest):
        lengths.append(sum(len(rollout.completions[i]) for i in rows))
        return micro_batches(rollout, rows, *rest)

    def accept_three(text, problem):
        left[0] -= 1
        return accept_all(text, problem) | {"accuracy": float(left[0] >= 0)}

    monkeypatch.setattr(optimizer, "step", noted_step)
    monkeypatch.setattr(distill, "micro_batches", noted_batches)
    step(student, teacher, optimizer, accept_three, distill_minibatches=5, distill_epochs=2)
    assert told == [(n, n > 0) for n in lengths] * 2 and lengths[3:] == [0, 0] and min(lengths[:3]) > 0


@pytest.mark.parametrize("divergence", ("forward", "sft"))
@pytest.mark.parametrize("junk", (float("nan"), float("inf")))
def test_padding_changes_nothing(make_gpt, monkeypatch, divergence, junk):
    """A mean must not include padding. Since 0 * NaN is NaN, one bad number in the padding would also destroy the
    weights. Here the hidden states of all positions outside the completions are junk."""
    found, batches = [], []

    def noted(*args):
        made = micro_batches(*args)
        batches.extend(made)
        return made

    class Poisoned(Asked):
        def __call__(self, idx):
            hidden = super().__call__(idx)
            if torch.is_inference_mode_enabled():
                return hidden  # it samples
            mask = next(batch.mask for batch in batches if torch.equal(batch.idx[:, :-1], idx))
            return hidden.masked_fill(~mask[..., None], junk)

    for poisoned in (False, True):
        student, teacher = make_gpt(TASK.encoding.n_vocab, seed=1), make_gpt(TASK.encoding.n_vocab)
        with torch.no_grad():
            teacher.embedding.weight[TASK.encoding.eot_token] *= 20  # so that the lengths differ
        if poisoned:
            monkeypatch.setattr(distill, "micro_batches", noted)
            student.hidden, teacher.hidden = Poisoned(student), Poisoned(teacher)
        optimizer = Descent(student, distance=1.0)
        metrics = step(student, teacher, optimizer, accept_some, divergence=divergence, micro_batch=100)
        found.append((metrics, optimizer.gradients))
    (metrics, gradients), (poisoned_metrics, poisoned_gradients) = found
    assert student.hidden.times > 3 and teacher.hidden.times == (0 if divergence == "sft" else student.hidden.times)
    assert not all(batch.mask[:, -1].all() for batch in batches), "there should be padding here"
    assert metrics == poisoned_metrics
    assert all(torch.equal(a, b) for a, b in zip(gradients, poisoned_gradients)) and gradients[1].any()


def test_a_step_refuses_an_unknown_divergence(make_gpt):
    """A misspelt divergence must end the step, and not train with another one."""
    model = make_gpt(TASK.encoding.n_vocab)
    with pytest.raises(ValueError, match="must be"):
        step(model, model, Optimizer(model, adam_lr=0.0), divergence="forwards")


@pytest.mark.parametrize("divergence", ("forward", "sft"))
def test_loss_is_the_mean_over_the_tokens(make_gpt, divergence):
    """The logged loss must not be that of the last micro-batch, or a mean that gives the same weight to minibatches of
    different sizes."""
    V, rng = TASK.encoding.n_vocab, random.Random(0)

    def accept_at_random(text, problem):
        return accept_all(text, problem) | {"format": float(rng.random() < 0.4)}

    found = []
    for micro_batch, minibatches in ((10_000, 1), (60, 1), (60, 3)):
        rng.seed(0)
        student, teacher = make_gpt(V, seed=1), make_gpt(V)
        optimizer = Optimizer(student, adam_lr=0.0)  # nothing is learnt, so all parts see the same student
        metrics = step(student, teacher, optimizer, accept_at_random, divergence=divergence, micro_batch=micro_batch,
                       distill_minibatches=minibatches)
        found.append(metrics["loss"])
    assert max(found) - min(found) < 1e-4 * max(found)
