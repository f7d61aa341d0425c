"""Run a command line: --ask, --evaluate, or a run, which trains and evaluates the stages of a program's table."""
import dataclasses
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from data.own import fingerprint, path_of
from engine.arguments import Program, parse_args
from engine.ask import ask, evaluate_file
from engine.evaluation import evaluate_stage
from engine.files import check_base, lock, write_file
from engine.loop import Run, Stage
from engine.machine import machine, settle, tune_libraries
from engine.parallel import broadcast, check_shares, end, init, rank
from engine.pretrained.weights import load_model
from engine.report import report
from engine.settings import EVALUATION, change, check, names_of, shaped_by
from engine.tasks import Checked, make_task
from engine.terminal import UsageError


def main(stages: dict[str, Stage], config: type, description: str, make_task: Callable = make_task) -> NoReturn:
    """The last line of a program: run its command line, and end this process with the exit code.

    `stages` is the program's table, `config` its Config, `description` the text of --help. make_task(cfg) returns the
    task, see docs/own.md.
    """
    for stream in (sys.stdout, sys.stderr):  # the encoding of a terminal may lack ± and ▁
        if stream:  # there is none where nobody could read it, as behind >&-
            stream.reconfigure(errors="replace")
    program = Program(stages, config, description, make_task, Path(sys.argv[0]).name)
    end(run_command(program, sys.argv[1:]))


def run_command(program: Program, argv: list[str]) -> int:
    """Run a command line -> exit code. An error that the user can correct is one line on stderr, with exit code 2."""
    try:
        tune_libraries()
        cfg, options = parse_args(program, argv)
        out = Path(options.out or default_folder(program, cfg, options.preset))
        if options.ask is not None:
            print(ask(program, out, options.ask, options.samples, options.temperature))
        elif options.evaluate is not None:
            print(evaluate_file(program, out, options.evaluate))
        else:
            init(cfg.device)
            check_shares(cfg)
            if rank():  # rank 0 alone prints
                sys.stdout = open(os.devnull, "w", encoding="utf-8")
            prepared = None if rank() else prepare(program, cfg, out)  # rank 0 reads the files for all
            with lock(out):
                opened = None if rank() else open_run(program, *prepared, out)
                train(program, Run(*broadcast(opened), program.stages), options.stage or "")
        return 0
    except (UsageError, OSError) as error:
        print(f"{program.name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{program.name}: interrupted; repeat the command to resume from the last checkpoint", file=sys.stderr)
        return 130


def default_folder(program: Program, cfg, preset: str | None) -> Path:
    """out/ for train.py, out/r1 for r1.py; a preset or a pretrained model has a folder of its own inside."""
    out = Path("out") if program.name == "train.py" else Path("out", Path(program.name).stem)
    return out / (preset or Path(path_of(cfg.init)).name)


def prepare(program: Program, cfg, out: Path) -> tuple:
    """Check the settings and the files that they name -> (the settings, the task). Raises UsageError for bad ones."""
    try:
        check(cfg)
        task = Checked(program.make_task(cfg))
        task.try_reward()
        for key in ("base", "init", "student_init"):  # a model that cannot be loaded is refused before any training
            path = path_of(getattr(cfg, key))
            shaped = [name for name in program.stages if key in shaped_by(program.stages, name)]
            if not path or any((out / f"{name}.pt").exists() for name in shaped):
                continue
            if key == "base":
                check_base(Path(path), cfg, task.encoding.n_tokens if cfg.init else task.encoding.n_vocab)
            else:
                load_model(path, task.encoding.n_tokens, cfg.block_size)
    except ValueError as error:
        raise UsageError(str(error)) from None
    # The settings store fingerprints (path and checksum) of the files, so that a changed file is noticed.
    files = {key: fingerprint(path_of(getattr(cfg, key)))
             for key in ("problems", "corpus", "init", "student_init", "base")}
    return dataclasses.replace(cfg, **files), task


def open_run(program: Program, cfg, task, out: Path) -> tuple:
    """Begin a run, or resume the one in `out` -> (its settings, the task, out, its results). Raises UsageError if a
    checkpoint in `out` was made with other settings."""
    path, results = out / "results.json", {"config": {}, "seconds": {}, "models": {}}
    try:
        stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else results
        results = {key: dict(stored[key]) for key in results}
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path} was not written by nanoR1: use another --out") from None
    run = Run(settle(cfg, results["config"]), task, out, results, program.stages)
    for name in program.stages:
        if run.path(name).exists():
            run.checkpoint(name)  # raises UsageError if a setting that shaped it has changed
    changed = change(run.cfg, results["config"], names_of(EVALUATION))
    if results["models"] and changed:
        print(f"the models were evaluated with {changed}, so they are evaluated again")
        results["models"] = {}
    results["config"] = dataclasses.asdict(run.cfg)
    run.save_results()
    return run.cfg, task, out, results


def train(program: Program, run: Run, chosen: str) -> None:
    """Train the unfinished stages whose names begin with `chosen`, evaluate each finished stage that has no results
    yet, and write the report. Raises UsageError if a stage ends without its checkpoint."""
    torch.set_num_threads(run.cfg.threads)
    for note in run.task.notes:  # such as how many problems of a file are used, and how many are left out
        print(note)
    wanted = [name for name in run.stages if name.startswith(chosen)]
    for name, stage in run.stages.items():
        if name in wanted and not run.path(name).exists():
            run.results["models"].pop(name, None)  # results of a checkpoint that somebody removed
            run.save_results()
            run.stage, run.began = name, time.perf_counter()
            spent = sum(run.results["seconds"].values()) / 60
            print(f"\n{name}: stage {wanted.index(name) + 1} of {len(wanted)}, {spent:.1f} minutes so far; "
                  f"{machine(run.cfg)}", flush=True)
            try:
                stage.train(run, *map(run.load_model, stage.starts))
            except torch.OutOfMemoryError:
                raise UsageError(f"{name}: the GPU's memory is full. Repeat the command with --micro_batch below "
                                 f"{run.cfg.micro_batch}, or begin anew with fewer --rl_prompts or a smaller "
                                 "--block_size") from None
            if not run.path(name).exists() and not rank():
                raise UsageError(f"{name} ended before the last step, so {run.path(name)} was not written: "
                                 "its loop must take every step of run.steps")
            gc.collect()  # compiled models contain reference cycles, and would stay in memory for a while
        if run.path(name).exists() and name not in run.results["models"]:
            evaluate_stage(run, name)
    text = report(run)
    write_file(run.out / "report.md", (text + "\n").encode())
    problem = run.task.heldout_problems(2, [*run.task.held_out][0], run.cfg.seed)[0]
    print(f"""\n{text}

{run.out}/ holds the models, report.md, log.jsonl and samples.jsonl. Try next:
    python {program.name} --out={run.out} --ask="{problem.question}"
    python experiments/page.py --out={run.out}      # the run as a page: every answer, every token
    python experiments/samples.py --out={run.out}   # how zero's answers changed
    docs/walkthrough.ipynb                   # the recipe, step by step
    docs/own.md                              # problems and rewards of your own""")
