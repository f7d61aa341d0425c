"""A small Llama: the GPT that is pretrained, trained by RL and distilled, with its sampling, its log-probabilities and
its optimizer.

The block is Llama's: RMSNorm before attention and before a SwiGLU, rotary positions, no biases. The embedding is tied
to the output. So the weights can move to other tools and back. The last fields of GPTConfig are what published models
of the families Llama, Qwen2 and Qwen3 do otherwise (data/pretrained.py reads those); the models made here leave them as
they are.

    x = x + attention(rmsnorm(x))
    x = x + (silu(x' Wg) * (x' Wu)) Wd,  x' = rmsnorm(x)

Shapes: B batch, T tokens, V vocabulary, H heads, D head size, C width (here H * D).

Two things matter to RL. `generate` samples from exactly softmax(logits / temperature): nothing is cut off (no top-k, no
top-p), and the stop token that was sampled is returned. `token_logprobs` is the logarithm of exactly that distribution.
If the two disagreed, the importance ratio of a policy that has not moved would not be 1.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from parallel import all_reduce_gradients

LOOK_EVERY = 8  # on a GPU, sampled tokens between two looks at which rows have ended: a look waits for the GPU
LARGE_VOCABULARY = 4_096    # above this many tokens, token_logprobs computes the logits in parts
LOGITS_AT_A_TIME = 2**24    # as many logits as a part has, 64 MB


@dataclass
class GPTConfig:
    """The shape of a GPT. A size of 0 is replaced by the usual one. Raises ValueError if the heads do not divide the
    width into even sizes, or do not share their keys and values evenly."""
    vocab_size: int
    block_size: int = 128  # longest sequence, in tokens
    n_layer: int = 4
    n_head: int = 3
    n_embd: int = 96
    n_hidden: int = 0      # width inside the SwiGLU; usually 8/3 of n_embd, to the nearest multiple of 32
    n_kv_head: int = 0     # heads of keys and values, each shared by n_head / n_kv_head heads; usually n_head
    head_size: int = 0     # usually n_embd / n_head
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    rope_scaling: tuple[float, float, float, int] | None = None  # Llama 3's: see rotary_frequencies
    eps: float = 1e-5             # of RMSNorm
    qkv_bias: bool = False        # biases on q, k and v (Qwen2)
    qk_norm: bool = False         # RMSNorm over each head of q and k (Qwen3)
    tied: bool = True             # the output matrix is the embedding

    def __post_init__(self):
        if not self.head_size and (self.n_embd % self.n_head or self.n_embd // self.n_head % 2):
            raise ValueError(f"n_embd {self.n_embd} must be n_head {self.n_head} times an even head size")
        self.n_hidden = self.n_hidden or max(1, round(8 * self.n_embd / 3 / 32)) * 32
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_size = self.head_size or self.n_embd // self.n_head
        if self.n_head % self.n_kv_head or self.head_size % 2:
            raise ValueError(f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}, and head_size "
                             f"{self.head_size} even")


class KVCache:
    """What sampling keeps from token to token: the keys and values of the tokens read so far, for the rows of a batch
    that are still being sampled, and the model's matrices in the form that the products take.

    Rows are aligned on the right. A prompt shorter than the longest starts with `pad[row]` columns that nobody attends
    to, so that all rows write their next token into the same column.
    """

    def __init__(self, model: "GPT", pad: Tensor, max_len: int):
        # subtle: these are parameters, or the compiler would treat their sizes as variables.
        self.weights = [[nn.Parameter(weight, requires_grad=False) for weight in block.weights(model.dtype)]
                        for block in model.blocks]
        self.output = nn.Parameter(model.output_weight(), requires_grad=False)
        self.pad = pad          # (B,) columns on the left that hold no token
        # subtle: not -inf. A padding column sees no other column; its softmax over nothing would be NaN.
        self.mask = (torch.arange(max_len, device=pad.device) < pad[:, None]) * -1e9  # (B, max_len), added to scores
        self.max_len = max_len  # columns to make room for
        self.length = 0         # columns written
        self.kv = {}            # layer -> keys and values, (B, n_kv_head, max_len, D) each, in the type of the products

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, n_kv_head, T, D) after the columns written so far -> all of them, (.., length + T, D)."""
        B, H, T, D = k.shape
        if layer not in self.kv:
            self.kv[layer] = [k.new_empty(B, H, self.max_len, D) for _ in range(2)]
        (keys, values), end = self.kv[layer], self.length + T
        keys[:, :, self.length:end], values[:, :, self.length:end] = k, v
        return keys[:, :, :end], values[:, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keep copies of these rows (indices, which may repeat), in this order."""
        self.pad, self.mask = self.pad[rows], self.mask[rows]
        for pair in self.kv.values():
            for i, old in enumerate(pair):
                pair[i] = old.new_empty(len(rows), *old.shape[1:])
                pair[i][:, :, :self.length] = old[rows, :, :self.length]

    def replace(self, rows: Tensor, others: Tensor, size: int) -> None:
        """Copy the rows `others` over `rows` (indices), then keep the first `size` rows, where they lie."""
        self.pad, self.mask = (x.index_put((rows,), x[others])[:size] for x in (self.pad, self.mask))
        for pair in self.kv.values():
            for i, x in enumerate(pair):
                x[rows, :, :self.length] = x[others, :, :self.length]
                pair[i] = x[:size]


def rotary_frequencies(config: GPTConfig) -> Tensor:
    """Radians a token of each pair of a head's numbers, (D/2,).

    With rope_scaling (factor, low, high, context), Llama 3 stretches the slow frequencies for longer texts. Those that
    turn less than `low` times in the `context` tokens of pretraining are divided by `factor`, those that turn more than
    `high` times stay, and those in between are interpolated.
    """
    frequency = config.rope_theta ** (-torch.arange(0, config.head_size, 2) / config.head_size)
    if config.rope_scaling:
        factor, low, high, context = config.rope_scaling
        kept = ((context * frequency / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / factor)
    return frequency


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (RoFormer, arXiv 2104.09864), with the halves paired as in Llama: x (B, H, T, D), cos
    and sin of the angles, broadcastable to (B, 1, T, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        c = config
        # subtle: as attributes of the module these are constants to the compiler; read from config, they would vary.
        self.n_head, self.n_kv_head, self.head_size = c.n_head, c.n_kv_head, c.head_size
        self.norm1, self.norm2 = nn.RMSNorm(c.n_embd, eps=c.eps), nn.RMSNorm(c.n_embd, eps=c.eps)
        self.q, self.k, self.v = (nn.Linear(c.n_embd, heads * c.head_size, bias=c.qkv_bias)
                                  for heads in (c.n_head, c.n_kv_head, c.n_kv_head))
        self.o = nn.Linear(c.n_head * c.head_size, c.n_embd, bias=False)
        self.q_norm, self.k_norm = (nn.RMSNorm(c.head_size, eps=c.eps) if c.qk_norm else None for _ in range(2))
        self.gate, self.up = (nn.Linear(c.n_embd, c.n_hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(c.n_hidden, c.n_embd, bias=False)

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The block's matrices in the type of its products: q, k and v joined, o, gate and up joined, down. Fewer and
        larger products are quicker.

        The parameters themselves stay float32, because the optimizer's small updates would be rounded away in bfloat16.
        torch.autocast casts them too, but it keeps the copies until its context ends, so that a second update inside
        that context would be computed with old weights.
        """
        qkv = torch.cat((self.q.weight, self.k.weight, self.v.weight))  # ((H + 2 n_kv_head) D, C)
        gate_up = torch.cat((self.gate.weight, self.up.weight))  # (2 hidden, C)
        return tuple(weight.to(dtype) for weight in (qkv, self.o.weight, gate_up, self.down.weight))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: KVCache | None = None,
                layer: int = 0) -> Tensor:
        """x (B, T, C) -> (B, T, C). The mask is added to the attention scores (B, H, T, T').

        cos, sin and mask have the type of the matrix products; x, the sum of all blocks so far, is float32.
        """
        qkv, o, gate_up, down = self.weights(mask.dtype) if cache is None else cache.weights[layer]
        h = F.linear(self.norm1(x).to(mask.dtype), qkv)  # (B, T, (H + 2 n_kv_head) D)
        if self.q.bias is not None:
            h = (h + torch.cat((self.q.bias, self.k.bias, self.v.bias))).to(mask.dtype)
        q, k, v = (y.transpose(1, 2) for y in h.unflatten(-1, (-1, self.head_size)).split(
            (self.n_head, self.n_kv_head, self.n_kv_head), dim=2))  # (B, H, T, D), (B, n_kv_head, T, D) twice
        if self.q_norm is not None:
            q, k = self.q_norm(q.float()).to(mask.dtype), self.k_norm(k.float()).to(mask.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        y = attend(q, k, v, mask, fused=cache is not None or q.device.type != "cpu")
        x = x + F.linear(y.transpose(1, 2).flatten(2), o)  # (B, T, C)
        gate, up = F.linear(self.norm2(x).to(mask.dtype), gate_up).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, down)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, fused: bool) -> Tensor:
    """softmax(q k' / sqrt(D) + mask) v: q (B, H, T, D), k and v (B, n_kv_head, T', D) -> (B, H, T, D).

    Heads that share their keys and values are computed as further rows of one head, so that nothing is copied.
    There are three ways to compute it, each the quickest somewhere. When one token is sampled by compiled code, sums
    over products become one loop. On a cache, or on a GPU, the fused kernel reads keys and values where they lie. In
    training on a CPU, two matrix products are quicker than the fused kernel, whose backward pass is slow there.
    """
    if (n_shared := q.size(1) // k.size(1)) > 1:
        rows = q.reshape(q.size(0), k.size(1), -1, q.size(3))  # (B, n_kv_head, n_shared T, D)
        return attend(rows, k, v, torch.cat([mask] * n_shared, dim=-2), fused).reshape(q.shape)
    if torch.compiler.is_compiling() and q.size(2) == 1:
        scores = (q.float() * k).sum(dim=-1)[:, :, None] * q.size(-1) ** -0.5 + mask  # (B, H, 1, T')
        return (scores.softmax(dim=-1).mT * v).sum(dim=2, keepdim=True).to(q.dtype)
    if fused:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.size(-1) ** -0.5) @ k.transpose(2, 3) + mask  # (B, H, T, T')
    return scores.softmax(dim=-1) @ v


class GPT(nn.Module):
    """The language model. `GPT(config)(idx)` maps token ids (B, T) to logits (B, T, V).

    dtype is the type of the matrix products and of the logits; weights and their gradients are float32. Weights start
    as in GPT-2: normal with standard deviation 0.02, divided by sqrt(2 * n_layer) for the matrices that write to the
    residual stream. Raises ValueError for a sequence longer than block_size.
    """

    def __init__(self, config: GPTConfig, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.dtype = config, dtype
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=config.eps)
        self.output = None if config.tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith(("o.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * config.n_layer) ** 0.5 if residual else 0.02)
        angle = torch.outer(torch.arange(config.block_size), rotary_frequencies(config))  # (block_size, D/2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def n_params(self) -> int:
        """How many numbers are learnt. An embedding that is also the output matrix counts once."""
        return sum(p.numel() for p in self.parameters())

    def forward(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """idx (B, T) -> logits (B, T, V). With a cache, idx continues what the cache holds."""
        return self.logits(self.hidden(idx, cache), cache)

    def logits(self, hidden: Tensor, cache: KVCache | None = None) -> Tensor:
        """What `hidden` returned, (.., C) -> logits (.., V)."""
        return F.linear(hidden, cache.output if cache else self.output_weight())

    def output_weight(self) -> Tensor:
        """The matrix that makes logits of the last block's output, (V, C), in the type of the products."""
        return (self.embedding if self.output is None else self.output).weight.to(self.dtype)

    def hidden(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """idx (B, T) -> what the output matrix reads, (B, T, C), in the type of the products."""
        start = cache.length if cache else 0
        T, end = idx.size(1), start + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens are more than block_size {self.config.block_size}")
        x = self.embedding(idx)  # (B, T, C)
        column = torch.arange(end, device=idx.device)
        mask = torch.where(column <= column[start:, None], 0.0, float("-inf"))  # (T, end)
        if cache is None:
            cos, sin = self.cos[:T], self.sin[:T]  # (T, D/2)
        else:
            position = (column[start:] - cache.pad[:, None]).clamp(min=0)  # (B, T)
            cos, sin = self.cos[position][:, None], self.sin[position][:, None]  # (B, 1, T, D/2)
            padding = cache.mask[:, None, None, :end]
            mask = padding if T == 1 else mask + padding  # (B, 1, T, end); one new token may see all before it
        cos, sin, mask = (constant.to(self.dtype) for constant in (cos, sin, mask))
        for layer, block in enumerate(self.blocks):
            # subtle: block.forward() bypasses the block's torch.compile, which is for training; next_token has its own.
            x = block(x, cos, sin, mask) if cache is None else block.forward(x, cos, sin, mask, cache, layer)
        if cache is not None:
            cache.length = end
        return self.norm(x).to(self.dtype)

    def next_token(self, token: Tensor, cache: KVCache, temperature: float, u: Tensor) -> tuple[Tensor, Tensor]:
        """Read one token a row, token (B,), after what the cache holds, and draw the next one as `sample` does."""
        return sample(self(token[:, None], cache)[:, -1], temperature, u)


def sample(logits: Tensor, temperature: float, u: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token a row from softmax(logits / temperature), or take the likeliest one if the temperature is 0:
    logits (B, V), u (B, 1) uniform in [0, 1) -> (token (B,), its log-probability (B,)).

    It inverts the cumulative distribution, which needs one random number a row. torch.multinomial draws V of them.
    """
    probs = (logits.float() / (temperature or 1.0)).softmax(dim=-1)  # (B, V)
    if temperature:
        cumulative = probs.cumsum(dim=-1)
        # subtle: "<=", so that u = 0 skips tokens of probability 0. Rounding may count all V tokens, hence the clamp.
        token = (cumulative <= u * cumulative[:, -1:]).sum(dim=-1).clamp(max=probs.size(1) - 1)
    else:
        token = probs.argmax(dim=-1)
    return token, probs.gather(1, token[:, None])[:, 0].log()


@torch.inference_mode()
def generate(model: GPT, prompts: list[list[int]], max_new_tokens: int, *, temperature: float = 1.0,
             eos_id: int | tuple[int, ...], generator: torch.Generator | None = None, samples: int = 1,
             return_logprobs: bool = False) -> list[list[int]] | tuple[list[list[int]], list[list[float]]]:
    """Sample `samples` completions of each prompt -> list of token-id lists, those of one prompt side by side.

    A completion ends with eos_id (or one of several), which it includes, or after max_new_tokens. The distribution is
    exactly softmax(logits / temperature); temperature 0 takes the likeliest token. `generator` (on the model's device)
    makes the draw repeatable. With return_logprobs, the log-probability of each sampled token is returned too, in lists
    of the same lengths. Each prompt is read once, however many samples it gets, and rows that have ended soon leave the
    batch. Raises ValueError for an empty prompt, or one too long for max_new_tokens to fit block_size.
    """
    if not prompts:
        return ([], []) if return_logprobs else []
    device, longest = model.embedding.weight.device, max(map(len, prompts))
    if not min(map(len, prompts)) or longest + max_new_tokens > model.config.block_size:
        raise ValueError(f"prompts of 1 to {longest} tokens and {max_new_tokens} new ones must fit block_size "
                         f"{model.config.block_size}")
    pad = torch.tensor([longest - len(p) for p in prompts], device=device)
    stop = torch.tensor(eos_id, device=device).view(-1)
    idx = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)  # (P, longest)
    cache = KVCache(model, pad, longest + max_new_tokens)
    logits = model.logits(model.hidden(idx, cache)[:, -1], cache).repeat_interleave(samples, dim=0)  # (N, V)
    N = len(prompts) * samples
    cache.select(torch.arange(N, device=device) // samples)
    out = stop[0].repeat(N, max_new_tokens)                 # what was sampled; what follows a stop token does not count
    logp = torch.zeros(N, max_new_tokens, device=device)
    rows = torch.arange(N, device=device)                   # row of `out` that each row of the batch writes
    done = torch.zeros(N, dtype=torch.bool, device=device)  # which rows of the batch have ended
    token, token_logp = sample(logits, temperature, torch.rand(N, 1, generator=generator, device=device))
    look_every = LOOK_EVERY if device.type == "cuda" else 1
    for t in range(max_new_tokens):
        out[rows, t], logp[rows, t] = token, token_logp
        done |= (token[:, None] == stop).any(dim=1)
        n_live = int((~done).sum()) if t % look_every == 0 else len(done)
        if not n_live or t == max_new_tokens - 1:
            break
        # Rows that have ended leave, but not one by one: each new batch size costs a CPU's library a new kernel, and a
        # GPU a new graph. So the sizes are 2^k and (CPU) 3/4 of it, and rows that go on (late) move to the places of
        # rows that have ended (free).
        size = max(8, 2 ** (n_live - 1).bit_length())
        size = size * 3 // 4 if n_live <= size * 3 // 4 and device.type == "cpu" else size
        if size < len(done):
            late = (~done[size:]).nonzero()[:, 0] + size
            free = done[:size].nonzero()[:len(late), 0]
            for x in (rows, token, done):
                x[free] = x[late]
            rows, token, done = rows[:size], token[:size], done[:size]
            cache.replace(free, late, size)
        u = torch.rand(len(token), 1, generator=generator, device=device)
        token, token_logp = model.next_token(token, cache, temperature, u)
    ended = torch.isin(out, stop).cumsum(dim=1) > 0         # (N, max_new_tokens), from the first stop token on
    lengths = (~ended).sum(dim=1).add(1).clamp(max=max_new_tokens)  # (N,) up to and with the first stop token
    completions, logp = ([row[:n] for row, n in zip(x.tolist(), lengths.tolist())] for x in (out, logp))
    return (completions, logp) if return_logprobs else completions


def token_logprobs(model: GPT, idx: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """log p(idx[:, t+1] | idx[:, :t+1]) under softmax(logits / temperature), what `generate` samples from.

    idx (B, T) -> (B, T-1), float32. The mask (B, T-1) says which of them are wanted; the others may be 0 instead.

    With a large vocabulary the logits would be most of a training step's memory. So they are computed in parts, for the
    wanted tokens only, and the backward pass computes them again instead of keeping them.
    """
    def logp(hidden: Tensor, output: Tensor, target: Tensor) -> Tensor:
        logits = F.linear(hidden, output).float() / temperature
        return logits.log_softmax(dim=-1).gather(-1, target[..., None])[..., 0]

    hidden, output, target = model.hidden(idx[:, :-1]), model.output_weight(), idx[:, 1:]
    if len(output) <= LARGE_VOCABULARY:
        return logp(hidden, output, target)  # (B, T-1)
    wanted = torch.ones_like(target, dtype=torch.bool) if mask is None else mask.bool()
    size = max(1, LOGITS_AT_A_TIME // len(output))  # tokens of a part
    parts = [checkpoint(logp, h, output, t, use_reentrant=False)
             for h, t in zip(hidden[wanted].split(size), target[wanted].split(size))]
    return hidden.new_zeros(target.shape, dtype=torch.float32).masked_scatter(wanted, torch.cat(parts))


class Muon(torch.optim.Optimizer):
    """Muon (K. Jordan, 2024): the update of a matrix is the orthogonal matrix nearest to its momentum, so that all
    directions are learnt at one pace. In pretraining on arithmetic it saves a factor of several in tokens.

    The updates are those of torch.optim.Muon, with the matrices of one shape computed as one batch.
    """

    def __init__(self, matrices: list[Tensor], lr: float, dtype: torch.dtype, momentum: float = 0.95):
        self.dtype = dtype  # of its matrix products
        shapes = {p.shape: [m for m in matrices if m.shape == p.shape] for p in matrices}
        super().__init__([{"params": params} for params in shapes.values()], {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params, (rows, columns) = group["params"], group["params"][0].shape
            grad = torch.stack([p.grad for p in params])  # (n, rows, columns)
            average = self.state[params[0]].setdefault("average", torch.zeros_like(grad))
            update = self.direction(grad, average)
            torch._foreach_add_(params, update.unbind(), alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)

    def direction(self, grad: Tensor, average: Tensor) -> Tensor:
        """Move the average of the gradients of n matrices, (n, rows, columns), towards `grad` -> nearly U V' of what
        Nesterov's momentum makes of the two, U S V', by five Newton-Schulz steps; of the same shape, float32."""
        momentum = self.defaults["momentum"]
        average.lerp_(grad, 1 - momentum)
        x = grad.lerp(average, momentum)
        tall = x.size(1) > x.size(2)
        x = x.mT if tall else x  # so that x x' is the smaller of its two products
        x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(self.dtype)
        for _ in range(5):  # each singular value s -> 3.4445 s - 4.7750 s^3 + 2.0315 s^5, which takes it near to 1
            a = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
        return (x.mT if tall else x).float()


class Optimizer:
    """AdamW, with Muon for the blocks' matrices if muon_lr is given.

    Pretraining and distillation use Muon. RL uses AdamW alone, with beta2 at its usual 0.999: its steps get smaller
    where the gradient is noisy, as in RL, while Muon's steps always have one size.
    """

    def __init__(self, model: GPT, adam_lr: float, muon_lr: float | None = None, beta2: float = 0.95):
        matrices = [p for p in model.blocks.parameters() if p.dim() == 2] if muon_lr else []
        others = [p for p in model.parameters() if all(p is not m for m in matrices)]
        self.parts = [torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, beta2), weight_decay=0.0, fused=True)]
        if matrices:
            self.parts.append(Muon(matrices, muon_lr, model.dtype))
        self.lrs = [part.param_groups[0]["lr"] for part in self.parts]
        self.parameters = others + matrices

    def step(self, scale: float = 1.0, clip: float = 1.0) -> Tensor:
        """One update with the learning rates times `scale`. The gradients of all ranks are added up, clipped to norm
        `clip`, and cleared afterwards -> their norm before clipping, a scalar."""
        all_reduce_gradients(self.parameters)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, clip)
        for part, lr in zip(self.parts, self.lrs):
            for group in part.param_groups:
                group["lr"] = lr * scale
            part.step()
            part.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> list[dict]:
        """What a checkpoint keeps."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, state: list[dict]) -> None:
        """Go on from a checkpoint."""
        for part, part_state in zip(self.parts, state):
            part.load_state_dict(part_state)
