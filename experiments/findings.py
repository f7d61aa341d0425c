"""The findings: claims about DeepSeek-R1 and GRPO, measured at toy scale. Controls could refute them.

    python experiments/findings.py             trains the missing cells, and renews the tables of findings.md
    python experiments/findings.py --only=7    one finding
    python experiments/findings.py --jobs=4    four trainings at a time (default: one for each core, with one thread)

A cell is a run of train.py, controls.py or r1.py with some flags and a seed. A cell that shares its first stages with
another cell starts from the checkpoints of the other cell. experiments/results/CELL-SEED.json holds the results of a
cell that the tables (tables.py) need, and the settings that shaped the cell. A cell is run again if these settings or
its controls have changed. Checkpoints and logs are in out/findings/. To resume an interrupted run, repeat the command.
There is no training loop in this file.

The sentences of the page are written by hand. Its tables stand between the marks `<!-- NAME -->` and `<!-- end -->`.
They are made from the stored results alone.
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS, OUT, PAGE = (ROOT / name for name in ("experiments/results", "out/findings", "experiments/findings.md"))
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import r1  # noqa: E402
from controls import CONTROLS  # noqa: E402
from engine.arguments import Parser, Program, number, parse_args  # noqa: E402
from engine.files import write_file  # noqa: E402
from engine.settings import EVALUATION, names_of, settings_of, shaped_by  # noqa: E402
from engine.tasks import make_task  # noqa: E402
from engine.terminal import UsageError  # noqa: E402
from tables import ROWS, Known, table  # noqa: E402
from train import STAGES, Config  # noqa: E402

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Cell:
    """One run for each seed."""
    trains: tuple[str, ...]         # the models that the run makes, by their names in tables.py
    flags: str = ""                 # the flags that differ from the defaults
    start: str | None = None        # the cell with the checkpoints that the run starts from
    controls: dict[str, str] = field(default_factory=dict)  # the models that are controls: model -> name of the control
    measures: tuple[str, ...] = ()  # functions of measures.py, for measurements that train.py does not make
    is_r1: bool = False             # whether this is a run of r1.py

    def table(self) -> dict:
        """The stages of the cell's programs."""
        return r1.STAGES if self.is_r1 else STAGES | CONTROLS

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
        return commands + [["experiments/controls.py", stage] for stage in others if stage not in made]


# The number of updates on a rollout, of RL steps and of distillation steps were defaults when the cells were run.
TWO_UPDATES = "--rl_minibatches=2"
DEFAULT = f"{TWO_UPDATES} --rl_steps=200 --distill_steps=50"
NO_KL = f"{TWO_UPDATES} --rl_steps=200 --kl_coef=0"
HALF = f"{TWO_UPDATES} --rl_steps=100 --kl_coef=0"
COUNTDOWN = f"{TWO_UPDATES} --rl_steps=120 --kl_coef=0 --task=countdown --max_number=10 --rl_max_new_tokens=104"
# The student learns once from each sample: 960 updates on 61,440 samples, not 1,200 updates on 25,600 samples.
ONE_PASS = f"{NO_KL} --distill_steps=120 --distill_epochs=1"
SHORT = {"student": "student_short"}
ALL = {"zero": "all_completions"}
CELLS = {
    # rows 6, 9 and 10
    "default": Cell(("base", "zero", "student_base", "student", "student_rl"), DEFAULT,
                    measures=("distributions", "divergence")),
    "short problems": Cell(("student", "student_rl"), DEFAULT, "default", SHORT | {"student_rl": "student_rl_short"}),
    "all completions": Cell(("zero",), DEFAULT, "default", ALL, measures=("divergence",)),
    # rows 1 to 9
    "no KL": Cell(("base", "zero", "student_base", "student"), ONE_PASS, controls=SHORT,
                  measures=("conditional", "operations", "many_samples", "signal", "reflections")),
    # row 1
    "shuffled rewards": Cell(("zero",), NO_KL, "no KL", {"zero": "shuffled"}),
    "format alone": Cell(("zero",), NO_KL, "no KL", {"zero": "format_alone"}),
    # rows 3 and 9
    "half the steps": Cell(("zero",), HALF, "no KL"),
    "no std": Cell(("zero",), f"{HALF} --scale=none", "no KL"),
    "KL 0.01": Cell(("zero",), f"{TWO_UPDATES} --rl_steps=100 --kl_coef=0.01", "no KL", ALL),
    "KL 0.1": Cell(("zero",), f"{TWO_UPDATES} --rl_steps=100 --kl_coef=0.1", "no KL", ALL),
    "clip higher": Cell(("zero",), f"{HALF} --clip_high=0.28", "no KL"),
    "sequence": Cell(("zero",), f"{HALF} --normalize=sequence", "no KL"),
    "constant": Cell(("zero",), f"{HALF} --normalize=constant", "no KL"),
    "G 4": Cell(("zero",), f"{HALF} --rl_prompts=128 --rl_samples=4", "no KL"),
    "G 16": Cell(("zero",), f"{HALF} --rl_prompts=32 --rl_samples=16", "no KL"),
    "G 32": Cell(("zero",), f"{HALF} --rl_prompts=16 --rl_samples=32", "no KL"),
    "batch baseline": Cell(("zero",), HALF, "no KL", {"zero": "batch_baseline"}),
    # row 4
    "countdown": Cell(("base", "zero"), COUNTDOWN, measures=("reflections",)),
    "countdown, no wait": Cell(("base", "zero"), COUNTDOWN, None, {"base": "base_no_wait", "zero": "zero_no_wait"},
                               measures=("reflections",)),
    # row 6
    "sft": Cell(("student",), f"{ONE_PASS} --divergence=sft", "no KL", SHORT),
    "reverse": Cell(("student",), f"{ONE_PASS} --divergence=reverse", "no KL", SHORT),
    "jsd": Cell(("student",), f"{ONE_PASS} --divergence=jsd", "no KL", SHORT),
    "on policy": Cell(("student",), f"{ONE_PASS} --on_policy=True", "no KL", SHORT),
    # row 7
    "tokens 1/4": Cell(("base", "zero"), f"{NO_KL} --base_tokens=1625000", measures=("signal",)),
    "tokens 1/2": Cell(("base", "zero"), f"{NO_KL} --base_tokens=3250000", measures=("signal",)),
    "worked 0": Cell(("base", "zero"), NO_KL, None, {"base": "base_no_working", "zero": "zero_no_working"},
                     measures=("signal",)),
    "worked 1/2": Cell(("base", "zero"), NO_KL, None, {"base": "base_half_working", "zero": "zero_half_working"},
                       measures=("signal",)),
    # row 11
    "R1": Cell(("base", "zero", "dev1", "dev2", "dev3", "r1", "student_base", "student", "student_sft"),
               "--task=bilingual", is_r1=True),
    "no cold start": Cell(("dev2",), "--task=bilingual --cold_start=False", "R1", is_r1=True),
    "language 0": Cell(("dev2",), "--task=bilingual --language_weight=0", "R1", is_r1=True),
    "language 1/4": Cell(("dev2",), "--task=bilingual --language_weight=0.25", "R1", is_r1=True),
}

# Some stored results come from a program that had settings in place of the controls. Their files name no controls. For
# each of these settings: its value in train.py's stages, a setting that shapes the same stages, and its values in the
# controls.
GONE = {
    "shuffle_rewards": (False, "scale", {"shuffled": True}),
    "accuracy_weight": (1.0, "scale", {"format_alone": 0.0}),  # a setting, but format_alone does not use it
    "baseline":        ("group", "scale", {"batch_baseline": "batch"}),
    "skip_no_signal":  (True, "scale", {"all_completions": False}),
    "worked_share":    (1.0, "corpus", {"base_no_working": 0.0, "base_half_working": 0.5}),
    "wait_share":      (1.0, "corpus", {"base_no_wait": 0.0}),
    "distill_longer":  (True, "distill_steps", {"student_short": False, "student_rl_short": False}),
}
# The values for files that are older than these settings and therefore do not hold them.
BEFORE = {"skip_no_signal": False, "distill_longer": False, "distill_epochs": 1}


# Running the cells


def settings(cell: Cell) -> dict:
    """The settings that shape a cell's models and their evaluation, except the seed."""
    cfg, _ = parse_args(Program(cell.table(), cell.config(), "", make_task, "findings.py"), cell.flags.split())
    names = {name for stage in cell.stages() for name in shaped_by(cell.table(), stage)} | {*names_of(EVALUATION)}
    return {name: getattr(cfg, name) for name in settings_of(cell.config()) if name in names and name != "seed"}


def old_settings(cell: Cell) -> dict:
    """The same settings for the program that had settings in place of the controls."""
    found = settings(cell)
    for name, (value, neighbour, in_controls) in GONE.items():
        if neighbour in found:
            found.setdefault(name, value)
            found |= {name: in_controls[stage] for stage in cell.stages() if stage in in_controls}
    return found


def slug(name: str) -> str:
    """The name of a cell's files.

    >>> slug("countdown, no wait"), slug("tokens 1/4")
    ('countdown_no_wait', 'tokens_1-4')
    """
    return name.replace(",", "").replace(" ", "_").replace("/", "-")


def folder(name: str, seed: int) -> Path:
    """The folder that a cell's run writes to. If the settings change, the folder changes."""
    key = json.dumps([settings(CELLS[name]), CELLS[name].controls], sort_keys=True)
    return OUT / f"{slug(name)}-{seed}-{zlib.crc32(key.encode()):08x}"


def stored(name: str, seed: int) -> dict | None:
    """The stored results of a cell. None if the cell was not run, was not measured in full, or was run with other
    settings or controls. A setting that the file does not hold had the value in BEFORE, or else its default."""
    path = RESULTS / f"{slug(name)}-{seed}.json"
    if not path.exists():
        return None
    found, cell = json.loads(path.read_text()), CELLS[name]
    defaults = {key: setting.default for key, setting in settings_of(cell.config()).items()}
    defaults |= {key: value for key, (value, _, _) in GONE.items()} | BEFORE
    now = settings(cell) if "controls" in found else old_settings(cell)
    same = all(found["settings"].get(key, defaults[key]) == value for key, value in now.items())
    same = same and found.get("controls", cell.controls) == cell.controls
    complete = set(found["models"]) >= set(cell.trains) and set(found["measures"]) >= set(cell.measures)
    return found if complete and same else None


def train(name: str, seed: int, threads: int) -> None:
    """Train a cell's models, from the checkpoints of its start. Raises UsageError if a program fails."""
    cell, out = CELLS[name], folder(name, seed)
    out.mkdir(parents=True, exist_ok=True)
    flags = [f"--seed={seed}", f"--threads={threads}", f"--out={out}", *cell.flags.split()]
    if cell.start:
        parent = folder(cell.start, seed)
        for needed in cell.table()[cell.stages()[0]].starts:
            if not (out / f"{needed}.pt").exists():
                shutil.copy(parent / f"{needed}.pt", out / "copying")
                os.replace(out / "copying", out / f"{needed}.pt")
    for program, *argument in cell.commands():
        with open(out / "output.txt", "a") as output:
            command = [sys.executable, str(ROOT / program), *argument, *flags]
            if subprocess.run(command, stdout=output, stderr=output).returncode:
                raise UsageError(f"{name}, seed {seed}: {program} failed; {out / 'output.txt'} says why")


def curve(rows: list[dict]) -> dict[str, list[float]]:
    """The logged metrics of an RL run, averaged over each tenth of its steps."""
    tenths = [rows[i * len(rows) // 10:(i + 1) * len(rows) // 10] for i in range(10)]
    means = {}
    for key in ("accuracy", "format", "length", "length_wrong", "reflection", "no_signal", "language", "consistent"):
        values = [[row[key] for row in tenth if row.get(key) is not None] for tenth in tenths]
        means[key] = [round(statistics.fmean(v), 4) if v else None for v in values]
    return means


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


def collect(name: str, seed: int, threads: int) -> None:
    """Measure a trained cell and store the results that the page needs."""
    cell, out = CELLS[name], folder(name, seed)
    results = json.loads((out / "results.json").read_text())
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    cfg, measures, made = cell.config()(**results["config"]), {}, dict(zip(cell.trains, cell.stages()))
    of = {model: [row for row in rows if row["stage"] == stage] for model, stage in made.items()}
    for measure in cell.measures:
        names = [f"{model}={stage}" for model, stage in cell.controls.items()]
        command = [sys.executable, str(ROOT / "experiments/measures.py"), measure, str(out), str(threads), *names]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            why = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise UsageError(f"{name}, seed {seed}: measuring {measure} failed: {why[-1]}")
        measures[measure] = json.loads(done.stdout)
    found = {
        "cell": name, "seed": seed, "settings": settings(cell), "controls": cell.controls,
        "machine": {key: getattr(cfg, key) for key in ("device", "dtype", "compile", "threads")},
        "seconds": round(sum(s for key, s in results["seconds"].items() if key.split()[-1] in made.values())),
        "models": {model: results["models"][stage] for model, stage in made.items()},
        "curves": {model: curve(of[model]) for model in ("zero", "dev2", "r1") if model in of},
        "work": {model: work(of[model], cfg, model) for model in of if name == "default"
                 and model in ("student", "student_rl")},
        "measures": measures,
    }
    RESULTS.mkdir(exist_ok=True)
    write_file(RESULTS / f"{slug(name)}-{seed}.json", json.dumps(found, indent=1).encode())
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


# The page

def known() -> Known:
    """The cells that are stored for all seeds."""
    found = {name: [stored(name, seed) for seed in SEEDS] for name in CELLS}
    return Known({name: cells for name, cells in found.items() if None not in cells})


def minutes(k: Known, cells: tuple[str, ...]) -> float:
    """The minutes of training and evaluation of these cells, one after another."""
    return sum(sum(k.values(cell, "seconds")) for cell in cells) / 60


def shown(cell: Cell) -> list[str]:
    """A cell's commands, without the --stage flags."""
    commands = [[part for part in command if not part.startswith("--")] for command in cell.commands()]
    return list(dict.fromkeys(" ".join(["python", *command, cell.flags]).rstrip() for command in commands))


def blocks(k: Known) -> dict[str, list[str]]:
    """The tables of the page by their names, for the findings whose cells are all stored."""
    found, rows = {}, []
    for n, row in ROWS.items():
        missing = [cell for cell in row.cells if cell not in k.cells]
        if missing:
            print(f"finding {n} is left out: {', '.join(missing)} has not been run")
            continue
        measured, holds, tables = row.measure(k)
        rows.append([n, row.claim, row.bar, measured, "**holds**" if holds else "**does not hold**"])
        found |= tables
        found[f"{n} runs"] = [
            "", f"`python experiments/findings.py --only={n}` takes {minutes(k, row.cells):.0f} minutes of one thread, "
            "for these runs with seeds 0, 1 and 2:", "",
            *(f"    {line}" for cell in row.cells for line in shown(CELLS[cell])), ""]
    machines = {"{device}, {dtype}".format(**cell["machine"]) for cells in k.cells.values() for cell in cells}
    found["summary"] = [*table(["#", "claim", "bar", "measured", "verdict"], rows),
                        f"All runs together took {minutes(k, tuple(k.cells)) / 60:.1f} hours of training and "
                        f"evaluation on one thread ({' and '.join(sorted(machines))}).", ""]
    return found


def page(k: Known, text: str) -> str:
    """The text of findings.md with new tables. Raises UsageError if a mark is missing."""
    for name, lines in blocks(k).items():
        start, end = f"<!-- {name} -->\n", "<!-- end -->\n"
        before, mark, rest = text.partition(start)
        if not mark or end not in rest:
            raise UsageError(f"{PAGE.name} lacks the mark {start.strip()} or its {end.strip()}")
        text = before + start + "\n".join(lines) + "\n" + end + rest.partition(end)[2]
    return text


def main(argv: list[str]) -> int:
    """Run the command line -> exit code."""
    parser = Parser(prog="findings.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    parser.add_argument("--only", type=int, choices=ROWS, help="one finding")
    parser.add_argument("--jobs", type=number(int, None, None), default=os.cpu_count() or 1, help="trainings at a time")
    try:
        options = parser.parse_args(argv)
        rows = [ROWS[options.only]] if options.only else ROWS.values()
        run_cells([name for name in CELLS if any(name in row.cells for row in rows)], options.jobs)
        write_file(PAGE, page(known(), PAGE.read_text(encoding="utf-8")).encode())
        print(f"wrote {PAGE.relative_to(ROOT)}")
        return 0
    except (UsageError, OSError) as error:
        print(f"findings.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nfindings.py: interrupted; the same command goes on from there", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
