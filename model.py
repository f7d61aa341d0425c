"""A small Llama: the network, the log-probabilities of tokens, and sampling. This file is the whole model.

    x = x + attention(rmsnorm(x))
    x = x + (silu(h Wg) * (h Wu)) Wd,  h = rmsnorm(x)

The block has rotary positions and no biases, and the embedding is also the output matrix, so the weights can move to
other tools and back. Shapes: B batch, T tokens, V vocabulary, H heads, D head size, C width.

RL depends on one property. `generate` samples from exactly softmax(logits): it cuts nothing off (no top-k, no top-p).
`token_logprobs` is the logarithm of exactly that distribution. If the two disagreed, the importance ratio of a policy
that has not changed would not be 1. (In bfloat16 they differ by rounding. GRPO therefore takes both terms of the ratio
from token_logprobs, and logs the difference as sampler_gap.)
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
    # Only published models (engine/pretrained/) change what follows.
    n_hidden: int = 0             # width inside the SwiGLU; 0: 8/3 of n_embd, as a multiple of 32
    n_kv_head: int = 0            # heads of keys and values, which heads of queries share; 0: n_head
    head_size: int = 0            # D; 0: n_embd / n_head
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    rope_scaling: tuple | None = None  # Llama 3's: see engine/pretrained/weights.py
    eps: float = 1e-5             # of RMSNorm
    qkv_bias: bool = False        # biases on queries, keys and values (Qwen2)
    qk_norm: bool = False         # RMSNorm over each head of queries and keys (Qwen3)
    tied: bool = True             # the output matrix is the embedding

    def __post_init__(self):
        if not self.head_size and self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}")
        self.n_hidden = self.n_hidden or 32 * max(1, round(8 / 3 * self.n_embd / 32))
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_size = self.head_size or self.n_embd // self.n_head
        if self.head_size % 2 or self.n_head % self.n_kv_head:
            raise ValueError(f"n_embd {self.n_embd}, n_head {self.n_head}, n_kv_head {self.n_kv_head}: "
                             f"head_size {self.head_size} must be even, and heads shared evenly")


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (RoFormer, arXiv 2104.09864), with the halves paired as in Llama.

    x (B, H, T, D); cos and sin (T, D/2) of the angles. Returns (B, H, T, D).
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v. q (B, H, T, D); k, v (B, n_kv_head, T, D); mask (T, T) -> (B, H, T, D).

    Heads that share their keys and values are computed as further rows of one head, so nothing is copied.
    """
    n_kv_head = k.size(1)
    rows = q.unflatten(1, (n_kv_head, -1)).flatten(2, 3)  # (B, n_kv_head, H / n_kv_head * T, D)
    mask = mask.repeat(q.size(1) // n_kv_head, 1)         # (H / n_kv_head * T, T)
    if q.device.type != "cpu":
        y = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask)
    else:  # where the backward pass of the fused kernel is slow
        scores = (rows * q.size(-1) ** -0.5) @ k.mT + mask
        y = scores.softmax(dim=-1) @ v
    return y.reshape(q.shape)


class Block(nn.Module):
    """One layer: attention, then the SwiGLU, each added to the residual stream x."""

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_size = c.n_head, c.n_kv_head, c.head_size
        self.norm1 = nn.RMSNorm(c.n_embd, eps=c.eps)
        self.q = nn.Linear(c.n_embd, c.n_head * c.head_size, bias=c.qkv_bias)
        self.k = nn.Linear(c.n_embd, c.n_kv_head * c.head_size, bias=c.qkv_bias)
        self.v = nn.Linear(c.n_embd, c.n_kv_head * c.head_size, bias=c.qkv_bias)
        self.q_norm = nn.RMSNorm(c.head_size, eps=c.eps) if c.qk_norm else None
        self.k_norm = nn.RMSNorm(c.head_size, eps=c.eps) if c.qk_norm else None
        self.o = nn.Linear(c.n_head * c.head_size, c.n_embd, bias=False)
        self.norm2 = nn.RMSNorm(c.n_embd, eps=c.eps)
        self.gate = nn.Linear(c.n_embd, c.n_hidden, bias=False)
        self.up = nn.Linear(c.n_embd, c.n_hidden, bias=False)
        self.down = nn.Linear(c.n_hidden, c.n_embd, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """x (B, T, C), float32 -> (B, T, C). cos, sin and mask have the compute dtype."""
        q, k, v = self.qkv(x, cos, sin)
        return self.rest(x, attend(q, k, v, mask))

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C) -> queries (B, H, T, D), keys and values (B, n_kv_head, T, D)."""
        h = self.project(self.norm1(x).to(cos.dtype), "q", "k", "v")  # (B, T, (H + 2 n_kv_head) D)
        heads = h.unflatten(-1, (-1, self.head_size)).transpose(1, 2)  # (B, H + 2 n_kv_head, T, D)
        q, k, v = heads.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=1)
        if self.q_norm is not None:
            q = self.q_norm(q.float()).to(q.dtype)
            k = self.k_norm(k.float()).to(k.dtype)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def rest(self, x: Tensor, y: Tensor) -> Tensor:
        """What follows attention. x (B, T, C), attention's output y (B, H, T, D) -> (B, T, C)."""
        x = x + self.project(y.transpose(1, 2).flatten(2), "o")
        gate, up = self.project(self.norm2(x).to(y.dtype), "gate", "up").chunk(2, dim=-1)
        return x + self.project(F.silu(gate) * up, "down")

    def project(self, x: Tensor, *names: str) -> Tensor:
        """Multiply x by the matrices of the named layers side by side (one large product is quicker than several), in
        the compute dtype. The parameters stay float32: bfloat16 would round away the optimizer's small updates."""
        layers = [getattr(self, name) for name in names]
        weight = layers[0].weight if len(layers) == 1 else torch.cat([layer.weight for layer in layers])
        h = F.linear(x, weight.to(x.dtype))
        if layers[0].bias is None:
            return h
        return (h + torch.cat([layer.bias for layer in layers])).to(x.dtype)


class GPT(nn.Module):
    """The language model: `GPT(config)(idx)` maps token ids (B, T) to logits (B, T, V).

    dtype is the compute dtype: the type of the matrix products and of the logits. Weights and gradients are float32.
    """

    def __init__(self, config: GPTConfig, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.dtype = config, dtype
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=config.eps)
        self.output = None if config.tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # As in GPT-2: standard deviation 0.02, and less for the matrices that write to the residual stream.
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                writes = name.endswith(("o.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * config.n_layer) ** 0.5 if writes else 0.02)
        angle = torch.outer(torch.arange(config.block_size), self.rotary_frequencies())  # (block_size, D/2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def rotary_frequencies(self) -> Tensor:
        """Rotation per position, in radians, for each pair of head dimensions, (D/2,)."""
        D = self.config.head_size
        return self.config.rope_theta ** (-torch.arange(0, D, 2) / D)

    def n_params(self) -> int:
        """How many numbers are learnt. An embedding that is also the output matrix counts once."""
        return sum(p.numel() for p in self.parameters())

    def forward(self, idx: Tensor, mask: Tensor | None = None) -> Tensor:
        """The logits of the token after each token of idx (B, T) -> (B, T, V).

        With a mask (B, T), only those of the M places where it is True, row after row -> (M, V).
        """
        hidden = self.hidden(idx)
        return self.logits(hidden if mask is None else select(hidden, mask))

    def hidden(self, idx: Tensor) -> Tensor:
        """The last hidden states: idx (B, T) -> (B, T, C). Raises ValueError if T is larger than block_size."""
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens are more than block_size {self.config.block_size}")
        cos, sin = self.cos[:T].to(self.dtype), self.sin[:T].to(self.dtype)  # (T, D/2)
        mask = torch.full((T, T), float("-inf"), dtype=self.dtype, device=idx.device).triu(1)
        x = self.embedding(idx)
        for block in self.blocks:
            x = block(x, cos, sin, mask)
        return self.norm(x).to(self.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """The output projection (unembedding): (.., C) -> (.., V)."""
        output = self.embedding if self.output is None else self.output
        return F.linear(hidden, output.weight.to(self.dtype))

    def logprobs(self, hidden: Tensor, target: Tensor) -> Tensor:
        """The log-probability of each target token: hidden (M, C), target (M,) -> (M,), float32."""
        logits = self.logits(hidden).float()  # (M, V)
        return logits.log_softmax(dim=-1).gather(1, target[:, None])[:, 0]

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], max_new_tokens: int, *, stop_ids: tuple[int, ...],
                 samples: int = 1, temperature: float = 1.0, generator: Generator | None = None):
        """Sample completions of each prompt -> (completions, log-probability of each of their tokens).

        The `samples` completions of a prompt stand side by side. A completion ends with the first of stop_ids, which it
        includes, or after max_new_tokens. Temperature 0 takes the likeliest token; its log-probability is then that at
        temperature 1. Raises ValueError for an empty prompt, or one that leaves no room in block_size.

        This is the plain way: for each token the model reads the whole text again. Every run samples from the same
        distribution with a cache (engine/speed/sampler.py).
        """
        if not prompts:
            return [], []
        self.check_room(prompts, max_new_tokens)
        device = self.embedding.weight.device
        rows = [torch.tensor(prompt, device=device) for prompt in prompts for _ in range(samples)]
        N, row = len(rows), torch.arange(len(rows), device=device)
        start = torch.tensor([len(prompt) for prompt in rows], device=device)  # (N,) of the completions
        longest = int(start.max())
        idx = F.pad(pad_sequence(rows, batch_first=True), (0, max_new_tokens))  # (N, longest + max_new_tokens)
        logp = torch.zeros(N, max_new_tokens, device=device)
        length = torch.zeros(N, dtype=torch.long, device=device)  # tokens up to and with the first stop token
        ended = torch.zeros(N, dtype=torch.bool, device=device)
        for t in range(max_new_tokens):
            # 1) read everything so far. Padding needs no mask, because no token reads what is to its right
            hidden = self.hidden(idx[:, :longest + t])[row, start + t - 1]  # (N, C)
            # 2) draw the next token from exactly softmax(logits / temperature)
            probs = (self.logits(hidden).float() / (temperature or 1.0)).softmax(dim=-1)  # (N, V)
            token = probs.argmax(dim=-1)
            if temperature:
                token = torch.multinomial(probs, 1, generator=generator)[:, 0]
            # 3) append it
            idx[row, start + t] = token
            logp[:, t] = probs[row, token].log()
            length += ~ended
            ended |= torch.isin(token, torch.tensor(stop_ids, device=device))
            if ended.all():
                break
        start, length = start.tolist(), length.tolist()
        completions = [tokens[i:i + n] for tokens, i, n in zip(idx.tolist(), start, length)]
        return completions, [values[:n] for values, n in zip(logp.tolist(), length)]

    def check_room(self, prompts: list[list[int]], max_new_tokens: int) -> None:
        """Raises ValueError for an empty prompt, or one that leaves no room for max_new_tokens."""
        shortest, longest = min(map(len, prompts)), max(map(len, prompts))
        if not shortest or longest + max_new_tokens > self.config.block_size:
            raise ValueError(f"prompts of {shortest} to {longest} tokens and {max_new_tokens} new tokens "
                             f"must not be empty, and must fit block_size {self.config.block_size}")


def token_logprobs(model: GPT, idx: Tensor, mask: Tensor) -> Tensor:
    """log p(idx[:, t+1] | idx[:, :t+1]) at the M places where the mask is True, row after row.

    idx (B, T) token ids, mask (B, T-1) bool -> (M,), float32.
    """
    hidden = select(model.hidden(idx[:, :-1]), mask)  # (M, C)
    return model.logprobs(hidden, select(idx[:, 1:], mask))


def select(x: Tensor, mask: Tensor) -> Tensor:
    """The entries of x (B, T, ...) where the mask (B, T) is True, row after row: (M, ...)."""
    assert mask.shape == x.shape[:2], "the mask says of each token whether it is taken"
    # A mask on the CPU saves a GPU the wait for nonzero().
    where = mask.flatten().nonzero()[:, 0].to(x.device, non_blocking=True)
    return x.flatten(0, 1).index_select(0, where)
