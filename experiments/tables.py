"""The tables of the findings. Each finding has a bar, and a function that reads its figures from the stored cells: the
figure that decides, whether it reaches the bar, and the tables. cells.py has the cells, which are the runs. findings.py
writes the tables into findings.md, which defines the terms of this file, and into docs/variants.md. In every function
below, k is the Known of all stored cells.
"""
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from measures import TURNS  # cells.py sets the path
from variants import VARIANTS


# Means and spreads


@dataclass(frozen=True)
class Figure:
    """A mean over the seeds and its spread."""
    mean: float
    spread: float

    def __str__(self) -> str:
        return format(self)

    def __format__(self, spec: str) -> str:
        """Without a spec: a share in percent, such as "96.6 ± 0.6". With a spec such as ".2f": the number itself."""
        scale = 1 if spec else 100
        return f"{scale * self.mean:{spec or '.1f'}} ± {scale * self.spread:{spec or '.1f'}}"


def figure(values: list[float], errors: list[float] | None = None) -> Figure:
    """The mean of the values, one for each seed. The spread is the standard deviation of the values, or the mean of
    their standard errors over problems if these are given and larger.

    >>> f"{figure([0.5, 0.6, 0.7])}", f"{figure([1.0, 2.0, 3.0], [4.0, 4.0, 4.0]):.1f}"
    ('60.0 ± 10.0', '2.0 ± 4.0')
    """
    return Figure(statistics.fmean(values), max(statistics.stdev(values), statistics.fmean(errors or [0.0])))


@dataclass(frozen=True)
class Known:
    """The stored cells and their figures. Raises KeyError for a cell that has not been run."""
    cells: dict[str, list[dict]]  # name of the cell -> the stored results of each seed

    def values(self, name: str, *path: str) -> list[float]:
        """For each seed, the value at this path in the cell's results."""
        found = self.cells[name]
        for key in path:
            found = [cell[key] for cell in found]
        return found

    def tenths(self, name: str, model: str, key: str) -> list[list[float | None]]:
        """For each seed, the means of a metric in each tenth of the RL steps. None if the tenth has no value."""
        means = []
        for rows in self.values(name, "rows", model, key):
            tenths = [rows[i * len(rows) // 10:(i + 1) * len(rows) // 10] for i in range(10)]
            known = [[value for value in tenth if value is not None] for tenth in tenths]
            means.append([statistics.fmean(values) if values else None for values in known])
        return means

    def errors(self, name: str, model: str, kind: str) -> list[float]:
        """For each seed, the standard error of pass@1 over problems."""
        return self.values(name, "models", model, kind, "pass@1_se")

    def score(self, name: str, model: str = "zero", kind: str = "test", what: str = "pass@1") -> Figure:
        return figure(self.values(name, "models", model, kind, what),
                      self.errors(name, model, kind) if what == "pass@1" else None)

    def gain(self, before: tuple[str, str, str], after: tuple[str, str, str]) -> Figure:
        """The gain in pass@1 from one (cell, model, kind) to another, computed for each seed."""
        pairs = [self.values(name, "models", model, kind, "pass@1") for name, model, kind in (before, after)]
        errors = zip(self.errors(*before), self.errors(*after))
        return figure([b - a for a, b in zip(*pairs)], [math.hypot(a, b) for a, b in errors])


def table(head: list[str], rows: list[list]) -> list[str]:
    """The lines of a Markdown table."""
    return ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head),
            *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]


def diverged(k: Known, cell: str) -> list[int]:
    """The steps that the diverged runs of a variant took."""
    runs = zip(k.values(cell, "models"), k.values(cell, "rows", "zero", "accuracy"))
    return [len(accuracy) for models, accuracy in runs if not models]


def differs(gain: Figure) -> str:
    """A gain in words."""
    return f"{gain} points" + ("" if abs(gain.mean) > gain.spread else ", no difference")


# The findings. The function of each returns the figure that decides, whether it reaches the bar, and the tables by the
# names that they have in findings.md.

Tables = dict[str, list[str]]


def finding_1(k: Known) -> tuple[str, bool, Tables]:
    base, zero = ("default", "base", "test"), ("default", "zero", "test")
    gain = k.gain(base, zero)
    shuffled = k.gain(base, ("shuffled rewards", "zero", "test"))
    behind = k.gain(("format alone", "zero", "test"), zero)
    rows = [["(the base)", k.score("default", "base"), k.score("default", "base", "hard"),
             k.score("default", "base", what="format"), ""]]
    for name, cell in (("both rewards", "default"), ("rewards shuffled in each group", "shuffled rewards"),
                       ("the format reward alone", "format alone")):
        best = figure([max(curve) for curve in k.tenths(cell, "zero", "accuracy")])
        rows.append([name, k.score(cell), k.score(cell, kind="hard"), k.score(cell, what="format"), best])
    holds = gain.mean >= 0.5 and shuffled.mean <= 0.05 and behind.mean >= 0.2
    head = ["RL from the base with", "pass@1 on test", "pass@1 on hard", "format", "correct in the best tenth of RL"]
    return f"{gain} points", holds, {"1": table(head, rows)}


def finding_2(k: Known) -> tuple[str, bool, Tables]:
    rows, below = [], {}
    for model in ("base", "zero", "student"):
        for kind in ("test", "hard"):
            single, vote = (k.values("default", "models", model, kind, what) for what in ("pass@1", "maj@16"))
            gain = figure([b - a for a, b in zip(single, vote)])
            rows.append([model, kind, k.score("default", model, kind), k.score("default", model, kind, "maj@16"), gain])
            if model == "zero" and statistics.fmean(single) < 0.95:
                below[kind] = gain
    least = min(below, key=lambda kind: below[kind].mean, default=None)
    holds = least is not None and below[least].mean >= 0.03
    return f"{below[least]} points ({least})" if below else "none", holds, {
        "2": table(["model", "problems", "pass@1", "maj@16", "gain, points"], rows)}


def finding_3(k: Known) -> tuple[str, bool, Tables]:
    pairs = [k.values("default", "models", model, "test", "length") for model in ("base", "zero")]
    ratio = figure([b / a for a, b in zip(*pairs)])
    rows = [["(the base)", k.score("default", "base"), f"{k.score('default', 'base', what='length'):.1f}", ""]]
    for name, cell in (("sequence: each token weighs 1/\\|o_i\\|", "sequence"), ("token", "default"),
                       ("constant", "constant"), ("token, and the format reward alone", "format alone")):
        late = figure([statistics.fmean(v for v in tenths[7:] if v is not None)
                       for tenths in k.tenths(cell, "zero", "length_wrong")])
        rows.append([name, k.score(cell), f"{k.score(cell, what='length'):.1f}", f"{late:.1f}"])
    return f"{ratio:.2f} times", ratio.mean >= 1.3, {"3": table(
        ["average in the loss", "pass@1 on test", "length on test", "length of wrong answers late in RL"], rows)}


def finding_4(k: Known) -> tuple[str, bool, Tables]:
    rate = [k.values("countdown", "models", model, "test", "reflection") for model in ("base", "zero")]
    ratio = figure([b / a for a, b in zip(*rate)])
    without = k.score("countdown, no wait", what="reflection")
    rows = []
    for cell in ("countdown", "countdown, no wait"):
        for model in ("base", "zero"):
            found = k.values(cell, "measures", "reflections", model)
            counts = [sum(f[turn] for f in found) for turn in TURNS]
            shares = [f"{count / sum(counts):.0%}" if sum(counts) else "none" for count in counts[:2]]
            rows.append([cell, model, k.score(cell, model), k.score(cell, model, what="reflection"), *shares])
    return f"{ratio:.1f} times", ratio.mean >= 3 and without.mean < 0.01, {"4": table(
        ["task", "model", "pass@1 on test", "answers that reflect", "\"wait\": wrong to correct",
         "\"wait\": correct to wrong"], rows)}


def logit(p: float) -> float:
    """The log-odds log(p / (1 - p)), between -9.2 and 9.2."""
    return math.log(max(p, 1e-4) / max(1 - p, 1e-4))


def finding_5(k: Known) -> tuple[str, bool, Tables]:
    by = {model: k.values("default", "measures", "operations", model) for model in ("base", "zero")}
    rows, points, odds = [], {}, {}
    for n in by["base"][0]:
        base, zero = ([found[n] for found in by[model]] for model in by)
        points[n] = figure([b - a for a, b in zip(base, zero)])
        odds[n] = figure([logit(b) - logit(a) for a, b in zip(base, zero)])
        rows.append([n, figure(base), figure(zero), points[n], f"{odds[n]:.2f}"])
    ends = [[zero[n] - base[n] for n in (list(base)[0], list(base)[-1])] for base, zero in zip(*by.values())]
    more = figure([hardest - easiest for easiest, hardest in ends])
    return f"{more} points", more.mean > more.spread, {
        "5": table(["operations", "pass@1 of base", "pass@1 of zero", "gain, points", "gain, log-odds"], rows)}


def finding_6(k: Known) -> tuple[str, bool, Tables]:
    pairs = [k.values("default", "models", model) for model in ("student_rl", "student")]
    # the mean of the gains on test and on hard; its standard error is half the root of the sum of four squared errors
    kinds = ("test", "hard")
    mean = figure([statistics.fmean(after[kind]["pass@1"] - before[kind]["pass@1"] for kind in kinds)
                   for before, after in zip(*pairs)],
                  [math.hypot(*(model[kind]["pass@1_se"] for model in pair for kind in kinds)) / 2
                   for pair in zip(*pairs)])
    work, params = k.values("default", "work"), k.values("default", "models")
    of_student = figure([w["student_rl"]["student"] / w["student"]["student"] for w in work])
    of_both = figure([(w["student"]["student"] + w["student"]["teacher"] * m["zero"]["params"] / m["student"]["params"])
                      / w["student_rl"]["student"] for w, m in zip(work, params)])
    rows = [[name, k.score(cell, model), k.score(cell, model, "hard"), k.score(cell, model, "hard", "format")]
            for name, cell, model in (("distillation", "default", "student"), ("RL", "default", "student_rl"),
                                      ("(its base)", "default", "student_base"), ("(the teacher)", "default", "zero"),
                                      ("distillation, 1 to 4 operations", "short problems", "student"))]
    losses = [[name, k.score(cell, "student"), k.score(cell, "student", "hard"),
               differs(k.gain(("default", "student", "test"), (cell, "student", "test")))]
              for name, cell in (("forward KL", "default"), ("reverse KL", "reverse"), ("JSD", "jsd"),
                                 ("SFT on the teacher's answers", "sft"), ("forward KL, on policy", "on policy"))]
    return f"{mean} points", mean.mean >= 0.1, {
        "6": table(["the small model is trained by", "pass@1 on test", "pass@1 on hard", "format on hard"], rows),
        "6 more": table(["", "measured"], [
            ["FLOPs of the small model, RL divided by distillation", f"{of_student:.2f}"],
            ["FLOPs with those of the teacher, distillation divided by RL", f"{of_both:.1f}"]]),
        "6 losses": table(["loss", "pass@1 on test", "pass@1 on hard", "test, compared with forward KL"], losses)}


def finding_7(k: Known) -> tuple[str, bool, Tables]:
    rows, cells = [], {"tokens 1/4": "a quarter of the tokens", "worked 0": "no answers with steps",
                       "default": "the default"}
    for cell, name in cells.items():
        found, start = k.values(cell, "measures", "signal"), k.tenths(cell, "zero", "no_signal")
        rows.append([name, k.score(cell, "base"), k.score(cell), k.score(cell, what="format"),
                     *(figure([f[key] for f in found]) for key in ("mean p", "counted", "predicted", "at the mean p")),
                     figure([1 - tenths[0] for tenths in start])])
    weakest = min(cells, key=lambda cell: k.score(cell, "base").mean)
    gain = k.gain((weakest, "zero", "test"), ("default", "zero", "test"))
    return f"{gain} points", gain.mean >= 0.2, {"7": table(
        ["corpus of the base", "pass@1 of base", "pass@1 of zero", "format of zero", "mean p",
         "groups with correct and wrong answers: counted", "predicted", "predicted from the mean p",
         "groups with a signal, first tenth of RL"], rows)}


def finding_8(k: Known) -> tuple[str, bool, Tables]:
    found = k.values("default", "measures", "many_samples")
    rows, all_leads = [], {}
    for kind in ("test", "hard"):
        base, zero = f"base {kind}", f"zero {kind}"
        for name in (base, zero):
            means = [100 * statistics.fmean([f[name][n] for f in found]) for n in found[0][name]]
            rows.append([name.replace(" ", " on "), *(f"{mean:.1f}" for mean in means)])
        leads = {n: figure([f[base][n] - f[zero][n] for f in found]) for n in found[0][base]}
        rows.append([f"base minus zero on {kind}", *leads.values()])
        all_leads |= {(kind, n): lead for n, lead in leads.items()}
    (kind, n), lead = max(all_leads.items(), key=lambda item: (item[1].mean > item[1].spread, item[1].mean))
    return f"{lead} points at most ({kind}, k = {n})", lead.mean > lead.spread, {
        "8": table(["pass@k", *(f"k = {n}" for n in found[0]["base test"])], rows)}


def finding_9(k: Known) -> tuple[str, bool, Tables]:
    rows, gains = [], {}
    changes = {"default": "none: 64 prompts x 8 answers",
               "sequence": "loss averaged over each answer first (1/\\|o_i\\|)",
               "constant": "loss divided by Dr. GRPO's constant", "G 4": "128 prompts x 4 answers",
               "G 32": "16 prompts x 32 answers", "batch baseline": "the batch's mean as the baseline"}
    for cell, name in changes.items():
        gains[name] = k.gain(("default", "zero", "test"), (cell, "zero", "test"))
        compared = "" if cell == "default" else differs(gains[name])
        rows.append([name, k.score(cell), k.score(cell, kind="hard"), compared])
    for name in VARIANTS:
        if not diverged(k, f"default {name}"):
            gains[name] = k.gain(("default ours", "zero", "test"), (f"default {name}", "zero", "test"))
    most = max(gains, key=lambda name: abs(gains[name].mean) / gains[name].spread)
    return f"{gains[most]} points ({most})", abs(gains[most].mean) > 2 * gains[most].spread, {"9": table(
        ["change", "pass@1 on test", "pass@1 on hard", "test, compared with no change"], rows)}


def finding_10(k: Known) -> tuple[str, bool, Tables]:
    found = k.values("default", "measures", "distributions")
    rows, more = [["student"], ["zero, its teacher"], ["student minus zero"]], {}
    for kind in ("hard", "larger numbers"):
        student, zero = ([f[model]["test"] - f[model][kind] for f in found] for model in ("student", "zero"))
        more[kind] = figure([a - b for a, b in zip(student, zero)])
        for row, drop in zip(rows, (figure(student), figure(zero), more[kind])):
            row.append(drop)
    least = min(more, key=lambda kind: more[kind].mean - more[kind].spread)
    return f"{more[least]} points ({least})", more[least].mean > more[least].spread, {"10": table(
        ["drop", *more], rows)}


PIPELINE = ("base", "zero", "dev1", "dev2", "dev3", "r1", "student", "student_sft")
SHOWN = ("pass@1 on test", "pass@1 on hard", "format", "language", "consistent", "everyday")


def pipeline_values(k: Known, model: str, cell: str = "R1") -> dict[str, list[float]]:
    """The measures that finding 11 compares, for each seed. Language and consistency are of well-formed answers."""
    value = lambda kind, what: k.values(cell, "models", model, kind, what)
    of_well_formed = lambda what: [x / n if n else 0.0 for x, n in zip(value("test", what), value("test", "format"))]
    return {"pass@1 on test": value("test", "pass@1"), "pass@1 on hard": value("hard", "pass@1"),
            "format": value("test", "format"), "language": of_well_formed("language"),
            "consistent": of_well_formed("consistent"), "everyday": value("everyday", "pass@1")}


def gain(before: dict, after: dict, what: str) -> Figure:
    """The difference of two models in a column, seed by seed."""
    return figure([b - a for a, b in zip(before[what], after[what])])


def parts_of_r1(of: dict, without: dict) -> dict[str, tuple[str, bool]]:
    """The parts of finding 11 -> what was measured, and whether the part holds. `of` has the columns of each model,
    `without` those of the variants of dev2."""
    parts = {}
    mixing, learnt = (gain(of["base"], of["zero"], what) for what in ("consistent", "pass@1 on test"))
    before, after = (figure(of[model]["consistent"]) for model in ("base", "zero"))
    parts["(a)"] = (f"consistent: base {before} %, zero {after} %; pass@1 rises by {learnt} points",
                    mixing.mean <= 0.1 and learnt.mean > 0.5)

    consistent, cost = figure(of["dev2"]["consistent"]), gain(of["dev2"], without["language 0"], "pass@1 on test")
    parts["(b)"] = (f"consistent: {consistent} %; the reward costs {cost} points",
                    consistent.mean >= 0.97 and cost.mean <= 0.03)

    well_formed, pure, solved = (figure(of["dev1"][what]) for what in ("format", "consistent", "pass@1 on test"))
    cold = [gain(of["base"], of["dev1"], what).mean for what in ("format", "consistent")]
    parts["(c)"] = (f"dev1: format {well_formed} %, consistent {pure} %, pass@1 {solved} %",
                    min(cold) > 0 and gain(of["dev1"], of["zero"], "pass@1 on test").mean > 0)

    behind = gain(of["dev2"], of["zero"], "pass@1 on test")
    parts["(d)"] = f"{behind} points below", behind.mean <= 0.02

    zero, dev2, dev3 = (gain(of[model], of["base"], "everyday") for model in ("zero", "dev2", "dev3"))
    parts["(e)"] = (f"points below the base (negative: above): zero {zero}, dev2 {dev2}, dev3 {dev3}",
                    min(zero.mean - zero.spread, dev2.mean - dev2.spread) > 0 and dev3.mean <= dev3.spread)

    below = []  # the columns in which r1 is below the best model by more than the spread
    for what in SHOWN:
        best = max(PIPELINE[:6], key=lambda model: statistics.fmean(of[model][what]))
        short = gain(of["r1"], of[best], what)
        if short.mean > max(short.spread, 0.001):
            below.append(f"{what}: {short} points below {best}")
    parts["(f)"] = "; ".join(below) or "r1 is within the spread of the best in each of them", not below
    return parts


def finding_11(k: Known) -> tuple[str, bool, Tables]:
    of = {model: pipeline_values(k, model) for model in PIPELINE}
    ablations = {"language 0": "dev2, language reward of weight 0",
                 "language 1/4": "dev2, language reward of weight 0.25",
                 "no cold start": "dev2, language reward of weight 1, from the base instead of dev1"}
    without = {cell: pipeline_values(k, "dev2", cell) for cell in ablations}

    parts = parts_of_r1(of, without)
    n_hold = sum(holds for _, holds in parts.values())
    judged = [[part, measured, "holds" if holds else "does not hold"] for part, (measured, holds) in parts.items()]

    rows = [[model, *(figure(of[model][what]) for what in SHOWN)] for model in PIPELINE]
    rows += [[name, *(figure(values[what]) for what in SHOWN)] for name, values in
             zip(ablations.values(), without.values())]
    tenths = [k.tenths(cell, "dev2", "consistent") for cell in ("R1", *ablations)]
    return f"{n_hold} of {len(parts)} parts", n_hold == len(parts), {
        "11": table(["part", "measured", "verdict"], judged),
        "11 models": table(["model", *SHOWN], rows),
        "11 tenths": table(["RL steps", *(f"{10 * i + 1} to {10 * (i + 1)}" for i in range(10))],
                           [[name, *(f"{100 * statistics.fmean(values):.0f}" for values in zip(*curves))]
                            for name, curves in zip(("dev2", *ablations.values()), tenths)])}


def finding_12(k: Known) -> tuple[str, bool, Tables]:
    gains, rows = {}, [["(the base)", k.score("default", "base"), k.score("default", "base", "hard"),
                        k.score("default", "base", "hard", "maj@16"), "", ""]]
    for name, cell in (("none", "no KL"), ("0.001 (the default)", "default"), ("0.01", "KL 0.01"), ("0.1", "KL 0.1"),
                       ("0.001, on all completions", "all completions")):
        gains[cell] = k.gain(("no KL", "zero", "hard"), (cell, "zero", "hard"))
        rows.append([name, k.score(cell), k.score(cell, kind="hard"), k.score(cell, kind="hard", what="maj@16"),
                     "" if cell == "no KL" else differs(gains[cell]),
                     f"{figure(k.values(cell, 'measures', 'divergence', 'kl')):.3f}"])
    return f"{gains['default']} points", gains["default"].mean > gains["default"].spread, {"12": table(
        ["penalty", "pass@1 on test", "pass@1 on hard", "maj@16 on hard", "pass@1 on hard, compared with none",
         "KL divergence"], rows)}


def finding_13(k: Known) -> tuple[str, bool, Tables]:
    rows, losses = [], {}
    for model in ("base", "zero", "student_base", "student"):
        for kind in ("test", "hard"):
            loss = k.gain(("float32", model, kind), ("default", model, kind))
            rows.append([model, kind, *(k.score(cell, model, kind) for cell in ("float32", "default")), differs(loss)])
            if model in ("zero", "student"):
                losses[f"{model} on {kind}"] = loss
    worst = min(losses, key=lambda name: losses[name].mean + losses[name].spread)
    return f"{losses[worst]} points ({worst})", losses[worst].mean >= -losses[worst].spread, {"13": table(
        ["model", "problems", "float32", "bfloat16", "bfloat16, compared with float32"], rows)}


def finding_14(k: Known) -> tuple[str, bool, Tables]:
    rows = []
    for regime, updates in (("default", "4, at 3e-4"), ("stress", "16, at 8e-4")):
        for name, clip in (("ours", "yes"), ("no_clip", "no")):
            cell = f"{regime} {name}"
            if diverged(k, cell):
                rows.append([updates, clip, "diverged", "", "", ""])
                continue
            rows.append([updates, clip, k.score(cell), k.score(cell, kind="hard"), k.score(cell, what="format"),
                         f"{k.score(cell, what='length'):.1f}"])
    without, clipped = ([models["zero"]["test"]["pass@1"] if models else 0.0  # 0 if the run diverged
                         for models in k.values(f"stress {name}", "models")] for name in ("no_clip", "ours"))
    losses = [b - a for a, b in zip(without, clipped)]
    return f"{figure(losses)} points", min(losses) >= 0.3, {"14": table(
        ["updates on a rollout, and learning rate", "clip", "pass@1 on test", "pass@1 on hard", "format", "length"],
        rows)}


# docs/variants.md


def steps_to(heldout: list[float | None], accuracy: float) -> float:
    """The first step at which a quick evaluation reached an accuracy, or infinity.

    >>> steps_to([None, 0.5, None, 0.91], 0.9)
    4
    """
    return next((i for i, value in enumerate(heldout, 1) if value is not None and value >= accuracy), math.inf)


def largest(rows: dict[str, list], *fields: str) -> float:
    """The largest value that the sum of some fields has in a step. (A value that is not logged is 0.)"""
    return max(sum(filter(None, values)) for values in zip(*(rows[field] for field in fields)))


def variants_table(k: Known, regime: str) -> list[str]:
    """A row for each variant, with means over the seeds."""
    head = ["variant", "test", "minus `ours`", "hard", "format", "steps to 90 %", "length", "entropy", "largest KL",
            "clipped, most"]
    lines = []
    for name in VARIANTS:
        cell = f"{regime} {name}"
        rows = k.values(cell, "rows", "zero")
        ends = diverged(k, cell)
        if ends:
            words = f"diverged in {len(ends)} of {len(rows)} runs, after {', '.join(map(str, ends))} steps"
            lines.append([f"`{name}`", words, *[""] * (len(head) - 2)])
            continue
        ninety = [steps_to(r["heldout_accuracy"], 0.9) for r in rows]
        clipped = [largest(r, "clip_fraction_low", "clip_fraction_high") for r in rows]
        ahead = k.gain((f"{regime} ours", "zero", "test"), (cell, "zero", "test"))
        lines.append([
            f"`{name}`", k.score(cell), "" if name == "ours" else ahead,
            k.score(cell, kind="hard"), k.score(cell, what="format"),
            ", ".join("never" if step == math.inf else str(step) for step in ninety),
            f"{k.score(cell, what='length').mean:.1f}",
            f"{statistics.fmean(r['entropy'][-1] for r in rows):.3f}",
            f"{statistics.fmean(largest(r, 'kl') for r in rows):.2g}",
            f"{100 * statistics.fmean(clipped):.1f}"])
    return table(head, lines)


class Finding(NamedTuple):
    cells: tuple[str, ...]  # the cells that the function reads
    measure: Callable[[Known], tuple[str, bool, Tables]]


PAIRS = tuple(f"{regime} {name}" for regime in ("default", "stress") for name in ("ours", "no_clip"))
FINDINGS = {
    1: Finding(("default", "shuffled rewards", "format alone"), finding_1),
    2: Finding(("default",), finding_2),
    3: Finding(("default", "format alone", "sequence", "constant"), finding_3),
    4: Finding(("countdown", "countdown, no wait"), finding_4),
    5: Finding(("default",), finding_5),
    6: Finding(("default", "short problems", "reverse", "jsd", "sft", "on policy"), finding_6),
    7: Finding(("default", "tokens 1/4", "worked 0"), finding_7),
    8: Finding(("default",), finding_8),
    9: Finding(("default", "sequence", "constant", "G 4", "G 32", "batch baseline",
                *(f"default {name}" for name in VARIANTS)), finding_9),
    10: Finding(("default",), finding_10),
    11: Finding(("R1", "language 0", "language 1/4", "no cold start"), finding_11),
    12: Finding(("default", "no KL", "KL 0.01", "KL 0.1", "all completions"), finding_12),
    13: Finding(("default", "float32"), finding_13),
    14: Finding(PAIRS, finding_14),
}
