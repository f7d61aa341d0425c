"""Group relative policy optimisation (GRPO): reinforcement learning from rewards alone, as DeepSeek-R1-Zero does it.

Terms, for readers who know PyTorch but not RL. The policy is the language model that is being trained. A prompt q gets
G completions o_1..o_G sampled from the policy; together they are its group. Each completion gets a reward r_i. Its
advantage A_i says how much better it did than its group. A rollout is the G completions of each of P prompts, N = P * G
rows. Training makes completions of positive advantage more likely and those of negative advantage less likely.

DeepSeek-R1 (arXiv 2501.12948v2), eq. 1-3, written per token as in DeepSeekMath (2402.03300), eq. 3. o_{i,t} is token t
of completion i, and all its tokens share the advantage A_i:

    A_i      = (r_i - mean(r)) / (std(r) + 1e-4)                                       group_advantages
    ratio    = pi_theta(o_{i,t} | q, o_{i,<t}) / pi_old(o_{i,t} | q, o_{i,<t})
    L_{i,t}  = - min(ratio A_i, clip(ratio, 1 - clip_low, 1 + clip_high) A_i)
    KL_{i,t} = pi_ref/pi_theta - log(pi_ref/pi_theta) - 1      KL(pi_theta || pi_ref), estimated from one token
    loss     = average over tokens of L_{i,t} + kl_coef KL_{i,t}                       grpo_loss

pi_theta is the policy as it is now, pi_old the policy as it was when it sampled, pi_ref (the reference) a frozen copy
of the model that RL began with. "On policy" means that pi_theta is still pi_old: the ratio is 1.

The ratio and its clip. One rollout may serve several updates, and pi_theta moves away from pi_old with each. Weighting
a token by the ratio (importance weighting) turns an average over samples of pi_old into one over samples of pi_theta.
But once the two differ much, a few tokens of a large ratio make up most of that average, and it is mostly noise. So the
clip ends a token's gradient when the policy has moved far enough in the direction that the advantage asks for, and only
then:
    A > 0, ratio above 1 + clip_high   no gradient: the token has become likelier by enough
    A > 0, ratio below 1 + clip_high   a gradient that makes it likelier, even if it has become unlikelier so far
    A < 0, ratio below 1 - clip_low    no gradient: the token has become unlikelier by enough
    A < 0, ratio above 1 - clip_low    a gradient that makes it unlikelier, even if it has become likelier so far
In the first and third case the min picks the clipped term, which is a constant. The bound is relative: with clip_high
0.2 a token of probability 0.01 may grow to 0.012 in one rollout, while one of 0.9 never reaches its bound. So a larger
clip_high ("clip higher", DAPO, 2503.14476) helps rare tokens that did well.

Dividing by the standard deviation (`scale`). The rewards of a prompt that is nearly always or nearly never solved have
a small std, so dividing by it gives such a prompt more weight than a prompt that is half solved. Dr. GRPO (2503.20783)
calls this a bias: what RL is to raise is the reward averaged over all prompts, in which every prompt has the same
weight. So it does not divide (scale "none"). The default here divides, as R1 does; we measured no difference
(experiments/findings.md, finding 9).

The average over tokens (`normalize`), for N completions of |o_i| tokens:
    "sequence"  1/N sum_i 1/|o_i| sum_t      DeepSeekMath. All completions weigh the same, so a token of a long one
                                             weighs less. A long wrong answer is punished less per token than a short
                                             one, and a short right answer is rewarded more per token than a long one.
                                             This is the length bias: it lets wrong answers grow.
    "token"     1/(sum_i |o_i|) sum_i sum_t  DAPO, and the default here. All tokens of a minibatch weigh the same, so
                                             the bias is gone. That weight still shrinks when all answers grow.
    "constant"  1/(N max_len) sum_i sum_t    Dr. GRPO. As "token", but max_len is the generation budget, so a token
                                             weighs the same however long the answers are.

The KL penalty. KL_{i,t} (known as "k3") is never negative, and averaged over samples of pi_theta it is
KL(pi_theta || pi_ref). The plain log-ratio log(pi_theta/pi_ref) has the same average, but as a loss it has no effect:
on policy its gradient is grad log pi_theta, which averages to 0, because the probabilities add up to 1 whatever theta
is. The gradient of KL_{i,t} is (1 - pi_ref/pi_theta) grad log pi_theta. Autograd does not see that the samples depend
on theta, too, so its average is not the gradient of KL(pi_theta || pi_ref), but that of the reversed
KL(pi_ref || pi_theta) (2506.09477). The factor shows what that means in practice: where the policy is far less likely
to say a token than the reference is, the pull back is strong; where it is more likely, the factor is at most 1.

Reading the log. On policy the loss of a whole rollout is 0 with "sequence", since the advantages of a group add up to
0. (A minibatch has parts of groups, so its loss is only near 0.) Its gradient is not 0: the value of the ratio is 1,
but its derivative is that of log pi_theta, so each token's gradient is -A_i grad log pi_theta. With "token" and
"constant" the loss is minus the mean advantage weighted by length. No loss falls as the policy gets better: watch the
reward.

Where we differ from the papers, and why
1. The standard deviation has 1e-4 added, as in TRL: a group of equal rewards has advantage 0, not NaN.
2. pi_old's log-probabilities come from the forward pass that training uses, not from the sampler. In bf16 the
   sampler's cached pass rounds differently, and the ratio would not be 1 on policy. The log shows the difference
   (sampler_gap).
3. A completion that was cut off at the generation budget is scored and trained on like any other. It usually lacks
   its last tag and earns nothing, so the policy learns to finish in time.
4. Completions of advantage 0 are not computed, and the KL penalty acts on the others. (They still count in the
   average. Nearly all are of groups without signal, whose rewards are all equal: most groups, late in RL.) With
   `skip_no_signal` off, the penalty acts on all completions. That is Algorithm 1 to the letter, and takes longer.
5. Minibatches are made of rows, not of groups. The advantages are computed before, so a group need not stay together.
6. The reward is a function that the caller hands in. This file knows no task.
"""
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model import GPT, Optimizer, generate, token_logprobs
from parallel import Means, all_reduce, world_size


def group_advantages(rewards: Tensor, scale: str = "std", baseline: str = "group") -> Tensor:
    """How much better each completion did than its group: rewards (P, G) -> advantages (P, G).

    scale "std" divides by the group's standard deviation (with the divisor G - 1) plus 1e-4, as in DeepSeekMath; "none"
    does not divide, as in Dr. GRPO. baseline "batch" is a control: it takes the mean and the standard deviation of all
    P * G rewards, so that an answer to an easy prompt looks good and one to a hard prompt looks bad. Raises ValueError
    for another scale or baseline, or groups of one.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]), scale="none").tolist()
    [[0.5, -0.5, -0.5, 0.5], [0.0, 0.0, 0.0, 0.0]]
    """
    if rewards.size(1) < 2:
        raise ValueError("an advantage compares the answers to one prompt: a group needs two or more")
    if baseline == "batch":
        return group_advantages(rewards.reshape(1, -1), scale).view(rewards.shape)
    if baseline != "group":
        raise ValueError(f"baseline must be 'group' or 'batch', not {baseline!r}")
    # subtle: the mean of equal rewards may be off in its last bit, which dividing by 1e-4 would turn into an advantage.
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)  # (P, 1)
    centred = (rewards - rewards.mean(dim=1, keepdim=True)).masked_fill(equal, 0.0)
    if scale == "none":
        return centred
    if scale == "std":
        return centred / (rewards.std(dim=1, keepdim=True) + 1e-4)
    raise ValueError(f"scale must be 'std' or 'none', not {scale!r}")


def normalizer(n_rows: int, n_tokens: int, normalize: str, max_len: int | None = None) -> int:
    """The denominator of the loss: the rows ("sequence"), the tokens ("token"), or rows * max_len ("constant"), where
    max_len is the generation budget in tokens.

    Raises ValueError for another name, or for "constant" without max_len.
    """
    if normalize not in ("sequence", "token", "constant") or normalize == "constant" and not max_len:
        raise ValueError(f"normalize must be 'sequence', 'token', or 'constant' with max_len, not {normalize!r}")
    return {"sequence": n_rows, "token": max(n_tokens, 1), "constant": n_rows * (max_len or 0)}[normalize]


def grpo_loss(logp: Tensor, logp_old: Tensor, logp_ref: Tensor | None, adv: Tensor, mask: Tensor, *, clip_low: float,
              clip_high: float, kl_coef: float, normalize: str, max_len: int | None = None,
              denominator: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss above -> (scalar loss, metrics).

    logp, logp_old, logp_ref (N, T): log-probabilities of the sampled tokens under the policy, pi_old and pi_ref (None
    if kl_coef is 0). adv (N,). mask (N, T): which tokens count. The sum over tokens is divided by the `normalizer` of
    this mask. If a batch is computed in parts, give each part the normalizer of the whole batch as `denominator`; then
    the losses of the parts add up to the loss of the batch. The metrics are means over the counted tokens, without
    gradient: ratio; kl (nats); and, under the names clip_low and clip_high, the shares of tokens whose gradient the
    clip took away on either side. Raises ValueError as `normalizer` does.
    """
    mask = mask.bool()
    if denominator is None:
        denominator = normalizer(len(mask), int(mask.sum()), normalize, max_len)
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
    if normalize == "sequence":
        weight = weight / weight.sum(dim=1, keepdim=True).clamp(min=1)  # 1 / |o_i|
    loss = (per_token * weight).sum() / denominator

    def mean(x: Tensor) -> Tensor:
        return x.detach()[mask].float().mean() if mask.any() else x.new_zeros(())

    return loss, {"ratio": mean(ratio), "kl": mean(kl), "clip_low": mean((ratio < 1 - clip_low) & (adv < 0)),
                  "clip_high": mean((ratio > 1 + clip_high) & (adv > 0))}


@dataclass
class Rollout:
    """Sampled completions and their scores: N = P * G rows, the G rows of a prompt side by side."""
    prompts: list[list[int]]          # N prompts, token ids
    completions: list[list[int]]      # N completions, token ids, with the stop token if it was sampled
    sampler_logp: list[list[float]]   # log-probability of each sampled token, as the sampler computed it
    texts: list[str]                  # N completions as text, without their stop token
    truncated: list[bool]             # N: was it cut off at the generation budget?
    scores: list[dict[str, float]]    # N: what reward_fn returned

    def column(self, name: str) -> Tensor:
        """One part of the scores, (N,)."""
        return torch.tensor([score[name] for score in self.scores])


@dataclass
class MicroBatch:
    """n rows of a rollout as tensors: T token ids each, prompt + completion, padded on the right. The last rows may be
    copies of one that round n up (see micro_batches). The mask leaves them out."""
    rows: Tensor          # (n,) which rows of the rollout
    idx: Tensor           # (n, T) token ids
    mask: Tensor          # (n, T-1) True where idx[i, t+1] was sampled by the policy
    sampler_logp: Tensor  # (n, T-1) the sampler's log-probability of idx[i, t+1], 0 outside the mask


def sample_rollout(model: GPT, problems: list, reward_fn, task, *, samples: int, max_new_tokens: int,
                   temperature: float = 1.0, generator: torch.Generator | None = None) -> Rollout:
    """`samples` completions of each problem's prompt, scored.

    The task gives encode_prompt(problem) -> token ids, stop_ids (the tokens that end a completion) and its encoding.
    reward_fn(text, problem) -> {"reward": total, "accuracy": 0 or 1, ...} sees the text without the stop token.
    """
    prompts = [task.encode_prompt(problem) for problem in problems]
    completions, logp = generate(model, prompts, max_new_tokens, temperature=temperature, eos_id=task.stop_ids,
                                 generator=generator, samples=samples, return_logprobs=True)
    truncated = [c[-1] not in task.stop_ids for c in completions]
    texts = [task.encoding.decode(c if cut_off else c[:-1]) for c, cut_off in zip(completions, truncated)]
    scores = [reward_fn(text, problems[i // samples]) for i, text in enumerate(texts)]
    return Rollout([p for p in prompts for _ in range(samples)], completions, logp, texts, truncated, scores)


def grpo_step(policy: GPT, reference: GPT | None, optimizer: Optimizer, problems: list, reward_fn, task, cfg,
              generator: torch.Generator | None = None, lr_scale: float = 1.0) -> tuple[dict, Rollout]:
    """One iteration of Algorithm 1 of DeepSeekMath on P problems -> (metrics, the rollout).

    problems, reward_fn, task and generator are those of `sample_rollout`. cfg holds the hyperparameters: rl_samples
    (G), rl_max_new_tokens, rl_minibatches, scale, baseline, normalize, clip_low, clip_high, kl_coef, skip_no_signal,
    shuffle_rewards and micro_batch (see Config in run.py). The reference may be None if kl_coef is 0.
    """
    # 1) sample G completions of each of P prompts, N = P * G rows; 2) score them
    rollout = sample_rollout(policy, problems, reward_fn, task, samples=cfg.rl_samples,
                             max_new_tokens=cfg.rl_max_new_tokens, generator=generator)
    # 3) advantages: better or worse than the other answers to the same prompt
    rewards = rollout.column("reward").view(-1, cfg.rl_samples)  # (P, G)
    if cfg.shuffle_rewards:
        rewards = shuffle_in_groups(rewards, generator)
    adv = group_advantages(rewards, cfg.scale, cfg.baseline).flatten()  # (N,)
    # 4) update the policy
    return grpo_update(policy, reference, optimizer, rollout, adv, cfg, generator, lr_scale), rollout


def grpo_update(policy: GPT, reference: GPT | None, optimizer: Optimizer, rollout: Rollout, adv: Tensor, cfg,
                generator: torch.Generator | None = None, lr_scale: float = 1.0) -> dict[str, float | None]:
    """One update of the policy for each minibatch of the rollout, given the advantages (N,) -> metrics.

    A minibatch is the part of the rollout that one update learns from. It is computed in micro-batches, as many tokens
    at a time as memory allows, and their gradients add up. The metrics are those of `rollout_means`, and loss and
    grad_norm (means over the minibatches), no_signal (share of groups whose rewards are all equal, so that they teach
    nothing), kl (None without a penalty), ratio, clip_low, clip_high and sampler_gap (means over the tokens that were
    computed).
    """
    device, means = policy.embedding.weight.device, rollout_means(rollout)
    # Cut the rollout into minibatches, and compute the log-probabilities under pi_ref and pi_old. pi_old is the policy
    # before the first update, so it must be computed now, except for the first minibatch: there it still is the policy.
    minibatches = []
    for rows in random_minibatches(len(adv), cfg.rl_minibatches, generator):
        live = [i for i in rows if adv[i] != 0 or cfg.kl_coef and not cfg.skip_no_signal]  # the rows to compute
        n_tokens = sum(len(rollout.completions[i]) for i in rows)
        n_rows, n_tokens, n_live = all_reduce(torch.tensor([len(rows), n_tokens, len(live)])).tolist()
        if not n_live:
            continue  # there is nothing to learn, and a step without a gradient would move weights by momentum
        batches = []
        for batch in micro_batches(rollout, live, cfg.micro_batch, device):
            # subtle: detach(), not no_grad(), under which torch.compile makes other code, which rounds differently. The
            # ratio should differ from 1 by what the updates changed, and by nothing else.
            is_first = not minibatches
            logp_old = None if is_first else token_logprobs(policy, batch.idx, mask=batch.mask).detach()  # (n, T-1)
            logp_ref = token_logprobs(reference, batch.idx, mask=batch.mask).detach() if cfg.kl_coef else None
            batches.append((batch, logp_old, logp_ref))
        minibatches.append((normalizer(n_rows, n_tokens, cfg.normalize, cfg.rl_max_new_tokens), batches))

    loss_sum, norm_sum = 0.0, 0.0
    for denominator, batches in minibatches:
        for batch, logp_old, logp_ref in batches:
            logp = token_logprobs(policy, batch.idx, mask=batch.mask)  # (n, T-1)
            if logp_old is None:  # the first minibatch: pi_old is the policy
                logp_old = logp.detach()
            loss, metrics = grpo_loss(logp, logp_old, logp_ref, adv[batch.rows].to(device), batch.mask,
                                      clip_low=cfg.clip_low, clip_high=cfg.clip_high, kl_coef=cfg.kl_coef,
                                      normalize=cfg.normalize, denominator=denominator)
            loss.backward()
            loss_sum += loss.detach()
            n_tokens = batch.mask.sum()
            for name, value in metrics.items():
                means.add(name, value * n_tokens, n_tokens)
            means.add("sampler_gap", (logp_old - batch.sampler_logp)[batch.mask].abs().sum(), n_tokens)
        norm_sum += optimizer.step(lr_scale)  # sums the gradients of all ranks, clips their norm, steps, clears them
    equal = rollout.column("reward").view(-1, cfg.rl_samples).diff(dim=1).eq(0).all(dim=1)  # (P,)
    means.add("no_signal", equal.sum(), len(equal))
    # Means divides the sum of the ranks' totals by the sum of their counts. Each rank's loss is a part of one loss, so
    # each has a part of its count. grad_norm is the norm of the whole gradient on every rank, so each counts in full.
    means.add("loss", loss_sum, cfg.rl_minibatches / world_size())
    means.add("grad_norm", norm_sum, cfg.rl_minibatches)
    return means.compute() | ({} if cfg.kl_coef else {"kl": None})


def rollout_means(rollout: Rollout) -> Means:
    """What the log shows of a rollout: the means of the scores, and length (tokens, with the stop token), length_wrong
    (of the answers with accuracy 0), truncated (share), and the policy's entropy (nats a token, estimated from the
    samples)."""
    means, lengths = Means(), [len(c) for c in rollout.completions]
    wrong = [n for n, accuracy in zip(lengths, rollout.column("accuracy")) if not accuracy]
    for name in rollout.scores[0]:
        means.add(name, rollout.column(name).sum(), len(lengths))
    means.add("length", sum(lengths), len(lengths))
    means.add("length_wrong", sum(wrong), len(wrong))
    means.add("truncated", sum(rollout.truncated), len(lengths))
    means.add("entropy", -sum(map(sum, rollout.sampler_logp)), sum(lengths))
    return means


def shuffle_in_groups(rewards: Tensor, generator: torch.Generator | None) -> Tensor:
    """A control: deal the rewards (P, G) of each group out to its completions at random. They then say nothing about
    the answers, so the policy can only drift; if it got better, the code would be wrong."""
    device = generator.device if generator else None
    order = torch.rand(rewards.shape, generator=generator, device=device).argsort(dim=1)  # (P, G)
    return rewards.gather(1, order.cpu())


def random_minibatches(n: int, n_batches: int, generator: torch.Generator | None) -> list[list[int]]:
    """The numbers 0..n-1 in random order, dealt into n_batches lists of equal size, give or take one."""
    order = torch.randperm(n, generator=generator, device=generator.device if generator else None).tolist()
    return [order[i::n_batches] for i in range(n_batches)]


def micro_batches(rollout: Rollout, rows: list[int], max_tokens: int, device: torch.device) -> Iterator[MicroBatch]:
    """Cut rows of a rollout into micro-batches of similar lengths, of at most max_tokens each with their padding.

    If `rows` is empty, there is one micro-batch of padding alone, so that this rank can take part in an update of the
    others.

    subtle: the mask is made from lengths. A mask made by comparing tokens with a pad id that is also the stop token
    would leave stopping untrained. And sizes are rounded up, because the CPU's library (oneDNN) writes new machine code
    for each new size, which takes as long as the computation itself: T - 1, the length that the model reads, is rounded
    up to a multiple of 8, and n to a multiple of 16, or as far as max_tokens allows.
    """
    lengths = [round_up(len(p) + len(c) - 1, 8) + 1 for p, c in zip(rollout.prompts, rollout.completions)]
    parts: list[list[int]] = [[]]
    for row in sorted(rows, key=lambda row: lengths[row]):
        if parts[-1] and (len(parts[-1]) + 1) * lengths[row] > max_tokens:
            parts.append([])
        parts[-1].append(row)
    for part in parts:
        longest = part[-1] if part else 0  # a row of the rollout, which padding rows repeat
        T = lengths[longest]
        n = max(len(part), 1, min(round_up(len(part), 16), max_tokens // T))  # never fewer than the rows, never 0
        padded = part + [longest] * (n - len(part))
        # The token at position t + 1 is predicted at t, so a completion's predictions start one before its first token.
        start = torch.tensor([len(rollout.prompts[i]) - 1 for i in padded])[:, None]         # (n, 1)
        end = start + torch.tensor([len(rollout.completions[i]) for i in padded])[:, None]  # (n, 1)
        # numpy reads nested lists several times as quickly as torch does
        idx = np.array([pad(rollout.prompts[i] + rollout.completions[i], 0, T) for i in padded])
        logp = np.array([pad(rollout.sampler_logp[i], len(rollout.prompts[i]) - 1, T - 1) for i in padded], np.float32)
        position, is_row = torch.arange(T - 1), (torch.arange(n) < len(part))[:, None]
        mask = (start <= position) & (position < end) & is_row  # (n, T-1)
        yield MicroBatch(torch.tensor(padded), torch.from_numpy(idx).to(device), mask.to(device),
                         torch.from_numpy(logp).to(device))


def pad(values: list, start: int, length: int) -> list:
    """A list of `length` zeros, into which the values are put from index `start` on."""
    return [0] * start + values + [0] * (length - start - len(values))


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below n."""
    return -(-n // multiple) * multiple
