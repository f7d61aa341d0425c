"""Distillation: at every position, a small student learns the RL teacher's whole distribution over the next token.

P is the teacher's distribution at one position of a completion, Q the student's, both softmax(logits / tau), where tau
is a temperature:

    "forward"  KL(P || Q) = sum P (log P - log Q)      large where Q lacks what P says; minimised, Q covers all of P
    "reverse"  KL(Q || P) = sum Q (log Q - log P)      large where Q says what P does not; Q may leave parts of P out
    "jsd"      1/2 KL(P || M) + 1/2 KL(Q || M), M = (P + Q) / 2      the Jensen-Shannon divergence, between the two
                                                                     (generalised knowledge distillation, 2306.13649)

Each is averaged over the tokens of the completions. A temperature above 1 flattens both distributions, so that tokens
which the teacher holds possible but unlikely count for more. It also makes the gradient about tau^2 times smaller: by
1/tau because the logits are divided by tau, and by another 1/tau because the flattened P and Q are closer to each
other. So the loss is multiplied by tau^2 (Hinton et al., 1503.02531, section 2). The temperature is used for this
comparison only: completions are sampled at temperature 1.

"sft" (supervised fine-tuning) is sequence-level distillation (Kim & Rush, 1606.07947): the mean of -log Q over the
tokens that the teacher sampled. DeepSeek-R1 distils in this way.

The completions are sampled from the teacher, and only those that the reward accepts are kept (rejection sampling, as in
R1). Or they are sampled from the student ("on policy", as in 2306.13649). Then the teacher corrects the student's own
mistakes, so all of them are kept.

Where we differ from the paper, and why
1. R1 distils by "sft" on 800,000 samples. Here the teacher's whole distribution is at hand, and says more than one
   sample of it. The default is "forward" at temperature 2. Students of the other divergences did as well within the
   noise (docs/knobs.md); at temperature 1 they learnt more slowly (docs/tried.md).
2. R1 draws its samples once. Here each step draws new ones, and learns from them `distill_epochs` times: sampling costs
   more than learning.
3. The problems are not only those of RL: the teacher also answers longer ones (`distill_longer`), which it can solve
   although RL never asked it. A student that never sees such answers loses what its base could do with them.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from grpo import MicroBatch, micro_batches, random_minibatches, rollout_means, sample_rollout
from model import LARGE_VOCABULARY, GPT, Optimizer
from parallel import all_reduce

DIVERGENCES = ("forward", "reverse", "jsd")


def distill_loss(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, *, divergence: str,
                 temperature: float = 1.0, denominator: int | None = None) -> Tensor:
    """A divergence above, as the mean over tokens, times temperature^2 -> scalar, in nats.

    Logits are (N, T, V): N rows of T tokens over a vocabulary of V. The mask (N, T) says which tokens count. The sum is
    divided by `denominator` instead of their number, if it is given, so that the losses of micro-batches add up. No
    gradient flows to the teacher. Raises ValueError for another divergence.

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
        """KL(a || b), summed over the tokens. subtle: F.kl_div takes b first."""
        return F.kl_div(log_b, log_a, reduction="sum", log_target=True)

    if divergence == "forward":
        total = kl(log_p, log_q)
    elif divergence == "reverse":
        total = kl(log_q, log_p)
    else:
        log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
        total = (kl(log_p, log_m) + kl(log_q, log_m)) / 2
    return total * temperature**2 / (denominator or max(len(log_q), 1))


def sft_loss(student_logits: Tensor, target: Tensor, mask: Tensor, denominator: int | None = None) -> Tensor:
    """The mean of -log Q(target) over the counted tokens: logits (N, T, V), target and mask (N, T) -> scalar, in
    nats."""
    mask = mask.bool()
    total = F.cross_entropy(student_logits[mask].float(), target[mask], reduction="sum")
    return total / (denominator or max(int(mask.sum()), 1))


def read(model: GPT, batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
    """The model reads a micro-batch -> what it makes logits of, (n, T-1, C), the tokens that come next and their mask,
    (n, T-1) each. With a large vocabulary, whose logits are most of the work, these are the masked positions alone:
    (1, tokens, C) and (1, tokens)."""
    parts = model.hidden(batch.idx[:, :-1]), batch.idx[:, 1:], batch.mask
    return tuple(x[batch.mask][None] for x in parts) if model.config.vocab_size > LARGE_VOCABULARY else parts


def distill_step(student: GPT, teacher: GPT, optimizer: Optimizer, problems: list, reward_fn, task, cfg,
                 generator: torch.Generator | None = None, lr_scale: float = 1.0) -> dict[str, float | None]:
    """Sample one completion of each problem, then update the student on each minibatch of them, `distill_epochs` times.

    problems, reward_fn, task and generator are those of `grpo.sample_rollout`. cfg holds the hyperparameters:
    divergence (one of DIVERGENCES, or "sft"), on_policy, rl_max_new_tokens, distill_minibatches, distill_epochs,
    distill_temperature and micro_batch (see Config in run.py). -> metrics: those of `grpo.rollout_means`, accepted
    (share of the samples), and loss (mean over tokens) and grad_norm (mean over updates), which are absent if none was
    accepted.
    """
    # 1) sample: the teacher answers, or the student itself
    rollout = sample_rollout(student if cfg.on_policy else teacher, problems, reward_fn, task, samples=1,
                             max_new_tokens=cfg.rl_max_new_tokens, generator=generator)
    # 2) of the teacher's answers, keep those that are right and well formed
    accepted = [i for i, score in enumerate(rollout.scores)
                if cfg.on_policy or score["accuracy"] == 1 and score.get("format", 1) == 1]
    means = rollout_means(rollout)
    means.add("accepted", len(accepted), len(rollout.scores))
    # 3) the teacher reads them, once for all epochs. Its hidden states are kept; its logits would be far larger
    minibatches = []
    for picks in random_minibatches(len(accepted), cfg.distill_minibatches, generator):
        rows, batches = [accepted[i] for i in picks], []
        n_tokens = int(all_reduce(torch.tensor(sum(len(rollout.completions[i]) for i in rows))))
        if n_tokens:
            for batch in micro_batches(rollout, rows, cfg.micro_batch, student.embedding.weight.device):
                batches.append((batch, None if cfg.divergence == "sft" else read(teacher, batch)[0].detach()))
            minibatches.append((n_tokens, batches))
    # 4) update the student; each epoch takes the same minibatches
    for n_tokens, batches in minibatches * cfg.distill_epochs:
        for batch, teacher_hidden in batches:
            hidden, target, mask = read(student, batch)
            student_logits = student.logits(hidden)  # (n, T-1, V)
            if cfg.divergence == "sft":
                loss = sft_loss(student_logits, target, mask, n_tokens)
            else:
                teacher_logits = teacher.logits(teacher_hidden).detach()  # (n, T-1, V)
                loss = distill_loss(student_logits, teacher_logits, mask, divergence=cfg.divergence,
                                    temperature=cfg.distill_temperature, denominator=n_tokens)
            loss.backward()
            means.add("loss", loss.detach() * n_tokens, batch.mask.sum())  # the sum of its tokens' losses, their number
        means.add("grad_norm", optimizer.step(lr_scale), 1)
    return means.compute()
