"""CUDA graphs: the kernels of a pass on a GPU, recorded once for each size, and then launched together.

Launching the kernels of a small model one by one takes longer than running them.
"""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.speed.sampler import Cache, next_token
from model import GPT


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is n or more."""
    return -(-n // multiple) * multiple


class Graph:
    """A CUDA graph: the kernels that `action` would launch, recorded without running them. replay() launches them
    together. They read and write the same memory as when they were recorded."""
    stream = None  # all graphs are recorded on this stream

    def __init__(self, action: Callable[[], None], pool):
        Graph.stream = Graph.stream or torch.cuda.Stream()
        self.graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            # subtle: `with torch.cuda.graph` would first return all free memory, which takes longer than recording.
            self.graph.capture_begin(pool=pool)
            action()
            self.graph.capture_end()
        torch.cuda.current_stream().wait_stream(self.stream)
        self.replay = self.graph.replay


class GraphedSampling:
    """sampler.next_token on a GPU, with one graph for each size (rows, tokens in the cache), recorded at the second use
    of the size. A graph works in fixed memory, so each new cache is moved there. This memory has room for `rows` rows
    of `columns` tokens."""

    def __init__(self):
        self.rows, self.columns, self.cache, self.pad = 0, 0, None, None
        self.seen, self.graphs, self.pool = set(), {}, torch.cuda.graph_pool_handle()

    def __call__(self, model: GPT, token: Tensor, cache: Cache, temperature: float,
                 u: Tensor) -> tuple[Tensor, Tensor]:
        n = len(token)
        if cache is not self.cache:
            self.move_in(cache)
        if cache.pad is not self.pad:  # rows have left: see Cache.replace
            self.pads[:n], self.masks[:n, :cache.mask.size(1)] = cache.pad, cache.mask
            self.pad = cache.pad = self.pads[:n]
            cache.mask = self.masks[:n]
        self.token[:n], self.u[:n] = token, u

        def step() -> None:
            self.token[:n], self.logp[:n] = next_token(model, self.token[:n], cache, temperature, self.u[:n])

        size = n, cache.length, temperature
        if size not in self.seen:
            self.seen.add(size)
            step()
        else:
            if size not in self.graphs:
                self.graphs[size] = Graph(step, self.pool)
            cache.length = size[1] + 1
            self.graphs[size].replay()
        return self.token[:n], self.logp[:n]

    def move_in(self, cache: Cache) -> None:
        """Move a cache into the memory that the graphs use."""
        self.cache, self.pad, n = cache, None, len(cache.pad)
        if n > self.rows or cache.max_len > self.columns:
            self.rows, self.columns = max(n, self.rows), max(round_up(cache.max_len, 64), self.columns)
            self.seen, self.graphs = set(), {}
            self.blocks, self.output = cache.blocks, cache.output
            self.kv = {layer: [x.new_empty(self.rows, x.size(1), self.columns, x.size(3)) for x in pair]
                       for layer, pair in cache.kv.items()}
            self.masks, self.u = (cache.mask.new_zeros(self.rows, width) for width in (self.columns, 1))
            self.pads, self.token = (cache.pad.new_zeros(self.rows) for _ in range(2))
            self.logp = cache.mask.new_zeros(self.rows)
        else:  # the weights may have changed
            for mine, new in zip(self.blocks, cache.blocks):
                torch._foreach_copy_(list(mine.parameters(recurse=False)), list(new.parameters(recurse=False)))
            self.output.copy_(cache.output)
            cache.blocks, cache.output = self.blocks, self.output
        for mine, new in zip(self.kv.values(), cache.kv.values()):
            for i, x in enumerate(mine):
                x[:n, :, :cache.length] = new[i][:, :, :cache.length]
                new[i] = x[:n]


class GraphedTraining:
    """GPT.hidden on a GPU with its backward pass: two graphs for each size, recorded at the second use of the size.
    Sizes are rounded up, so that there are few. The backward graph itself adds to the gradients of the parameters."""

    def __init__(self, model: GPT):
        self.model, self.seen, self.passes, self.pool = model, set(), {}, torch.cuda.graph_pool_handle()
        self.parameters = list(model.parameters())
        self.grads = [torch.zeros_like(p) for p in self.parameters]

    def __call__(self, idx: Tensor) -> Tensor:
        if self.parameters[0].grad is None:  # an update begins
            torch._foreach_zero_(self.grads)
            for p, grad in zip(self.parameters, self.grads):
                p.grad = grad
        n, T = idx.shape
        size = round_up(n, 32), max(T, min(round_up(T, 32), self.model.config.block_size))
        idx = F.pad(idx, (0, size[1] - T, 0, size[0] - n))
        if size not in self.seen:
            self.seen.add(size)
            return GPT.hidden(self.model, idx)[:n, :T]
        if size not in self.passes:
            self.passes[size] = Passes(Twin(self.model), idx, self.grads, self.pool)
        return Replay.apply(self.passes[size], idx, self.parameters[0])[:n, :T]


class Twin(GPT):
    """A model that shares the memory of another. To autograd its parameters are different ones. The parameters of the
    first model cannot be recorded, because a loss that still exists ties them to another stream."""

    def __init__(self, model: GPT):
        with torch.device("meta"):
            super().__init__(model.config, model.dtype)
        self.load_state_dict(model.state_dict(), assign=True)
        self.cos, self.sin = model.cos, model.sin


class Passes:
    """The recorded forward and backward pass of a model at one size. Forward: `idx` -> `out`. Backward: `grad`, the
    gradient of `out` -> the gradients of the parameters, which are added to `grads`."""

    def __init__(self, model: GPT, idx: Tensor, grads: list[Tensor], pool):
        self.idx = idx

        def forward() -> None:
            with torch.enable_grad():
                self.live = model.hidden(idx)

        def backward() -> None:
            new_grads = torch.autograd.grad(self.live, list(model.parameters()), self.grad, allow_unused=True)
            torch._foreach_add_(*zip(*((grad, new) for grad, new in zip(grads, new_grads) if new is not None)))

        self.forward = Graph(forward, pool)
        self.out, self.grad = self.live.detach(), torch.empty_like(self.live)
        self.backward = Graph(backward, pool)
        del self.live


class Replay(torch.autograd.Function):
    """The recorded passes as a function of autograd. `weight` is a parameter; without it there would be no backward."""

    @staticmethod
    def forward(ctx, passes: Passes, idx: Tensor, weight: Tensor) -> Tensor:
        ctx.passes = passes
        passes.idx.copy_(idx)
        passes.forward.replay()
        return passes.out.clone()  # the next replay overwrites it

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, None, None]:
        ctx.passes.grad.copy_(grad)
        ctx.passes.backward.replay()
        return None, None, None


class GraphedMuon:
    """Muon.direction on a GPU, with one graph for each shape, recorded at the second use of the shape."""

    def __init__(self, direction: Callable[[Tensor, Tensor], Tensor]):
        self.direction, self.graphs, self.pool = direction, {}, torch.cuda.graph_pool_handle()

    def __call__(self, grad: Tensor, average: Tensor) -> Tensor:  # the momentum buffer
        if grad.shape not in self.graphs:
            self.graphs[grad.shape] = None
            return self.direction(grad, average)
        if self.graphs[grad.shape] is None:
            static_grad, found = grad.clone(), []
            graph = Graph(lambda: found.append(self.direction(static_grad, average)), self.pool)
            self.graphs[grad.shape] = graph, static_grad, *found
        graph, static_grad, update = self.graphs[grad.shape]
        static_grad.copy_(grad)
        graph.replay()
        return update
