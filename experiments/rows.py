"""The rows of the findings: each claim, what is said of large models, the bar that decides whether it holds here, and
how the stored cells are read. findings.py runs the cells and writes the page, which explains the terms that stand here.
In every function below, k is the Known of all stored cells.
"""
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass


# Means and spreads


@dataclass(frozen=True)
class Figure:
    """A mean over the seeds and its spread."""
    mean: float
    spread: float

    def __str__(self) -> str:
        return format(self)

    def __format__(self, spec: str) -> str:
        """Without a spec, a share in percent, such as "96.6 ± 0.6"; with a spec such as ".2f", the number itself."""
        scale = 1 if spec else 100
        return f"{scale * self.mean:{spec or '.1f'}} ± {scale * self.spread:{spec or '.1f'}}"


def figure(values: list[float], errors: list[float] | None = None) -> Figure:
    """The mean of one value for each seed. Its spread is the standard deviation of the values, or the mean of their
    standard errors over problems, if these are given and larger.

    >>> f"{figure([0.5, 0.6, 0.7])}", f"{figure([1.0, 2.0, 3.0], [4.0, 4.0, 4.0]):.1f}"
    ('60.0 ± 10.0', '2.0 ± 4.0')
    """
    return Figure(statistics.fmean(values), max(statistics.stdev(values), statistics.fmean(errors or [0.0])))


@dataclass(frozen=True)
class Known:
    """The stored cells, and figures of them. Raises KeyError for a cell that has not been run."""
    cells: dict[str, list[dict]]  # by name: what is stored for each seed

    def values(self, name: str, *path: str) -> list[float]:
        """The value at a path in a cell's results, for each seed."""
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
        """The gain in pass@1 between two (cell, model, kind), taken seed by seed."""
        pairs = [self.values(name, "models", model, kind, "pass@1") for name, model, kind in (before, after)]
        errors = zip(self.errors(*before), self.errors(*after))
        return figure([b - a for a, b in zip(*pairs)], [math.hypot(a, b) for a, b in errors])


def table(head: list[str], rows: list[list]) -> list[str]:
    """The lines of a Markdown table."""
    return ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head),
            *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]


def differs(gain: Figure) -> str:
    """A gain in words."""
    return f"{gain} points" + ("" if abs(gain.mean) > gain.spread else ", no difference")


# The rows. The function of each returns what was measured in one line, whether it passed, and the lines of the details.


@dataclass(frozen=True)
class Row:
    claim: str
    paper: str              # what is said of the large models, and where
    bar: str                # what decides
    cells: tuple[str, ...]  # the cells that it reads
    measure: Callable[[Known], tuple[str, bool, list[str]]]
    note: str = ""          # what the page says above the row's table: the terms that the table needs


def row_1(k: Known) -> tuple[str, bool, list[str]]:
    base, zero = ("no KL", "base", "test"), ("no KL", "zero", "test")
    gain = k.gain(base, zero)
    shuffled, alone = k.gain(base, ("shuffled rewards", "zero", "test")), k.score("format alone")
    behind = k.gain(("format alone", "zero", "test"), zero)
    predicted = figure(k.values("no KL", "measures", "conditional", "right if well formed"))
    curves = [curve["accuracy"] for curve in k.values("format alone", "curves", "zero")]
    best = figure([max(curve) for curve in curves])
    line = (f"Pass@1 rises from {k.score('no KL', 'base')} % (base) to {k.score('no KL')} % (zero), by "
            f"{differs(gain)}. Shuffled rewards change it by {differs(shuffled)}. With the format reward alone it ends "
            f"at {alone} %, after {best} % in the best tenth of RL; {predicted} % of the base's well-formed answers "
            "are right.")
    details = table(["RL from the base with", "pass@1 on test", "pass@1 on hard", "format", "length"], [
        [name, k.score(cell, model), k.score(cell, model, "hard"), k.score(cell, model, what="format"),
         f"{k.score(cell, model, what='length'):.1f}"]
        for name, cell, model in (("(the base)", "no KL", "base"), ("both rewards", "no KL", "zero"),
                                  ("rewards shuffled in each group", "shuffled rewards", "zero"),
                                  ("the format reward alone", "format alone", "zero"))])
    return line, gain.mean >= 0.5 and shuffled.mean <= 0.05 and behind.mean >= 0.2, details


def row_2(k: Known) -> tuple[str, bool, list[str]]:
    rows, passed, below = [], True, []
    for cell, model, kind in (("no KL", "base", "test"), ("no KL", "base", "hard"), ("no KL", "zero", "test"),
                              ("no KL", "zero", "hard"), ("no KL", "student", "hard")):
        pairs = [k.values(cell, "models", model, kind, what) for what in ("pass@1", "maj@16")]
        gain = figure([b - a for a, b in zip(*pairs)])
        rows.append([model, kind, k.score(cell, model, kind), k.score(cell, model, kind, "maj@16"), gain])
        if model == "zero" and statistics.fmean(pairs[0]) < 0.95:
            passed &= gain.mean >= 0.03
            below.append(f"On {kind} problems zero's pass@1 is {k.score(cell, model, kind)} %, and its maj@16 "
                         f"{k.score(cell, model, kind, 'maj@16')} %: a gain of {differs(gain)}.")
    return " ".join(below), passed and bool(below), table(["model", "problems", "pass@1", "maj@16", "gain"], rows)


def row_3(k: Known) -> tuple[str, bool, list[str]]:
    pairs = [k.values("no KL", "models", model, "test", "length") for model in ("base", "zero")]
    ratio = figure([b / a for a, b in zip(*pairs)])
    rows, wrong = [], {}
    for name, cell in (("sequence: each token weighs 1/\\|o_i\\|", "sequence"), ("token", "half the steps"),
                       ("constant", "constant")):
        curves = k.values(cell, "curves", "zero")
        tail = {key: figure([statistics.fmean([v for v in c[key][7:] if v is not None]) for c in curves])
                for key in ("length", "length_wrong")}
        wrong[cell] = tail["length_wrong"]
        rows.append([name, k.score(cell), f"{k.score(cell, what='length'):.1f}", f"{tail['length']:.1f}",
                     f"{tail['length_wrong']:.1f}"])
    alone, again = (figure([b / a for a, b in zip(k.values(start, "models", "base", "test", "length"),
                                                  k.values(cell, "models", "zero", "test", "length"))])
                    for start, cell in (("no KL", "format alone"), ("countdown", "countdown")))
    line = (f"Answers grow from {k.score('no KL', 'base', what='length'):.1f} tokens (base) to "
            f"{k.score('no KL', what='length'):.1f} (zero), {ratio:.2f} times as many. With the format reward alone "
            f"they become {alone:.2f} times as long, in countdown {again:.2f} times. Late in RL wrong answers have "
            f"{wrong['sequence']:.1f} tokens if each token weighs 1/\\|o_i\\|, and {wrong['constant']:.1f} with the "
            "constant.")
    return line, ratio.mean >= 1.3, table(["average in the loss", "pass@1", "length on test", "length late in RL",
                                           "length of wrong answers late in RL"], rows)


def row_4(k: Known) -> tuple[str, bool, list[str]]:
    rate = [k.values("countdown", "models", model, "test", "reflection") for model in ("base", "zero")]
    ratio = figure([b / a for a, b in zip(*rate)])
    without = k.score("countdown, no wait", what="reflection")
    turns = {turn: sum(k.values("countdown", "measures", "reflections", "zero", turn))
             for turn in ("wrong to right", "right to wrong", "wrong to wrong", "right to right")}
    total = sum(turns.values()) or 1
    line = ("In countdown the share of answers that reflect rises from "
            f"{k.score('countdown', 'base', what='reflection')} % (base) to "
            f"{k.score('countdown', what='reflection')} % (zero), {ratio:.1f} times. After a corpus without a single "
            f"\"wait\" it is {without} %. Of zero's {total:,} reflections "
            f"{turns['wrong to right'] / total:.1%} turn a wrong attempt into a right one, and "
            f"{turns['right to wrong'] / total:.1%} a right one into a wrong one. pass@1 rises from "
            f"{k.score('countdown', 'base')} to {k.score('countdown')} %, and without \"wait\" in the corpus from "
            f"{k.score('countdown, no wait', 'base')} to {k.score('countdown, no wait')} %.")
    rows = []
    for cell in ("countdown", "countdown, no wait", "no KL"):
        for model in ("base", "zero"):
            found = k.values(cell, "measures", "reflections", model)
            all_turns = sum(f[turn] for f in found for turn in turns)
            shares = ([f[key] for f in found] for key in ("looks again", "right, looking again",
                                                          "right, not looking again", "first attempt right"))
            row = [figure(share) if None not in share else "none" for share in shares]
            row += [f"{sum(f[turn] for f in found) / all_turns:.0%}" if all_turns else "none"
                    for turn in ("wrong to right", "right to wrong")]
            rows.append(["arithmetic" if cell == "no KL" else cell, model, k.score(cell, model),
                         k.score(cell, model, what="reflection"), *row])
    details = table(["task", "model", "pass@1", "answers that reflect", "worked answers that look again",
                     "right, looking again", "right, not looking again", "first attempt right",
                     "reflections from wrong to right", "reflections from right to wrong"], rows)
    return line, ratio.mean >= 3 and without.mean < 0.01, details


def logit(p: float) -> float:
    """The log-odds log(p / (1 - p)), between -9.2 and 9.2."""
    return math.log(max(p, 1e-4) / max(1 - p, 1e-4))


def row_5(k: Known) -> tuple[str, bool, list[str]]:
    by = {model: k.values("no KL", "measures", "operations", model) for model in ("base", "zero")}
    rows, points, odds = [], {}, {}
    for n in by["base"][0]:
        base, zero = ([found[n] for found in by[model]] for model in by)
        points[n] = figure([b - a for a, b in zip(base, zero)])
        odds[n] = figure([logit(b) - logit(a) for a, b in zip(base, zero)])
        rows.append([n, figure(base), figure(zero), points[n], f"{odds[n]:.2f}"])
    most = [max(gains, key=lambda n: gains[n].mean) for gains in (points, odds)]
    line = (f"Problems of 1 to 6 operations gain {', '.join(f'{100 * g.mean:.0f}' for g in points.values())} points. "
            f"In log-odds they gain {', '.join(f'{g.mean:.1f}' for g in odds.values())}. The gain is largest at "
            f"{most[0]} operations in points, and at {most[1]} in log-odds.")
    ends = [[zero[n] - base[n] for n in (list(base)[0], list(base)[-1])] for base, zero in zip(*by.values())]
    more = figure([hardest - easiest for easiest, hardest in ends])
    return line, more.mean > more.spread, table(["operations", "base", "zero", "gain, points", "gain, log-odds"], rows)


def row_6(k: Known) -> tuple[str, bool, list[str]]:
    ahead = {cell: {kind: k.gain((cell, "student_rl", kind), (cell, "student", kind)) for kind in ("test", "hard")}
             for cell in ("default", "short problems")}
    mean = statistics.fmean(gain.mean for gain in ahead["default"].values())
    on_hard = (k.values("default", "models", model, "hard", "pass@1") for model in ("student", "zero"))
    inherited = figure([student / teacher for student, teacher in zip(*on_hard)])
    work, params = k.values("default", "work"), k.values("default", "models")
    of_student = figure([w["student_rl"]["student"] / w["student"]["student"] for w in work])
    of_both = figure([(w["student"]["student"] + w["student"]["teacher"] * m["zero"]["params"] / m["student"]["params"])
                      / w["student_rl"]["student"] for w, m in zip(work, params)])
    line = (f"The student reaches {k.score('default', 'student')} % on test and {k.score('default', 'student', 'hard')}"
            f" % on hard, which is {inherited} % of its teacher's. It is ahead of student_rl by "
            f"{differs(ahead['default']['test'])} on test and {differs(ahead['default']['hard'])} on hard, by "
            f"{100 * mean:.1f} on the mean of both. If both are trained on problems of 1 to 4 operations alone, it is "
            f"ahead by {differs(ahead['short problems']['test'])} on test and "
            f"{differs(ahead['short problems']['hard'])} on hard. RL took "
            f"{of_student:.2f} times as many FLOPs of the small model as distillation did. If the teacher's FLOPs are "
            f"counted too, distillation took {of_both:.1f} times as many as RL.")
    rows = [[name, k.score(cell, model), k.score(cell, model, "hard"), k.score(cell, model, "hard", "format")]
            for name, cell, model in (("distillation", "default", "student"), ("RL", "default", "student_rl"),
                                      ("(its base)", "default", "student_base"), ("(the teacher)", "default", "zero"),
                                      ("distillation, 1 to 4 operations", "short problems", "student"),
                                      ("RL, 1 to 4 operations", "short problems", "student_rl"))]
    losses = [[name, k.score(cell, "student"), k.score(cell, "student", "hard"),
               differs(k.gain(("no KL", "student", "test"), (cell, "student", "test")))]
              for name, cell in (("forward KL", "no KL"), ("reverse KL", "reverse"), ("JSD", "jsd"),
                                 ("SFT on the teacher's answers", "sft"), ("forward KL, on policy", "on policy"))]
    return line, mean >= 0.1, [
        *table(["the small model is trained by", "pass@1 on test", "pass@1 on hard", "format on hard"], rows),
        "What distillation compares, on problems of 1 to 4 operations, with 120 steps of one epoch:",
        *table(["loss", "pass@1 on test", "pass@1 on hard", "test, compared with forward KL"], losses)]


def row_7(k: Known) -> tuple[str, bool, list[str]]:
    rows, cells = [], {"tokens 1/4": "a quarter of the tokens", "tokens 1/2": "half of the tokens",
                       "worked 0": "no answers that show working",
                       "worked 1/2": "half of the answers that show working", "no KL": "the default"}
    for cell, name in cells.items():
        found, start = k.values(cell, "measures", "signal"), k.values(cell, "curves", "zero")
        rows.append([name, k.score(cell, "base"), k.score(cell), k.score(cell, what="format"),
                     *(figure([f[key] for f in found]) for key in ("mean p", "counted", "predicted", "at the mean p")),
                     figure([1 - c["no_signal"][0] for c in start])])
    line = "Pass@1, base -> zero, by the corpus of the base: " + "; ".join(
        f"{name} {k.score(cell, 'base')} -> {k.score(cell)} %" for cell, name in cells.items())
    weakest = min(cells, key=lambda cell: k.score(cell, "base").mean)
    passed = k.score("no KL").mean - k.score(weakest).mean >= 0.2
    return line, passed, table(
        ["corpus of the base", "base", "zero", "format of zero", "mean p",
         "groups with right and wrong answers: counted", "predicted", "predicted from the mean p",
         "groups with a signal, first tenth of RL"], rows)


def row_8(k: Known) -> tuple[str, bool, list[str]]:
    found = k.values("no KL", "measures", "many_samples")
    rows, lines, passed = [], [], False
    for kind in ("test", "hard"):
        base, zero = f"base {kind}", f"zero {kind}"
        for name in (base, zero):
            means = [100 * statistics.fmean([f[name][n] for f in found]) for n in found[0][name]]
            rows.append([name.replace(" ", " on "), *(f"{mean:.1f}" for mean in means)])
        leads = {n: figure([f[base][n] - f[zero][n] for f in found]) for n in found[0][base]}
        rows.append([f"base minus zero on {kind}", *leads.values()])
        ahead = [n for n, lead in leads.items() if lead.mean > lead.spread]
        lines.append(f"On {kind} the base is ahead at {'k = ' + ', '.join(ahead) if ahead else 'no k'}; pass@256 is "
                     f"{figure([f[base]['256'] for f in found])} % for the base and "
                     f"{figure([f[zero]['256'] for f in found])} % for zero.")
        passed |= bool(ahead)
    return " ".join(lines), passed, table(["pass@k", *(f"k = {n}" for n in found[0]["base test"])], rows)


def row_9(k: Known) -> tuple[str, bool, list[str]]:
    rows, real = [], []
    changes = {"half the steps": "none: 64 prompts x 8 answers",
               "no std": "advantages not divided by the standard deviation", "KL 0.01": "KL 0.01", "KL 0.1": "KL 0.1",
               "clip higher": "clip higher, 0.28", "sequence": "loss averaged over each answer first (1/\\|o_i\\|)",
               "constant": "loss divided by Dr. GRPO's constant", "G 4": "128 prompts x 4 answers",
               "G 16": "32 prompts x 16 answers", "G 32": "16 prompts x 32 answers",
               "batch baseline": "the batch's mean as the baseline"}
    for cell, name in changes.items():
        gain = k.gain(("half the steps", "zero", "test"), (cell, "zero", "test"))
        if abs(gain.mean) > 2 * gain.spread:
            real.append(f"{name} ({100 * gain.mean:+.1f} points)")
        curves = k.values(cell, "curves", "zero")
        rows.append([name, k.score(cell), k.score(cell, kind="hard"), differs(gain) if cell != "half the steps" else "",
                     figure([statistics.fmean(c["accuracy"]) for c in curves]),
                     figure([c["no_signal"][9] for c in curves])])
    line = "Changes that move pass@1 on test by more than twice the spread: " + (", ".join(real) or "none")
    penalties = [["none", k.score("no KL"), k.score("no KL", kind="hard"), "", "not measured"]]
    for name, cell in (("0.001, on completions with an advantage (the default)", "default"),
                       ("0.001, on all completions", "all completions")):
        penalties.append([name, k.score(cell), k.score(cell, kind="hard"),
                          differs(k.gain(("no KL", "zero", "test"), (cell, "zero", "test"))),
                          f"{figure(k.values(cell, 'measures', 'divergence', 'kl')):.3f}"])
    return line, bool(real), [
        *table(["change", "pass@1 on test", "pass@1 on hard", "test, compared with no change",
                "training accuracy, mean over the run", "groups without a signal, last tenth of RL"], rows),
        "R1-Zero's penalty, after 200 RL steps. The divergence from the base is that of all of zero's completions of "
        "training problems, in nats a token:",
        *table(["penalty", "pass@1 on test", "pass@1 on hard", "test, compared with none", "KL from the base"],
               penalties)]


def row_10(k: Known) -> tuple[str, bool, list[str]]:
    found = k.values("default", "measures", "distributions")
    rows = [[model, *(figure([f[model][kind] for f in found]) for kind in found[0][model])] for model in found[0]]
    drop = lambda f, model, kind: f[model]["test"] - f[model][kind]
    more = {kind: figure([drop(f, "student", kind) - drop(f, "zero", kind) for f in found])
            for kind in ("trained on", "hard", "larger numbers")}
    line = " ".join(f"{what} the student is {figure([drop(f, 'student', kind) for f in found])} points below test, "
                    f"its teacher {figure([drop(f, 'zero', kind) for f in found])}." for kind, what in (
                        ("trained on", "On problems that it was trained on"), ("hard", "On longer problems"),
                        ("larger numbers", "On larger numbers")))
    return line, all(more[kind].mean > more[kind].spread for kind in ("hard", "larger numbers")), \
        table(["model", *found[0]["student"]], rows)


PIPELINE = ("base", "zero", "dev1", "dev2", "dev3", "r1", "student", "student_sft")
SHOWN = ("pass@1 on test", "pass@1 on hard", "format", "language", "consistent", "everyday", "length")


def pipeline_values(k: Known, model: str, cell: str = "R1") -> dict[str, list[float]]:
    """What row 11 compares, for each seed. Language and consistency are those of well-formed answers."""
    value = lambda kind, what: k.values(cell, "models", model, kind, what)
    of_well_formed = lambda what: [x / n if n else 0.0 for x, n in zip(value("test", what), value("test", "format"))]
    return {"pass@1 on test": value("test", "pass@1"), "pass@1 on hard": value("hard", "pass@1"),
            "format": value("test", "format"), "language": of_well_formed("language"),
            "consistent": of_well_formed("consistent"), "everyday": value("everyday", "pass@1"),
            "length": value("test", "length")}


def row_11(k: Known) -> tuple[str, bool, list[str]]:
    of = {model: pipeline_values(k, model) for model in PIPELINE}
    ablations = {"language 0": "the same, the language reward's weight 0", "language 1/4": "weight 0.25",
                 "no cold start": "weight 1, from the base instead of dev1"}
    without = {cell: pipeline_values(k, "dev2", cell) for cell in ablations}

    def gain(before: dict, after: dict, what: str) -> Figure:
        return figure([b - a for a, b in zip(before[what], after[what])])

    mixing, learnt = gain(of["base"], of["zero"], "consistent"), gain(of["base"], of["zero"], "pass@1 on test")
    consistent, cost = figure(of["dev2"]["consistent"]), gain(of["dev2"], without["language 0"], "pass@1 on test")
    behind, lost = gain(of["dev2"], of["zero"], "pass@1 on test"), gain(of["dev3"], of["base"], "everyday")
    forgotten = [gain(of[model], of["base"], "everyday") for model in ("zero", "dev2")]
    below = []  # the columns in which r1 is not the best, by more than the spread
    for what in SHOWN[:-1]:
        best = max(PIPELINE[:6], key=lambda model: statistics.fmean(of[model][what]))
        if (short := gain(of["r1"], of[best], what)).mean > max(short.spread, 0.001):
            below.append(f"{what} ({short} points behind {best})")
    cold = [gain(of["base"], of["dev1"], what).mean for what in ("format", "consistent")]
    claims = {
        f"(a) of zero's well-formed answers {figure(of['zero']['consistent'])} % are wholly in the question's "
        f"language, of the base's {figure(of['base']['consistent'])} %, while pass@1 rises by {learnt} points":
            mixing.mean <= 0.1 and learnt.mean > 0.5,
        f"(b) the language reward brings it to {consistent} %, and costs {cost} points of pass@1":
            consistent.mean >= 0.97 and cost.mean <= 0.03,
        f"(c) the cold start alone: format {figure(of['dev1']['format'])} %, consistent "
        f"{figure(of['dev1']['consistent'])} %, pass@1 {figure(of['dev1']['pass@1 on test'])} %":
            min(cold) > 0 and gain(of["dev1"], of["zero"], "pass@1 on test").mean > 0,
        f"(d) dev2 is {behind} points behind zero": behind.mean <= 0.02,
        f"(e) everyday questions: zero loses {forgotten[0]} points, dev2 {forgotten[1]}; dev3 is {lost} points behind "
        "the base": min(loss.mean - loss.spread for loss in forgotten) > 0 and lost.mean <= lost.spread,
        f"(f) r1 is behind the best in {', '.join(below) or 'nothing'}": not below}
    line = "; ".join(f"{claim}: {'yes' if holds else 'no'}" for claim, holds in claims.items()) + "."

    def cells(values: dict) -> list:
        return [format(figure(values[what]), ".1f" if what == "length" else "") for what in SHOWN]

    tenths = [[curve["consistent"] for curve in k.values(cell, "curves", "dev2")] for cell in ("R1", *ablations)]
    names = ("dev2", *ablations.values())
    return line, all(claims.values()), [
        *table(["model", *SHOWN], [[model, *cells(of[model])] for model in PIPELINE]),
        "What dev2 hangs on, after 100 RL steps:",
        *table(["dev2", *SHOWN], [[name, *cells(values)] for name, values in
                                  zip(names, (of["dev2"], *without.values()))]),
        "The share of all answers that are well formed and wholly consistent, in each tenth of these steps, in % (the "
        "mean of the seeds):",
        *table(["dev2", *(f"{10 * (i + 1)}" for i in range(10))],
               [[name, *(f"{100 * statistics.fmean(values):.0f}" for values in zip(*curves))]
                for name, curves in zip(names, tenths)])]


ROWS = {
    1: Row("RL alone lifts pass@1", "AIME 2024: 15.6 -> 77.9 % (R1-Zero; 2501.12948v2)",
           "Zero is at least 50 points above the base; RL with shuffled rewards gains at most 5 points; RL with the "
           "format reward alone ends at least 20 points below zero",
           ("no KL", "shuffled rewards", "format alone"), row_1,
           """The first control deals the rewards of each group out to its answers at random, so that a reward says
           nothing about its answer. The second rewards the format alone. Most well-formed answers of the base are
           right, so pass@1 first rises with the format, and then falls."""),
    2: Row("A majority vote beats a single answer", "AIME 2024: 77.9 -> 86.7 % by self-consistency, which is "
           "such a vote (2501.12948v2)",
           "Maj@16 is at least 3 points above pass@1 wherever zero's pass@1 is below 95 %", ("no KL",), row_2),
    3: Row("Answers get longer although length is not rewarded",
           "Length rises throughout RL (2501.12948v2); 1/\\|o_i\\| lengthens wrong answers (2503.20783)",
           "Zero's answers to test problems are at least 1.3 times as long as the base's",
           ("no KL", "format alone", "countdown", "half the steps", "sequence", "constant"), row_3,
           """Answer i has |o_i| tokens. If the loss is averaged over each answer first ("sequence", as in
           DeepSeekMath), each token of it weighs 1/|o_i|, so that a long wrong answer is punished less per token than
           a short one. "token" averages over all tokens of a batch (DAPO, and the default here). "constant" divides
           by a constant (Dr. GRPO, 2503.20783). With both, all tokens weigh the same. The table is of 100 RL steps;
           "late in RL" means the last 30 of them, on training problems."""),
    4: Row("Reflection becomes more frequent",
           "Ten reflective words become 5 to 7 times as frequent (2501.12948v2, C.2)",
           "In countdown, where checking pays, zero reflects in at least 3 times as many answers as the base; after a "
           "corpus without \"wait\" it does so in fewer than 1 %",
           ("no KL", "countdown", "countdown, no wait"), row_4,
           """In countdown the answer is an expression that makes a target from given numbers (data/countdown.py), and
           a second attempt may hit where the first one missed. "Worked" answers show working inside a thought; those
           that "look again" hold a "wait" in it. The two columns "right" are shares of the worked answers, in
           countdown of those whose first attempt missed. The last two columns are shares of all reflections."""),
    5: Row("Hard problems gain most",
           "Accuracy on MATH level 5 rises from 0.55 to 0.90; levels 1 to 3 reach 0.90 to 0.95 early (2501.12948v2, "
           "C.1)",
           "The gain in points is larger at 6 operations than at 1, by more than the spread", ("no KL",), row_5,
           """Points favour hard problems: an easy problem cannot gain more than what it lacks to 100 %. So the gain
           is also given in log-odds, log(p / (1 - p)) of pass@1 p, which have no ceiling: a rise from 95 to 99 %
           counts as much as one from 50 to 84 %."""),
    6: Row("Distillation beats RL on the small model",
           "AIME 2024: 72.6 % by distillation, 47.0 % by RL (2501.12948v2, table 16)",
           "The student is at least 10 points above student_rl on the mean of test and hard",
           ("default", "short problems", "no KL", "reverse", "jsd", "sft", "on policy"), row_6,
           """P is the teacher's distribution over the next token, Q the student's. The losses are the forward KL
           divergence, KL(P || Q); the reverse one, KL(Q || P); the Jensen-Shannon divergence (JSD), which is the mean
           of KL(P || M) and KL(Q || M) with M = (P + Q) / 2; and supervised fine-tuning (SFT), -log Q of the tokens
           that the teacher sampled, as R1 distills. "On policy" means on the student's own answers instead of the
           teacher's. FLOPs (floating-point operations) are counted from the tokens that each model read, with a
           training pass counted as three forward passes."""),
    7: Row("RL needs a base that sometimes succeeds", "Small bases \"consistently failed\" (2501.12948v2, G.1)",
           "Zero from the weakest base is at least 20 points below zero from the default's base",
           ("no KL", "tokens 1/4", "tokens 1/2", "worked 0", "worked 1/2"), row_7,
           """p is the chance that an answer of the base to a training problem is right. A group of G answers holds
           right and wrong ones with probability 1 - p^G - (1-p)^G; here G is 8. "Counted" is their share among
           sampled groups, "predicted" the mean of this formula over problems, "predicted from the mean p" the formula
           at the mean of p. In the last column groups whose rewards differ by the format alone count too."""),
    8: Row("RL sharpens what the base can do, rather than teaching it more",
           "RL wins at small k of pass@k, the base at large k (2504.13837)",
           "The base's pass@k is above zero's at some k up to 256, by more than the spread", ("no KL",), row_8,
           """pass@k is the chance that at least one of k answers is right. It is estimated without bias from 256
           answers to each of 128 problems of a kind."""),
    9: Row("Some details of GRPO matter",
           "Dr. GRPO does not divide by the standard deviation, and divides the loss by a constant (2503.20783); DAPO "
           "clips higher, and averages over tokens (2503.14476)",
           "At least one of ten changes moves pass@1 on test by more than twice its spread",
           ("default", "all completions", "no KL", "half the steps", "no std", "KL 0.01", "KL 0.1", "clip higher",
            "sequence", "constant", "G 4", "G 16", "G 32", "batch baseline"), row_9,
           """The runs of the first table have 100 RL steps. KL is the weight of a penalty on the policy's KL divergence
           from the base; in the first table it acts on all completions. The ratio says how much likelier a token has
           become since it was sampled; GRPO clips it at 0.8 and 1.2, so that one rollout cannot move a token's
           probability far. "Clip higher" clips it at 1.28 instead of 1.2, so that rare tokens that did well can grow
           faster. Row 3 explains the averages of the loss. Other group sizes G keep the number of answers of a step.
           The batch's mean as the baseline compares an answer with all answers of the step, instead of those of its
           group."""),
    10: Row("On unfamiliar problems a student loses more than its teacher", "(A question of our own)",
            "The student loses more than its teacher both on longer problems and on larger numbers, by more than the "
            "spread",
            ("default",), row_10,
            """Problems "trained on" are those of the last step of distillation, of 2 to 4 operations as in test.
            "Hard" ones are longer, but of lengths that distillation asks too. "Larger numbers" are unseen problems
            of as many operations as in test, with operands up to 99 instead of 20."""),
    11: Row("Each stage of R1 does what the paper says",
            "R1-Zero mixes languages. A cold start makes it readable and costs accuracy (AIME 2024: 77.9 -> 59.0 %), "
            "RL with a language reward brings that back (74.0), fine-tuning the base on accepted samples and general "
            "data adds more (78.1), as does RL for all scenarios (79.8; Nature 645, table 2)",
            "(a) Among well-formed answers zero's share of wholly consistent ones is at most 10 points above the "
            "base's, while pass@1 rises by over 50; (b) the language reward brings it to 97 % or more and costs at "
            "most 3 points; (c) dev1 is above the base in format and consistency, and below zero in pass@1; (d) dev2 "
            "is within 2 points of zero on test; (e) zero and dev2 lose everyday accuracy against the base, and dev3 "
            "has it back; (f) r1 is best or within the spread of the best in every column",
            ("R1", "language 0", "language 1/4", "no cold start"), row_11,
            """docs/r1.md explains the stages. Language is the share of a thought's steps that are in the question's
            language, consistent the share of answers that are wholly in it; both are of well-formed answers to test
            problems. Everyday is pass@1 on questions that want no working, such as "larger 37 52"."""),
}
