"""samples.jsonl: how the answers to the same four problems change while a model is trained."""
import json

from engine.files import write_file
from engine.parallel import rank
from grpo import group_advantages, sample_rollout
from model import GPT

N_PROBLEMS, N_SAMPLES = 4, 8


def keep_samples(run, step: int, n_steps: int, model: GPT, watch) -> None:
    """Let the model answer the same four training problems eight times each, with the same random numbers, and add the
    answers to samples.jsonl. This happens at steps 0 (before the first), 1, 2, 5, 10, 20, 50, ... and the last. The
    teacher answers once, at step 0.

    A row holds one model's answers to one problem: {"stage", "step", "model", "question", "completions", "rewards":
    {name: one for each completion}, "advantages": one for each completion, "logprobs": one for each token}.
    """
    if rank() or not (step in (0, n_steps) or f"{step}".rstrip("0") in ("1", "2", "5")):
        return
    rows = answers(run, step, run.stage, model, watch)
    if watch.teacher is not None and step == 0:
        rows += answers(run, step, "teacher", watch.teacher, watch)
    path = run.out / "samples.jsonl"
    kept = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    kept = [row for row in kept if row["stage"] != run.stage or row["step"] < step]  # a killed attempt may leave more
    write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept + rows).encode())


def answers(run, step: int, name: str, model: GPT, watch) -> list[dict]:
    """A model's answers as rows of samples.jsonl."""
    rng, generator = run.seeded(0, f"samples {run.stage}")
    problems = [watch.make_problem(rng) for _ in range(N_PROBLEMS)]
    rollout = sample_rollout(model, problems, watch.reward_fn, run.task, N_SAMPLES, run.cfg.rl_max_new_tokens,
                             generator)
    advantages = group_advantages(rollout.column("reward").view(-1, N_SAMPLES), run.cfg.scale).tolist()
    rows = []
    for i, problem in enumerate(problems):
        group = slice(N_SAMPLES * i, N_SAMPLES * (i + 1))
        rewards = {key: [score[key] for score in rollout.scores[group]] for key in rollout.scores[0]}
        logprobs = [[round(value, 4) for value in logp] for logp in rollout.sampler_logp[group]]
        rows.append({"stage": run.stage, "step": step, "model": name, "question": problem.question,
                     "completions": rollout.texts[group], "rewards": rewards, "advantages": advantages[i],
                     "logprobs": logprobs})
    return rows
