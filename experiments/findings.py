"""The findings: what is said of DeepSeek-R1, measured at toy scale, each claim with a control that could have refuted it.

    python experiments/findings.py             runs what is missing, or goes on, and writes experiments/findings.md
    python experiments/findings.py --only=7    one row
    python experiments/findings.py --jobs=4    so many trainings at a time (default: one a core, of one thread each)

A cell is a run of train.py with some flags and a seed; it starts from the checkpoints of another cell where it shares its
first stages. What the table needs of a cell is kept in experiments/results/CELL-SEED.json, with the settings that shaped it: a
cell is run again when these have changed, and the table is written from the files alone. Checkpoints and logs go to
out/findings/, where a run that was stopped goes on. There is no training loop here.

Each figure is a mean over the seeds ± the larger of two spreads: the standard deviation over seeds, and the standard
error over problems. A difference is taken seed by seed; one that is not larger than its spread is no difference.
"""
import dataclasses
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS, OUT, PAGE = (ROOT / name for name in ("experiments/results", "out/findings", "experiments/findings.md"))
sys.path.insert(0, str(ROOT))

from data.arithmetic import Arithmetic  # noqa: E402
from run import EVALUATED_BY, SHAPED_BY, Config, Fault, parse_args, write_file  # noqa: E402

SEEDS = (0, 1, 2)
MACHINE = ("device", "dtype", "compile", "micro_batch", "seed")  # fields that a cell's results do not hang on, and the seed


@dataclass(frozen=True)
class Cell:
    """A run of train.py for each seed."""
    trains: tuple[str, ...]           # the models that it makes
    flags: str = ""                   # beside the defaults
    start: str | None = None          # the cell whose other checkpoints it starts from
    measures: tuple[str, ...] = ()    # of experiments/measures.py, beside what train.py measures

    def stages(self) -> list[str]:
        """What to give --stage, in order."""
        return [stage for stage in ("base", "zero", "student") if any(name.startswith(stage) for name in self.trains)]


COUNTDOWN = "--task=countdown --max_number=10 --rl_max_new_tokens=104 --rl_steps=120"
CELLS = {
    "default": Cell(("base", "zero", "student_base", "student", "student_rl"), "--student_rl=True",
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
    "sft": Cell(("student",), "--divergence=sft", "default"),
    "reverse": Cell(("student",), "--divergence=reverse", "default"),
    "jsd": Cell(("student",), "--divergence=jsd", "default"),
    "on policy": Cell(("student",), "--on_policy=True", "default"),
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
    return {field.name: getattr(cfg, field.name) for field in dataclasses.fields(Config) if field.name not in MACHINE
            and any(field.name == n or n.endswith("_") and field.name.startswith(n) for n in names)}


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
    return found if before == settings(cell) and set(found["measures"]) == set(cell.measures) else None


def train(name: str, seed: int, threads: int) -> None:
    """Have train.py make a cell's models, from its start's checkpoints. Raises Fault if it fails."""
    cell, out = CELLS[name], folder(name, seed)
    out.mkdir(parents=True, exist_ok=True)
    flags = [f"--seed={seed}", f"--threads={threads}", f"--out={out}", *cell.flags.split()]
    if cell.start:
        parent = folder(cell.start, seed)
        for path in parent.glob("*.pt"):
            if path.stem not in ("resume", *cell.trains) and not (out / path.name).exists():
                shutil.copy(path, out / "copying")
                os.replace(out / "copying", out / path.name)
        made_with = json.loads((parent / "results.json").read_text())["config"]
        flags += [f"--{key}={made_with[key]}" for key in ("device", "dtype", "compile")]
    for stage in cell.stages():
        with open(out / "output.txt", "a") as output:
            command = [sys.executable, str(ROOT / "train.py"), f"--stage={stage}", *flags]
            if subprocess.run(command, stdout=output, stderr=output).returncode:
                raise Fault(f"{name}, seed {seed}: train.py failed; {out / 'output.txt'} says why")


def curve(rows: list[dict]) -> dict[str, list[float]]:
    """What an RL run logged, averaged over each tenth of it."""
    tenths = [rows[i * len(rows) // 10:(i + 1) * len(rows) // 10] for i in range(10)]
    means = {}
    for key in ("accuracy", "format", "length", "length_wrong", "reflection", "no_signal", "entropy"):
        values = [[row[key] for row in tenth if row.get(key) is not None] for tenth in tenths]
        means[key] = [round(statistics.fmean(v), 4) if v else None for v in values]
    return means


def student_work(rows: list[dict], cfg: Config, student_rl: bool) -> float:
    """Tokens that the student's forward passes saw, a forward and backward pass counted as three: its FLOPs divided by
    twice its parameters."""
    prompt = 12  # tokens, about: small beside the answers
    if student_rl:
        per_step = cfg.distill_prompts / cfg.distill_minibatches * cfg.rl_minibatches
        return sum(per_step * (row["length"] + prompt) * (1 + 3 * (1 - row["no_signal"])) for row in rows)
    return sum(3 * row["accepted"] * cfg.distill_prompts * (row["length"] + prompt) for row in rows)


def collect(name: str, seed: int, threads: int) -> None:
    """Measure a trained cell, and keep what the table needs."""
    cell, out = CELLS[name], folder(name, seed)
    results = json.loads((out / "results.json").read_text())
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    cfg, work = Config(**results["config"]), {}
    for trained in cell.trains:
        if trained in ("student", "student_rl"):
            work[trained] = student_work([r for r in rows if r["stage"] == trained], cfg, trained == "student_rl")
    measures = {}
    for measure in cell.measures:
        command = [sys.executable, str(ROOT / "experiments/measures.py"), measure, str(out), str(threads)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise Fault(f"{name}, seed {seed}: measuring {measure} failed: {done.stderr.strip().splitlines()[-1]}")
        measures[measure] = json.loads(done.stdout)
    found = {
        "cell": name, "seed": seed, "settings": settings(cell),
        "seconds": round(sum(s for key, s in results["seconds"].items() if key.split()[-1] in cell.trains)),
        "models": {trained: results["models"][trained] for trained in cell.trains},
        "curves": {trained: curve([row for row in rows if row["stage"] == trained]) for trained in cell.trains
                   if trained in ("zero", "student_rl")},
        "student_work": work, "measures": measures,
    }
    RESULTS.mkdir(exist_ok=True)
    write_file(RESULTS / f"{slug(name)}-{seed}.json", json.dumps(found, indent=1).encode())
    print(f"{name}, seed {seed}: " + ", ".join(f"{k} {m['test']['pass@1']:.1%}" for k, m in found["models"].items()),
          flush=True)


def run_cells(names: list[str], jobs: int) -> None:
    """Run the cells that are missing, those that others start from first."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    missing = [(name, seed) for name in names for seed in SEEDS if stored(name, seed) is None]
    starts = {(CELLS[name].start, seed) for name, seed in missing} - {(None, seed) for seed in SEEDS}

    def work(key: tuple[str, int]) -> None:
        if key in starts or key in missing:
            train(*key, threads)
        if stored(*key) is None:
            collect(*key, threads)

    first = sorted(starts | {key for key in missing if CELLS[key[0]].start is None})
    then = [key for key in missing if key not in first]
    for keys in (first, then):
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(work, keys))


# Means and their spread


@dataclass(frozen=True)
class Figure:
    """A mean over seeds, and the larger of its spreads over seeds and over problems."""
    mean: float
    spread: float

    def __format__(self, spec: str) -> str:
        """"96.6 ± 0.6", of a share in percent or points; with a spec such as ".2f" the number itself."""
        scale = 1 if spec else 100
        return f"{scale * self.mean:{spec or '.1f'}} ± {scale * self.spread:{spec or '.1f'}}"


def figure(values: list[float], errors: list[float] | None = None) -> Figure:
    """Of one value a seed, each with its standard error over problems if that is known.

    >>> f"{figure([0.5, 0.6, 0.7])}", f"{figure([1.0, 2.0, 3.0], [4.0, 4.0, 4.0]):.1f}"
    ('60.0 ± 10.0', '2.0 ± 4.0')
    """
    return Figure(statistics.fmean(values), max(statistics.stdev(values), statistics.fmean(errors or [0.0])))


class Known:
    """The stored cells, and figures of them."""

    def cell(self, name: str) -> list[dict]:
        """One for each seed. Raises KeyError if one is missing."""
        found = [stored(name, seed) for seed in SEEDS]
        if None in found:
            raise KeyError(name)
        return found

    def values(self, name: str, *path: str) -> list[float]:
        """What stands at a path in the results, for each seed."""
        found = self.cell(name)
        for key in path:
            found = [cell[key] for cell in found]
        return found

    def errors(self, name: str, model: str, kind: str) -> list[float]:
        """The standard errors of pass@1."""
        return self.values(name, "models", model, kind, "pass@1_se")

    def score(self, name: str, model: str = "zero", kind: str = "test", what: str = "pass@1") -> Figure:
        return figure(self.values(name, "models", model, kind, what),
                      self.errors(name, model, kind) if what == "pass@1" else None)

    def gain(self, before: tuple[str, str, str], after: tuple[str, str, str]) -> Figure:
        """What pass@1 gains, seed by seed, between two (cell, model, kind)."""
        pairs = [self.values(name, "models", model, kind, "pass@1") for name, model, kind in (before, after)]
        errors = zip(self.errors(*before), self.errors(*after))
        return figure([b - a for a, b in zip(*pairs)], [math.hypot(a, b) for a, b in errors])


def table(head: list[str], rows: list[list]) -> list[str]:
    """A Markdown table's lines."""
    return ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head),
            *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]


def differs(gain: Figure) -> str:
    """In words, with the points."""
    return f"{gain:} points" + ("" if abs(gain.mean) > gain.spread else ", no difference")


# The rows: each -> (what was measured in a line, did it pass, the details' lines)


@dataclass(frozen=True)
class Row:
    claim: str
    paper: str                       # what is said of the large models, and where
    bar: str                         # fixed before measuring
    cells: tuple[str, ...]
    measure: Callable[[Known], tuple[str, bool, list[str]]]


def row_1(k: Known) -> tuple[str, bool, list[str]]:
    base, zero = ("default", "base", "test"), ("default", "zero", "test")
    gain = k.gain(base, zero)
    shuffled, alone = k.gain(base, ("shuffled rewards", "zero", "test")), k.score("format alone")
    behind = k.gain(("format alone", "zero", "test"), zero)
    predicted = figure(k.values("default", "measures", "conditional", "right if well formed"))
    line = (f"base {k.score('default', 'base')} -> zero {k.score('default')} %, {differs(gain)}; with shuffled rewards "
            f"{differs(shuffled)}; with the format reward alone {alone} %, where the base's well-formed answers, "
            f"{predicted} % right, predict as much")
    details = table(["RL from the base with", "pass@1, %", "hard, %", "format, %", "length"], [
        [name, k.score(cell, model), k.score(cell, model, "hard"), k.score(cell, model, what="format"),
         f"{k.score(cell, model, what='length'):.1f}"]
        for name, cell, model in (("(the base)", "default", "base"), ("both rewards", "default", "zero"),
                                  ("rewards shuffled in each group", "shuffled rewards", "zero"),
                                  ("the format reward alone", "format alone", "zero"))])
    return line, gain.mean >= 0.5 and shuffled.mean <= 0.05 and behind.mean >= 0.2, details


def row_2(k: Known) -> tuple[str, bool, list[str]]:
    rows, passed, below = [], True, []
    for cell, model, kind in (("default", "base", "test"), ("default", "base", "hard"), ("default", "zero", "test"),
                              ("default", "zero", "hard"), ("default", "student", "hard")):
        pairs = [k.values(cell, "models", model, kind, what) for what in ("pass@1", "maj@16")]
        gain = figure([b - a for a, b in zip(*pairs)])
        rows.append([model, kind, k.score(cell, model, kind), k.score(cell, model, kind, "maj@16"), gain])
        if model == "zero" and statistics.fmean(pairs[0]) < 0.95:
            passed &= gain.mean >= 0.03
            below.append(f"zero on {kind}: {k.score(cell, model, kind)} -> {k.score(cell, model, kind, 'maj@16')} %, "
                         f"{differs(gain)}")
    return "; ".join(below), passed and bool(below), table(["model", "problems", "pass@1", "maj@16", "gain"], rows)


def row_3(k: Known) -> tuple[str, bool, list[str]]:
    pairs = [k.values("default", "models", model, "test", "length") for model in ("base", "zero")]
    ratio = figure([b / a for a, b in zip(*pairs)])
    rows, wrong = [], {}
    for name, cell in (("sequence: 1/\\|o_i\\|", "sequence"), ("token", "half the steps"), ("constant: Dr. GRPO", "constant")):
        curves = k.values(cell, "curves", "zero")
        tail = {key: figure([statistics.fmean([v for v in c[key][7:] if v is not None]) for c in curves])
                for key in ("length", "length_wrong")}
        wrong[cell] = tail["length_wrong"]
        rows.append([name, k.score(cell), f"{k.score(cell, what='length'):.1f}", f"{tail['length']:.1f}",
                     f"{tail['length_wrong']:.1f}"])
    line = (f"{k.score('default', 'base', what='length'):.1f} -> {k.score('default', what='length'):.1f} tokens, "
            f"{ratio:.2f} times; wrong answers late in RL have {wrong['sequence']:.1f} tokens with 1/\\|o_i\\|, "
            f"{wrong['constant']:.1f} with the constant")
    return line, ratio.mean >= 1.3, table(["average (100 RL steps)", "pass@1", "length on test",
                                           "training: length, last 3 tenths", "of wrong answers"], rows)


def row_4(k: Known) -> tuple[str, bool, list[str]]:
    rate = [k.values("countdown", "models", model, "test", "reflection") for model in ("base", "zero")]
    ratio = figure([b / a for a, b in zip(*rate)])
    without = k.score("countdown, no wait", what="reflection")
    turns = {turn: sum(k.values("countdown", "measures", "reflections", "zero", turn))
             for turn in ("wrong to right", "right to wrong", "wrong to wrong", "right to right")}
    total = sum(turns.values()) or 1
    line = (f"countdown: reflection {k.score('countdown', 'base', what='reflection')} -> "
            f"{k.score('countdown', what='reflection')} % of answers, {ratio:.1f} times; from a corpus without a single "
            f"\"wait\" {without} %; of zero's {total:,} reflections {turns['wrong to right'] / total:.1%} turn wrong into "
            f"right, {turns['right to wrong'] / total:.1%} right into wrong; pass@1 {k.score('countdown', 'base')} -> "
            f"{k.score('countdown')}, without \"wait\" {k.score('countdown, no wait', 'base')} -> "
            f"{k.score('countdown, no wait')} %")
    rows = []
    for cell in ("countdown", "countdown, no wait", "default"):
        for model in ("base", "zero"):
            found = k.values(cell, "measures", "reflections", model)
            share = lambda key: figure([f[key] for f in found]) if all(f.get(key) is not None for f in found) else "none"
            total = sum(sum(f[turn] for turn in turns) for f in found)
            part = lambda turn: f"{sum(f[turn] for f in found) / total:.0%}" if total else "none"
            rows.append([cell if cell != "default" else "arithmetic", model, k.score(cell, model), share("reflection"),
                         f"{figure([f['reflections an answer'] for f in found]):.2f}",
                         share("right, looking again"), share("right, not looking again"), share("first attempt right")
                         if cell != "default" else "", part("wrong to right"), part("right to wrong")])
    details = table(["task", "model", "pass@1", "answers that reflect", "reflections an answer",
                     "worked answers right: looking again", "not looking again", "first attempt right",
                     "wrong to right", "right to wrong"], rows)
    return line, ratio.mean >= 3 and without.mean < 0.01, details


def row_5(k: Known) -> tuple[str, bool, list[str]]:
    by = {model: k.values("default", "measures", "operations", model) for model in ("base", "zero")}
    logit = lambda p: math.log(max(p, 1e-4) / max(1 - p, 1e-4))
    rows, points, odds = [], {}, {}
    for n in by["base"][0]:
        base, zero = ([found[n] for found in by[model]] for model in by)
        points[n], odds[n] = figure([b - a for a, b in zip(base, zero)]), figure([logit(b) - logit(a) for a, b in zip(base, zero)])
        rows.append([n, figure(base), figure(zero), points[n], f"{odds[n]:.2f}"])
    most = [max(gains, key=lambda n: gains[n].mean) for gains in (points, odds)]
    line = (f"gain by operations, in points: {', '.join(f'{100 * g.mean:.0f}' for g in points.values())} (1 to 6); in "
            f"log-odds: {', '.join(f'{g.mean:.1f}' for g in odds.values())}; the most at {most[0]} in points, at "
            f"{most[1]} in log-odds")
    hardest, easiest = list(points)[-1], list(points)[0]
    passed = points[hardest].mean - points[easiest].mean > math.hypot(points[hardest].spread, points[easiest].spread)
    return line, passed, table(["operations", "base", "zero", "gain, points", "gain, log-odds"], rows)


def row_6(k: Known) -> tuple[str, bool, list[str]]:
    gain = k.gain(("default", "student_rl", "test"), ("default", "student", "test"))
    hard = k.gain(("default", "student_rl", "hard"), ("default", "student", "hard"))
    work = figure([w["student_rl"] / w["student"] for w in k.values("default", "student_work")])
    line = (f"student {k.score('default', 'student')} %, student_rl {k.score('default', 'student_rl')} %, {differs(gain)}, "
            f"with {work:.2f} times the student's FLOPs for RL; on hard {differs(hard)}")
    rows = [[name, k.score(cell, model), k.score(cell, model, "hard"),
             differs(k.gain(("default", "student", "test"), (cell, model, "test")))]
            for name, cell, model in (("forward KL", "default", "student"), ("reverse KL", "reverse", "student"),
                                      ("JSD", "jsd", "student"), ("SFT on the teacher's answers", "sft", "student"),
                                      ("forward KL, on policy", "on policy", "student"),
                                      ("RL", "default", "student_rl"), ("(its base)", "default", "student_base"))]
    return line, gain.mean >= 0.1, table(["student by", "test", "hard", "beside forward KL on test"], rows)


def row_7(k: Known) -> tuple[str, bool, list[str]]:
    rows, cells = [], ("tokens 1/4", "tokens 1/2", "worked 0", "worked 1/2", "default")
    gains = {}
    for cell in cells:
        found, start = k.values(cell, "measures", "signal"), k.values(cell, "curves", "zero")
        part = lambda key: figure([f[key] for f in found])
        gains[cell] = k.gain((cell, "base", "test"), (cell, "zero", "test"))
        rows.append([cell, k.score(cell, "base"), k.score(cell), k.score(cell, what="format"), part("mean p"), part("counted"),
                     part("predicted"), part("at the mean p"), figure([1 - c["no_signal"][0] for c in start])])
    line = "zero after " + ", ".join(f"{cell}: {k.score(cell, 'base')} -> {k.score(cell)} %" for cell in cells)
    weakest = min(cells, key=lambda cell: k.score(cell).mean)
    passed = k.score("default").mean - k.score(weakest).mean >= 0.2
    return line, passed, table(
        ["corpus", "base", "zero", "zero's format", "mean p of training problems", "groups with right and wrong: counted",
         "predicted", "at the mean p", "with any signal, first tenth of RL"], rows)


def row_8(k: Known) -> tuple[str, bool, list[str]]:
    found = k.values("default", "measures", "many_samples")
    rows, crossing = [], {}
    for kind in ("test", "hard"):
        for name in (f"base {kind}", f"zero {kind}"):
            rows.append([name, *(f"{100 * statistics.fmean([f[name][n] for f in found]):.1f}" for n in found[0][name])])
        ahead = [n for n in found[0][f"base {kind}"] if
                 statistics.fmean([f[f"base {kind}"][n] - f[f"zero {kind}"][n] for f in found]) > 0]
        crossing[kind] = f"from k = {ahead[0]} on" if ahead else "at no k"
    best = {kind: [statistics.fmean([f[f"{model} {kind}"]["256"] for f in found]) for model in ("base", "zero")] for kind in crossing}
    line = "; ".join(f"{kind}: the base is ahead {crossing[kind]}, pass@256 {100 * b:.1f} % against zero's {100 * z:.1f}"
                     for kind, (b, z) in best.items())
    return line, any("from" in text for text in crossing.values()), table(
        ["pass@k, %", *(f"k = {n}" for n in found[0]["base test"])], rows)


def row_9(k: Known) -> tuple[str, bool, list[str]]:
    rows, real = [], []
    for name, cell in (("the default, 100 steps", "half the steps"), ("advantages not divided by the deviation", "no std"),
                       ("KL 0.01", "KL 0.01"), ("KL 0.1", "KL 0.1"), ("clip higher, 0.28", "clip higher"),
                       ("average over the sequence first", "sequence"), ("Dr. GRPO's constant", "constant"), ("128 prompts x 4", "G 4"),
                       ("32 x 16", "G 16"), ("16 x 32", "G 32"), ("the batch's mean as baseline", "batch baseline")):
        gain = k.gain(("half the steps", "zero", "test"), (cell, "zero", "test"))
        if abs(gain.mean) > gain.spread:
            real.append(f"{name} ({100 * gain.mean:+.1f})")
        curves = k.values(cell, "curves", "zero")
        rows.append([name, k.score(cell), k.score(cell, kind="hard"), differs(gain) if cell != "half the steps" else "",
                     figure([statistics.fmean(c["accuracy"]) for c in curves]),
                     figure([c["no_signal"][9] for c in curves])])
    line = "differ on test by more than the spread: " + (", ".join(real) or "none")
    return line, bool(real), table(["change", "test", "hard", "beside the default", "training accuracy, mean over the run",
                                    "groups without signal at the end"], rows)


def row_10(k: Known) -> tuple[str, bool, list[str]]:
    found = k.values("default", "measures", "distributions")
    rows = [[model, *(figure([f[model][kind] for f in found]) for kind in found[0][model])] for model in found[0]]
    drop = {kind: figure([f["student"]["test"] - f["student"][kind] for f in found]) for kind in found[0]["student"]}
    line = (f"the student on trained problems beside test: {differs(Figure(-drop['trained'].mean, drop['trained'].spread))}; it "
            f"loses {drop['hard']} points on longer problems, {drop['larger numbers']} on larger numbers (the teacher "
            + " and ".join(str(figure([f["zero"]["test"] - f["zero"][kind] for f in found]).__format__(""))
                           for kind in ("hard", "larger numbers")) + ")")
    return line, drop["hard"].mean > drop["hard"].spread and drop["larger numbers"].mean > drop["larger numbers"].spread, \
        table(["model", *found[0]["student"]], rows)


ROWS = {
    1: Row("RL alone lifts pass@1", "AIME 2024: 15.6 -> 77.9 (R1-Zero; 2501.12948v2)",
           "base -> zero at least +50 points; shuffled rewards at most +5; the format reward alone at least 20 below zero",
           ("default", "shuffled rewards", "format alone"), row_1),
    2: Row("voting adds", "AIME 2024: 77.9 -> 86.7 by self-consistency (2501.12948v2)",
           "maj@16 at least 3 points above pass@1 wherever zero's is under 95 %", ("default",), row_2),
    3: Row("length grows unrewarded", "it rises throughout RL; 1/\\|o_i\\| makes wrong answers longer (2503.20783)",
           "answers to test problems at least 1.3 times as long as the base's", ("default", "half the steps", "sequence", "constant"), row_3),
    4: Row("reflection rises", "ten reflective words rise 5 to 7 times (2501.12948v2, C.2)",
           "at least 3 times the base's where checking pays; under 1 % from a corpus without \"wait\"",
           ("default", "countdown", "countdown, no wait"), row_4),
    5: Row("hard problems gain most", "MATH level 5 goes from 0.55 to 0.90, levels 1-3 to 0.90-0.95 early (2501.12948v2, C.1)",
           "the gain in points at 6 operations is above that at 1 by more than the spread", ("default",), row_5),
    6: Row("distillation beats RL on the small model", "AIME 2024: 72.6 distilled, 47.0 by RL (2501.12948v2, table 16)",
           "student at least 10 points above student_rl", ("default", "reverse", "jsd", "sft", "on policy"), row_6),
    7: Row("the base gates RL", "small bases \"consistently failed\" (2501.12948v2, G.1)",
           "zero from the weakest base at least 20 points under the default's",
           ("default", "tokens 1/4", "tokens 1/2", "worked 0", "worked 1/2"), row_7),
    8: Row("RL sharpens rather than teaches", "RL wins at small k of pass@k, the base at large k (2504.13837)",
           "the base is ahead at some k up to 256", ("default",), row_8),
    9: Row("what matters in GRPO", "no deviation, a constant (2503.20783); clip higher, averages over tokens (2503.14476)",
           "some change moves pass@1 on test by more than the spread",
           ("half the steps", "no std", "KL 0.01", "KL 0.1", "clip higher", "sequence", "constant", "G 4", "G 16", "G 32",
            "batch baseline"), row_9),
    10: Row("easy tests flatter a student", "",
            "the student loses more than the spread on longer problems and on larger numbers", ("default",), row_10),
}


# The page


def minutes(k: Known, cells: tuple[str, ...]) -> float:
    """What training and evaluating these cells took, one after the other."""
    return sum(sum(k.values(cell, "seconds")) for cell in cells) / 60


def page(k: Known) -> str:
    """experiments/findings.md, of the rows whose cells are all there."""
    rows, details = [], []
    for number, row in ROWS.items():
        try:
            line, passed, lines = row.measure(k)
        except KeyError as missing:
            print(f"row {number} is left out: {missing} has not been run")
            continue
        rows.append([number, row.claim, row.paper, row.bar, line, "pass" if passed else "fail"])
        commands = [f"    python train.py {CELLS[cell].flags}" for cell in row.cells]
        details += [f"## {number}. {row.claim}", "", f"`python experiments/findings.py --only={number}` trains "
                    f"{minutes(k, row.cells):.0f} minutes of one thread, for seeds 0, 1 and 2:", "", *commands, *lines]
    done = [name for name in CELLS if all(stored(name, seed) for seed in SEEDS)]
    head = ["# Findings", "", "What is said of DeepSeek-R1, at toy scale, with controls. `python experiments/findings.py` "
            "writes this page from experiments/results/, after running what is missing there; it says what a cell and a spread are. "
            f"All cells together: {minutes(k, tuple(done)) / 60:.1f} hours of one thread, two at a time on two cores.",
            "", "Seeds 0, 1, 2; 256 problems x 16 samples at temperature 1 unless a table says otherwise."]
    return "\n".join(head + table(["#", "claim", "paper", "bar, fixed before", "measured", ""], rows) + details).rstrip() + "\n"


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
        write_file(PAGE, page(Known()).encode())
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
