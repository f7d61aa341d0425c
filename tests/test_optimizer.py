"""Muon against torch.optim.Muon, and what a step of the optimizer does to weights, gradients and state."""
import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from engine import optimizer as optimizer_module
from engine.optimizer import Muon, Optimizer
from model import token_logprobs


def backward(model, idx, factor=1.0):
    """Add the gradient of the mean log-probability to the gradients."""
    (-factor * token_logprobs(model, idx, torch.ones_like(idx[:, 1:], dtype=torch.bool)).mean()).backward()


def train(model, optimizer, batches):
    for idx in batches:
        backward(model, idx)
        optimizer.step(lr_scale=0.5)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_muon_is_torchs(make_gpt, dtype):
    """With a wrong scale for a shape, a wrong momentum or a wrong coefficient, Muon still learns, but worse.
    torch.optim.Muon computes in bfloat16, hence the tolerance."""
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


@pytest.mark.parametrize("muon_lr", (0.0, 0.02))
def test_optimizer_goes_on_from_a_checkpoint_bit_for_bit(make_gpt, muon_lr):
    """If a checkpoint lacked a moment or a step count, a resumed run would reach other weights."""
    model, batches = make_gpt(), torch.randint(11, (6, 4, 10))
    optimizer = Optimizer(model, adam_lr=0.003, muon_lr=muon_lr)
    train(model, optimizer, batches[:3])
    kept, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, batches[3:])

    resumed = make_gpt(seed=1)
    resumed.load_state_dict(kept)
    resumed_optimizer = Optimizer(resumed, adam_lr=0.003, muon_lr=muon_lr)
    resumed_optimizer.load_state_dict(state)
    train(resumed, resumed_optimizer, batches[3:])
    for name, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
        assert not torch.equal(kept[name], value), f"{name} did not learn"


def test_optimizer_step_scales_clears_and_reports_the_norm(make_gpt):
    """Gradients must not pile up over steps, the schedule must be applied, and the reported norm must be that before
    clipping."""
    model, idx = make_gpt(), torch.randint(11, (4, 10))
    optimizer = Optimizer(model, adam_lr=0.003, muon_lr=0.02)
    backward(model, idx, factor=100)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    before = copy.deepcopy(model.state_dict())
    assert norm > 1 and abs(optimizer.step(lr_scale=0.0) / norm - 1) < 1e-5
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("muon_lr", (0.0, 0.02))
def test_gradients_are_clipped(make_gpt, muon_lr):
    """One minibatch with a huge gradient would fill the momentum buffer and decide the direction of the next updates.
    Adam's first step has the same size for every gradient, so only a later step shows whether it was clipped."""
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


def test_an_update_without_a_gradient_moves_nothing(make_gpt):
    """Late in RL a minibatch may have no gradient. A step would still move the weights, by momentum alone. The norm
    must be on the device of the model, or it could not be added to the other norms on a GPU."""
    model = make_gpt()
    optimizer = Optimizer(model, adam_lr=0.003, muon_lr=0.02)
    train(model, optimizer, torch.randint(11, (2, 4, 10)))
    before, state = weights(model), copy.deepcopy(optimizer.state_dict())
    for zeros in (False, True):  # as CUDA graphs leave the gradients when only forward passes were made
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if zeros else None
        assert optimizer.step(has_gradient=False).item() == 0.0
        assert torch.equal(weights(model), before)
        assert str(optimizer.state_dict()) == str(state)
    on_meta = Optimizer(make_gpt().to("meta"), adam_lr=0.003)
    assert on_meta.step(has_gradient=False).device.type == "meta"


# Several ranks


@pytest.fixture
def two_ranks(monkeypatch):
    """two_ranks(f, g) calls both at once, each as one of two ranks."""
    barrier, given = threading.Barrier(2, timeout=60), {}

    def all_reduce(x):
        given[threading.get_ident()] = x.clone()
        barrier.wait()
        total = sum(given.values())
        barrier.wait()
        return x.copy_(total)

    def together(*actions):
        given.clear()
        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(action) for action in actions]:
                done.result()

    monkeypatch.setattr(optimizer_module, "world_size", lambda: 2)
    monkeypatch.setattr(optimizer_module, "all_reduce", all_reduce)
    return together


@pytest.mark.parametrize("rows", ((4, 4), (5, 3), (8, 0)))
def test_ranks_make_the_update_of_one_process(make_gpt, two_ranks, monkeypatch, rows):
    """Each rank's loss is a mean over its own rows. If the ranks' gradients were added without weights, or clipped
    before they are added, several processes would make another update than one. A rank may have no rows."""
    idx, models = torch.randint(11, (8, 10)), [make_gpt() for _ in range(3)]
    optimizers = [Optimizer(model, adam_lr=0.003, muon_lr=0.02) for model in models]
    norms = [None] * 3

    def step(i, mine):
        if len(mine):
            backward(models[i], mine, factor=30)
        norms[i] = optimizers[i].step(share=len(mine), has_gradient=len(mine) > 0).item()

    parts = idx.split(rows)
    two_ranks(lambda: step(0, parts[0]), lambda: step(1, parts[1]))
    monkeypatch.undo()
    step(2, idx)
    assert norms[0] == norms[1] == pytest.approx(norms[2], rel=1e-4) and norms[2] > 1
    assert torch.equal(weights(models[0]), weights(models[1]))
    assert torch.allclose(weights(models[0]), weights(models[2]), atol=2e-5)


def test_ranks_agree_that_there_is_nothing_to_learn(make_gpt, two_ranks):
    """If a rank stepped without any gradient, momentum would move its weights, and the other ranks would wait for
    it."""
    models, idx = [make_gpt() for _ in range(2)], torch.randint(11, (2, 4, 10))
    optimizers = [Optimizer(model, adam_lr=0.003, muon_lr=0.02) for model in models]
    two_ranks(*(lambda i=i: train(models[i], optimizers[i], idx) for i in range(2)))
    before = weights(models[0])
    two_ranks(*(lambda optimizer=optimizer: optimizer.step(share=3, has_gradient=False) for optimizer in optimizers))
    assert all(torch.equal(weights(model), before) for model in models)
