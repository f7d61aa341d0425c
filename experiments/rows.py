"""The rows of the findings: each claim, what is said of large models, the bar that decides, and how the stored cells
are read. findings.py runs the cells and writes the page; `k` is its Known.
"""
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass


# Means and their spread


@dataclass(frozen=True)
class Figure:
    """A mean over seeds and its spread."""
    mean: float
    spread: float

    def __str__(self) -> str:
        return format(self)

    def __format__(self, spec: str) -> str:
        """"96.6 ± 0.6", of a share in percent or points; with a spec such as ".2f" the number itself."""
        scale = 1 if spec else 100
        return f"{scale * self.mean:{spec or '.1f'}} ± {scale * self.spread:{spec or '.1f'}}"


def figure(values: list[float], errors: list[float] | None = None) -> Figure:
    """Of one value a seed: the spread is their standard deviation, or the mean of their standard errors over problems,
    where these are given and larger.

    >>> f"{figure([0.5, 0.6, 0.7])}", f"{figure([1.0, 2.0, 3.0], [4.0, 4.0, 4.0]):.1f}"
    ('60.0 ± 10.0', '2.0 ± 4.0')
    """
    return Figure(statistics.fmean(values), max(statistics.stdev(values), statistics.fmean(errors or [0.0])))


@dataclass(frozen=True)
class Known:
    """The stored cells, and figures of them. Raises KeyError for one that has not been run."""
    cells: dict[str, list[dict]]  # by name: what is stored for each seed

    def values(self, name: str, *path: str) -> list[float]:
        """What stands at a path in the results, for each seed."""
        found = self.cells[name]
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
    bar: str                         # what decides
    cells: tuple[str, ...]
    measure: Callable[[Known], tuple[str, bool, list[str]]]


def row_1(k: Known) -> tuple[str, bool, list[str]]:
    base, zero = ("default", "base", "test"), ("default", "zero", "test")
    gain = k.gain(base, zero)
    shuffled, alone = k.gain(base, ("shuffled rewards", "zero", "test")), k.score("format alone")
    behind = k.gain(("format alone", "zero", "test"), zero)
    predicted = figure(k.values("default", "measures", "conditional", "right if well formed"))
    curves = [curve["accuracy"] for curve in k.values("format alone", "curves", "zero")]
    best = figure([max(curve) for curve in curves])
    line = (f"base {k.score('default', 'base')} -> zero {k.score('default')} %, {differs(gain)}; with shuffled rewards "
            f"{differs(shuffled)}; the format reward alone ends at {alone} %, after {best} % in its best tenth, where "
            f"{predicted} % of the base's well-formed answers are right")
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
    for name, cell in (("sequence: 1/\\|o_i\\|", "sequence"), ("token", "half the steps"),
                       ("constant: Dr. GRPO", "constant")):
        curves = k.values(cell, "curves", "zero")
        tail = {key: figure([statistics.fmean([v for v in c[key][7:] if v is not None]) for c in curves])
                for key in ("length", "length_wrong")}
        wrong[cell] = tail["length_wrong"]
        rows.append([name, k.score(cell), f"{k.score(cell, what='length'):.1f}", f"{tail['length']:.1f}",
                     f"{tail['length_wrong']:.1f}"])
    alone, again = (figure([b / a for a, b in zip(k.values(start, "models", "base", "test", "length"),
                                                  k.values(cell, "models", "zero", "test", "length"))])
                    for start, cell in (("default", "format alone"), ("countdown", "countdown")))
    line = (f"{k.score('default', 'base', what='length'):.1f} -> {k.score('default', what='length'):.1f} tokens, "
            f"{ratio:.2f} times; the format reward alone gives {alone:.2f} times, countdown {again:.2f}; wrong answers "
            f"late in RL have {wrong['sequence']:.1f} tokens with 1/\\|o_i\\|, "
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
            f"{k.score('countdown', what='reflection')} % of answers, {ratio:.1f} times; from a corpus without a "
            f"single \"wait\" {without} %; of zero's {total:,} reflections {turns['wrong to right'] / total:.1%} turn "
            f"wrong into right, {turns['right to wrong'] / total:.1%} right into wrong; pass@1 "
            f"{k.score('countdown', 'base')} -> {k.score('countdown')}, without \"wait\" "
            f"{k.score('countdown, no wait', 'base')} -> {k.score('countdown, no wait')} %")
    rows = []
    for cell in ("countdown", "countdown, no wait", "default"):
        for model in ("base", "zero"):
            found = k.values(cell, "measures", "reflections", model)
            all_turns = sum(f[turn] for f in found for turn in turns)
            shares = ([f[key] for f in found] for key in ("looks again", "right, looking again",
                                                          "right, not looking again", "first attempt right"))
            row = [figure(share) if None not in share else "none" for share in shares]
            row += [f"{sum(f[turn] for f in found) / all_turns:.0%}" if all_turns else "none"
                    for turn in ("wrong to right", "right to wrong")]
            rows.append(["arithmetic" if cell == "default" else cell, model, k.score(cell, model),
                         k.score(cell, model, what="reflection"), *row])
    details = ["", "\"Right\" is of worked answers; in countdown of those whose first attempt missed."]
    details += table(["task", "model", "pass@1", "answers that reflect", "worked answers that look again",
                      "right, looking again", "right, not looking again", "first attempt right",
                      "reflections: wrong to right", "right to wrong"], rows)
    return line, ratio.mean >= 3 and without.mean < 0.01, details


def logit(p: float) -> float:
    """Log-odds, of at most 9 either way."""
    return math.log(max(p, 1e-4) / max(1 - p, 1e-4))


def row_5(k: Known) -> tuple[str, bool, list[str]]:
    by = {model: k.values("default", "measures", "operations", model) for model in ("base", "zero")}
    rows, points, odds = [], {}, {}
    for n in by["base"][0]:
        base, zero = ([found[n] for found in by[model]] for model in by)
        points[n] = figure([b - a for a, b in zip(base, zero)])
        odds[n] = figure([logit(b) - logit(a) for a, b in zip(base, zero)])
        rows.append([n, figure(base), figure(zero), points[n], f"{odds[n]:.2f}"])
    most = [max(gains, key=lambda n: gains[n].mean) for gains in (points, odds)]
    line = (f"gain by operations, in points: {', '.join(f'{100 * g.mean:.0f}' for g in points.values())} (1 to 6); in "
            f"log-odds: {', '.join(f'{g.mean:.1f}' for g in odds.values())}; the most at {most[0]} in points, at "
            f"{most[1]} in log-odds")
    ends = [[zero[n] - base[n] for n in (list(base)[0], list(base)[-1])] for base, zero in zip(*by.values())]
    more = figure([hardest - easiest for easiest, hardest in ends])
    return line, more.mean > more.spread, table(["operations", "base", "zero", "gain, points", "gain, log-odds"], rows)


def row_6(k: Known) -> tuple[str, bool, list[str]]:
    gain = k.gain(("default", "student_rl", "test"), ("default", "student", "test"))
    hard = k.gain(("default", "student_rl", "hard"), ("default", "student", "hard"))
    work, params = k.values("default", "work"), k.values("default", "models")
    of_student = figure([w["student_rl"]["student"] / w["student"]["student"] for w in work])
    of_both = figure([(w["student"]["student"] + w["student"]["teacher"] * m["zero"]["params"] / m["student"]["params"])
                      / w["student_rl"]["student"] for w, m in zip(work, params)])
    line = (f"student {k.score('default', 'student')} %, student_rl {k.score('default', 'student_rl')} %, "
            f"{differs(gain)}, with {of_student:.2f} times the student's FLOPs in RL (the teacher's counted too, "
            f"distillation takes {of_both:.1f} times as many as RL); on hard {differs(hard)}")
    rows = [[name, k.score(cell, model), k.score(cell, model, "hard"),
             differs(k.gain(("default", "student", "test"), (cell, model, "test")))]
            for name, cell, model in (("forward KL", "default", "student"), ("reverse KL", "reverse", "student"),
                                      ("JSD", "jsd", "student"), ("SFT on the teacher's answers", "sft", "student"),
                                      ("forward KL, on policy", "on policy", "student"),
                                      ("RL", "default", "student_rl"), ("(its base)", "default", "student_base"))]
    return line, gain.mean >= 0.1, table(["student by", "test", "hard", "beside forward KL on test"], rows)


def row_7(k: Known) -> tuple[str, bool, list[str]]:
    rows, cells = [], ("tokens 1/4", "tokens 1/2", "worked 0", "worked 1/2", "default")
    for cell in cells:
        found, start = k.values(cell, "measures", "signal"), k.values(cell, "curves", "zero")
        rows.append([cell, k.score(cell, "base"), k.score(cell), k.score(cell, what="format"),
                     *(figure([f[key] for f in found]) for key in ("mean p", "counted", "predicted", "at the mean p")),
                     figure([1 - c["no_signal"][0] for c in start])])
    line = "zero after " + ", ".join(f"{cell}: {k.score(cell, 'base')} -> {k.score(cell)} %" for cell in cells)
    weakest = min(cells, key=lambda cell: k.score(cell, "base").mean)
    passed = k.score("default").mean - k.score(weakest).mean >= 0.2
    return line, passed, ["", "Groups are of 8 answers of the base to a training problem."] + table(
        ["corpus", "base", "zero", "zero's format", "mean p of training problems",
         "groups with right and wrong: counted", "predicted", "at the mean p", "with any signal, first tenth of RL"],
        rows)


def row_8(k: Known) -> tuple[str, bool, list[str]]:
    found = k.values("default", "measures", "many_samples")
    rows, lines, passed = [], [], False
    for kind in ("test", "hard"):
        base, zero = f"base {kind}", f"zero {kind}"
        for name in (base, zero):
            rows.append([name, *(f"{100 * statistics.fmean([f[name][n] for f in found]):.1f}" for n in found[0][name])])
        leads = {n: figure([f[base][n] - f[zero][n] for f in found]) for n in found[0][base]}
        rows.append(["base less zero", *leads.values()])
        ahead = [n for n, lead in leads.items() if lead.mean > lead.spread]
        lines.append(f"{kind}: the base is ahead at {'k = ' + ', '.join(ahead) if ahead else 'no k'}; pass@256 "
                     f"{figure([f[base]['256'] for f in found])} against {figure([f[zero]['256'] for f in found])} %")
        passed |= bool(ahead)
    return "; ".join(lines), passed, ["", "128 problems x 256 samples."] + table(
        ["pass@k, %", *(f"k = {n}" for n in found[0]["base test"])], rows)


def row_9(k: Known) -> tuple[str, bool, list[str]]:
    rows, real = [], []
    changes = {"half the steps": "the default, 100 steps: 64 prompts x 8",
               "no std": "advantages not divided by the deviation", "KL 0.01": "KL 0.01", "KL 0.1": "KL 0.1",
               "clip higher": "clip higher, 0.28", "sequence": "the average over each sequence first",
               "constant": "Dr. GRPO's constant", "G 4": "128 prompts x 4", "G 16": "32 x 16", "G 32": "16 x 32",
               "batch baseline": "the batch's mean as baseline"}
    for cell, name in changes.items():
        gain = k.gain(("half the steps", "zero", "test"), (cell, "zero", "test"))
        if abs(gain.mean) > 2 * gain.spread:
            real.append(f"{name} ({100 * gain.mean:+.1f})")
        curves = k.values(cell, "curves", "zero")
        rows.append([name, k.score(cell), k.score(cell, kind="hard"), differs(gain) if cell != "half the steps" else "",
                     figure([statistics.fmean(c["accuracy"]) for c in curves]),
                     figure([c["no_signal"][9] for c in curves])])
    line = "differ on test by more than twice the spread: " + (", ".join(real) or "none")
    return line, bool(real), table(["change", "test", "hard", "test, beside the default",
                                    "training accuracy, mean over the run", "groups of equal rewards at the end"], rows)


def row_10(k: Known) -> tuple[str, bool, list[str]]:
    found = k.values("default", "measures", "distributions")
    rows = [[model, *(figure([f[model][kind] for f in found]) for kind in found[0][model])] for model in found[0]]
    drop = lambda f, model, kind: f[model]["test"] - f[model][kind]
    more = {kind: figure([drop(f, "student", kind) - drop(f, "zero", kind) for f in found])
            for kind in ("trained on", "hard", "larger numbers")}
    line = "; ".join(f"{what}: the student {figure([drop(f, 'student', kind) for f in found])} below test, its teacher "
                     f"{figure([drop(f, 'zero', kind) for f in found])}" for kind, what in (
                         ("trained on", "problems trained on"), ("hard", "longer ones"), ("larger numbers",) * 2))
    return line, all(more[kind].mean > more[kind].spread for kind in ("hard", "larger numbers")), \
        table(["model", *found[0]["student"]], rows)


ROWS = {
    1: Row("RL alone lifts pass@1", "AIME 2024: 15.6 -> 77.9 (R1-Zero; 2501.12948v2)",
           "base -> zero at least +50 points; shuffled rewards at most +5; the format reward alone at least 20 below "
           "zero",
           ("default", "shuffled rewards", "format alone"), row_1),
    2: Row("voting adds", "AIME 2024: 77.9 -> 86.7 by self-consistency (2501.12948v2)",
           "maj@16 at least 3 points above pass@1 wherever zero's is under 95 %", ("default",), row_2),
    3: Row("length grows unrewarded", "it rises throughout RL; 1/\\|o_i\\| lengthens wrong answers (2503.20783)",
           "answers to test problems at least 1.3 times as long as the base's",
           ("default", "format alone", "countdown", "half the steps", "sequence", "constant"), row_3),
    4: Row("reflection rises", "ten reflective words rise 5 to 7 times (2501.12948v2, C.2)",
           "at least 3 times the base's where checking pays; under 1 % from a corpus without \"wait\"",
           ("default", "countdown", "countdown, no wait"), row_4),
    5: Row("hard problems gain most",
           "MATH level 5 goes from 0.55 to 0.90, levels 1-3 to 0.90-0.95 early (2501.12948v2, C.1)",
           "the gain in points at 6 operations is above that at 1 by more than the spread", ("default",), row_5),
    6: Row("distillation beats RL on the small model", "AIME 2024: 72.6 distilled, 47.0 by RL (2501.12948v2, table 16)",
           "student at least 10 points above student_rl", ("default", "reverse", "jsd", "sft", "on policy"), row_6),
    7: Row("the base gates RL", "small bases \"consistently failed\" (2501.12948v2, G.1)",
           "zero from the weakest base at least 20 points under the default's",
           ("default", "tokens 1/4", "tokens 1/2", "worked 0", "worked 1/2"), row_7),
    8: Row("RL sharpens rather than teaches", "RL wins at small k of pass@k, the base at large k (2504.13837)",
           "the base is ahead at some k up to 256", ("default",), row_8),
    9: Row("what matters in GRPO",
           "no deviation, a constant (2503.20783); clip higher, averages over tokens (2503.14476)",
           "some of ten changes moves pass@1 on test by more than twice its spread",
           ("half the steps", "no std", "KL 0.01", "KL 0.1", "clip higher", "sequence", "constant", "G 4", "G 16",
            "G 32", "batch baseline"), row_9),
    10: Row("easy tests flatter a student", "",
            "the student loses more than its teacher on longer problems and on larger numbers, by more than the spread",
            ("default",), row_10),
}
