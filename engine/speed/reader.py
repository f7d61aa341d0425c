"""The blocks of a model, as the sampler reads them: with matrices that are concatenated and cast in advance.

Block.project concatenates and casts in each call, because the weights change in training.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.pretrained.families import FamilyBlock
from model import GPT, Block


class Reader(Block):
    """A block of model.py."""

    def __init__(self, block: Block, dtype: torch.dtype):
        nn.Module.__init__(self)
        self.head_size, self.norm1, self.norm2 = block.head_size, block.norm1, block.norm2
        for names in ("q", "k", "v"), ("o",), ("gate", "up"), ("down",):
            weights = [getattr(block, name).weight for name in names]
            weight = weights[0] if len(weights) == 1 else torch.cat(weights)
            # subtle: these are parameters, or the compiler would treat their sizes as variables.
            self.register_parameter("_".join(names), nn.Parameter(weight.detach().to(dtype), requires_grad=False))

    def project(self, x: Tensor, *names: str) -> Tensor:
        return F.linear(x, getattr(self, "_".join(names)))


class FamilyReader(Reader, FamilyBlock):
    """A block of a published model, which may have biases on queries, keys and values."""

    def __init__(self, block: FamilyBlock, dtype: torch.dtype):
        super().__init__(block, dtype)
        self.n_head, self.n_kv_head = block.n_head, block.n_kv_head
        self.q_norm, self.k_norm = block.q_norm, block.k_norm
        bias = None if block.q.bias is None else torch.cat([block.q.bias, block.k.bias, block.v.bias]).detach()
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def project(self, x: Tensor, *names: str) -> Tensor:
        h = super().project(x, *names)
        return h if self.bias is None or names[0] != "q" else (h + self.bias).to(x.dtype)


def make_readers(model: GPT) -> list[Reader]:
    """The readers of a model's blocks, in its compute dtype."""
    reader = FamilyReader if model.block_class is FamilyBlock else Reader
    return [reader(block, model.dtype) for block in model.blocks]
