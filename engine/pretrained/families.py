"""The blocks of published models (--init): Llama, Qwen2 and Qwen3. They have model.py's block with more settings.

In grouped-query attention, several query heads share one head of keys and values. Qwen2 has biases on queries, keys and
values. Qwen3 has an RMSNorm over each head of queries and keys. Llama 3 stretches the rotation for longer texts.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from model import GPT, Block, GPTConfig, attend, rotate


@dataclass
class FamilyConfig(GPTConfig):
    """The shape of a published model. Raises ValueError if the sizes do not fit each other."""
    n_hidden: int = 0             # width of the SwiGLU; 0: that of model.py
    n_kv_head: int = 0            # heads of keys and values; 0: n_head
    head_size: int = 0            # D; 0: n_embd / n_head
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    rope_scaling: tuple | None = None  # Llama 3's: see rotary_frequencies
    eps: float = 1e-5             # of RMSNorm
    qkv_bias: bool = False        # biases on queries, keys and values (Qwen2)
    qk_norm: bool = False         # RMSNorm over each head of queries and keys (Qwen3)
    tied: bool = True             # the output matrix is the embedding

    def __post_init__(self):
        if not self.head_size:
            super().__post_init__()
        self.n_hidden = self.n_hidden or GPTConfig.n_hidden.fget(self)
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_size = self.head_size or self.n_embd // self.n_head
        if self.head_size % 2:
            raise ValueError(f"head_size {self.head_size} (n_embd / n_head) must be even")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is no multiple of n_kv_head {self.n_kv_head}")


class FamilyBlock(Block):
    """A layer of a published model."""

    def __init__(self, c: FamilyConfig):
        super().__init__(c)
        self.n_head, self.n_kv_head = c.n_head, c.n_kv_head
        self.norm1 = nn.RMSNorm(c.n_embd, eps=c.eps)
        self.q = nn.Linear(c.n_embd, c.n_head * c.head_size, bias=c.qkv_bias)
        self.k = nn.Linear(c.n_embd, c.n_kv_head * c.head_size, bias=c.qkv_bias)
        self.v = nn.Linear(c.n_embd, c.n_kv_head * c.head_size, bias=c.qkv_bias)
        self.q_norm = nn.RMSNorm(c.head_size, eps=c.eps) if c.qk_norm else None
        self.k_norm = nn.RMSNorm(c.head_size, eps=c.eps) if c.qk_norm else None
        self.o = nn.Linear(c.n_head * c.head_size, c.n_embd, bias=False)
        self.norm2 = nn.RMSNorm(c.n_embd, eps=c.eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """As model.Block.forward, with shared heads."""
        q, k, v = self.qkv(x, cos, sin)
        return self.after_attention(x, attend_shared(q, k, v, mask))

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C) -> queries (B, H, T, D), keys and values (B, n_kv_head, T, D)."""
        h = self.project(self.norm1(x).to(cos.dtype), "q", "k", "v")   # (B, T, (H + 2 n_kv_head) D)
        heads = h.unflatten(-1, (-1, self.head_size)).transpose(1, 2)  # (B, H + 2 n_kv_head, T, D)
        q, k, v = heads.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=1)
        if self.q_norm is not None:  # normalised in float32, as the residual stream is
            q = self.q_norm(q.float()).to(q.dtype)
            k = self.k_norm(k.float()).to(k.dtype)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def project(self, x: Tensor, *names: str) -> Tensor:
        """As model.Block.project, with biases. They are float32, so h + bias is rounded once."""
        h = super().project(x, *names)
        layers = [getattr(self, name) for name in names]
        if layers[0].bias is None:
            return h
        return (h + torch.cat([layer.bias for layer in layers])).to(x.dtype)


def attend_shared(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """model.attend with shared heads: q (B, H, T, D); k, v (B, n_kv_head, T, D); mask (T, T) -> (B, H, T, D).

    We do not copy keys and values for each query head. We put the queries that share them one after the other, along T.
    """
    n_kv_head = k.size(1)
    stacked = q.unflatten(1, (n_kv_head, -1)).flatten(2, 3)  # (B, n_kv_head, H / n_kv_head * T, D)
    mask = mask.repeat(q.size(1) // n_kv_head, 1)            # (H / n_kv_head * T, T)
    return attend(stacked, k, v, mask).reshape(q.shape)      # unstacked


class FamilyGPT(GPT):
    """A published model. Its output matrix may have weights of its own."""
    block_class = FamilyBlock

    def __init__(self, config: FamilyConfig, dtype: torch.dtype = torch.float32):
        super().__init__(config, dtype)
        self.norm = nn.RMSNorm(config.n_embd, eps=config.eps)
        self.output = None if config.tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def output_weight(self) -> Tensor:
        return super().output_weight() if self.output is None else self.output.weight

    def rotary_frequencies(self) -> Tensor:
        """The angle per position, in radians, for each pair of head dimensions, (D/2,).

        With rope_scaling (factor, low, high, context), Llama 3 lowers the slow frequencies for longer texts.
        Frequencies that turn less than `low` times in the `context` tokens of pretraining are divided by `factor`.
        Those that turn more than `high` times stay as they are, and those in between are interpolated.
        """
        c = self.config
        frequency = c.rope_theta ** (-torch.arange(0, c.head_size, 2) / c.head_size)
        if not c.rope_scaling:
            return frequency
        factor, low, high, context = c.rope_scaling
        kept = ((context * frequency / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        return frequency * (kept + (1 - kept) / factor)


def make_model(shape: dict, dtype: torch.dtype = torch.float32) -> GPT:
    """The model of a checkpoint, with random weights. `shape` has the fields of its config."""
    if "n_kv_head" in shape:
        return FamilyGPT(FamilyConfig(**shape), dtype)
    return GPT(GPTConfig(**shape), dtype)
