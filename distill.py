"""Distillation: at every position, a small student learns the RL teacher's whole distribution over the next token.

P is the teacher's distribution at one position of a completion, Q the student's, both softmax(logits / tau):

    "forward"  KL(P || Q) = sum P (log P - log Q)   large where Q misses what P says; minimised, Q covers all of P
    "reverse"  KL(Q || P) = sum Q (log Q - log P)   large where Q says what P does not; Q may leave parts of P out
    "jsd"      (KL(P || M) + KL(Q || M)) / 2, M = (P + Q) / 2     Jensen-Shannon divergence, as in generalised
                                                                  knowledge distillation (arXiv 2306.13649)
    "sft"      -log Q(the token that was sampled)   supervised fine-tuning, the way in which DeepSeek-R1 distils
                                                    (sequence-level distillation, 1606.07947)

Each is averaged over the tokens of the completions, which are sampled at temperature 1. A temperature tau above 1
flattens both distributions, so unlikely tokens count for more. It makes the gradient about tau^2 times smaller: by
1/tau because the logits are divided by tau, and again because the flattened P and Q are closer to each other. So the
loss is multiplied by tau^2 (Hinton et al., 1503.02531, section 2).

The teacher answers, and only what the reward accepts is kept (rejection sampling, as in R1). Or the student answers
("on policy", as in 2306.13649). Then the teacher corrects the student's own mistakes, so all answers are kept.

The student learns from each sample in several epochs, which RL may not do. In RL, samples of an old policy say less and
less about the current one. Here the target, the teacher's distribution, does not depend on who sampled the tokens.
"""
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from grpo import Budget, Metrics, micro_batches, random_minibatches, rollout_metrics, sample_rollout
from model import GPT, select, token_logprobs

DIVERGENCES = ("forward", "reverse", "jsd")


@dataclass
class DistillConfig(Budget):
    """The settings of distillation."""
    distill_steps: int = 50            # steps, each with new completions
    distill_prompts: int = 512         # problems of a step, one completion each
    distill_minibatches: int = 8       # updates in an epoch over a step's completions
    distill_epochs: int = 3            # epochs over a step's completions
    distill_muon_lr: float = 7e-3      # learning rate of Muon; 0: AdamW alone
    distill_adam_lr: float = 1.5e-3    # learning rate of AdamW
    divergence: Literal["forward", "reverse", "jsd", "sft"] = "forward"  # the loss: see distill.py
    distill_temperature: float = 2.0   # temperature at which both distributions are compared
    on_policy: bool = False            # learn on the student's own completions, not the teacher's


def distill_loss(student_logits: Tensor, teacher_logits: Tensor, divergence: str,
                 temperature: float = 1.0) -> Tensor:
    """A divergence above at each of M tokens, times temperature^2: logits (M, V) each -> (M,), in nats.

    No gradient flows to the teacher. Raises ValueError for another divergence.
    """
    log_q = (student_logits.float() / temperature).log_softmax(dim=-1)
    log_p = (teacher_logits.detach().float() / temperature).log_softmax(dim=-1)
    if divergence == "forward":
        loss = kl(log_p, log_q)
    elif divergence == "reverse":
        loss = kl(log_q, log_p)
    elif divergence == "jsd":
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        loss = (kl(log_p, log_m) + kl(log_q, log_m)) / 2
    else:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, not {divergence!r}")
    return loss * temperature**2


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b): log-probabilities (M, V) each -> (M,). subtle: F.kl_div takes b first."""
    return F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(dim=-1)


def distill_step(student: GPT, teacher: GPT, optimizer, problems: list, reward_fn, task, cfg,
                 generator: Generator | None = None, lr_scale: float = 1.0) -> Metrics:
    """Sample one completion of each problem, then update the student on each minibatch, epoch by epoch -> metrics.

    cfg is a DistillConfig, or has its fields. The other arguments are those of grpo.sample_rollout and grpo_update.
    """
    # 1) the teacher answers, or the student itself
    author = student if cfg.on_policy else teacher
    rollout = sample_rollout(author, problems, reward_fn, task, 1, cfg.rl_max_new_tokens, generator)
    # 2) of the teacher's answers, keep those that are correct and well formed
    accepted = [i for i, scores in enumerate(rollout.scores) if cfg.on_policy or is_good(scores)]
    metrics = rollout_metrics(rollout)
    metrics.add("accepted", len(accepted), len(rollout.scores))
    # 3) the teacher reads them, once for all epochs. Its hidden states are kept; its logits would be far larger
    minibatches = []
    for picks in random_minibatches(len(accepted), cfg.distill_minibatches, generator):
        rows = [accepted[i] for i in picks.tolist()]
        n_tokens = sum(len(rollout.completions[row]) for row in rows)
        batches = []
        for batch in micro_batches(rollout, rows, cfg.micro_batch, student.embedding.weight.device):
            hidden = None  # (M, C)
            if cfg.divergence != "sft":
                hidden = select(teacher.hidden(batch.idx[:, :-1]), batch.mask).detach()
            batches.append((batch, hidden))
        minibatches.append((batches, n_tokens))
    # 4) update the student; each epoch takes the same minibatches
    for batches, n_tokens in minibatches * cfg.distill_epochs:
        for batch, teacher_hidden in batches:
            if cfg.divergence == "sft":
                loss = -token_logprobs(student, batch.idx, batch.mask)  # (M,)
            else:
                student_logits = student(batch.idx[:, :-1], batch.mask)   # (M, V)
                teacher_logits = teacher.logits(teacher_hidden).detach()  # (M, V)
                loss = distill_loss(student_logits, teacher_logits, cfg.divergence,
                                    cfg.distill_temperature)  # (M,)
            (loss.sum() / n_tokens).backward()
            metrics.add("loss", loss.detach().sum(), len(loss))
        norm = optimizer.step(lr_scale, share=n_tokens, has_gradient=n_tokens > 0)
        if n_tokens:
            metrics.add("grad_norm", norm, 1)
    return metrics


def is_good(scores: dict[str, float]) -> bool:
    """Is an answer correct and, if the task has a format, well formed?"""
    return scores["accuracy"] == 1 and scores.get("format", 1) == 1
