"""The report of a run, as Markdown: the evaluations as a table, RL as a chart, model sizes and seconds."""
import textwrap

from engine.files import log_rows
from engine.machine import machine

COLUMNS = {"pass@1": "", "maj@16": ".1%", "pass@16": ".1%", "format": ".1%", "length": ".1f", "reflection": ".1%"}


def sparkline(values: list[float], width: int = 60) -> str:
    """A chart of the values in one line of text.

    >>> sparkline([0, 1, 2, 3])
    '▁▃▆█'
    """
    n = min(width, len(values))
    values = [values[i * len(values) // n] for i in range(n)]
    low, high = min(values), max(values)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (v - low) / (high - low or 1))] for v in values)


def table(rows: list[tuple[str, str, dict[str, float]]]) -> list[str]:
    """Rows of (model, kind of problems, result of `evaluate`) as a Markdown table, aligned for the terminal.

    >>> table([("zero", "hard", {"pass@1": 0.5, "pass@1_se": 0.01, **dict.fromkeys([*COLUMNS][1:], 0.25)})])[2]
    'zero |hard    |50.0% ± 1.0%| 25.0%|  25.0%| 25.0%|   0.2|     25.0%'
    """
    keys = rows[0][2] if rows else {}
    columns = COLUMNS | {key: ".1%" for key in keys if key not in (*COLUMNS, "pass@1_se", "n_problems")}
    cells = [["model", "problems", *columns]]
    for name, kind, result in rows:
        others = [f"{result[key]:{form}}" for key, form in columns.items() if form]
        cells.append([name, kind, f"{result['pass@1']:.1%} ± {result['pass@1_se']:.1%}", *others])
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for row in cells:
        names = [cell.ljust(width) for cell, width in zip(row[:2], widths)]
        figures = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:])]
        lines.append("|".join(names + figures))
    return [lines[0], "|".join("-" * width for width in widths), *lines[1:]]


def report(run) -> str:
    """The report, made from results.json and the log of RL."""
    models = run.results["models"]
    names = [name for name in run.stages if name in models]
    names += [name for name in models if name not in names]  # stages of another program, such as the controls
    lines = table([(name, kind, models[name][kind]) for name in names for kind in run.task.held_out]) + [""]
    rows = [row for row in log_rows(run.out) if "no_signal" in row]
    trained = {row["stage"] for row in rows}  # by RL
    for name in [name for name in run.stages if name in trained][:1]:
        for key in ("accuracy", "length"):
            values = [row[key] for row in rows if row["stage"] == name]
            chart = f"{values[0]:5.2f} {sparkline(values, 36)} {values[-1]:.2f}"
            lines.append(f"    {key:8} over {len(values)} RL steps {chart}")
    seconds = run.results["seconds"]
    spent = "Seconds: " + ", ".join(f"{name} {s:.0f}" for name, s in seconds.items())
    spent += f"; together {sum(seconds.values()) / 60:.1f} minutes on {machine(run.cfg)}, seed {run.cfg.seed}."
    sizes = "Parameters: " + ", ".join(f"{name} {models[name]['params']:,}" for name in names) + "."
    return "\n".join([*lines, "", textwrap.fill(sizes, 80), "", textwrap.fill(spent, 80)])
