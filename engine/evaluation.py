"""Evaluation on held-out problems: pass@1, maj@16 and so on after a stage, and quick evaluations during RL."""
import time
from collections import Counter

import torch

from engine.parallel import all_reduce, rank, world_size
from engine.speed.fast import make_fast
from engine.terminal import fitting
from grpo import sample_rollout
from model import GPT
from rewards import extract_answer, format_reward, reflects

EVAL_SAMPLES = 16  # completions of each evaluated problem, for maj@16 and pass@16
QUICK_PROBLEMS, QUICK_SAMPLES = 32, 4  # problems of a quick evaluation (--eval_every), and completions of each
WORTH_COMPILING = 200_000  # on a CPU, models of at least this many parameters are compiled for the evaluation


def majority(answers: list[str | None]) -> str | None:
    """The most frequent answer, or the first of several that are equally frequent. None means no answer and no vote.

    >>> majority(["3", None, None, None, "5", "5", "3"])
    '3'
    """
    votes = Counter(answer for answer in answers if answer is not None)
    return votes.most_common(1)[0][0] if votes else None


def evaluate(model: GPT, problems: list, task, *, max_new_tokens: int, generator: torch.Generator,
             size: int = 32) -> dict[str, float]:
    """Sample EVAL_SAMPLES completions of each problem at temperature 1 -> the figures of results.json for one model and
    one kind of problems.

    pass@1 is the share of correct completions, pass@1_se its standard error over problems, maj@16 the share of problems
    that the most frequent answer solves, pass@16 the share that any of the 16 solves. format, length (tokens, with the
    stop token), reflection and all other keys of the task's reward are means over completions. The ranks divide the
    problems among themselves. Each rank samples for `size` problems at a time, which bounds the memory of the cache.
    """
    known = ("reward", "accuracy", "format", "reflection")
    others = [key for key in task.reward("", problems[0]) if key not in known]
    counts = torch.zeros(len(problems), 5 + len(others), dtype=torch.float64)  # sums over each problem's completions
    mine = range(rank(), len(problems), world_size())
    for start in range(0, len(mine), size):
        chunk = mine[start:start + size]
        rollout = sample_rollout(model, [problems[i] for i in chunk], task.reward, task, EVAL_SAMPLES, max_new_tokens,
                                 generator)
        for k, i in enumerate(chunk):
            group = slice(k * EVAL_SAMPLES, (k + 1) * EVAL_SAMPLES)
            scores, texts = rollout.scores[group], rollout.texts[group]
            # format and reflection are read from the text, because the reward of another task may report neither
            counts[i] = torch.tensor([
                sum(score["accuracy"] for score in scores), majority_is_correct(problems[i], texts),
                sum(map(format_reward, texts)), sum(map(len, rollout.completions[group])), sum(map(reflects, texts)),
                *(sum(score[key] for score in scores) for key in others)])
    correct, majority_correct, *sums = all_reduce(counts).unbind(dim=1)
    n = EVAL_SAMPLES
    figures = {"pass@1": correct.mean() / n, "pass@1_se": correct.std() / n / len(problems) ** 0.5,
               f"maj@{n}": majority_correct.mean(), f"pass@{n}": (correct > 0).double().mean()}
    figures |= {key: total.mean() / n for key, total in zip(("format", "length", "reflection", *others), sums)}
    return {key: value.item() for key, value in figures.items()} | {"n_problems": len(problems)}


def majority_is_correct(problem, texts: list[str]) -> bool:
    """Does the most frequent answer solve the problem? Equal answers, such as 0.5 and 1/2, vote together."""
    answers = [extract_answer(text) for text in texts]
    vote = majority([None if answer is None else problem.canonical(answer) for answer in answers])
    return vote is not None and problem.check(vote)


def problems_at_a_time(init: str, device: str) -> int:
    """The `size` of evaluate(). More problems at a time are quicker, above all on a GPU, and take more memory, of which
    a pretrained model leaves little."""
    if init:
        return 8
    return 256 if device == "cuda" else 32


def evaluate_stage(run, name: str) -> None:
    """Evaluate a stage's model on the held-out problems, and store the figures in results.json."""
    cfg, start = run.cfg, time.perf_counter()
    print(f"evaluating {name}: {EVAL_SAMPLES} answers to each of {cfg.eval_problems} problems of each kind", flush=True)
    model = run.load_model(name)
    # Compiling is worth it for the larger models: RL and distillation have compiled their sampling anyway, and models
    # of one shape share the code. For a small model, compiling would take longer than its evaluation.
    compiles = cfg.device == "cpu" and model.n_params() >= WORTH_COMPILING
    model = make_fast(model, cfg, sampling=compiles)
    results = {"params": model.n_params()}
    for kind in run.task.held_out:
        problems = run.task.heldout_problems(cfg.eval_problems, kind, cfg.seed)
        _, generator = run.seeded(0, f"evaluate {name} {kind}")
        results[kind] = evaluate(model, problems, run.task, max_new_tokens=cfg.rl_max_new_tokens, generator=generator,
                                 size=problems_at_a_time(cfg.init, cfg.device))
        figures = [f"{key} {value:.3g}" for key, value in results[kind].items()
                   if key not in ("pass@1_se", "n_problems")]
        print(fitting([f"{name} on {kind}: {figures[0]}", *figures[1:]]), flush=True)
    run.results["models"][name] = results
    run.results["seconds"][f"evaluate {name}"] = round(time.perf_counter() - start, 1)
    run.save_results()


def heldout_accuracy(policy: GPT, task, cfg, generator: torch.Generator) -> float:
    """The quick evaluation during RL: the policy's accuracy on a few held-out problems, which the ranks divide."""
    kind, *_ = task.held_out
    problems = task.heldout_problems(min(QUICK_PROBLEMS, cfg.eval_problems), kind, cfg.seed + 1)[rank()::world_size()]
    rollout = sample_rollout(policy, problems, task.reward, task, QUICK_SAMPLES, cfg.rl_max_new_tokens, generator)
    accuracy = rollout.column("accuracy")
    correct, n = all_reduce(torch.tensor([accuracy.sum(), len(accuracy)])).tolist()
    return correct / n
