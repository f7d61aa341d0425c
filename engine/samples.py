"""samples.jsonl: how the answers to the same four problems change while a model is trained."""
import json
from collections.abc import Iterator

import torch
from torch import Tensor

from engine.files import write_file
from engine.parallel import rank
from engine.speed.fast import LOGITS_AT_A_TIME
from grpo import Rollout, group_advantages, micro_batches, sample_rollout
from model import GPT, select

N_PROBLEMS, N_SAMPLES, N_LIKELIEST = 4, 8, 5


def keep_samples(run, step: int, n_steps: int, model: GPT, watch) -> None:
    """Let the model answer the same four training problems eight times each, with the same random numbers, and add the
    answers to samples.jsonl. This happens at steps 0 (before the first), 1, 2, 5, 10, 20, 50, ... and the last. The
    teacher answers once, at step 0.

    A row holds one model's answers to one problem: {"stage", "step", "model", "question", "completions", "rewards":
    {name: one for each completion}, "advantages": one for each completion}. For each completion it also has three lists
    with an entry for each token: "tokens" (their texts, with the stop token), "logprobs", and "likeliest": the five
    likeliest tokens at this position, {text: probability}.
    """
    if rank() or not (step in (0, n_steps) or f"{step}".rstrip("0") in ("1", "2", "5")):
        return
    rows = answers(run, step, run.stage, model, watch)
    if watch.teacher is not None and step == 0:
        rows += answers(run, step, "teacher", watch.teacher, watch)
    path = run.out / "samples.jsonl"
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        row = json.loads(line)
        if row["stage"] != run.stage or row["step"] < step:  # a killed attempt may leave more
            kept.append(line)
    kept += [json.dumps(row) for row in rows]  # in ASCII, because a sampled text may have foreign line ends
    write_file(path, "".join(f"{line}\n" for line in kept).encode())


def answers(run, step: int, name: str, model: GPT, watch) -> list[dict]:
    """A model's answers as rows of samples.jsonl."""
    rng, generator = run.seeded(0, f"samples {run.stage}")
    problems = [watch.make_problem(rng) for _ in range(N_PROBLEMS)]
    rollout = sample_rollout(model, problems, watch.reward_fn, run.task, N_SAMPLES, run.cfg.rl_max_new_tokens,
                             generator)
    advantages = group_advantages(rollout.column("reward").view(-1, N_SAMPLES), run.cfg.scale).tolist()
    encoding = run.task.encoding
    tokens = [[token_text(encoding, i) for i in completion] for completion in rollout.completions]
    logprobs = [[round(value, 4) for value in logp] for logp in rollout.sampler_logp]
    likeliest = likeliest_tokens(model, rollout, encoding, run.cfg.micro_batch)
    rows = []
    for i, problem in enumerate(problems):
        group = slice(N_SAMPLES * i, N_SAMPLES * (i + 1))
        rewards = {key: [score[key] for score in rollout.scores[group]] for key in rollout.scores[0]}
        rows.append({"stage": run.stage, "step": step, "model": name, "question": problem.question,
                     "completions": rollout.texts[group], "rewards": rewards, "advantages": advantages[i],
                     "tokens": tokens[group], "logprobs": logprobs[group], "likeliest": likeliest[group]})
    return rows


def token_text(encoding, token: int) -> str:
    """The text of one token. A byte that is no text by itself, such as half of an "é", is written as \\xc3."""
    return encoding.decode([token], errors="backslashreplace")


def likeliest_tokens(model: GPT, rollout: Rollout, encoding, max_tokens: int) -> list[list[dict[str, float]]]:
    """The five likeliest tokens at each position of each completion, as {text: probability}."""
    found = [[] for _ in rollout.completions]
    for rows, probs in predictions(model, rollout, max_tokens):
        top, tokens = probs.topk(N_LIKELIEST)  # (m, 5) each
        for row, values, ids in zip(rows.tolist(), top.tolist(), tokens.tolist()):
            found[row].append({token_text(encoding, i): round(p, 3) for i, p in zip(ids, values)})
    return found


@torch.no_grad()
def predictions(model: GPT, rollout: Rollout, max_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The model's probabilities of the next token, at every position of every completion, in pieces: yields (the row of
    the rollout that each position belongs to (m,), probabilities (m, V)). The positions of a completion are in order.

    subtle: this calls GPT.hidden, not model.hidden. A run's faster method records a CUDA graph at the second use of a
    size, and a graph rounds differently. So it must not see the sizes of these answers, or they would change training.
    """
    n_tokens = max(1, LOGITS_AT_A_TIME // model.config.vocab_size)  # of a piece
    rows = list(range(len(rollout.completions)))
    for batch in micro_batches(rollout, rows, max_tokens, model.embedding.weight.device):
        hidden = select(GPT.hidden(model, batch.idx[:, :-1]), batch.mask)  # (M, C)
        for h, row in zip(hidden.split(n_tokens), batch.row.split(n_tokens)):
            yield row, GPT.logits(model, h).float().softmax(dim=-1)
