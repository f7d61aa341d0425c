"""--ask and --evaluate: answers of the finished models in a folder, and their scores on a file of problems."""
from pathlib import Path

import torch

from data.own import read_problems
from engine.evaluation import evaluate, problems_at_a_time
from engine.files import build_model, finished_models, load_checkpoint
from engine.machine import has
from engine.report import table
from engine.settings import settings_of
from engine.speed.sampler import Sampler, generate
from engine.tasks import NOT_ANSWER, Checked
from engine.terminal import UsageError


def finished_run(program, out: Path) -> tuple:
    """The settings of the run in `out`, and the names of its models, including those that other programs trained.
    Raises UsageError if there is no model."""
    names = finished_models(out, program.stages)
    if not names:
        raise UsageError(f"there is no model in {out}/: train one with python {program.name}, or use another --out")
    last = [name for name in names if name in program.stages][-1:] or names[-1:]
    stored = load_checkpoint(out / f"{last[0]}.pt", last[0])["config"]  # all models of a run have the same task
    return stored_config(program.config, stored), names


def stored_config(config: type, stored: dict):
    """The Config of a finished run, from the settings that it has stored. Those of another program are left out, and so
    is --corpus, whose file is not needed any more."""
    known = {name: stored[name] for name in settings_of(config) if name in stored}
    return config(**known | {"corpus": ""})


def ask(program, out: Path, text: str, samples: int = 1, temperature: float | None = None) -> str:
    """How each finished model in `out` answers the problem in `text`, as lines. Without a temperature, a single answer
    is the likeliest one, and several answers are sampled at temperature 1."""
    cfg, names = finished_run(program, out)
    if temperature is None:
        temperature = 1.0 if samples > 1 else 0.0
    try:
        task = Checked(program.make_task(cfg))
        problem = task.parse(text)
    except ValueError as error:
        raise UsageError(f"--ask: {error}") from None
    lines, prompt = [f"{problem.question} = {problem.answer or '?'}"], task.encode_prompt(problem)
    width = max(13, *map(len, names))
    for name in names:
        model = build_model(load_checkpoint(out / f"{name}.pt", name))
        max_new_tokens = min(cfg.rl_max_new_tokens, model.config.block_size - len(prompt))
        if max_new_tokens < 1:
            raise UsageError(f"--ask: the prompt is too long, {len(prompt)} tokens: it must have fewer than "
                             f"{model.config.block_size}")
        answers, _ = generate(model, [prompt], max_new_tokens, temperature=temperature, stop_ids=task.stop_ids,
                              samples=samples)
        for ids in answers:
            answer = task.encoding.decode([i for i in ids if i not in task.stop_ids])
            verdict = "wrong" if problem.answer else ""
            if task.reward(answer, problem)["accuracy"] == 1:
                verdict = "right"
            lines.append(f"{name:{width}} {verdict:5}  {' '.join(answer.split())}")
    return "\n".join(lines)


def evaluate_file(program, out: Path, path: str) -> str:
    """The evaluation of each finished model in `out` on a file of problems (see data/own.py), as Markdown."""
    cfg, names = finished_run(program, out)
    try:
        task = Checked(program.make_task(cfg))
        lines, notes = read_problems(path, task, cfg.block_size - cfg.rl_max_new_tokens,
                                     cfg.rl_max_new_tokens - NOT_ANSWER)
    except ValueError as error:
        raise UsageError(f"--evaluate: {error}") from None
    asked = [line.problem for line in lines]
    notes = [f"{path}: {len(asked)} problems", *notes]
    if len(asked) < 2:
        raise UsageError(f"--evaluate: at least 2 problems are needed; {'; '.join(notes)}")
    rows, device = [], cfg.device if has(cfg.device) else "cpu"
    for name in names:
        model = build_model(load_checkpoint(out / f"{name}.pt", name)).to(device)
        model.generate = Sampler(model)
        generator = torch.Generator(device).manual_seed(cfg.seed)
        figures = evaluate(model, asked, task, max_new_tokens=cfg.rl_max_new_tokens, generator=generator,
                           size=problems_at_a_time(cfg.init, device))
        rows.append((name, Path(path).stem, figures))
    return "\n".join([*notes, "", *table(rows)])
