"""What only a GPU can show: recorded kernels give what the plain ones give. Skipped where there is none."""
import copy
import json
import random
from types import SimpleNamespace

import pytest
import torch

import run
from grpo import grpo_update, sample_rollout
from data.arithmetic import Arithmetic
from model import GPT, GPTConfig, Optimizer, generate, token_logprobs
from run import Config, GraphedSampling, GraphedTraining, compiled

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
CFG = Config(device="cuda", compile="on", micro_batch=65_536)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9], [10, 11]]


def make(dtype=torch.bfloat16, **shape) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(80, 64, 2, 2, 64, **shape), dtype).to("cuda")


def draw(model: GPT, seed: int, temperature: float = 1.0, prompts=PROMPTS, **more):
    generator = torch.Generator("cuda").manual_seed(seed)
    return generate(model, prompts, 40, temperature=temperature, eos_id=(0, 3), generator=generator, samples=16,
                    return_logprobs=True, **more)


@gpu
@pytest.mark.parametrize("shape", ({}, {"n_kv_head": 1, "qk_norm": True, "qkv_bias": True, "tied": False}))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_recorded_sampling_is_the_plain_one(dtype, shape):
    """A graph reads what an earlier rollout left: old weights, old padding, another temperature's."""
    plain, model = make(dtype, **shape), compiled(make(dtype, **shape), CFG, sampling=True)
    for i in range(5):
        for prompts in (PROMPTS, PROMPTS[::-1] * 2, PROMPTS[:2]):
            for temperature in (1.0, 0.7, 0.0):
                assert draw(model, i, temperature, prompts) == draw(plain, i, temperature, prompts)
        with torch.no_grad():
            for weight, other in zip(model.parameters(), plain.parameters()):
                weight += 0.02 * torch.randn_like(weight)
                other.copy_(weight)
    assert len(model.next_token.graphs) > 40


@gpu
@pytest.mark.parametrize("dtype, close", ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)))
def test_cached_sampling_is_the_full_pass(dtype, close):
    """A column of the cache is off by one, or padding is attended to."""
    model = compiled(make(dtype), CFG, sampling=True)
    for _ in range(3):
        completions, logp = draw(model, 0)
    for i, (completion, found) in enumerate(zip(completions, logp)):
        prompt = PROMPTS[i // 16]
        with torch.no_grad():
            full = token_logprobs(model, torch.tensor([prompt + completion], device="cuda"))[0, len(prompt) - 1:]
        assert torch.allclose(full.cpu(), torch.tensor(found), atol=close)


@gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_recorded_training_is_the_plain_one(dtype):
    """A replay writes over a gradient, or over what an earlier pass returned."""
    plain, model = make(dtype), make(dtype)
    model = compiled(model, CFG, training=True)
    for step in range(4):
        gradients = []
        for one in (plain, model):
            generator = torch.Generator("cuda").manual_seed(step)
            losses, kept = [], []
            for n, T in ((32, 32), (32, 32), (20, 30), (64, 64), (32, 32)):  # the same size twice in one update
                idx = torch.randint(80, (n, T + 1 if T < 64 else T), generator=generator, device="cuda")
                kept.append(token_logprobs(one, idx).detach())
                logp = token_logprobs(one, idx)
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
    """Muon moves its matrices by the products of the step before, or averages gradients twice."""
    shapes, model = ((3, 64, 64), (3, 96, 64)), make()
    plain, muon = (Optimizer(model, 1e-3, 1e-2).parts[1] for _ in range(2))
    run.graphed(SimpleNamespace(parts=[muon]), CFG)
    averages = [[torch.zeros(shape, device="cuda") for shape in shapes] for _ in range(2)]
    for _ in range(4):
        for mine, other in zip(*averages):
            grad = torch.randn_like(mine)
            assert torch.equal(plain.direction(grad, mine), muon.direction(grad, other)) and torch.equal(mine, other)
    assert all(muon.direction.graphs.values())


@gpu
def test_recorded_training_equals_plain_kernels_at_the_same_size():
    """Graphs round otherwise than the kernels that they record, so that a resumed run ends elsewhere."""
    plain, model = make(), compiled(make(), CFG, training=True)
    idx = torch.randint(80, (32, 33), device="cuda")
    for _ in range(3):
        for one in (plain, model):
            one.zero_grad(set_to_none=True)
            token_logprobs(one, idx).mean().backward()
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), model.parameters()))
    assert model.hidden.passes


@gpu
def test_a_loss_that_is_kept_does_not_stop_a_recording():
    """What autograd keeps for a loss ties the parameters to a stream that a recording may not meet."""
    model, kept = compiled(make(), CFG, training=True), []
    for n in (32, 64, 32, 64, 32, 96, 96):
        idx = torch.randint(80, (n, 33), device="cuda")
        hidden = model.hidden(idx[:, :-1])
        kept.append((hidden, model.logits(hidden).float().log_softmax(dim=-1).sum()))
        kept[-1][1].backward()
    assert len(model.hidden.passes) == 3


@gpu
def test_an_update_on_a_gpu_is_that_of_a_cpu():
    """A tensor is left on the CPU, or a micro-batch is lost."""
    task = Arithmetic()
    torch.manual_seed(0)
    model = GPT(GPTConfig(task.encoding.n_vocab, 64, 2, 2, 64))
    problems = [task.make_problem(random.Random(i)) for i in range(8)]
    rollout = sample_rollout(model, problems, lambda text, problem: {"reward": len(text) % 3, "accuracy": 0.0}, task,
                             samples=4, max_new_tokens=20, generator=torch.Generator().manual_seed(0))
    adv = torch.randn(32, generator=torch.Generator().manual_seed(1))
    found = []
    for device in ("cpu", "cuda"):
        one = copy.deepcopy(model).to(device)
        one = compiled(one, CFG, training=True) if device == "cuda" else one
        reference = copy.deepcopy(model).to(device)
        optimizer = Optimizer(one, 1e-3)
        cfg = Config(micro_batch=4_096, rl_max_new_tokens=20)
        metrics = [grpo_update(one, reference, optimizer, rollout, adv, cfg, torch.Generator(device).manual_seed(0))
                   for _ in range(1)]
        found.append((metrics, [p.detach().cpu() for p in one.parameters()]))
    assert found[0][0][0].keys() == found[1][0][0].keys()
    assert found[0][0][0]["sampler_gap"] == pytest.approx(found[1][0][0]["sampler_gap"], abs=1e-4)
    assert max((a - b).abs().max() for a, b in zip(found[0][1], found[1][1])) < 5e-3


@gpu
def test_a_killed_run_ends_in_the_same_weights(tmp_path):
    """A generator's state, or the order of graphs, shapes a resumed run."""
    from train import main
    tiny = ["--preset=tiny", "--stage=base", "--dtype=bfloat16", "--compile=on", "--base_tokens=60000",
            "--student_base_tokens=60000", "--save_every=0", "--eval_problems=8"]
    assert main([*tiny, f"--out={tmp_path / 'whole'}"]) == 0
    save, saved = run.save_checkpoint, []

    def killed(path, content):
        save(path, content)
        saved.append(path)
        if len(saved) == 12:
            raise KeyboardInterrupt

    run.save_checkpoint = killed
    try:
        assert main([*tiny, f"--out={tmp_path / 'cut'}"]) == 130
    finally:
        run.save_checkpoint = save
    assert main([*tiny, f"--out={tmp_path / 'cut'}"]) == 0
    whole, cut = (torch.load(tmp_path / name / "base.pt")["model"] for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    json.loads((tmp_path / "cut" / "results.json").read_text())


@gpu
def test_memory_of_a_step_is_bounded():
    """Graphs keep the memory of each size, instead of sharing it."""
    model = compiled(make(), CFG, training=True)
    sizes, held = (256, 256, 224, 224, 192, 192, 160, 160, 128, 128, 96, 96, 64, 64, 32, 32), []
    for n in sizes:
        token_logprobs(model, torch.randint(80, (n, 64), device="cuda")).mean().backward()
        held.append(torch.cuda.memory_reserved() / 2**20)
    assert len(model.hidden.passes) == 8 and held[-1] < 1.3 * held[1]


class Again:
    """Stands in for a CUDA graph on a CPU: what was recorded is run again, in the memory that it had."""

    def __init__(self, action, pool):
        self.action, self.at = action, dict(zip(action.__code__.co_freevars, action.__closure__))
        if "cache" in self.at:
            self.cache = copy.copy(self.at["cache"].cell_contents)
            self.cache.kv = {layer: list(pair) for layer, pair in self.cache.kv.items()}
            self.length = self.cache.length
        elif action.__name__ != "backward":
            action()

    def replay(self) -> None:
        if "cache" in self.at:
            cell, self.cache.length = self.at["cache"], self.length
            before, cell.cell_contents = cell.cell_contents, self.cache
            self.action()
            cell.cell_contents = before
        else:
            self.action()
            if self.action.__name__ == "forward":
                passes = self.at["self"].cell_contents
                passes.out.copy_(passes.live.detach())


@pytest.fixture
def no_graphs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(run, "Graph", Again)


@pytest.mark.parametrize("shape", ({}, {"n_kv_head": 1, "qk_norm": True, "qkv_bias": True, "tied": False}))
def test_a_cache_moves_in(shape, no_graphs, monkeypatch):
    """A graph reads another rollout's weights, padding or rows."""
    monkeypatch.setattr("model.LOOK_EVERY", 1)
    torch.manual_seed(0)
    plain = GPT(GPTConfig(80, 64, 2, 2, 64, **shape))
    model = copy.deepcopy(plain)
    model.next_token = GraphedSampling(model)
    for i in range(4):
        for prompts in (PROMPTS, PROMPTS[::-1] * 2, PROMPTS[:2]):
            drawn = [generate(one, prompts, 40, eos_id=(0, 3), generator=torch.Generator().manual_seed(i), samples=16,
                              return_logprobs=True) for one in (plain, model)]
            assert drawn[0][0] == drawn[1][0]
            for a, b in zip(drawn[0][1], drawn[1][1]):
                assert a == pytest.approx(b, abs=1e-5)
        with torch.no_grad():
            for weight, other in zip(model.parameters(), plain.parameters()):
                weight += 0.02 * torch.randn_like(weight)
                other.copy_(weight)
    assert len(model.next_token.graphs) > 20


def test_what_a_recorded_pass_returns_is_kept(no_graphs):
    """A later replay writes over what an earlier pass returned, or a gradient is lost between micro-batches."""
    torch.manual_seed(0)
    plain = GPT(GPTConfig(80, 64, 2, 2, 64))
    model = copy.deepcopy(plain)
    model.hidden = GraphedTraining(model)
    for step in range(3):
        for one in (plain, model):
            generator, kept = torch.Generator().manual_seed(step), []
            for n, T in ((32, 33), (20, 31), (32, 33), (32, 33)):
                idx = torch.randint(80, (n, T), generator=generator)
                kept.append(token_logprobs(one, idx).detach())
                (token_logprobs(one, idx) * kept[0][:n, :T - 1].mean()).mean().backward()
            one.found = [*kept, *(p.grad.clone() for p in one.parameters())]
            one.zero_grad(set_to_none=True)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain.found, model.found))
    assert len(model.hidden.passes) == 1
