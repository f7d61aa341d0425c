"""Draw a run's RL stage as a figure: python experiments/plot.py OUT FIGURE.png, where OUT is a finished run.

Four panels show accuracy, format, length and reflection of the answers to training problems over the RL steps, from
OUT/log.jsonl. Horizontal lines show the levels of base, zero and student on test problems, from OUT/results.json.
"""
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window

import matplotlib.pyplot as plt  # noqa: E402

PANELS = {  # the name in log.jsonl: (the name in results.json, the panel's title)
    "accuracy": ("pass@1", "accuracy"),
    "format": ("format", "format"),
    "length": ("length", "length, tokens"),
    "reflection": ("reflection", "answers that reflect"),
}
LEVELS = {"base": "tab:gray", "zero": "tab:blue", "student": "tab:orange"}
SMOOTH = 2  # the running mean is over so many steps before and after each step


def smooth(values: list[float]) -> list[float]:
    """The running mean of the values.

    >>> smooth([0, 0, 5, 0, 0, 0])
    [1.6666666666666667, 1.25, 1.0, 1.0, 1.25, 0.0]
    """
    near = [values[max(0, i - SMOOTH):i + SMOOTH + 1] for i in range(len(values))]
    return [sum(v) / len(v) for v in near]


def plot(rows: list[dict], models: dict[str, dict], path: Path) -> None:
    """Draw the log rows of the RL stage and the models' results into a PNG file."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 5.5), layout="constrained", sharex=True)
    for (key, (measured, title)), ax in zip(PANELS.items(), axes.flat):
        steps, values = [row["step"] for row in rows], [row[key] for row in rows]
        ax.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=0.8)
        ax.plot(steps, smooth(values), color="tab:blue", label="RL, on training problems")
        for name, colour in LEVELS.items():
            if name in models:
                ax.axhline(models[name]["test"][measured], color=colour, linestyle="--", linewidth=1,
                           label=f"{name} on test")
        ax.set_title(title, fontsize=10)
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
    for ax in axes[1]:
        ax.set_xlabel("RL step")
    axes[0, 0].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=80, metadata={"Software": None})


def main(argv: list[str]) -> int:
    """Run the command line -> exit code."""
    try:
        out, path = map(Path, argv)
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        rows = [row for row in rows if row["stage"] == "zero"]
        models = json.loads((out / "results.json").read_text())["models"]
        if not rows:
            raise ValueError(f"{out} has no RL stage")
        plot(rows, models, path)
        return 0
    except (ValueError, KeyError, OSError) as error:
        print(f"plot.py: {error}; it needs a finished run: python experiments/plot.py OUT FIGURE.png", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
