"""Distillation against torch.distributions, Hinton's limit, and a student that must come nearer to its teacher."""
import copy
import random
from math import log

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from data.arithmetic import parse
from data.tokenizer import get_tokenizer
from distill import DIVERGENCES, distill_loss, distill_step, sft_loss
from model import GPT, Optimizer


@pytest.fixture
def batch():
    """Student, teacher (N, T, V), mask (N, T) of ragged rows; the logits differ in size, as a wide teacher's do."""
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
    """kl_div's arguments are the other way round than one thinks; bits for nats; a mean over the vocabulary."""
    loss, _ = loss_and_gradient(*batch, divergence=divergence, temperature=temperature)
    assert abs(loss.item() - oracle(*batch, divergence, temperature)) < 1e-4


def test_jsd_by_hand():
    """P = (1/2, 1/2), Q = (3/4, 1/4), M = (5/8, 3/8); and two that never say the same are log 2 apart, not infinite."""
    P, Q = torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[0.75, 0.25]]]).log()
    by_hand = (0.5 * log(4 / 5) + 0.5 * log(4 / 3)) / 2 + (0.75 * log(6 / 5) + 0.25 * log(2 / 3)) / 2  # P/M, then Q/M
    for a, b in ((P, Q), (Q, P)):
        assert abs(distill_loss(a, b, torch.ones(1, 1), divergence="jsd") - by_hand) < 1e-6
    far = torch.tensor([[[100.0, 0.0]]])
    assert abs(distill_loss(far, far.flip(-1), torch.ones(1, 1), divergence="jsd").item() - log(2)) < 1e-5


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_like_its_teacher_has_nothing_to_learn(batch, divergence):
    """A divergence that is not 0 at equality (a cross-entropy, a beta forgotten) pulls a perfect student away."""
    _, teacher, mask = batch
    loss, gradient = loss_and_gradient(teacher + 3.0, teacher, mask, divergence=divergence, temperature=2.0)
    assert abs(loss) < 1e-5 and gradient.abs().max() < 1e-6


@pytest.mark.parametrize("divergence, share", (("forward", 1.0), ("reverse", 1.0), ("jsd", 0.25)))
def test_high_temperature_matches_logits(batch, divergence, share):
    """Hinton et al., section 2.1: times T^2 the gradient tends to (z_s - z_t) / V of centred logits; else to 0."""
    student, teacher, mask = batch
    _, gradient = loss_and_gradient(student, teacher, mask, divergence=divergence, temperature=1000.0)
    difference = student - student.mean(-1, keepdim=True) - teacher + teacher.mean(-1, keepdim=True)
    assert torch.allclose(gradient[mask], share * difference[mask] / 8 / mask.sum(), atol=2e-3 / mask.sum().item())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_gradient_flows_to_the_teacher(batch, divergence):
    """A teacher that learns from its student."""
    student, teacher, mask = batch
    student.requires_grad_(), teacher.requires_grad_()
    distill_loss(student, teacher, mask, divergence=divergence).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


@pytest.mark.parametrize("divergence", (*DIVERGENCES, "sft"))
def test_padding_and_mask_types(batch, divergence):
    """Means over padding; 0 * NaN; a mask of integers that indexes rows instead of choosing them."""
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
    """Micro-batches that each take their own mean: a short row weighs more than a long one."""
    student, teacher, mask = batch
    loss, gradient = loss_and_gradient(*batch, divergence=divergence, temperature=2.0)
    parts = [loss_and_gradient(student[rows], teacher[rows], mask[rows], divergence=divergence, temperature=2.0,
                               denominator=int(mask.sum())) for rows in ([0], [1, 2])]
    assert torch.allclose(sum(part[0] for part in parts), loss, atol=1e-5)
    assert torch.allclose(torch.cat([part[1] for part in parts]), gradient, atol=1e-6)


def test_inputs_are_left_alone(batch):
    """Logits divided by the temperature in place: the second divergence sees other logits."""
    copies = [x.clone() for x in batch]
    for divergence in DIVERGENCES:
        distill_loss(*batch, divergence=divergence, temperature=2.0)
    assert all(torch.equal(x, y) and x._version == 0 for x, y in zip(batch, copies) if x.is_floating_point())
    assert torch.equal(batch[2], copies[2])


def test_an_unknown_divergence_is_refused(batch):
    """A misspelt divergence that silently becomes another."""
    with pytest.raises(ValueError):
        distill_loss(*batch, divergence="kl")


def test_sft_is_cross_entropy(batch):
    """The sequence-level case is the language model's loss: minus the mean log-probability of the counted tokens."""
    student, _, mask = batch
    target = torch.randint(8, mask.shape)
    terms = [-Categorical(logits=student[i, t]).log_prob(target[i, t]) for i, t in mask.nonzero().tolist()]
    assert abs(sft_loss(student, target, mask) - sum(terms) / len(terms)) < 1e-6
    halves = [sft_loss(student[rows], target[rows], mask[rows], len(terms)) for rows in ([0, 1], [2])]
    assert abs(sum(halves) - sum(terms) / len(terms)) < 1e-6


# The step

PROBLEMS = [parse("1+2"), parse("20-7*3")]


def accept_all(text, problem):
    return {"reward": 1.0, "accuracy": 1.0, "format": 1.0}


def step(student, teacher, optimizer, reward_fn=accept_all, seed=0, copies=16, **options):
    options = {"divergence": "forward", "on_policy": False, "max_new_tokens": 5, "minibatches": 2} | options
    return distill_step(student, teacher, optimizer, PROBLEMS * copies, reward_fn, get_tokenizer(),
                        generator=torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("divergence, on_policy", [
    ("forward", False), ("forward", True), ("reverse", True), ("jsd", True), ("sft", False)])
def test_step_brings_the_student_nearer(make_gpt, divergence, on_policy):
    """A gradient of the wrong sign, or teacher logits of other rows: measured by KL on the prompts, not by the loss."""
    encoding = get_tokenizer()
    student, teacher = make_gpt(encoding.n_vocab, seed=1), make_gpt(encoding.n_vocab, spread=5.0)
    before, optimizer = copy.deepcopy(teacher.state_dict()), Optimizer(student, adam_lr=0.003, muon_lr=0.02)

    @torch.no_grad()
    def distance():
        last = [torch.stack([model(torch.tensor([encoding.encode_ordinary(p.prompt)]))[0, -1] for p in PROBLEMS])
                for model in (student, teacher)]
        return oracle(*last, torch.ones(2, dtype=torch.bool), "forward")

    start = distance()
    for seed in range(12):
        metrics = step(student, teacher, optimizer, seed=seed, divergence=divergence, on_policy=on_policy)
        assert metrics["accepted"] == 1 and metrics["loss"] > 0
    assert distance() < 0.6 * start
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_epochs_repeat_the_updates_and_not_the_teacher(make_gpt, monkeypatch):
    """A second pass over other minibatches than the first, a teacher that is asked again, or a loss counted twice."""
    V, asked, losses = get_tokenizer().n_vocab, [], {}
    for epochs in (1, 2):
        student, teacher = make_gpt(V, seed=1), make_gpt(V, spread=5.0)
        teacher.forward = lambda idx, cache=None: (cache or asked.append(epochs), GPT.forward(teacher, idx, cache))[1]
        norms, optimizer = [], Optimizer(student, adam_lr=0.0)  # nothing is learnt: both passes must find the same loss

        def noted(scale):
            norms.append(Optimizer.step(optimizer, scale))
            return norms[-1]

        monkeypatch.setattr(optimizer, "step", noted)
        losses[epochs] = step(student, teacher, optimizer, epochs=epochs, minibatches=4)["loss"]
        assert len(norms) == 4 * epochs and norms[4:] == norms[:4 * (epochs - 1)]
    assert losses[2] == pytest.approx(losses[1]) and asked.count(2) == asked.count(1) == 4


def test_only_accepted_samples_teach(make_gpt):
    """Rejection sampling whose rejects are trained on, or whose prompts are: accept letters, and letters are learnt."""
    encoding = get_tokenizer()
    student, teacher = make_gpt(encoding.n_vocab, seed=1), make_gpt(encoding.n_vocab)
    optimizer, prompt = Optimizer(student, adam_lr=0.01, muon_lr=0.02), encoding.encode_ordinary(PROBLEMS[0].prompt)

    def accept_letters(text, problem):
        right = float(len(text) == 1 and "a" <= text <= "z")
        return {"reward": right, "accuracy": right, "format": 1.0}

    for seed in range(15):
        metrics = step(student, teacher, optimizer, accept_letters, seed, divergence="sft", copies=64,
                       max_new_tokens=1)
        assert 0 < metrics["accepted"] < 0.5 and metrics["accepted"] == metrics["accuracy"]
    with torch.no_grad():
        assert student(torch.tensor([prompt]))[0, -1].softmax(-1)[ord("a"):ord("z") + 1].sum() > 0.8


def test_policies_differ_only_in_who_samples(make_gpt):
    """On-policy distillation with a loss, a mask or a filter of its own: where student and teacher are one model and
    all is accepted, both learn the same from the same samples, bit for bit."""
    found = []
    for on_policy in (False, True):
        student, teacher = (make_gpt(get_tokenizer().n_vocab, spread=5.0) for _ in range(2))
        step(student, teacher, Optimizer(student, adam_lr=0.003), divergence="sft", on_policy=on_policy)
        assert not torch.equal(student.embedding.weight, teacher.embedding.weight)
        found.append(student.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("wrong", ("accuracy", "format"))
def test_nothing_accepted_is_nothing_learnt(make_gpt, wrong):
    """An empty batch: 0/0 in the weights, or a step of pure momentum. On policy nothing is rejected."""
    V = get_tokenizer().n_vocab
    student, teacher = make_gpt(V, seed=1), make_gpt(V)
    optimizer = Optimizer(student, adam_lr=0.003, muon_lr=0.02)
    step(student, teacher, optimizer)
    before = copy.deepcopy(student.state_dict())

    def reject(text, problem):
        return accept_all(text, problem) | {wrong: 0.0}

    metrics = step(student, teacher, optimizer, reject)
    assert metrics["loss"] is None and metrics["accepted"] == 0 and metrics["length"] > 0
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    assert step(student, teacher, optimizer, reject, on_policy=True)["loss"] > 0


def test_a_step_refuses_an_unknown_divergence(make_gpt):
    """A typing error found only after the samples are drawn."""
    model = make_gpt(get_tokenizer().n_vocab)
    with pytest.raises(ValueError, match="one of"):
        step(model, model, Optimizer(model, adam_lr=0.0), divergence="forwards")


@pytest.mark.parametrize("divergence", ("forward", "sft"))
def test_loss_is_the_mean_over_the_tokens(make_gpt, divergence):
    """The last micro-batch's loss logged as the step's; minibatches of different sizes averaged as if equal."""
    V, rng = get_tokenizer().n_vocab, random.Random(0)

    def accept_some(text, problem):
        return accept_all(text, problem) | {"format": float(rng.random() < 0.4)}

    found = []
    for max_tokens, minibatches in ((10_000, 1), (60, 1), (60, 3)):
        rng.seed(0)
        student, teacher = make_gpt(V, seed=1), make_gpt(V)
        optimizer = Optimizer(student, adam_lr=0.0)  # nothing moves: all parts see one student
        metrics = step(student, teacher, optimizer, accept_some, divergence=divergence, max_tokens=max_tokens,
                       minibatches=minibatches)
        found.append(metrics["loss"])
    assert max(found) - min(found) < 1e-4 * max(found)
