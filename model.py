"""A small Llama: the network, the log-probabilities of tokens, and sampling. This file is the whole model.

    x = x + attention(rmsnorm(x))
    h = rmsnorm(x)
    x = x + (silu(h gate) * (h up)) down

As in Llama, positions are rotary and there are no biases. The last line is called SwiGLU. The embedding is also the
output matrix. Shapes: B batch, T tokens, V vocabulary, H heads, D head size, C width (n_embd).

GRPO needs the ratio of a token's probability under the current model to its probability when it was sampled. So
`generate` must sample from the distribution that `token_logprobs` computes, without top-k or top-p. (In bfloat16 the
two differ a little, because they multiply matrices of different sizes. grpo.py logs the difference as sampler_gap.)
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass
class GPTConfig:
    """The shape of a GPT. Raises ValueError if the sizes do not fit each other."""
    vocab_size: int
    block_size: int = 128  # longest sequence, in tokens
    n_layer: int = 4
    n_head: int = 3
    n_embd: int = 96

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}")
        if self.head_size % 2:
            raise ValueError(f"head_size {self.head_size} (n_embd / n_head) must be even")

    @property
    def head_size(self) -> int:
        """D, the width of a head."""
        return self.n_embd // self.n_head

    @property
    def n_hidden(self) -> int:
        """The width of the SwiGLU: 8/3 of n_embd as in Llama, rounded to a multiple of 32."""
        return 32 * max(1, round(8 / 3 * self.n_embd / 32))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (RoFormer, arXiv 2104.09864): rotate each pair (x[d], x[d + D/2]) by an angle. x (B, H,
    T, D), cos and sin of the angles (T, D/2) -> (B, H, T, D)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v. q, k, v (B, H, T, D), mask (T, T) -> (B, H, T, D)."""
    if q.device.type == "cpu":  # on a CPU, the backward pass of torch's fused kernel is slower
        scores = (q * q.size(-1) ** -0.5) @ k.mT + mask  # (B, H, T, T)
        return scores.softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Block(nn.Module):
    """One layer: attention, then the SwiGLU. Each adds its output to x, the residual stream. Sampling with a cache of
    keys and values (engine/speed/sampler.py) calls the two halves, `qkv` and `after_attention`, by themselves.

    x, the parameters and their gradients are float32. Matrix products and attention have the compute dtype, which may
    be bfloat16.
    """

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.head_size = c.head_size
        self.norm1 = nn.RMSNorm(c.n_embd, eps=1e-5)
        self.q = nn.Linear(c.n_embd, c.n_embd, bias=False)
        self.k = nn.Linear(c.n_embd, c.n_embd, bias=False)
        self.v = nn.Linear(c.n_embd, c.n_embd, bias=False)
        self.o = nn.Linear(c.n_embd, c.n_embd, bias=False)
        self.norm2 = nn.RMSNorm(c.n_embd, eps=1e-5)
        self.gate = nn.Linear(c.n_embd, c.n_hidden, bias=False)
        self.up = nn.Linear(c.n_embd, c.n_hidden, bias=False)
        self.down = nn.Linear(c.n_hidden, c.n_embd, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C). cos, sin and mask have the compute dtype."""
        q, k, v = self.qkv(x, cos, sin)
        return self.after_attention(x, attend(q, k, v, mask))

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The first half: x (B, T, C) -> queries, keys and values, (B, H, T, D) each."""
        h = self.project(self.norm1(x).to(cos.dtype), "q", "k", "v")   # (B, T, 3 H D)
        heads = h.unflatten(-1, (-1, self.head_size)).transpose(1, 2)  # (B, 3 H, T, D)
        q, k, v = heads.chunk(3, dim=1)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def after_attention(self, x: Tensor, y: Tensor) -> Tensor:
        """The second half: x (B, T, C), attention's output y (B, H, T, D) -> (B, T, C)."""
        x = x + self.project(y.transpose(1, 2).flatten(2), "o")
        gate, up = self.project(self.norm2(x).to(y.dtype), "gate", "up").chunk(2, dim=-1)
        return x + self.project(F.silu(gate) * up, "down")

    def project(self, x: Tensor, *names: str) -> Tensor:
        """Apply the linear layers with these names to x, in one matrix product, which is faster than several small
        ones. The weights are stored in float32, because small updates would be lost to rounding in bfloat16."""
        weights = [getattr(self, name).weight for name in names]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        return F.linear(x, weight.to(x.dtype))


class GPT(nn.Module):
    """The language model: `GPT(config)(idx)` maps token ids (B, T) to logits (B, T, V). `dtype` is the compute dtype
    (see Block), and the logits have it, too."""
    block_class = Block  # published models have others (engine/pretrained/families.py)

    def __init__(self, config: GPTConfig, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.dtype = config, dtype
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(self.block_class(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=1e-5)
        # As in GPT-2: standard deviation 0.02. The two matrices of a layer that add to the residual stream have
        # 0.02 / sqrt(2 n_layer), so that the variance of the stream does not grow with the number of layers.
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                adds = name.endswith((".o.weight", ".down.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * config.n_layer) ** 0.5 if adds else 0.02)
        angle = torch.outer(torch.arange(config.block_size), self.rotary_frequencies())  # (block_size, D/2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def rotary_frequencies(self) -> Tensor:
        """The angle per position, in radians, for each pair of head dimensions, (D/2,). Llama 3 has others."""
        D = self.config.head_size
        return 10_000.0 ** (-torch.arange(0, D, 2) / D)

    def output_weight(self) -> Tensor:
        """The output matrix, (V, C): the embedding. Some published models have another."""
        return self.embedding.weight

    def n_params(self) -> int:
        """The number of parameters."""
        return sum(p.numel() for p in self.parameters())

    def forward(self, idx: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits of the next token at every position: idx (B, T) -> (B, T, V).

        With a mask (B, T) of bool, it returns only the logits at the M positions where the mask is True, row after row,
        (M, V). So no logits are computed for prompts and padding.
        """
        hidden = self.hidden(idx)
        return self.logits(hidden if mask is None else select(hidden, mask))

    def hidden(self, idx: Tensor) -> Tensor:
        """Hidden states of the last layer: idx (B, T) -> (B, T, C). Raises ValueError if T is above block_size."""
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens are more than block_size {self.config.block_size}")
        cos, sin = self.cos[:T].to(self.dtype), self.sin[:T].to(self.dtype)  # (T, D/2)
        mask = torch.full((T, T), -torch.inf, dtype=self.dtype, device=idx.device).triu(1)  # causal
        x = self.embedding(idx)
        for block in self.blocks:
            x = block(x, cos, sin, mask)
        return self.norm(x).to(self.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """The output projection (unembedding): (.., C) -> (.., V)."""
        return F.linear(hidden, self.output_weight().to(self.dtype))

    def logprobs(self, hidden: Tensor, target: Tensor) -> Tensor:
        """The log-probability of each target token: hidden (M, C), target (M,) -> (M,), float32."""
        logits = self.logits(hidden).float()  # (M, V)
        return logits.log_softmax(dim=-1).gather(1, target[:, None])[:, 0]

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], max_new_tokens: int, *, stop_ids: tuple[int, ...],
                 samples: int = 1, temperature: float = 1.0, generator: Generator | None = None):
        """Sample completions of each prompt -> (completions, the log-probability of each of their tokens). Both lists
        have `samples` entries for each prompt, and those of one prompt are adjacent.

        Sampling stops at the first token of stop_ids, which is part of the completion, or after max_new_tokens.
        Temperature 0 takes the likeliest token, and returns its log-probability at temperature 1. Errors: check_room.

        This plain version is for readers and for tests. For each new token, the model reads the whole text again. A run
        (run.fast in train.py) replaces it by engine/speed/sampler.py, which draws from the same distribution.
        """
        if not prompts:
            return [], []
        self.check_room(prompts, max_new_tokens)
        device = self.embedding.weight.device
        rows = [torch.tensor(prompt, device=device) for prompt in prompts for _ in range(samples)]
        N = len(rows)
        row = torch.arange(N, device=device)
        start = torch.tensor([len(prompt) for prompt in rows], device=device)  # (N,)
        longest = int(start.max())
        idx = F.pad(pad_sequence(rows, batch_first=True), (0, max_new_tokens))  # (N, longest + max_new_tokens)
        logp = torch.zeros(N, max_new_tokens, device=device)
        length = torch.zeros(N, dtype=torch.long, device=device)  # with the stop token
        ended = torch.zeros(N, dtype=torch.bool, device=device)
        for t in range(max_new_tokens):
            # 1) read everything so far. Padding needs no mask: it is on the right, where causal attention never looks
            hidden = self.hidden(idx[:, :longest + t])     # (N, longest + t, C)
            hidden = hidden[row, start + t - 1]            # (N, C), at the last token of each row
            logits = self.logits(hidden).float()  # (N, V)
            # 2) draw the next token
            if temperature == 0:
                probs = logits.softmax(dim=-1)
                token = probs.argmax(dim=-1)
            else:
                probs = (logits / temperature).softmax(dim=-1)
                token = torch.multinomial(probs, 1, generator=generator)[:, 0]
            # 3) append it. (Rows that have ended go on, and are cut below)
            idx[row, start + t] = token
            logp[:, t] = probs[row, token].log()
            length += torch.where(ended, 0, 1)  # the stop token counts: its row has not ended before it
            ended |= torch.isin(token, torch.tensor(stop_ids, device=device))
            if ended.all():
                break
        completions = [idx[i, start[i]:start[i] + length[i]].tolist() for i in range(N)]
        return completions, [logp[i, :length[i]].tolist() for i in range(N)]

    def check_room(self, prompts: list[list[int]], max_new_tokens: int) -> None:
        """Raises ValueError for an empty prompt, or one that leaves no room for max_new_tokens."""
        shortest, longest = min(map(len, prompts)), max(map(len, prompts))
        if not shortest or longest + max_new_tokens > self.config.block_size:
            raise ValueError(f"prompts of {shortest} to {longest} tokens and {max_new_tokens} new tokens "
                             f"must not be empty, and must fit block_size {self.config.block_size}")


def token_logprobs(model: GPT, idx: Tensor, mask: Tensor) -> Tensor:
    """log p(idx[:, t+1] | idx[:, :t+1]) at each position t where the mask is True.

    idx (B, T) token ids, mask (B, T-1) bool -> (M,), float32: a flat vector, row after row, without padding.
    """
    hidden = select(model.hidden(idx[:, :-1]), mask)  # (M, C)
    return model.logprobs(hidden, select(idx[:, 1:], mask))


def select(x: Tensor, mask: Tensor) -> Tensor:
    """x[mask]: the entries of x (B, T, ...) where the mask (B, T) is True, row after row, (M, ...)."""
    assert mask.shape == x.shape[:2], "the mask needs one entry for each token"
    # Our masks are on the CPU, because nonzero() of a mask on the GPU makes the CPU wait for the GPU.
    where = mask.flatten().nonzero()[:, 0].to(x.device, non_blocking=True)
    return x.flatten(0, 1).index_select(0, where)
