"""Draw a run as a figure: python experiments/plot.py OUT FIGURE.png, where OUT is a finished run.

Three panels show the answers to training problems over the RL steps, from OUT/log.jsonl: accuracy, format and length
(in countdown, reflection instead of format). A dashed line shows the value of each model on test problems, from
OUT/results.json. The fourth panel compares the models on hard problems. If OUT has the control student_rl, the figure
shows it beside the student. Two figures in this folder are of seed 0:

    arithmetic.png    python train.py && python experiments/controls.py student_rl --out=out
    countdown.png     python train.py --stage=base --task=countdown --max_number=10 --rl_max_new_tokens=104
                      and the same with --stage=zero

The third, variants.png, is drawn by python experiments/findings.py --figure.
"""
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window

import matplotlib.pyplot as plt  # noqa: E402

PANELS = {  # the name in log.jsonl: (the name in results.json, the panel's title)
    "accuracy": ("pass@1", "correct answers, %"),
    "format": ("format", "well-formed answers, %"),
    "reflection": ("reflection", "answers that reflect, %"),
    "length": ("length", "length of an answer, tokens"),
}
MODELS = {"base": "#767676", "zero": "#0b3c6f", "student": "#c8590b", "student_rl": "#2e7d4f"}
SMOOTH = 2  # steps before and after each step that the running mean includes


def smooth(values: list[float]) -> list[float]:
    """The running mean of the values.

    >>> smooth([0, 0, 5, 0, 0, 0])
    [1.6666666666666667, 1.25, 1.0, 1.0, 1.25, 0.0]
    """
    near = [values[max(0, i - SMOOTH):i + SMOOTH + 1] for i in range(len(values))]
    return [sum(v) / len(v) for v in near]


def spread(values: list[float], distance: float) -> list[float]:
    """The values, moved apart to at least this distance, so that labels at these heights do not overlap.

    >>> spread([1.0, 1.5, 5.0], 2.0)
    [0.25, 2.25, 5.0]
    """
    order, groups = sorted(range(len(values)), key=values.__getitem__), []
    for i in order:
        groups.append([i])
        while len(groups) > 1:  # a group of labels is centred on the mean of its values
            low, high = ([values[j] for j in group] for group in groups[-2:])
            gap = sum(high) / len(high) - sum(low) / len(low)
            if gap >= distance * (len(low) + len(high)) / 2:
                break
            groups[-2:] = [groups[-2] + groups[-1]]
    placed = {j: sum(values[i] for i in group) / len(group) + distance * (k - (len(group) - 1) / 2)
              for group in groups for k, j in enumerate(group)}
    return [placed[i] for i in range(len(values))]


def plot(rows: list[dict], models: dict[str, dict], path: Path, panels: tuple[str, ...]) -> None:
    """Draw the log rows of the RL stage and the models' results into a PNG file."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                         "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left"})
    figure, axes = plt.subplots(2, 2, figsize=(9, 5.4), layout="constrained")
    shown = {name: colour for name, colour in MODELS.items() if name in models}
    for key, ax in zip(panels, axes.flat):
        (measured, title), scale = PANELS[key], 1 if key == "length" else 100
        steps, values = [row["step"] for row in rows], [scale * row[key] for row in rows]
        ax.plot(steps, values, color=MODELS["zero"], alpha=0.25, linewidth=0.7)
        ax.plot(steps, smooth(values), color=MODELS["zero"], linewidth=1.8)
        levels = [scale * models[name]["test"][measured] for name in shown]
        top = 1.08 * max(*levels, *values)
        for level, height, (name, colour) in zip(levels, spread(levels, 0.085 * top), shown.items()):
            ax.plot([0, steps[-1]], [level, level], color=colour, linewidth=0.8, linestyle=(0, (4, 3)))
            ax.annotate(f"{name} {level:.0f}" if level >= 10 else f"{name} {level:.1f}", (1, height), color=colour,
                        xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points", va="center")
        ax.set(title=title, ylim=(0, top), xlim=(0, steps[-1]), xlabel="RL step")
    axes[1, 0].text(0.98, 0.08, "curve: training problems\ndashed: test problems", ha="right", fontsize=8,
                    color=MODELS["base"], transform=axes[1, 0].transAxes)
    ax, hard = axes.flat[-1], [100 * models[name]["hard"]["pass@1"] for name in shown]
    bars = ax.barh([*shown], hard, color=[*shown.values()], height=0.62,
                   xerr=[100 * models[name]["hard"]["pass@1_se"] for name in shown], error_kw={"elinewidth": 0.8})
    ax.bar_label(bars, [f"{value:.0f}" for value in hard], padding=4)
    ax.invert_yaxis()
    ax.set(title="correct answers to hard problems, %", xlim=(0, 1.15 * max(1, *hard)))
    ax.tick_params(axis="y", length=0)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def draw_variants(curves: dict[str, dict[str, list[list]]], path: Path) -> None:
    """A PNG file with a panel for each variant: curves[variant][regime] has the accuracy in the quick evaluations for
    each seed, and None for the steps between them."""
    plt.rcParams.update({"font.size": 7, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(3, 4, figsize=(9, 6), sharex=True, sharey=True, layout="constrained")
    for (name, regimes), ax in zip(curves.items(), axes.flat):
        for (regime, of_seeds), colour in zip(regimes.items(), ("#8a8a8a", "#c8590b")):
            for seed, values in enumerate(of_seeds):
                points = [(i, value) for i, value in enumerate(values, 1) if value is not None]
                ax.plot(*zip(*points), color=colour, linewidth=1, label=None if seed else regime)
        ax.set_title(name, loc="left", fontweight="bold")
        ax.set_ylim(0, 1.02)
    axes[0, 0].legend(frameon=False, loc="lower right")
    figure.supxlabel("RL step")
    figure.supylabel("accuracy on held-out problems, seeds 0, 1 and 2")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main(argv: list[str]) -> int:
    """Run the command line -> exit code."""
    try:
        out, path = map(Path, argv)
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        rows = [row for row in rows if row["stage"] == "zero"]
        results = json.loads((out / "results.json").read_text())
        if not rows:
            raise ValueError(f"{out} has no RL stage")
        countdown = results["config"]["task"] == "countdown"
        plot(rows, results["models"], path, ("accuracy", "reflection" if countdown else "format", "length"))
        return 0
    except (ValueError, KeyError, OSError) as error:
        print(f"plot.py: {error}; it needs a finished run: python experiments/plot.py OUT FIGURE.png", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
