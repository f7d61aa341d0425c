"""What the finished models of a folder answer, and what they reach on a file of problems."""
from pathlib import Path

import torch

from data.own import read_problems
from engine.evaluation import evaluate
from engine.files import build_model, finished_models, load_checkpoint
from engine.machine import has
from engine.report import table
from engine.settings import settings_of
from engine.speed.sampler import Sampler, generate
from engine.terminal import UsageError


def finished_run(program, out: Path) -> tuple:
    """The settings of the run in `out`, and the names of its models, those of other programs too. Raises UsageError if
    there are none."""
    names = finished_models(out, program.stages)
    if not names:
        raise UsageError(f"there is no model in {out}/: run python train.py first")
    last = [name for name in names if name in program.stages][-1:] or names[-1:]
    stored = load_checkpoint(out / f"{last[0]}.pt", last[0])["config"]  # all models of a run have the same task
    known = {name: stored[name] for name in settings_of(program.config) if name in stored}  # another program has more
    return program.config(**known | {"corpus": ""}), names  # what reads no corpus needs no file of it


def ask(program, out: Path, text: str, samples: int = 1, temperature: float | None = None) -> str:
    """What each finished model in `out` answers: its likeliest answer, or several at temperature 1 or another."""
    cfg, names = finished_run(program, out)
    if temperature is None:
        temperature = 1.0 if samples > 1 else 0.0
    try:
        task = program.make_task(cfg)
        problem = task.parse(text)
    except ValueError as error:
        raise UsageError(f"--ask: {error}") from None
    lines, prompt = [f"{problem.question} = {problem.answer or '?'}"], task.encode_prompt(problem)
    width = max(13, *map(len, names))
    for name in names:
        model = build_model(load_checkpoint(out / f"{name}.pt", name))
        room = min(cfg.rl_max_new_tokens, model.config.block_size - len(prompt))
        if room < 1:
            raise UsageError(f"--ask: the prompt is too long, {len(prompt)} tokens")
        answers, _ = generate(model, [prompt], room, temperature=temperature, stop_ids=task.stop_ids, samples=samples)
        for ids in answers:
            answer = task.encoding.decode([i for i in ids if i not in task.stop_ids])
            verdict = "wrong" if problem.answer else ""
            if task.reward(answer, problem)["accuracy"] == 1:
                verdict = "right"
            lines.append(f"{name:{width}} {verdict:5}  {' '.join(answer.split())}")
    return "\n".join(lines)


def evaluate_file(program, out: Path, path: str) -> str:
    """What each finished model in `out` reaches on a file of problems (see data/own.py), as Markdown."""
    cfg, names = finished_run(program, out)
    try:
        task = program.make_task(cfg)
        problems = read_problems(path)
    except ValueError as error:
        raise UsageError(f"--evaluate: {error}") from None
    room = cfg.block_size - cfg.rl_max_new_tokens
    asked = [problem for problem in problems if len(task.encode_prompt(problem)) <= room]
    if len(asked) < 2:
        raise UsageError(f"--evaluate: {path} has {len(asked)} problems of at most {room} tokens, 2 are the least")
    rows, device = [], cfg.device if has(cfg.device) else "cpu"
    for name in names:
        model = build_model(load_checkpoint(out / f"{name}.pt", name)).to(device)
        model.generate = Sampler(model)
        generator = torch.Generator(device).manual_seed(cfg.seed)
        figures = evaluate(model, asked, task, max_new_tokens=cfg.rl_max_new_tokens, generator=generator,
                           size=8 if cfg.init else 32)
        rows.append((name, Path(path).stem, figures))
    first = f"{path}: {len(asked)} of {len(problems)} problems, those of at most {room} tokens"
    return "\n".join([first, "", *table(rows)])
