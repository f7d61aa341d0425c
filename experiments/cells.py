"""The cells of the findings and of docs/variants.md. A cell is a run of train.py, controls.py, variants.py or r1.py
with some flags, repeated for the seeds 0, 1 and 2.

A cell that shares its first stages with another cell starts from the checkpoints of the other cell. Checkpoints and
logs are in out/findings/. experiments/results/CELL-SEED.json holds what the tables and figures need, and the settings,
the number type, the machine and the commit of the run. It is written as soon as the run is measured. A cell is run
again if its settings, its start, its controls or its number type have changed. findings.py is the command. There is no
training loop in this file.
"""
import json
import os
import shutil
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS, OUT = ROOT / "experiments/results", ROOT / "out/findings"
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import r1  # noqa: E402
import variants  # noqa: E402
from bugs import commit, rounded, write_json  # noqa: E402
from controls import CONTROLS  # noqa: E402
from engine.arguments import Program, parse_args  # noqa: E402
from engine.ask import stored_config  # noqa: E402
from engine.settings import EVALUATION, names_of, settings_of, shaped_by  # noqa: E402
from engine.tasks import make_task  # noqa: E402
from engine.terminal import UsageError  # noqa: E402
from train import STAGES, Config  # noqa: E402

SEEDS = (0, 1, 2)
KEPT = ("accuracy", "format", "length", "length_wrong", "no_signal", "entropy", "kl", "clip_fraction_low",
        "clip_fraction_high", "consistent", "heldout_accuracy")  # what is stored of each RL step, if it was logged


@dataclass(frozen=True)
class Cell:
    """One run for each seed."""
    trains: tuple[str, ...]         # the models that the run makes, by their names in tables.py
    flags: str = ""                 # the flags that differ from the defaults
    start: str | None = None        # the cell with the checkpoints that the run starts from
    controls: dict[str, str] = field(default_factory=dict)  # the models of a control or variant: model -> its name
    measures: tuple[str, ...] = ()  # functions of measures.py, for measurements that train.py does not make
    dtype: str = "bfloat16"
    is_r1: bool = False             # whether this is a run of r1.py
    may_diverge: bool = False       # whether a run that stops at a metric that is not finite is a result

    def table(self) -> dict:
        """The stages of the cell's programs."""
        return r1.STAGES if self.is_r1 else STAGES | CONTROLS | variants.STAGES

    def config(self) -> type:
        """The class of the settings of the cell's programs."""
        return r1.Config if self.is_r1 else Config

    def stages(self) -> list[str]:
        """The stages that make the cell's models."""
        return [self.controls.get(model, model) for model in self.trains]

    def commands(self) -> list[list[str]]:
        """The programs that make the cell's models, each with its stage or control. A control makes the base that it
        starts from: zero_no_wait first makes base_no_wait."""
        if self.is_r1:
            return [["r1.py", f"--stage={self.trains[0]}"] if self.start else ["r1.py"]]
        own = [stage for stage in self.stages() if stage in STAGES]
        others = [stage for stage in self.stages() if stage in CONTROLS]
        made = [start for stage in others for start in CONTROLS[stage].starts]
        commands = [["train.py"]] if own == list(STAGES) else [["train.py", f"--stage={stage}"] for stage in own]
        commands += [["experiments/controls.py", stage] for stage in others if stage not in made]
        return commands + [["experiments/variants.py", stage] for stage in self.stages() if stage in variants.STAGES]

    def all_flags(self) -> list[str]:
        """The flags of each of these programs."""
        return [f"--dtype={self.dtype}", *self.flags.split()]


COUNTDOWN = "--task=countdown --max_number=10 --rl_max_new_tokens=104"
REGIMES = {"default": "", "stress": "--rl_minibatches=16 --rl_lr=8e-4"}  # of docs/variants.md
CELLS = {
    "default": Cell(("base", "zero", "student_base", "student", "student_rl"),
                    measures=("operations", "many_samples", "signal", "distributions", "divergence")),
    "shuffled rewards": Cell(("zero",), "", "default", {"zero": "shuffled"}),
    "format alone": Cell(("zero",), "", "default", {"zero": "format_alone"}),
    "sequence": Cell(("zero",), "--normalize=sequence", "default"),
    "constant": Cell(("zero",), "--normalize=constant", "default"),
    "no KL": Cell(("zero",), "--kl_coef=0", "default", measures=("divergence",)),
    "KL 0.01": Cell(("zero",), "--kl_coef=0.01", "default", measures=("divergence",)),
    "KL 0.1": Cell(("zero",), "--kl_coef=0.1", "default", measures=("divergence",)),
    "all completions": Cell(("zero",), "", "default", {"zero": "all_completions"}, measures=("divergence",)),
    "G 4": Cell(("zero",), "--rl_prompts=128 --rl_samples=4", "default"),
    "G 32": Cell(("zero",), "--rl_prompts=16 --rl_samples=32", "default"),
    "batch baseline": Cell(("zero",), "", "default", {"zero": "batch_baseline"}),
    "tokens 1/4": Cell(("base", "zero"), "--base_tokens=1625000", measures=("signal",)),
    "worked 0": Cell(("base", "zero"), "", None, {"base": "base_no_working", "zero": "zero_no_working"}, ("signal",)),
    "countdown": Cell(("base", "zero"), COUNTDOWN, measures=("reflections",)),
    "countdown, no wait": Cell(("base", "zero"), COUNTDOWN, None, {"base": "base_no_wait", "zero": "zero_no_wait"},
                               ("reflections",)),
    "short problems": Cell(("student",), "", "default", {"student": "student_short"}),
    "reverse": Cell(("student",), "--divergence=reverse", "default"),
    "jsd": Cell(("student",), "--divergence=jsd", "default"),
    "sft": Cell(("student",), "--divergence=sft", "default"),
    "on policy": Cell(("student",), "--on_policy=True", "default"),
    "float32": Cell(("base", "zero", "student_base", "student"), dtype="float32"),
    "R1": Cell(("base", "zero", "dev1", "dev2", "dev3", "r1", "student_base", "student", "student_sft"),
               "--task=bilingual", is_r1=True),
    "no cold start": Cell(("dev2",), "--task=bilingual --cold_start=False", "R1", is_r1=True),
    "language 0": Cell(("dev2",), "--task=bilingual --language_weight=0", "R1", is_r1=True),
    "language 1/4": Cell(("dev2",), "--task=bilingual --language_weight=0.25", "R1", is_r1=True),
}
# findings 9 and 14, and docs/variants.md
CELLS |= {f"{regime} {name}": Cell(("zero",), f"--rl_steps=60 --eval_every=5 --eval_problems=128 {flags}".rstrip(),
                                   "float32", {"zero": name}, dtype="float32", may_diverge=True)
          for regime, flags in REGIMES.items() for name in variants.VARIANTS}


def settings(cell: Cell) -> dict:
    """The settings that shape a cell's models and their evaluation, except the seed."""
    cfg, _ = parse_args(Program(cell.table(), cell.config(), "", make_task, "findings.py"), cell.flags.split())
    names = {name for stage in cell.stages() for name in shaped_by(cell.table(), stage)}
    names |= {*names_of(EVALUATION), "eval_every"}  # the tables have the quick evaluations, too
    found = {name: getattr(cfg, name) for name in settings_of(cell.config()) if name in names and name != "seed"}
    for stage in cell.stages():
        if stage in variants.VARIANTS:
            found |= variants.own_settings(stage)
    return found


def slug(name: str) -> str:
    """The name of a cell's files.

    >>> slug("countdown, no wait"), slug("tokens 1/4")
    ('countdown_no_wait', 'tokens_1-4')
    """
    return name.replace(",", "").replace(" ", "_").replace("/", "-")


def folder(name: str, seed: int) -> Path:
    """The folder that a cell's run writes to. If the settings change, the folder changes."""
    cell = CELLS[name]
    key = json.dumps([settings(cell), cell.start, cell.controls, cell.dtype], sort_keys=True)
    return OUT / f"{slug(name)}-{seed}-{zlib.crc32(key.encode()):08x}"


def stored(name: str, seed: int) -> dict | None:
    """The stored results of a cell. None if the cell was not run, was not measured in full, or was run with other
    settings, another start, other controls or another number type. A setting that the file does not hold had its
    default."""
    path = RESULTS / f"{slug(name)}-{seed}.json"
    if not path.exists():
        return None
    found, cell = json.loads(path.read_text()), CELLS[name]
    defaults = {key: setting.default for key, setting in settings_of(cell.config()).items()}
    same = all(found["settings"].get(key, defaults[key]) == value for key, value in settings(cell).items())
    same = same and (found["start"], found["controls"]) == (cell.start, cell.controls)
    same = same and found["machine"]["dtype"] == cell.dtype
    complete = cell.may_diverge or set(found["models"]) >= set(cell.trains)
    return found if same and complete and set(found["measures"]) >= set(cell.measures) else None


def train(name: str, seed: int, threads: int) -> None:
    """Train a cell's models, from the checkpoints of its start. Raises UsageError if a program fails."""
    cell, out = CELLS[name], folder(name, seed)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "commit").exists():
        (out / "commit").write_text(commit())
    flags = [*cell.all_flags(), f"--seed={seed}", f"--threads={threads}", f"--out={out}"]
    if cell.start:
        parent = folder(cell.start, seed)
        for needed in cell.table()[cell.stages()[0]].starts:
            if not (out / f"{needed}.pt").exists():
                shutil.copy(parent / f"{needed}.pt", out / "copying")
                os.replace(out / "copying", out / f"{needed}.pt")
    for program, *argument in cell.commands():
        with open(out / "output.txt", "w") as output:
            code = subprocess.run([sys.executable, str(ROOT / program), *argument, *flags], stdout=output,
                                  stderr=output).returncode
        diverged = cell.may_diverge and "the last good checkpoint" in (out / "output.txt").read_text()
        if code and not diverged:
            raise UsageError(f"{name}, seed {seed}: {program} failed; {out / 'output.txt'} says why")


def work(rows: list[dict], cfg: Config, name: str) -> dict[str, float]:
    """The number of tokens that the student and the teacher read while a student is trained. Tokens of a forward and
    backward pass count three times. This number, times twice the parameters of the model, is the model's FLOPs.

    In distillation the teacher samples completions and reads the accepted ones once. The student reads the accepted
    completions in each epoch. In RL the student samples completions, and trains on those with a nonzero advantage. The
    reference reads these too. The student reads them once more for pi_old, except in the first minibatch.
    """
    prompt = 11.4  # mean tokens of a prompt, for problems of 1 to 6 operations
    if name == "student_rl":
        completions = cfg.distill_prompts / cfg.distill_minibatches * cfg.rl_minibatches
        passes = 3 + (cfg.rl_minibatches - 1) / cfg.rl_minibatches + bool(cfg.kl_coef)
        return {"student": sum(completions * (row["length"] + prompt) * (1 + passes * (1 - row["no_signal"]))
                               for row in rows), "teacher": 0.0}
    sampled = [cfg.distill_prompts * (row["length"] + prompt) for row in rows]
    learnt = [row["accepted"] * n for row, n in zip(rows, sampled)]
    return {"student": 3 * cfg.distill_epochs * sum(learnt), "teacher": sum(sampled) + sum(learnt)}


def measure(name: str, seed: int, threads: int) -> dict:
    """The measurements of a trained cell that train.py does not make. Raises UsageError if one fails."""
    cell, found = CELLS[name], {}
    names = [f"{model}={stage}" for model, stage in cell.controls.items()]
    for what in cell.measures:
        command = [sys.executable, str(ROOT / "experiments/measures.py"), what, str(folder(name, seed)), str(threads)]
        done = subprocess.run(command + names, capture_output=True, text=True)
        if done.returncode:
            why = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise UsageError(f"{name}, seed {seed}: measuring {what} failed: {why[-1]}")
        found[what] = json.loads(done.stdout)
    return found


def collect(name: str, seed: int, threads: int) -> None:
    """Measure a trained cell and store the results that the tables and figures need."""
    cell, out = CELLS[name], folder(name, seed)
    results = json.loads((out / "results.json").read_text())
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    cfg, made = stored_config(cell.config(), results["config"]), dict(zip(cell.trains, cell.stages()))
    of = {model: [row for row in rows if row["stage"] == stage] for model, stage in made.items()}
    seconds = [s for key, s in results["seconds"].items() if key.split()[-1] in made.values()]
    if not seconds:  # the run diverged
        seconds = [row["seconds"] for row in rows[-1:]]
    found = {
        "cell": name, "seed": seed, "commit": (out / "commit").read_text(),
        "machine": {key: getattr(cfg, key) for key in ("device", "dtype", "compile", "threads")},
        "settings": settings(cell), "start": cell.start, "controls": cell.controls, "seconds": round(sum(seconds)),
        "models": {model: results["models"][stage] for model, stage in made.items() if stage in results["models"]},
        "rows": {model: {key: [rounded(row.get(key)) for row in of[model]] for key in KEPT}
                 for model in ("zero", "dev2") if model in of},
        "work": {model: work(of[model], cfg, model) for model in ("student", "student_rl")
                 if model in of and "student_rl" in of},
        "measures": measure(name, seed, threads),
    }
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / f"{slug(name)}-{seed}.json", found)
    print(f"{name}, seed {seed}: " + ", ".join(f"{k} {m['test']['pass@1']:.1%}" for k, m in found["models"].items()),
          flush=True)


def run_cells(names: list[str], jobs: int) -> None:
    """Run the missing cells. The cells that others start from come first."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    missing = [(name, seed) for name in names for seed in SEEDS if stored(name, seed) is None]
    starts = {(CELLS[name].start, seed) for name, seed in missing if CELLS[name].start}

    def run(key: tuple[str, int]) -> None:
        train(*key, threads)
        if stored(*key) is None:
            collect(*key, threads)

    first = sorted(starts | {key for key in missing if CELLS[key[0]].start is None})
    then = [key for key in missing if key not in first]
    for keys in (first, then):
        with ThreadPoolExecutor(jobs) as pool:
            try:
                list(pool.map(run, keys))
            finally:  # after an error or Ctrl-C, start no further run; Ctrl-C also ends the running programs
                pool.shutdown(cancel_futures=True)
