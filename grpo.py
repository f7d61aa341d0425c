"""Group relative policy optimisation: reinforcement learning from rewards alone, as DeepSeek-R1-Zero does it.

The words, for who knows PyTorch but not RL. The policy is the language model. A prompt q gets G completions o_1..o_G
sampled from it (a rollout), each gets a reward r_i, and the advantage A_i says how much better than its group it did.
The policy is then nudged to make completions of positive advantage likelier, the others less likely. The importance
ratio rho corrects for the policy having moved since it sampled (pi_old); the clip takes away the incentive to move it
far. The reference policy pi_ref is a frozen copy that a KL penalty keeps the policy near to.

DeepSeek-R1 (2501.12948v2), eq. 1-3, per token as in DeepSeekMath (2402.03300), eq. 3:

    A_i   = (r_i - mean(r)) / (std(r) + 1e-4)                                          group_advantages
    rho_t = pi_theta(o_t | q, o_<t) / pi_old(o_t | q, o_<t)
    L_t   = - min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A)
    KL_t  = pi_ref/pi_theta - log(pi_ref/pi_theta) - 1                                 (k3, never negative)
    loss  = average over tokens of L_t + kl_coef KL_t                                  grpo_loss

How the average is taken ("normalize"), with N completions of |o_i| tokens:
    "sequence"  1/N sum_i 1/|o_i| sum_t      DeepSeekMath; a long wrong answer is punished less per token
    "token"     1/(sum_i |o_i|) sum_i sum_t  DAPO (2503.14476)
    "constant"  1/(N max_len) sum_i sum_t    Dr. GRPO (2503.20783)

As a loss, k3 has the gradient of KL(pi_ref || pi_theta) when on policy, although its value estimates
KL(pi_theta || pi_ref) (2506.09477).

Reading the log: on policy the "sequence" loss is 0 by construction, since a group's advantages add up to 0, and yet its
gradient is not; the "token" and "constant" losses are minus the length-weighted advantage. Neither falls as the policy
gets better: watch the reward.

Where we differ from the papers, and why
1. The clip may be asymmetric (DAPO's "clip higher"), and the standard deviation has 1e-4 added, as in TRL: a group of
   equal rewards has advantage 0, not NaN.
2. pi_old's log-probabilities come from the pass that trains, not from the sampler: in bf16 the sampler's cached pass
   rounds differently, and rho would not be 1 on policy. The gap is logged.
3. A completion that was cut off at max_new_tokens is scored as the text that it is, and trained on.
4. Without a KL penalty, completions of advantage 0 are left out of the update: their gradient is 0.
5. The reward is a function that the caller hands in: no task is known here.
"""
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model import GPT, Optimizer, generate, token_logprobs
from parallel import add_up, gather, own, share

NORMALIZE = ("sequence", "token", "constant")


def group_advantages(rewards: Tensor, scale: str = "std", baseline: str = "group") -> Tensor:
    """How much better than its group each completion did: rewards (P, G) -> advantages (P, G).

    scale "std" divides by the group's standard deviation (ddof 1) + 1e-4 (DeepSeekMath), "none" does not (Dr. GRPO).
    baseline "batch" compares with all P * G rewards as one group: REINFORCE with the batch's mean as its baseline.
    Raises ValueError for another scale or baseline, or groups of one.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]), scale="none").tolist()
    [[0.5, -0.5, -0.5, 0.5], [0.0, 0.0, 0.0, 0.0]]
    """
    if rewards.size(1) < 2:
        raise ValueError("an advantage compares the answers to one prompt: a group needs two or more")
    if baseline == "batch":
        return group_advantages(rewards.reshape(1, -1), scale).view(rewards.shape)
    if baseline != "group":
        raise ValueError(f"baseline must be 'group' or 'batch', not {baseline!r}")
    # subtle: the mean of equal rewards may be off in the last bit, which dividing by 1e-4 would make an advantage of.
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)  # (P, 1)
    centred = (rewards - rewards.mean(dim=1, keepdim=True)).masked_fill(equal, 0.0)
    if scale == "none":
        return centred
    if scale == "std":
        return centred / (rewards.std(dim=1, keepdim=True) + 1e-4)
    raise ValueError(f"scale must be 'std' or 'none', not {scale!r}")


def normalizer(n_rows: int, n_tokens: int, normalize: str, max_len: int | None = None) -> int:
    """What the sum over tokens is divided by: the rows ("sequence"), the tokens ("token"), or rows * max_len
    ("constant"), where max_len is the generation budget.

    Raises ValueError for another name, or "constant" without max_len.
    """
    if normalize == "sequence":
        return n_rows
    if normalize == "token":
        return max(n_tokens, 1)
    if normalize == "constant" and max_len:
        return n_rows * max_len
    raise ValueError(f"normalize must be 'sequence', 'token', or 'constant' with max_len, not {normalize!r}")


def grpo_loss(logp: Tensor, logp_old: Tensor, logp_ref: Tensor | None, adv: Tensor, mask: Tensor, *, clip_low: float,
              clip_high: float, kl_coef: float, normalize: str, max_len: int | None = None,
              denominator: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss above: log-probabilities (N, T) of the sampled tokens under the policy, pi_old and pi_ref, adv (N,),
    mask (N, T) of the tokens that count -> (scalar loss, metrics).

    logp_ref may be None if kl_coef is 0. `denominator` replaces the mask's own `normalizer`: a batch that is cut into
    micro-batches passes the whole batch's to each, so that their losses add up to its. The metrics are means over the
    counted tokens, without gradient: ratio, kl (k3, nats), clip_low and clip_high (shares of tokens whose gradient the
    clip took away, by side). Raises ValueError as `normalizer` does.
    """
    mask = mask.bool()
    if denominator is None:
        denominator = normalizer(len(mask), int(mask.sum()), normalize, max_len)
    assert normalize in NORMALIZE, f"normalize is one of {NORMALIZE}"
    assert logp_ref is not None or not kl_coef, "a KL penalty needs the reference's log-probabilities"
    adv = adv[:, None]  # (N, 1)
    # subtle: masked before exp, so that whatever stands in the padding can make neither inf nor NaN.
    ratio = (logp - logp_old).masked_fill(~mask, 0.0).exp()  # (N, T)
    per_token = -torch.min(ratio * adv, ratio.clamp(1 - clip_low, 1 + clip_high) * adv)
    kl = torch.zeros_like(ratio)
    if logp_ref is not None:
        log_r = (logp_ref - logp).masked_fill(~mask, 0.0)
        kl = log_r.exp() - log_r - 1
    if kl_coef:
        per_token = per_token + kl_coef * kl
    weight = mask.to(per_token.dtype)
    tokens = weight.sum(dim=1, keepdim=True).clamp(min=1)  # (N, 1)
    if normalize == "sequence":
        weight = weight / tokens
    loss = (per_token * weight).sum() / denominator

    def mean(x: Tensor) -> Tensor:
        return x.detach()[mask].float().mean() if mask.any() else x.new_zeros(())

    return loss, {"ratio": mean(ratio), "kl": mean(kl), "clip_low": mean((ratio < 1 - clip_low) & (adv < 0)),
                  "clip_high": mean((ratio > 1 + clip_high) & (adv > 0))}


@dataclass
class Rollout:
    """Sampled completions and what they earned: N = P * G rows, those of one prompt side by side."""
    prompts: list[list[int]]        # N prompts, token ids
    completions: list[list[int]]    # N completions, token ids, end of text included if it was sampled
    logp: list[list[float]]         # log-probability of each sampled token, as the sampler saw it
    texts: list[str]                # N completions without their end of text
    truncated: list[bool]           # N: cut off at the budget
    scores: list[dict[str, float]]  # N: what reward_fn says

    def column(self, name: str) -> Tensor:
        """One part of the scores, (N,)."""
        return torch.tensor([score[name] for score in self.scores])


def sample_rollout(model: GPT, problems: list, reward_fn, encoding, *, samples: int, max_new_tokens: int,
                   temperature: float = 1.0, generator: torch.Generator | None = None) -> Rollout:
    """`samples` completions of each problem's prompt, scored.

    problems have a .prompt (str); reward_fn(completion: str, problem) -> {"reward": total, "accuracy": 0 or 1, ...};
    encoding is the tiktoken.Encoding. The text is scored without its end of text.
    """
    eos, problems = encoding.eot_token, share(problems)
    prompts = [encoding.encode_ordinary(problem.prompt) for problem in problems]
    completions, logp = generate(model, prompts, max_new_tokens, temperature=temperature, eos_id=eos,
                                 generator=own(generator), samples=samples, return_logprobs=True)
    truncated = [c[-1] != eos for c in completions]
    texts = [encoding.decode(c if cut else c[:-1]) for c, cut in zip(completions, truncated)]
    scores = [reward_fn(text, problems[i // samples]) for i, text in enumerate(texts)]
    prompts = [p for p in prompts for _ in range(samples)]
    return Rollout(*map(list, zip(*gather(list(zip(prompts, completions, logp, texts, truncated, scores))))))


def pack(prompts: list[list[int]], completions: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Rows of prompt + completion, padded on the right -> idx (N, T), mask (N, T-1).

    mask[i, t] is True where idx[i, t+1] was sampled. subtle: it is made from lengths; comparing tokens with pad_id,
    which is also the stop token, would leave stopping untrained.
    """
    starts, ends = [len(p) for p in prompts], [len(p) + len(c) for p, c in zip(prompts, completions)]
    idx = torch.tensor([p + c + [pad_id] * (max(ends) - end) for p, c, end in zip(prompts, completions, ends)])
    position = torch.arange(1, max(ends))
    return idx, (position >= torch.tensor(starts)[:, None]) & (position < torch.tensor(ends)[:, None])


def micro_batches(lengths: list[int], rows: list[int], max_tokens: int) -> list[list[int]]:
    """Cut rows into parts of similar length, each of at most max_tokens with its padding.

    >>> micro_batches([9, 2, 3, 2], rows=[0, 1, 2, 3], max_tokens=9)
    [[1, 3, 2], [0]]
    """
    parts: list[list[int]] = []
    for row in sorted(rows, key=lambda row: lengths[row]):
        if not parts or (len(parts[-1]) + 1) * lengths[row] > max_tokens:
            parts.append([])
        parts[-1].append(row)
    return parts


def round_up(n: int, multiple: int) -> int:
    """The least multiple of n or more."""
    return -(-n // multiple) * multiple


def shuffled_minibatches(n: int, n_batches: int, generator: torch.Generator | None) -> list[list[int]]:
    """The numbers 0..n-1 in random order, dealt into n_batches lists of equal size, give or take one."""
    order = torch.randperm(n, generator=generator, device=generator.device if generator else None).tolist()
    return [order[i::n_batches] for i in range(n_batches)]


def cut(rollout: Rollout, rows: list[int], pad_id: int, max_tokens: int,
        device: torch.device) -> list[tuple[list[int], Tensor, Tensor]]:
    """Rows of a rollout -> micro-batches (their rows, idx (n, T), mask (n, T-1)) of at most max_tokens with padding.

    n may be more than the rows: then the last are padding, and in no mask. subtle: each size that a CPU's library has
    not met costs it new kernels, which takes as long as computing with them. So sizes are rounded up where that fits: n
    to a multiple of 16, T - 1, the length that the model is given, to one of 8.
    """
    lengths = [round_up(len(p) + len(c) - 1, 8) + 1 for p, c in zip(rollout.prompts, rollout.completions)]
    parts = []
    for part in micro_batches(lengths, rows, max_tokens):
        idx, mask = pack([rollout.prompts[i] for i in part], [rollout.completions[i] for i in part], pad_id)
        T = lengths[part[-1]]
        n = max(len(part), min(round_up(len(part), 16), max_tokens // T))
        padding = (0, T - idx.size(1), 0, n - len(part))
        parts.append((part, F.pad(idx, padding).to(device), F.pad(mask, padding).to(device)))
    return parts


def grpo_step(policy: GPT, reference: GPT | None, optimizer: Optimizer, problems: list, reward_fn, encoding, *,
              samples: int, max_new_tokens: int, minibatches: int, clip_low: float, clip_high: float, kl_coef: float,
              normalize: str, scale: str, baseline: str = "group", shuffle: bool = False, temperature: float = 1.0,
              lr_scale: float = 1.0, max_tokens: int = 4_096,
              generator: torch.Generator | None = None) -> tuple[dict[str, float], Rollout]:
    """One iteration of Algorithm 1 of DeepSeekMath: `samples` completions of each problem, then an update a minibatch.

    The first arguments are as in `sample_rollout`; the reference may be None if kl_coef is 0, and is not asked then;
    shuffle deals the rewards out at random inside each group, a control; max_tokens bounds a micro-batch. -> (metrics,
    the rollout). loss, grad_norm, kl (None without a penalty), ratio, clip_* and sampler_gap are of the completions
    trained on, the other metrics of all. Raises ValueError for a name that grpo_loss or group_advantages does not know.
    """
    start, device = time.perf_counter(), policy.embedding.weight.device

    # 1) sample G completions of each of P prompts: N = P * G rows; 2) score them
    rollout = sample_rollout(policy, problems, reward_fn, encoding, samples=samples, max_new_tokens=max_new_tokens,
                             temperature=temperature, generator=generator)
    rewards = rollout.column("reward").view(-1, samples)  # (P, G)

    # 3) advantages: better or worse than the other answers to the same prompt
    if shuffle:
        order = torch.rand(rewards.shape, generator=generator, device=device).argsort(dim=1)  # (P, G)
        rewards = rewards.gather(1, order.cpu())
    adv = group_advantages(rewards, scale, baseline).flatten()  # (N,)

    # 4) pi_ref, and pi_old of the minibatches that come after an update: the first one's training pass is its pi_old.
    # Without a KL penalty a completion of advantage 0 has no gradient: it counts in the average, but is not computed.
    lengths = [len(c) for c in rollout.completions]
    batches, trained = [], 0
    for rows in shuffled_minibatches(len(lengths), minibatches, generator):
        live = [i for i in rows if kl_coef or adv[i] != 0]
        if not live:
            continue
        parts = []
        for part, idx, mask in cut(rollout, share(live), encoding.eot_token, max_tokens, device):
            logp_old = token_logprobs(policy, idx, temperature=temperature).detach() if batches else None
            logp_ref = token_logprobs(reference, idx, temperature=temperature).detach() if kl_coef else None
            sampled = torch.tensor([p for i in part for p in rollout.logp[i]], device=device)  # (tokens,)
            part_adv = F.pad(adv[part], (0, len(idx) - len(part))).to(device)  # (n,)
            parts.append((idx, logp_old, logp_ref, part_adv, mask, sampled))
        trained += sum(lengths[i] for i in live)
        batches.append((normalizer(len(rows), sum(lengths[i] for i in rows), normalize, max_new_tokens), parts))

    # 5) update the policy, a minibatch at a time; the gradients of its micro-batches add up to its own
    totals, grad_norm = dict.fromkeys(("loss", "kl", "ratio", "clip_low", "clip_high", "sampler_gap"), 0.0), 0.0
    for denominator, parts in batches:
        for idx, logp_old, logp_ref, part_adv, mask, sampled in parts:
            logp = token_logprobs(policy, idx, temperature=temperature)
            logp_old = logp.detach() if logp_old is None else logp_old
            loss, metrics = grpo_loss(logp, logp_old, logp_ref, part_adv, mask, clip_low=clip_low, clip_high=clip_high,
                                      kl_coef=kl_coef, normalize=normalize, denominator=denominator)
            loss.backward()
            totals["loss"] += loss.item() / minibatches
            for name, value in metrics.items():  # means over tokens: weigh each part by its tokens
                totals[name] += value.item() * int(mask.sum()) / trained
            totals["sampler_gap"] += (logp_old[mask] - sampled).abs().sum().item() / trained
        grad_norm += optimizer.step(lr_scale) / minibatches
    totals = dict(zip(totals, add_up(torch.tensor(list(totals.values()), dtype=torch.float64)).tolist()))

    wrong = [n for n, right in zip(lengths, rollout.column("accuracy")) if not right]
    seconds = time.perf_counter() - start
    return {
        **{name: rollout.column(name).mean().item() for name in rollout.scores[0]},
        "length": sum(lengths) / len(lengths),
        "length_wrong": sum(wrong) / len(wrong) if wrong else None,
        "truncated": sum(rollout.truncated) / len(lengths),
        "no_signal": (rewards == rewards[:, :1]).all(dim=1).float().mean().item(),  # groups of equal rewards
        "entropy": -sum(map(sum, rollout.logp)) / sum(lengths),  # its estimate from the samples, nats a token
        "grad_norm": grad_norm,
        **totals,
        "kl": totals["kl"] if kl_coef else None,
        "tokens_per_s": sum(lengths) / seconds,
    }, rollout
