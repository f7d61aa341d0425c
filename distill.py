"""Distillation: a small student learns the RL teacher's distribution over the next token, logit by logit.

P is the teacher's distribution at one position of a completion, Q the student's, both softmax(logits / T):

    "forward"  KL(P || Q) = sum P (log P - log Q)      covers all that the teacher would say
    "reverse"  KL(Q || P) = sum Q (log Q - log P)      prefers what the student can say well
    "jsd"      1/2 KL(P || M) + 1/2 KL(Q || M), M = (P + Q) / 2      (GKD, 2306.13649, with beta 1/2)

Each is averaged over the completion's tokens and multiplied by T^2, which keeps the gradient's size independent of T
(Hinton et al., 1503.02531, section 2). "sft" is the sequence-level special case: -log Q of the tokens that the teacher
sampled (Kim & Rush, 1606.07947), which is what DeepSeek-R1 distils with.

The completions are the teacher's, those that the reward accepted (rejection sampling, as in R1), or the student's own
("on policy", GKD): then the teacher corrects the very mistakes that the student makes, and all of them are kept.

Where we differ from the paper
1. R1 distils by "sft" on 800,000 samples; here the teacher's whole distribution is at hand, and the default uses it,
   at temperature 2.
2. R1 draws its samples once; here each step draws new ones, and learns from them `epochs` times.
"""
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo import cut, sample_rollout, shuffled_minibatches
from model import GPT, Optimizer
from parallel import add_up, share

DIVERGENCES = ("forward", "reverse", "jsd")


def distill_loss(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, *, divergence: str,
                 temperature: float = 1.0, denominator: int | None = None) -> Tensor:
    """A divergence above: logits (N, T, V) twice, mask (N, T) of the tokens that count -> scalar, in nats.

    The mean over the counted tokens, times temperature^2. `denominator` replaces their number, so that micro-batches
    add up. No gradient flows to the teacher. Raises ValueError for another divergence.

    >>> logits = torch.tensor([[[2.0, 0.0]]])
    >>> [abs(distill_loss(logits, logits, torch.ones(1, 1), divergence=d).item()) < 1e-6 for d in DIVERGENCES]
    [True, True, True]
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, not {divergence!r}")
    mask = mask.bool()
    log_q = (student_logits[mask].float() / temperature).log_softmax(dim=-1)           # (tokens, V)
    log_p = (teacher_logits[mask].detach().float() / temperature).log_softmax(dim=-1)  # (tokens, V)

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return F.kl_div(log_b, log_a, reduction="sum", log_target=True)  # KL(a || b), summed over tokens

    if divergence == "forward":
        total = kl(log_p, log_q)
    elif divergence == "reverse":
        total = kl(log_q, log_p)
    else:
        log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
        total = (kl(log_p, log_m) + kl(log_q, log_m)) / 2
    return total * temperature**2 / (denominator or max(len(log_q), 1))


def sft_loss(student_logits: Tensor, target: Tensor, mask: Tensor, denominator: int | None = None) -> Tensor:
    """Mean of -log Q(target) over the counted tokens: logits (N, T, V), target and mask (N, T) -> scalar, in nats."""
    mask = mask.bool()
    total = F.cross_entropy(student_logits[mask].float(), target[mask], reduction="sum")
    return total / (denominator or max(int(mask.sum()), 1))


def distill_step(student: GPT, teacher: GPT, optimizer: Optimizer, problems: list, reward_fn, encoding, *,
                 divergence: str, on_policy: bool, max_new_tokens: int, minibatches: int, epochs: int = 1,
                 temperature: float = 1.0, lr_scale: float = 1.0, max_tokens: int = 4_096,
                 generator: torch.Generator | None = None) -> dict[str, float | None]:
    """Sample one completion of each problem, then `epochs` times one update of the student a minibatch -> metrics.

    The arguments are those of `grpo.sample_rollout`, whose samples are drawn from the student if on_policy, else from
    the teacher, and then only those with accuracy and format 1 are kept. divergence is one of distill_loss's, or
    "sft". The loss is None if nothing was kept: then nothing is learnt. Raises ValueError for another divergence.
    The teacher is asked once about a completion, however often the student learns from it.
    """
    if divergence not in (*DIVERGENCES, "sft"):
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, sft, not {divergence!r}")
    start, device = time.perf_counter(), student.embedding.weight.device
    rollout = sample_rollout(student if on_policy else teacher, problems, reward_fn, encoding, samples=1,
                             max_new_tokens=max_new_tokens, generator=generator)
    accepted = [i for i, score in enumerate(rollout.scores) if on_policy or score["accuracy"] == score["format"] == 1]
    batches = []  # of each minibatch its tokens and its micro-batches: idx (n, T), mask (n, T-1), logits (n, T-1, V)
    for picks in shuffled_minibatches(len(accepted), minibatches, generator):
        rows, parts = [accepted[i] for i in picks], []
        for _, idx, mask in cut(rollout, share(rows), encoding.eot_token, max_tokens, device):
            with torch.no_grad():
                parts.append((idx, mask, None if divergence == "sft" else teacher(idx[:, :-1])))
        if rows:
            batches.append((sum(len(rollout.completions[i]) for i in rows), parts))
    loss_sum, grad_norm, tokens = 0.0, 0.0, 0
    updates = batches * epochs
    for n_tokens, parts in updates:
        for idx, mask, teacher_logits in parts:
            student_logits = student(idx[:, :-1])  # (n, T-1, V)
            if divergence == "sft":
                loss = sft_loss(student_logits, idx[:, 1:], mask, n_tokens)
            else:
                loss = distill_loss(student_logits, teacher_logits, mask, divergence=divergence,
                                    temperature=temperature, denominator=n_tokens)
            loss.backward()
            loss_sum += loss.item() * n_tokens
        grad_norm += optimizer.step(lr_scale) / len(updates)
        tokens += n_tokens
    loss_sum = add_up(torch.tensor(loss_sum, dtype=torch.float64)).item()
    return {
        "loss": loss_sum / tokens if tokens else None,
        "accepted": len(accepted) / len(rollout.scores),
        **{name: rollout.column(name).mean().item() for name in rollout.scores[0]},
        "length": sum(map(len, rollout.completions)) / len(rollout.completions),
        "grad_norm": grad_norm,
        "tokens_per_s": tokens / (time.perf_counter() - start),
    }
