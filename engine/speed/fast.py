"""What makes a model quick, or saves memory. Nothing here changes a result by more than rounding.

The quick methods stand in place of the model's own `hidden`, `logits`, `logprobs` and `generate`, on the instance.
subtle: they are objects that hold the model, never functions that remember it. So a deepcopy of the model gets copies
of them that compute with its own weights.
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

DEEP = 12  # sampling by a model of more layers is not compiled: one step is all layers, at 3 s each
LAUNCH_BOUND = 4_000_000  # up to so many parameters, a GPU's kernels take less time to run than to start
LARGE_VOCABULARY = 4_096  # above this many tokens, log-probabilities are computed in parts
LOGITS_AT_A_TIME = 2**24  # as many logits as a part has, 64 MB
QUICK_METHODS = ("hidden", "logits", "logprobs", "generate")


class RoundedHidden:
    """GPT.hidden with the sizes of its batches rounded up. The CPU's library (oneDNN) writes new machine code for each
    new size, which takes as long as the computation itself."""

    def __init__(self, model: GPT, max_tokens: int):
        self.model, self.max_tokens = model, max_tokens

    def __call__(self, idx: Tensor) -> Tensor:
        n, T = idx.shape
        length = max(T, min(round_up(T, 8), self.model.config.block_size))
        # subtle: no more than max_tokens, for which the code is compiled; grpo.micro_batches cuts at rounded lengths.
        rows = max(n, min(round_up(n, 16), self.max_tokens // length))
        return GPT.hidden(self.model, F.pad(idx, (0, length - T, 0, rows - n)))[:n, :T]


class RoundedLogits:
    """GPT.logits of the sampled tokens alone, their number rounded up."""

    def __init__(self, model: GPT):
        self.model = model

    def __call__(self, hidden: Tensor) -> Tensor:
        if hidden.dim() > 2:
            return GPT.logits(self.model, hidden)
        M = len(hidden)
        return GPT.logits(self.model, F.pad(hidden, (0, 0, 0, round_up(M, 256) - M)))[:M]


class LogprobsInParts:
    """GPT.logprobs for a large vocabulary, whose logits would be most of a training step's memory: they are computed a
    part at a time, and again in the backward pass instead of being kept."""

    def __init__(self, model: GPT):
        self.model = model

    def __call__(self, hidden: Tensor, target: Tensor) -> Tensor:
        size = max(1, LOGITS_AT_A_TIME // self.model.config.vocab_size)  # tokens of a part
        return torch.cat([checkpoint(GPT.logprobs, self.model, h, t, use_reentrant=False)
                          for h, t in zip(hidden.split(size), target.split(size))])


def make_fast(model: GPT, cfg, training: bool = False, sampling: bool = False) -> GPT:
    """The model, which samples with a cache from now on. If the run compiles, it is also made quick at training and at
    sampling: on a GPU by CUDA graphs, one for each size, else by torch.compile, once for all sizes."""
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
        # subtle: code that was compiled for another size rounds differently. So everything is compiled here, at a fixed
        # size, and nothing later; what does not fit (a batch of one row) runs as it is. No other dimension has these
        # sizes, or the compiler would take the two for one.
        torch.compiler.set_stance("default")
        torch._dynamo.config.specialize_float = True  # no float varies; the compiler would find out by tracing twice
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
    """Compile the blocks, forward and backward."""
    for block in model.blocks:
        block.compile(dynamic=True)
    length = min(model.config.block_size, cfg.micro_batch // 2) - 3
    idx = torch.zeros(max(2, cfg.micro_batch // length - 1), length, dtype=torch.long, device=cfg.device)
    GPT.hidden(model, idx).float().sum().backward()
    model.zero_grad(set_to_none=True)


def frozen(model: GPT, cfg) -> GPT:
    """A copy of the model that is never trained, such as GRPO's reference.

    Of a pretrained model it keeps the matrices in the compute dtype, to which they would be cast at each use: the same
    values in half the memory. (A model made here keeps its type: its copy runs the code that was compiled for it.)
    """
    quick = {name: vars(model).pop(name) for name in QUICK_METHODS if name in vars(model)}
    copied = copy.deepcopy(model)
    vars(model).update(quick)
    for layer in copied.modules():
        if cfg.init and isinstance(layer, nn.Linear):
            layer.weight.data = layer.weight.data.to(model.dtype)
    return make_fast(copied, cfg, training=True)


def graphed(optimizer: Optimizer, cfg) -> None:
    """Let Muon's many small products run as graphs, if the run records any."""
    for part in getattr(optimizer, "parts", ()):
        if isinstance(part, Muon) and cfg.compile == "on" and cfg.device == "cuda":
            part.direction = GraphedMuon(part.direction)
