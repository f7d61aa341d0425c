"""Sampling with a cache of keys and values: the same distribution as GPT.generate, in a fraction of the time.

Each prompt is read once, however many samples it gets. Then every row reads one token at a time, and rows that have
ended soon leave the batch. reader.py has the blocks, with their matrices concatenated in advance.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.speed.reader import make_readers
from model import GPT

LOOK_EVERY = 8  # on a GPU, sampled tokens between two checks for ended rows, because a check waits for the GPU


class Cache:
    """The keys and values of the tokens read so far, for the rows of a batch that are still being sampled, and the
    model's matrices.

    Rows are aligned on the right. A prompt that is shorter than the longest one starts with `pad[row]` columns that no
    token attends to, so that all rows write their next token into the same column.
    """

    def __init__(self, model: GPT, pad: Tensor, max_len: int):
        self.blocks = make_readers(model)
        self.output = nn.Parameter(model.output_weight().detach().to(model.dtype), requires_grad=False)
        self.pad = pad          # (B,) columns on the left that hold no token
        # subtle: not -inf. A padding column attends to no token, so its softmax would be NaN.
        self.mask = (torch.arange(max_len, device=pad.device) < pad[:, None]) * -1e9  # (B, max_len), added to scores
        self.max_len = max_len  # columns to make room for
        self.length = 0         # columns written
        self.kv = {}            # layer -> keys and values, (B, n_kv_head, max_len, D) each, in the compute dtype

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
        """Overwrite `rows` (indices) by the rows `others`, then keep the first `size` rows, without a copy."""
        self.pad, self.mask = (x.index_put((rows,), x[others])[:size] for x in (self.pad, self.mask))
        for pair in self.kv.values():
            for i, x in enumerate(pair):
                x[rows, :, :self.length] = x[others, :, :self.length]
                pair[i] = x[:size]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """model.attend on a cache: q (B, H, T, D), k and v (B, n_kv_head, T', D) -> (B, H, T, D).

    Heads that share their keys and values are computed as further rows of one head, so that nothing is copied. In
    compiled code for one token, products and sums are written out, because the compiler fuses them into one fast loop.
    """
    n_shared = q.size(1) // k.size(1)
    if n_shared > 1:
        rows = q.reshape(q.size(0), k.size(1), -1, q.size(3))  # (B, n_kv_head, n_shared T, D)
        return attend(rows, k, v, torch.cat([mask] * n_shared, dim=-2)).reshape(q.shape)
    if torch.compiler.is_compiling() and q.size(2) == 1:
        scores = (q.float() * k).sum(dim=-1)[:, :, None] * q.size(-1) ** -0.5 + mask  # (B, H, 1, T')
        return (scores.softmax(dim=-1).mT * v).sum(dim=2, keepdim=True).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def read(model: GPT, idx: Tensor, cache: Cache) -> Tensor:
    """Read idx (B, T) after the tokens in the cache -> logits of the next token, (B, V)."""
    T, end = idx.size(1), cache.length + idx.size(1)
    x = model.embedding(idx)  # (B, T, C)
    column = torch.arange(end, device=idx.device)
    position = (column[cache.length:] - cache.pad[:, None]).clamp(min=0)  # (B, T)
    cos, sin = model.cos[position][:, None], model.sin[position][:, None]  # (B, 1, T, D/2)
    mask = cache.mask[:, None, None, :end]
    if T > 1:  # a single new token attends to all tokens before it
        mask = mask + torch.where(column <= column[cache.length:, None], 0.0, float("-inf"))  # (B, 1, T, end)
    cos, sin, mask = (constant.to(model.dtype) for constant in (cos, sin, mask))
    for layer, block in enumerate(cache.blocks):
        q, k, v = block.qkv(x, cos, sin)
        k, v = cache.append(layer, k, v)
        x = block.after_attention(x, attend(q, k, v, mask))
    cache.length = end
    return F.linear(model.norm(x[:, -1]).to(model.dtype), cache.output)


def draw(logits: Tensor, temperature: float, u: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token a row from softmax(logits / temperature), or take the likeliest one if the temperature is 0:
    logits (B, V), u (B, 1) uniform in [0, 1) -> (token (B,), its log-probability (B,)).

    This inverts the cumulative distribution, with one random number for each row. torch.multinomial draws V of them.
    """
    probs = (logits.float() / (temperature or 1.0)).softmax(dim=-1)  # (B, V)
    if temperature:
        cumulative = probs.cumsum(dim=-1)
        # subtle: "<=", so that u = 0 skips tokens of probability 0. The clamp is there because rounding may give V.
        token = (cumulative <= u * cumulative[:, -1:]).sum(dim=-1).clamp(max=probs.size(1) - 1)
    else:
        token = probs.argmax(dim=-1)
    return token, probs.gather(1, token[:, None])[:, 0].log()


def next_token(model: GPT, token: Tensor, cache: Cache, temperature: float, u: Tensor) -> tuple[Tensor, Tensor]:
    """Read one token of each row, token (B,), after the tokens in the cache, and draw the next one."""
    return draw(read(model, token[:, None], cache), temperature, u)


class Sampler:
    """`generate` below as a method of one model, in place of its own. next_token may be compiled or recorded."""

    def __init__(self, model: GPT, next_token=next_token):
        self.model, self.next_token = model, next_token

    def __call__(self, *args, **options):
        return generate(self.model, *args, next_token=self.next_token, **options)


@torch.inference_mode()
def generate(model: GPT, prompts: list[list[int]], max_new_tokens: int, *, stop_ids: tuple[int, ...], samples: int = 1,
             temperature: float = 1.0, generator: torch.Generator | None = None,
             next_token=next_token) -> tuple[list, list]:
    """GPT.generate with a cache: the same arguments, distribution and errors."""
    if not prompts:
        return [], []
    model.check_room(prompts, max_new_tokens)
    device, longest, N = model.embedding.weight.device, max(map(len, prompts)), len(prompts) * samples
    # 1) read each prompt once, however many samples it gets
    pad = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    idx = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)  # (P, longest)
    cache = Cache(model, pad, longest + max_new_tokens)
    logits = read(model, idx, cache).repeat_interleave(samples, dim=0)  # (N, V)
    cache.select(torch.arange(N, device=device) // samples)
    token, token_logp = draw(logits, temperature, torch.rand(N, 1, generator=generator, device=device))
    # 2) one token after the other
    stop = torch.tensor(stop_ids, device=device)
    out = stop[0].repeat(N, max_new_tokens)                 # sampled tokens; those after a stop token do not count
    logp = torch.zeros(N, max_new_tokens, device=device)
    rows = torch.arange(N, device=device)                   # the row of `out` for each row of the batch
    done = torch.zeros(N, dtype=torch.bool, device=device)  # which rows of the batch have ended
    look_every = LOOK_EVERY if device.type == "cuda" else 1
    for t in range(max_new_tokens):
        out[rows, t], logp[rows, t] = token, token_logp
        done |= torch.isin(token, stop)
        n_live = int((~done).sum()) if t % look_every == 0 else len(done)
        if not n_live or t == max_new_tokens - 1:
            break
        size = batch_size(n_live, device)
        if size < len(done):  # rows that go on (late) take the places of rows that have ended (free)
            late = (~done[size:]).nonzero()[:, 0] + size
            free = done[:size].nonzero()[:len(late), 0]
            for x in (rows, token, done):
                x[free] = x[late]
            rows, token, done = rows[:size], token[:size], done[:size]
            cache.replace(free, late, size)
        u = torch.rand(len(token), 1, generator=generator, device=device)
        token, token_logp = next_token(model, token, cache, temperature, u)
    # 3) cut each row after its first stop token
    ended = torch.isin(out, stop).cumsum(dim=1) > 0                 # (N, max_new_tokens)
    lengths = (~ended).sum(dim=1).add(1).clamp(max=max_new_tokens)  # (N,)
    return tuple([row[:n] for row, n in zip(x.tolist(), lengths.tolist())] for x in (out, logp))


def batch_size(n_live: int, device: torch.device) -> int:
    """How many rows a batch keeps if n_live rows go on. Each new size costs a new kernel on a CPU, and a new graph on a
    GPU. So there are few sizes: 2^k and, on a CPU, 3/4 of that."""
    size = max(8, 2 ** (n_live - 1).bit_length())
    return size * 3 // 4 if n_live <= size * 3 // 4 and device.type == "cpu" else size
