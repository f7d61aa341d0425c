"""Faster methods of a model, and methods that save memory. Nothing here changes a result by more than rounding.

The faster methods replace the model's own `hidden`, `logits`, `logprobs` and `generate` on the instance. subtle: they
are objects with the model as an attribute, and never closures over it. So a deepcopy of the model also copies them, and
the copies compute with the copy's weights.
"""
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from engine.optimizer import Muon, Optimizer
from engine.speed.graphs import GraphedMuon, GraphedSampling, GraphedTraining, round_up
from engine.speed.sampler import Sampler, next_token
from model import GPT

DEEP = 12  # sampling is not compiled for a model of more layers: each layer takes 3 s to compile
LAUNCH_BOUND = 4_000_000  # up to this many parameters, a kernel on a GPU takes longer to launch than to run
LARGE_VOCABULARY = 4_096  # above this many tokens, log-probabilities are computed in chunks
LOGITS_AT_A_TIME = 2**24  # the logits of a chunk: 64 MB
QUICK_METHODS = ("hidden", "logits", "logprobs", "generate")


class RoundedHidden:
    """GPT.hidden, with batches padded to rounded sizes. The CPU's library (oneDNN) generates new machine code for each
    new size, which takes as long as the computation itself."""

    def __init__(self, model: GPT, max_tokens: int):
        self.model, self.max_tokens = model, max_tokens

    def __call__(self, idx: Tensor) -> Tensor:
        n, T = idx.shape
        length = max(T, min(round_up(T, 8), self.model.config.block_size))
        # subtle: at most max_tokens, for which the code is compiled. grpo.micro_batches rounds lengths in the same way.
        rows = max(n, min(round_up(n, 16), self.max_tokens // length))
        return GPT.hidden(self.model, F.pad(idx, (0, length - T, 0, rows - n)))[:n, :T]


class RoundedLogits:
    """GPT.logits, padded to a rounded number of tokens if only the sampled tokens are given."""

    def __init__(self, model: GPT):
        self.model = model

    def __call__(self, hidden: Tensor) -> Tensor:
        if hidden.dim() > 2:
            return GPT.logits(self.model, hidden)
        M = len(hidden)
        return GPT.logits(self.model, F.pad(hidden, (0, 0, 0, round_up(M, 256) - M)))[:M]


class LogprobsInParts:
    """GPT.logprobs for a large vocabulary. Its logits would take most of the memory of a training step. So they are
    computed in chunks, and computed again in the backward pass instead of being stored."""

    def __init__(self, model: GPT):
        self.model = model

    def __call__(self, hidden: Tensor, target: Tensor) -> Tensor:
        n_tokens = max(1, LOGITS_AT_A_TIME // self.model.config.vocab_size)  # of a chunk
        return torch.cat([checkpoint(GPT.logprobs, self.model, h, t, use_reentrant=False)
                          for h, t in zip(hidden.split(n_tokens), target.split(n_tokens))])


def make_fast(model: GPT, cfg, training: bool = False, sampling: bool = False) -> GPT:
    """The model, which samples with a cache from now on. If cfg.compile is "on", training and sampling get faster, too:
    on a GPU by CUDA graphs, one for each size, otherwise by torch.compile, once for all sizes."""
    compiled = cfg.compile == "on"
    model.generate = Sampler(model)
    if training and model.config.vocab_size > LARGE_VOCABULARY:
        model.logprobs = LogprobsInParts(model)
    if cfg.device == "cuda" and compiled:
        if training and model.n_params() <= LAUNCH_BOUND:
            model.hidden = GraphedTraining(model)
        if sampling:
            model.generate = Sampler(model, GraphedSampling())
        return model
    if compiled:
        # subtle: code that was compiled at another size rounds differently. So everything is compiled here, at a fixed
        # size, and nothing is compiled later. An input that the code cannot take (a batch of one row) runs uncompiled.
        # The sizes differ from all other dimensions, or the compiler would assume that the two are always equal.
        torch.compiler.set_stance("default")
        torch._dynamo.config.specialize_float = True  # floats are constants; otherwise the compiler traces twice
    if training:
        if compiled:
            compile_training(model, cfg)
        model.hidden = RoundedHidden(model, cfg.micro_batch)
        if model.config.vocab_size <= LARGE_VOCABULARY:
            model.logits = RoundedLogits(model)
    if sampling and compiled and model.config.n_layer <= DEEP:
        model.generate = Sampler(model, torch.compile(next_token, dynamic=True))
        model.generate([[0] * 11], 3, stop_ids=(-1,), samples=509)
    if compiled:
        torch.compiler.set_stance("eager_on_recompile")
    return model


def compile_training(model: GPT, cfg) -> None:
    """Compile the forward and backward pass of the blocks, by running both once."""
    for block in model.blocks:
        block.compile(dynamic=True)
    length = min(model.config.block_size, cfg.micro_batch // 2) - 3
    idx = torch.zeros(max(2, cfg.micro_batch // length - 1), length, dtype=torch.long, device=cfg.device)
    GPT.hidden(model, idx).float().sum().backward()
    model.zero_grad(set_to_none=True)


def frozen(model: GPT, cfg) -> GPT:
    """A copy of the model that is never trained, such as GRPO's reference.

    The copy of a pretrained model stores the matrices of its layers in the compute dtype, to which each use would cast
    them: the same results in less memory. (The copy of a model made here stays float32, to run the code that was
    compiled for the model.)
    """
    quick = {name: vars(model).pop(name) for name in QUICK_METHODS if name in vars(model)}
    copied = copy.deepcopy(model)
    vars(model).update(quick)
    for layer in copied.modules():
        if cfg.init and isinstance(layer, nn.Linear):
            layer.weight.data = layer.weight.data.to(model.dtype)
    return make_fast(copied, cfg, training=True)


def graphed(optimizer: Optimizer, cfg) -> None:
    """Run Muon's many small matrix products as CUDA graphs, if the run uses CUDA graphs."""
    for part in getattr(optimizer, "parts", ()):
        if isinstance(part, Muon) and cfg.compile == "on" and cfg.device == "cuda":
            part.direction = GraphedMuon(part.direction)
