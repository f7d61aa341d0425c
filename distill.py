"""Distillation: at every position, a small student learns the teacher's whole distribution over the next token.

The teacher is the model that RL made (zero). By default it writes the completions, and only those that are correct and
well formed are kept (rejection sampling, as in R1). With on_policy the student writes them, as in GKD (generalised
knowledge distillation, arXiv 2306.13649). Then all are kept, so that the student learns what the teacher would have
written after each of its mistakes.

At each position of a completion, P is the teacher's distribution over the vocabulary, and Q the student's. Both are
softmax(logits / tau) with a temperature tau. The loss is the average, over all positions, of one of these:

    "forward"  KL(P || Q) = sum P (log P - log Q)   large where Q is small and P is not. So the student learns all
                                                    tokens that are likely for the teacher (the default)
    "reverse"  KL(Q || P) = sum Q (log Q - log P)   large where P is small and Q is not. So the student avoids tokens
                                                    that are unlikely for the teacher, and may leave out likely ones
    "jsd"      (KL(P || M) + KL(Q || M)) / 2, M = (P + Q) / 2     the Jensen-Shannon divergence, as in GKD
    "sft"      -log Q(the token that was sampled)   supervised fine-tuning on the completions, R1's way

A tau above 1 flattens P and Q, so that unlikely tokens count for more. It makes the gradient about tau^2 times smaller:
one factor tau comes from the derivative of logits / tau, and one from the difference of P and Q, which shrinks, too. So
the loss is multiplied by tau^2 (Hinton et al., 1503.02531, section 2).

The student learns from each completion in several epochs. RL cannot, because its ratio corrects only for a few small
updates. Here the target is the teacher's distribution, which does not depend on who sampled the tokens.
"""
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from grpo import Batch, Budget, Metrics, micro_batches, random_minibatches, rollout_metrics, sample_rollout
from model import GPT, select, token_logprobs


@dataclass
class DistillConfig(Budget):
    """The settings of distillation."""
    distill_steps: int = 40            # steps, each with new completions
    distill_prompts: int = 512         # problems of a step, one completion each
    distill_minibatches: int = 8       # minibatches of a step, each for one update in each epoch
    distill_epochs: int = 3            # epochs over a step's completions
    distill_muon_lr: float = 7e-3      # learning rate of Muon, for the matrices; 0: AdamW
    distill_adam_lr: float = 1.5e-3    # learning rate of AdamW, for all other weights
    divergence: Literal["forward", "reverse", "jsd", "sft"] = "forward"  # the loss: see distill.py
    distill_temperature: float = 2.0   # tau, at which the two distributions are compared
    on_policy: bool = False            # the student writes the completions, not the teacher


def distill_loss(student_logits: Tensor, teacher_logits: Tensor, divergence: str,
                 temperature: float = 1.0) -> Tensor:
    """The "forward", "reverse" or "jsd" divergence of M tokens, times temperature^2: logits (M, V) -> (M,), in nats.

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
        raise ValueError(f"divergence must be 'forward', 'reverse' or 'jsd', not {divergence!r}")
    return loss * temperature**2


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b): log-probabilities (M, V) each -> (M,). subtle: F.kl_div takes b before a."""
    return F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(dim=-1)


def distill_step(student: GPT, teacher: GPT, optimizer, problems: list, reward_fn, task, cfg,
                 generator: Generator | None = None, lr_scale: float = 1.0) -> Metrics:
    """Sample one completion of each problem, then update the student on each minibatch, epoch by epoch -> metrics. cfg
    is a DistillConfig, or has its fields. The other arguments are those of grpo.sample_rollout and grpo_update."""
    # 1) sample one completion of each problem
    model = student if cfg.on_policy else teacher
    rollout = sample_rollout(model, problems, reward_fn, task, 1, cfg.rl_max_new_tokens, generator)
    # 2) filter the teacher's completions (correct and well formed); the student's are all kept
    kept = [i for i, scores in enumerate(rollout.scores) if cfg.on_policy or is_good(scores)]
    metrics = rollout_metrics(rollout)
    metrics.add("accepted", len(kept), len(rollout.scores))
    # 3) the teacher reads them, once for all epochs. We keep its hidden states (M, C), as its logits (M, V) are larger
    minibatches = []
    for picks in random_minibatches(len(kept), cfg.distill_minibatches, generator):
        rows = [kept[i] for i in picks.tolist()]
        batches = []
        for batch in micro_batches(rollout, rows, cfg.micro_batch, student.embedding.weight.device):
            hidden = None  # (M, C)
            if cfg.divergence != "sft":
                hidden = select(teacher.hidden(batch.idx[:, :-1]), batch.mask).detach()
            batches.append((batch, hidden))
        n_tokens = sum(len(rollout.completions[row]) for row in rows)
        minibatches.append((batches, n_tokens))
    # 4) update the student once for each minibatch, in every epoch
    for _ in range(cfg.distill_epochs):
        for batches, n_tokens in minibatches:
            for batch, hidden in batches:  # their gradients add up
                loss = batch_loss(student, teacher, batch, hidden, cfg)  # (M,)
                (loss.sum() / n_tokens).backward()
                metrics.add("loss", loss.detach().sum(), len(loss))
            grad_norm = optimizer.step(lr_scale, share=n_tokens, has_gradient=n_tokens > 0)
            if n_tokens:
                metrics.add("grad_norm", grad_norm, 1)
    return metrics


def batch_loss(student: GPT, teacher: GPT, batch: Batch, hidden: Tensor | None, cfg) -> Tensor:
    """The loss of each token of a batch, (M,), given the hidden states of the teacher (M, C)."""
    if cfg.divergence == "sft":
        return -token_logprobs(student, batch.idx, batch.mask)
    student_logits = student(batch.idx[:, :-1], batch.mask)   # (M, V)
    teacher_logits = teacher.logits(hidden).detach()          # (M, V)
    return distill_loss(student_logits, teacher_logits, cfg.divergence, cfg.distill_temperature)


def is_good(scores: dict[str, float]) -> bool:
    """Is a completion correct and, if its scores have a "format", well formed?"""
    return scores["accuracy"] == 1 and scores.get("format", 1) == 1
