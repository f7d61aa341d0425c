"""Recorded CUDA graphs must give the results of the plain kernels. Most tests are skipped without a GPU. The last tests
run on a CPU, with a class in the place of CUDA graphs that records and replays in the same way."""
import copy
import json
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import engine.progress as progress
import engine.speed.graphs as graphs
from data.arithmetic import Arithmetic
from engine.optimizer import Optimizer
from engine.speed import fast, sampler
from engine.speed.fast import frozen, graphed, make_fast
from engine.speed.graphs import GraphedMuon, GraphedSampling, GraphedTraining
from engine.speed.sampler import Sampler
from grpo import grpo_update, sample_rollout
from engine.pretrained.families import FamilyConfig, FamilyGPT, attend_shared
from model import GPT, GPTConfig, token_logprobs
from tests.conftest import Descent, main
from train import Config

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
CFG = Config(device="cuda", compile="on", micro_batch=65_536)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9], [10, 11]]
SHAPES = ({}, {"n_kv_head": 1, "qk_norm": True, "qkv_bias": True, "tied": False})


def make(dtype=torch.bfloat16, device="cuda", **shape) -> GPT:
    torch.manual_seed(0)
    kind, config = (FamilyGPT, FamilyConfig) if shape else (GPT, GPTConfig)
    return kind(config(80, 64, 2, 2, 64, **shape), dtype).to(device)


def draw(model: GPT, seed: int, temperature: float = 1.0, prompts=PROMPTS):
    """The completions that a model samples, and their log-probabilities."""
    generator = torch.Generator(model.embedding.weight.device).manual_seed(seed)
    return model.generate(prompts, 40, temperature=temperature, stop_ids=(0, 3), generator=generator, samples=16)


def cached(model: GPT) -> GPT:
    """The same model, but it samples with the KV cache and the plain kernels."""
    model.generate = Sampler(model)
    return model


def every_logprob(model: GPT, idx) -> torch.Tensor:
    """The log-probabilities of all tokens except the first, in order."""
    return token_logprobs(model, idx, torch.ones(len(idx), idx.size(1) - 1, dtype=torch.bool))


def move_weights(model: GPT, other: GPT) -> None:
    """Update two equal models in place, so that they stay equal."""
    with torch.no_grad():
        for weight, its_weight in zip(model.parameters(), other.parameters()):
            weight += 0.02 * torch.randn_like(weight)
            its_weight.copy_(weight)


@gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_recorded_sampling_is_the_plain_one(dtype, shape):
    """A graph must not read data of an earlier rollout: old weights, old padding, or another temperature."""
    plain, model = cached(make(dtype, **shape)), make_fast(make(dtype, **shape), CFG, sampling=True)
    for i in range(5):
        for prompts in (PROMPTS, PROMPTS[::-1] * 2, PROMPTS[:2]):
            for temperature in (1.0, 0.7, 0.0):
                assert draw(model, i, temperature, prompts) == draw(plain, i, temperature, prompts)
        move_weights(model, plain)
    assert len(model.generate.next_token.graphs) > 40


@gpu
@pytest.mark.parametrize("dtype, close", ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)))
def test_cached_sampling_is_the_full_pass(dtype, close):
    """A column of the cache must not be off by one, and no token may attend to padding."""
    model = make_fast(make(dtype), CFG, sampling=True)
    for _ in range(3):
        completions, logp = draw(model, 0)
    for i, (completion, found) in enumerate(zip(completions, logp)):
        prompt = PROMPTS[i // 16]
        with torch.no_grad():
            full = every_logprob(model, torch.tensor([prompt + completion], device="cuda"))[len(prompt) - 1:]
        assert torch.allclose(full.cpu(), torch.tensor(found), atol=close)


@gpu
@pytest.mark.parametrize("n_kv_head", (1, 2, 4))
def test_training_with_shared_heads_is_that_of_a_cpu(n_kv_head):
    """The fused kernel stores its output in another order than the matrix product. If query heads share keys and
    values, the results must still be those of a CPU."""
    found = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = FamilyGPT(FamilyConfig(80, 64, 2, 4, 64, n_kv_head=n_kv_head)).to(device)
        idx = torch.randint(80, (5, 20), generator=torch.Generator().manual_seed(0)).to(device)
        logp = every_logprob(model, idx)
        logp.mean().backward()
        found.append([logp.detach().cpu()] + [p.grad.cpu() for p in model.parameters()])
    assert all((a - b).norm() <= 1e-3 * a.norm() + 1e-6 for a, b in zip(*found))


@gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_recorded_training_is_the_plain_one(dtype):
    """A replay must not overwrite a gradient, or the result of an earlier pass."""
    plain, model = make(dtype), make_fast(make(dtype), CFG, training=True)
    for step in range(4):
        gradients = []
        for one in (plain, model):
            generator = torch.Generator("cuda").manual_seed(step)
            losses, kept = [], []
            for n, T in ((32, 32), (32, 32), (20, 30), (64, 64), (32, 32)):  # the same size twice in one update
                idx = torch.randint(80, (n, T + 1 if T < 64 else T), generator=generator, device="cuda")
                kept.append(every_logprob(one, idx).detach())
                logp = every_logprob(one, idx)
                losses.append((logp * kept[-1]).mean())
                losses[-1].backward()
            gradients.append([torch.stack(losses), *kept] + [p.grad.clone() for p in one.parameters()])
            one.zero_grad(set_to_none=True)
        for a, b in zip(*gradients):
            close = 1e-4 if dtype == torch.float32 else 2e-2
            assert (a - b).norm() <= close * a.norm() + 1e-6
    assert len(model.hidden.passes) == 2


@gpu
def test_recorded_products_are_the_plain_ones():
    """Muon must not use the products of the step before, or add a gradient to the momentum buffer twice."""
    shapes, model = ((3, 64, 64), (3, 96, 64)), make()
    plain, muon = (Optimizer(model, 1e-3, 1e-2).parts[1] for _ in range(2))
    graphed(SimpleNamespace(parts=[muon]), CFG)
    averages = [[torch.zeros(shape, device="cuda") for shape in shapes] for _ in range(2)]
    for _ in range(4):
        for mine, other in zip(*averages):
            grad = torch.randn_like(mine)
            assert torch.equal(plain.direction(grad, mine), muon.direction(grad, other)) and torch.equal(mine, other)
    assert all(muon.direction.graphs.values())


@gpu
def test_recorded_training_equals_plain_kernels_at_the_same_size():
    """If graphs rounded differently from the kernels that they record, a resumed run would end in other weights."""
    plain, model = make(), make_fast(make(), CFG, training=True)
    idx = torch.randint(80, (32, 33), device="cuda")
    for _ in range(3):
        for one in (plain, model):
            one.zero_grad(set_to_none=True)
            every_logprob(one, idx).mean().backward()
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), model.parameters()))
    assert model.hidden.passes


@gpu
def test_a_loss_that_is_kept_does_not_stop_a_recording():
    """A loss that still exists ties the parameters to another stream. The recording of a graph must not fail because of
    this."""
    model, kept = make_fast(make(), CFG, training=True), []
    for n in (32, 64, 32, 64, 32, 96, 96):
        idx = torch.randint(80, (n, 33), device="cuda")
        hidden = model.hidden(idx[:, :-1])
        kept.append((hidden, model.logits(hidden).float().log_softmax(dim=-1).sum()))
        kept[-1][1].backward()
    assert len(model.hidden.passes) == 3


def rollout_of(model: GPT, task):
    """32 completions of 8 problems, and random advantages."""
    problems = [task.make_problem(random.Random(i)) for i in range(8)]
    rollout = sample_rollout(model, problems, lambda text, problem: {"reward": len(text) % 3, "accuracy": 0.0}, task, 4,
                             20, torch.Generator().manual_seed(0))
    return rollout, torch.randn(32, generator=torch.Generator().manual_seed(1))


def update(model: GPT, reference: GPT, rollout, adv):
    """An update of the model for each of two minibatches -> metrics and gradients."""
    cfg = Config(micro_batch=512, rl_samples=4, rl_minibatches=2, rl_max_new_tokens=20)
    optimizer = Descent(model, distance=0.1)
    metrics = grpo_update(model, reference, optimizer, rollout, adv, cfg, torch.Generator().manual_seed(0)).means()
    return metrics, torch.stack(optimizer.gradients).cpu()


def assert_same_update(one, other):
    (metrics, gradients), (its_metrics, its_gradients) = one, other
    assert metrics.keys() == its_metrics.keys() and metrics["kl"] > 0 and metrics["no_signal"] < 1
    assert metrics["sampler_gap"] == pytest.approx(its_metrics["sampler_gap"], abs=1e-4)
    assert metrics["kl"] == pytest.approx(its_metrics["kl"], rel=1e-2)
    assert len(gradients) == 2 and gradients.norm(dim=1).min() > 0
    for a, b in zip(gradients, its_gradients, strict=True):
        assert (a - b).norm() < 1e-3 * a.norm()


@gpu
def test_an_update_on_a_gpu_is_that_of_a_cpu():
    """No tensor may be left on the CPU, and no micro-batch may be lost."""
    task = Arithmetic()
    torch.manual_seed(0)
    model = GPT(GPTConfig(task.encoding.n_vocab, 64, 2, 2, 64))
    rollout, adv = rollout_of(model, task)
    of_cpu, of_gpu = (update(make_fast(copy.deepcopy(model).to(device), cfg, training=True),
                             copy.deepcopy(model).to(device), rollout, adv)
                      for device, cfg in (("cpu", Config(device="cpu", compile="off", micro_batch=512)), ("cuda", CFG)))
    assert_same_update(of_cpu, of_gpu)


@gpu
def test_a_minibatch_on_a_gpu_may_have_nothing_to_learn():
    """A minibatch without a gradient counts with a norm of 0. This 0 must be on the GPU, or it could not be added to
    the other norms."""
    task = Arithmetic()
    torch.manual_seed(0)
    model = GPT(GPTConfig(task.encoding.n_vocab, 64, 2, 2, 64))
    rollout, adv = rollout_of(model, task)
    cfg = Config(micro_batch=512, rl_samples=4, rl_max_new_tokens=20, kl_coef=0.0)
    first, second = torch.randperm(32, generator=torch.Generator().manual_seed(0)).view(-1, 2).T
    for empty in (first, second):
        one = make_fast(copy.deepcopy(model).to("cuda"), CFG, training=True)
        metrics = grpo_update(one, None, Optimizer(one, 1e-3), rollout, adv.index_fill(0, empty, 0.0), cfg,
                              torch.Generator().manual_seed(0)).means()
        assert metrics["grad_norm"] > 0


@gpu
def test_a_killed_run_ends_in_the_same_weights(tmp_path, monkeypatch):
    """A resumed run must end in the weights of an undisturbed run. The lost state of a generator, or graphs in another
    order, would change them."""
    tiny = ["--preset=tiny", "--stage=base", "--dtype=bfloat16", "--compile=on", "--base_tokens=60000",
            "--student_base_tokens=60000", "--save_every=0", "--eval_problems=8"]
    killed_run(tiny, tmp_path, monkeypatch)


def killed_run(tiny: list[str], out, monkeypatch) -> None:
    """A run that is killed while it trains the base, and then resumed, must end in the weights of an undisturbed
    run."""
    assert main([*tiny, f"--out={out / 'whole'}"]) == 0
    save, saved = progress.save_checkpoint, []

    def killed(path, content):
        save(path, content)
        saved.append(path)
        if len(saved) == 12:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(progress, "save_checkpoint", killed)
        assert main([*tiny, f"--out={out / 'cut'}"]) == 130
    assert main([*tiny, f"--out={out / 'cut'}"]) == 0
    whole, cut = (torch.load(out / name / "base.pt", weights_only=True)["model"] for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    json.loads((out / "cut" / "results.json").read_text())


@gpu
def test_memory_of_a_step_is_bounded():
    """Graphs of different sizes must share their memory. Otherwise each size would need its own."""
    model = make_fast(make(), CFG, training=True)
    sizes, held = (256, 256, 224, 224, 192, 192, 160, 160, 128, 128, 96, 96, 64, 64, 32, 32), []
    for n in sizes:
        every_logprob(model, torch.randint(80, (n, 64), device="cuda")).mean().backward()
        held.append(torch.cuda.memory_reserved() / 2**20)
    assert len(model.hidden.passes) == 8 and held[-1] < 1.3 * held[1]


# A CPU in place of the GPU


class Again:
    """Takes the place of a CUDA graph on a CPU. A replay runs the recorded function again, in the same memory."""

    def __init__(self, action, pool):
        self.action, self.at = action, dict(zip(action.__code__.co_freevars, action.__closure__))
        if "cache" in self.at:
            self.cache = copy.copy(self.at["cache"].cell_contents)
            self.cache.kv = {layer: list(pair) for layer, pair in self.cache.kv.items()}
            self.length = self.cache.length
        elif "found" in self.at:  # a recording runs nothing, so it must not change the momentum buffer
            average = self.at["average"].cell_contents
            before = average.clone()
            action()
            average.copy_(before)
        elif action.__name__ != "backward":
            action()

    def replay(self) -> None:
        if "cache" in self.at:
            cell, self.cache.length = self.at["cache"], self.length
            before, cell.cell_contents = cell.cell_contents, self.cache
            self.action()
            cell.cell_contents = before
        elif "found" in self.at:
            found = self.at["found"].cell_contents
            self.action()
            found[0].copy_(found.pop())
        else:
            self.action()
            if self.action.__name__ == "forward":
                passes = self.at["self"].cell_contents
                passes.out.copy_(passes.live.detach())


@pytest.fixture
def no_graphs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(graphs, "Graph", Again)


@pytest.mark.parametrize("dtype, shape", ((torch.bfloat16, SHAPES[0]), (torch.float32, SHAPES[1])))
def test_a_cache_moves_in(dtype, shape, no_graphs):
    """A graph must not read the weights, padding, rows or temperature of another rollout. (In float32 some matrices of
    the cache are the model's own weights, and an update changes them by itself.)"""
    plain = cached(make(dtype, "cpu", **shape))
    model = make_fast(make(dtype, "cpu", **shape), CFG, sampling=True)
    for _ in range(2):
        draw(model, 0, prompts=PROMPTS[:1])  # its graphs have room for 16 rows, and the next ones need more
    assert model.generate.next_token.graphs
    for i in range(3):  # a size is first seen, then recorded, then replayed; the weights change each time
        for prompts, temperature in ((PROMPTS, 1.0), (PROMPTS[::-1] * 2, 1.0), (PROMPTS[:2], 1.0), (PROMPTS[:2], 0.0)):
            drawn = [draw(one, i, temperature, prompts) for one in (plain, model)]
            assert drawn[0][0] == drawn[1][0]
            for a, b in zip(drawn[0][1], drawn[1][1]):
                assert a == pytest.approx(b, abs=1e-5)
        move_weights(model, plain)
    assert len(model.generate.next_token.graphs) > 20


def test_what_a_recorded_pass_returns_is_kept(no_graphs):
    """A later replay must not overwrite the result of an earlier pass, and no gradient may be lost between
    micro-batches."""
    plain, model = make(torch.float32, "cpu"), make_fast(make(torch.float32, "cpu"), CFG, training=True)
    for step in range(3):
        for one in (plain, model):
            generator, kept = torch.Generator().manual_seed(step), []
            for n, T in ((32, 33), (20, 31), (32, 33), (32, 33)):
                idx = torch.randint(80, (n, T), generator=generator)
                kept.append(every_logprob(one, idx).detach())
                (every_logprob(one, idx) * kept[0][:n * (T - 1)].mean()).mean().backward()
            one.found = [*kept, *(p.grad.clone() for p in one.parameters())]
            one.zero_grad(set_to_none=True)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain.found, model.found))
    assert len(model.hidden.passes) == 1
    first = model.hidden(idx[:, :-1])
    kept = first.clone()
    assert not torch.equal(model.hidden(idx[:, 1:]), kept) and torch.equal(first, kept)


def test_recorded_products_are_kept(no_graphs):
    """Muon must not use the products of the step before, or add a gradient to the momentum buffer twice."""
    models = [make(torch.float32, "cpu") for _ in range(2)]
    optimizers = [Optimizer(model, 1e-3, 1e-2) for model in models]
    graphed(optimizers[1], CFG)
    for _ in range(4):
        for p, other in zip(*(optimizer.parameters for optimizer in optimizers)):
            p.grad = torch.randn_like(p)
            other.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    recorded = optimizers[1].parts[1].direction
    assert isinstance(recorded, GraphedMuon) and len(recorded.graphs) > 2 and all(recorded.graphs.values())
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models)))


def test_an_update_with_recorded_passes(no_graphs):
    """The metrics and gradients of an update must be those of the plain passes, in the first update and in the second.
    The reference has recorded passes of its own."""
    task = Arithmetic()
    torch.manual_seed(0)
    plain = GPT(GPTConfig(task.encoding.n_vocab, 64, 2, 2, 64))
    rollout, adv = rollout_of(plain, task)
    model = copy.deepcopy(plain)
    reference = frozen(model, CFG)
    make_fast(model, CFG, training=True)
    its_reference = copy.deepcopy(plain)
    for _ in range(2):
        assert_same_update(update(plain, its_reference, rollout, adv), update(model, reference, rollout, adv))
    assert model.hidden.passes and reference.hidden.passes and reference.hidden.model is reference


def test_a_frozen_copy_takes_no_graph_with_it(no_graphs, monkeypatch):
    """A recorded graph cannot be copied, and a copied graph would replay the policy. The policy must keep its
    graphs."""
    def refuse(self, memo):
        raise AssertionError("a graph is copied")

    monkeypatch.setattr(GraphedTraining, "__deepcopy__", refuse, raising=False)
    monkeypatch.setattr(GraphedSampling, "__deepcopy__", refuse, raising=False)
    model = make_fast(make(torch.float32, "cpu"), CFG, training=True, sampling=True)
    quick = {name: vars(model)[name] for name in ("hidden", "generate")}
    copied, idx = frozen(model, CFG), torch.randint(80, (2, 9))
    assert all(vars(model)[name] is method for name, method in quick.items())
    assert copied.hidden.model is copied.generate.model is copied
    before = copied(idx)
    move_weights(model, make(torch.float32, "cpu"))
    assert torch.equal(copied(idx), before) and not torch.equal(model(idx), before)


def test_what_is_recorded(no_graphs, monkeypatch):
    """A large model gains nothing from recorded training, which would need a second copy of its gradients. A model that
    only samples must record nothing for training. A sequence that is too long must be refused, not cut."""
    model = make_fast(make(device="cpu"), CFG, training=True, sampling=True)
    assert type(model.hidden) is GraphedTraining and type(model.generate.next_token) is GraphedSampling
    with pytest.raises(ValueError, match="65 tokens"):
        model.hidden(torch.ones(2, 65, dtype=torch.long))
    assert vars(make_fast(make(device="cpu"), CFG)).keys() & set(fast.QUICK_METHODS) == {"generate"}
    monkeypatch.setattr(fast, "LAUNCH_BOUND", model.n_params() - 1)
    large = make_fast(make(device="cpu"), CFG, training=True, sampling=True)
    assert vars(large).keys() & set(fast.QUICK_METHODS) == {"generate"}
    assert type(large.generate.next_token) is GraphedSampling
    plain = make_fast(make(device="cpu"), Config(device="cuda", compile="off", micro_batch=512), sampling=True)
    assert plain.generate.next_token is sampler.next_token


class OnGpu(torch.Tensor):
    """A tensor on the CPU that claims to be on a GPU."""
    is_cuda = True
    device = torch.device("cuda")


@pytest.mark.parametrize("n_kv_head", (1, 2, 4))
def test_the_fused_kernel_is_the_product_of_matrices(monkeypatch, n_kv_head):
    """On a GPU the fused kernel stores its output in the order (B, T, H, D). A view in the shape of the queries would
    fail if heads share their keys."""
    fused, called = F.scaled_dot_product_attention, []

    def as_on_a_gpu(*args, **options):
        called.append(1)
        return fused(*args, **options).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(F, "scaled_dot_product_attention", as_on_a_gpu)
    q, k, v = (torch.randn(3, heads, 7, 8) for heads in (4, n_kv_head, n_kv_head))
    mask = torch.full((7, 7), float("-inf")).triu(1)
    found = attend_shared(*(x.as_subclass(OnGpu) for x in (q, k, v)), mask)
    expected = attend_shared(q, k, v, mask)
    assert called == [1] and torch.allclose(found.as_subclass(torch.Tensor), expected, atol=1e-6)
