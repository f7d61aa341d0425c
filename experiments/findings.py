"""The findings: what is said of DeepSeek-R1, measured at toy scale, each claim with a control that could refute it.

    python experiments/findings.py             runs what is missing, or goes on, and writes experiments/findings.md
    python experiments/findings.py --only=7    one row
    python experiments/findings.py --jobs=4    so many trainings at a time (default: one a core, of one thread each)

A cell is a run of train.py with some flags and a seed; it starts from the checkpoints of another cell where it shares
its first stages. What the rows (rows.py) need of a cell is kept in experiments/results/CELL-SEED.json, with the
settings that shaped it: a cell is run again when these have changed, and the page is written from the files alone.
Checkpoints and logs go to out/findings/, where a run that was stopped goes on. There is no training loop here.

Each figure is a mean over the seeds ± its standard deviation over them; of pass@1, if that is larger, ± its standard
error over problems. A difference is taken seed by seed; one that is not larger than its spread is no difference.
"""
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS, OUT, PAGE = (ROOT / name for name in ("experiments/results", "out/findings", "experiments/findings.md"))
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

from rows import ROWS, Known, table  # noqa: E402
from run import EVALUATED_BY, SHAPED_BY, STAGES, Config, Fault, among, parse_args, write_file  # noqa: E402

SEEDS = (0, 1, 2)
NEEDS = {"zero": ("base",), "student": ("zero", "student_base")}  # the checkpoints that a cell takes from its start
NOT_THE_CELL = ("device", "dtype", "compile", "micro_batch", "seed")  # the machine's fields, and what differs in a cell


@dataclass(frozen=True)
class Cell:
    """A run of train.py for each seed."""
    trains: tuple[str, ...]           # the models that it makes
    flags: str = ""                   # beside the defaults
    start: str | None = None          # the cell whose other checkpoints it starts from
    measures: tuple[str, ...] = ()    # of experiments/measures.py, beside what train.py measures

    def stages(self) -> list[str]:
        """The --stage flags to run train.py with, one after the other; none runs all stages."""
        stages = [stage for stage in STAGES if any(name.startswith(stage) for name in self.trains)]
        return [""] if len(stages) == len(STAGES) else [f"--stage={stage}" for stage in stages]


COUNTDOWN = "--task=countdown --max_number=10 --rl_max_new_tokens=104 --rl_steps=120"
# As many updates of the student as the default's, on three times as many samples: each is learnt from once.
ONE_PASS = "--distill_steps=120 --distill_epochs=1"
CELLS = {
    "default": Cell(("base", "zero", "student_base", "student", "student_rl"), f"{ONE_PASS} --student_rl=True",
                    measures=("conditional", "operations", "many_samples", "distributions", "signal", "reflections")),
    # row 1
    "shuffled rewards": Cell(("zero",), "--shuffle_rewards=True", "default"),
    "format alone": Cell(("zero",), "--accuracy_weight=0", "default"),
    # rows 3 and 9
    "half the steps": Cell(("zero",), "--rl_steps=100", "default"),
    "no std": Cell(("zero",), "--rl_steps=100 --scale=none", "default"),
    "KL 0.01": Cell(("zero",), "--rl_steps=100 --kl_coef=0.01", "default"),
    "KL 0.1": Cell(("zero",), "--rl_steps=100 --kl_coef=0.1", "default"),
    "clip higher": Cell(("zero",), "--rl_steps=100 --clip_high=0.28", "default"),
    "sequence": Cell(("zero",), "--rl_steps=100 --normalize=sequence", "default"),
    "constant": Cell(("zero",), "--rl_steps=100 --normalize=constant", "default"),
    "G 4": Cell(("zero",), "--rl_steps=100 --rl_prompts=128 --rl_samples=4", "default"),
    "G 16": Cell(("zero",), "--rl_steps=100 --rl_prompts=32 --rl_samples=16", "default"),
    "G 32": Cell(("zero",), "--rl_steps=100 --rl_prompts=16 --rl_samples=32", "default"),
    "batch baseline": Cell(("zero",), "--rl_steps=100 --baseline=batch", "default"),
    # row 4
    "countdown": Cell(("base", "zero"), COUNTDOWN, measures=("reflections",)),
    "countdown, no wait": Cell(("base", "zero"), f"{COUNTDOWN} --wait_share=0", measures=("reflections",)),
    # row 6
    "sft": Cell(("student",), f"{ONE_PASS} --divergence=sft", "default"),
    "reverse": Cell(("student",), f"{ONE_PASS} --divergence=reverse", "default"),
    "jsd": Cell(("student",), f"{ONE_PASS} --divergence=jsd", "default"),
    "on policy": Cell(("student",), f"{ONE_PASS} --on_policy=True", "default"),
    # row 7
    "tokens 1/4": Cell(("base", "zero"), "--base_tokens=1625000", measures=("signal",)),
    "tokens 1/2": Cell(("base", "zero"), "--base_tokens=3250000", measures=("signal",)),
    "worked 0": Cell(("base", "zero"), "--worked_share=0", measures=("signal",)),
    "worked 1/2": Cell(("base", "zero"), "--worked_share=0.5", measures=("signal",)),
}


# Running the cells


def settings(cell: Cell) -> dict:
    """The fields that shape a cell's models and their evaluation, whatever the machine and the seed."""
    cfg, _ = parse_args(cell.flags.split())
    names = {name for trained in cell.trains for name in SHAPED_BY[trained]} | set(EVALUATED_BY)
    return {field.name: getattr(cfg, field.name) for field in dataclasses.fields(Config)
            if field.name not in NOT_THE_CELL and among(field.name, names)}


def slug(name: str) -> str:
    """A cell's name as a file's.

    >>> slug("countdown, no wait"), slug("tokens 1/4")
    ('countdown_no_wait', 'tokens_1-4')
    """
    return name.replace(",", "").replace(" ", "_").replace("/", "-")


def folder(name: str, seed: int) -> Path:
    """Where a cell's run writes: other settings go elsewhere."""
    key = json.dumps(settings(CELLS[name]), sort_keys=True)
    return OUT / f"{slug(name)}-{seed}-{zlib.crc32(key.encode()):08x}"


def stored(name: str, seed: int) -> dict | None:
    """What is known of a cell, if that is of its settings as they are now, with all that is measured of it."""
    path = RESULTS / f"{slug(name)}-{seed}.json"
    if not path.exists():
        return None
    found, cell = json.loads(path.read_text()), CELLS[name]
    before = {key: getattr(Config, key) for key in settings(cell)} | found["settings"]  # fields that were added since
    complete = set(found["models"]) >= set(cell.trains) and set(found["measures"]) >= set(cell.measures)
    return found if complete and before == settings(cell) else None


def train(name: str, seed: int, threads: int) -> None:
    """Have train.py make a cell's models, from its start's checkpoints. Raises Fault if it fails."""
    cell, out = CELLS[name], folder(name, seed)
    out.mkdir(parents=True, exist_ok=True)
    flags = [f"--seed={seed}", f"--threads={threads}", f"--out={out}", *cell.flags.split()]
    if cell.start:
        parent = folder(cell.start, seed)
        for needed in NEEDS[cell.trains[0]]:
            if not (out / f"{needed}.pt").exists():
                shutil.copy(parent / f"{needed}.pt", out / "copying")
                os.replace(out / "copying", out / f"{needed}.pt")
        made_with = json.loads((parent / "results.json").read_text())["config"]
        flags += [f"--{key}={made_with[key]}" for key in ("device", "dtype", "compile")]
    for stage in cell.stages():
        with open(out / "output.txt", "a") as output:
            command = [sys.executable, str(ROOT / "train.py"), *stage.split(), *flags]
            if subprocess.run(command, stdout=output, stderr=output).returncode:
                raise Fault(f"{name}, seed {seed}: train.py failed; {out / 'output.txt'} says why")


def curve(rows: list[dict]) -> dict[str, list[float]]:
    """What an RL run logged, averaged over each tenth of it."""
    tenths = [rows[i * len(rows) // 10:(i + 1) * len(rows) // 10] for i in range(10)]
    means = {}
    for key in ("accuracy", "format", "length", "length_wrong", "reflection", "no_signal"):
        values = [[row[key] for row in tenth if row.get(key) is not None] for tenth in tenths]
        means[key] = [round(statistics.fmean(v), 4) if v else None for v in values]
    return means


def work(rows: list[dict], cfg: Config, name: str) -> dict[str, float]:
    """Tokens that the student and the teacher saw in training a student, a forward and backward pass counted as three:
    FLOPs divided by twice the model's parameters.

    Distillation: the teacher samples, and reads what the student learns. RL: the student samples, trains on completions
    with an advantage, and reads those of all minibatches but the first once more for pi_old.
    """
    prompt = 9  # tokens, on average
    if name == "student_rl":
        completions = cfg.distill_prompts / cfg.distill_minibatches * cfg.rl_minibatches
        passes = 3 + (cfg.rl_minibatches - 1) / cfg.rl_minibatches
        return {"student": sum(completions * (row["length"] + prompt) * (1 + passes * (1 - row["no_signal"]))
                               for row in rows), "teacher": 0.0}
    sampled = [cfg.distill_prompts * (row["length"] + prompt) for row in rows]
    learnt = [row["accepted"] * n for row, n in zip(rows, sampled)]
    return {"student": 3 * sum(learnt), "teacher": sum(sampled) + sum(learnt)}


def collect(name: str, seed: int, threads: int) -> None:
    """Measure a trained cell, and keep what the table needs."""
    cell, out = CELLS[name], folder(name, seed)
    results = json.loads((out / "results.json").read_text())
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    cfg, measures = Config(**results["config"]), {}
    of = {trained: [row for row in rows if row["stage"] == trained] for trained in cell.trains}
    for measure in cell.measures:
        command = [sys.executable, str(ROOT / "experiments/measures.py"), measure, str(out), str(threads)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            why = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise Fault(f"{name}, seed {seed}: measuring {measure} failed: {why[-1]}")
        measures[measure] = json.loads(done.stdout)
    found = {
        "cell": name, "seed": seed, "settings": settings(cell),
        "machine": {key: getattr(cfg, key) for key in ("device", "dtype", "compile", "threads")},
        "seconds": round(sum(s for key, s in results["seconds"].items() if key.split()[-1] in cell.trains)),
        "models": {trained: results["models"][trained] for trained in cell.trains},
        "curves": {"zero": curve(of["zero"])} if "zero" in of else {},
        "work": {trained: work(of[trained], cfg, trained) for trained in of if name == "default"
                 and trained in ("student", "student_rl")},
        "measures": measures,
    }
    RESULTS.mkdir(exist_ok=True)
    write_file(RESULTS / f"{slug(name)}-{seed}.json", json.dumps(found, indent=1).encode())
    print(f"{name}, seed {seed}: " + ", ".join(f"{k} {m['test']['pass@1']:.1%}" for k, m in found["models"].items()),
          flush=True)


def run_cells(names: list[str], jobs: int) -> None:
    """Run the cells that are missing, those that others start from first."""
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
            finally:  # after a fault, or Ctrl-C, which ends the runs under way, none is begun
                pool.shutdown(cancel_futures=True)


# The page


def known() -> Known:
    """The cells that have been run with all seeds."""
    found = {name: [stored(name, seed) for seed in SEEDS] for name in CELLS}
    return Known({name: cells for name, cells in found.items() if None not in cells})


def minutes(k: Known, cells: tuple[str, ...]) -> float:
    """What training and evaluating these cells took, one after the other."""
    return sum(sum(k.values(cell, "seconds")) for cell in cells) / 60


def page(k: Known) -> str:
    """experiments/findings.md, of the rows whose cells are all there."""
    rows, details = [], []
    for number, row in ROWS.items():
        missing = [cell for cell in row.cells if cell not in k.cells]
        if missing:
            print(f"row {number} is left out: {', '.join(missing)} has not been run")
            continue
        line, passed, lines = row.measure(k)
        rows.append([number, row.claim, row.paper, row.bar, line, "**pass**" if passed else "**fail**"])
        commands = [f"    python train.py {CELLS[cell].flags}" for cell in row.cells]
        details += [f"## {number}. {row.claim}", "", f"`python experiments/findings.py --only={number}` "
                    f"trains and evaluates for {minutes(k, row.cells):.0f} minutes of a thread, with seeds 0, 1 and 2:",
                    "", *commands, *lines]
    machines = {tuple(cell["machine"].values()) for cells in k.cells.values() for cell in cells}
    head = ["# Findings", "",
            "What is said of DeepSeek-R1, at toy scale, with controls. `python experiments/findings.py` writes this "
            "page from experiments/results/, after running what is missing there; its first lines say what a spread "
            f"is. All cells together trained and evaluated for {minutes(k, tuple(k.cells)) / 60:.1f} hours of a thread "
            f"({' and '.join(sorted(f'{device}, {dtype}' for device, dtype, *_ in machines))}). pass@1, format, length "
            "and reflection are of 256 unseen problems x 16 samples at temperature 1, in %, unless a table says more.",
            "",
            "The bars of rows 1 to 7 were fixed before measuring; those of 8 to 10 were made stricter when some of their "
            "cells were known.",
            *table(["#", "claim", "paper", "bar", "measured", ""], rows)]
    return "\n".join(head + details).rstrip() + "\n"


def main(argv: list[str]) -> int:
    """Run the command line -> exit code."""
    options = {"only": None, "jobs": os.cpu_count() or 1}
    try:
        if "--help" in argv:
            print(__doc__)
            return 0
        for arg in argv:
            name, _, text = arg.removeprefix("--").partition("=")
            if not arg.startswith("--") or name not in options or not text.isdecimal() or int(text) == 0:
                raise Fault(f"unknown argument {arg!r}: --only=ROW and --jobs=N are known, whole numbers")
            options[name] = int(text)
        if options["only"] not in (None, *ROWS):
            raise Fault(f"--only={options['only']}: rows are 1 to {len(ROWS)}")
        rows = [ROWS[options["only"]]] if options["only"] else ROWS.values()
        run_cells([name for name in CELLS if any(name in row.cells for row in rows)], options["jobs"])
        write_file(PAGE, page(known()).encode())
        print(f"wrote {PAGE.relative_to(ROOT)}")
        return 0
    except (Fault, OSError) as fault:
        print(f"findings.py: {fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nfindings.py: interrupted; the same command goes on from there", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
