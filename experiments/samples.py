"""Show how the answers to one problem change during training, from the samples.jsonl of a run.

    python experiments/samples.py                     the first of the four problems of the RL stage, of the run in out/
    python experiments/samples.py --out=out/r1 --stage=student --problem=2

Each line is an answer with its reward and its advantage. The advantage is the reward minus the mean reward of the group
(by default divided by the group's standard deviation). The first --answers=3 of eight answers are shown. On a terminal,
an answer with a positive advantage is green and bold, and one with a negative advantage is red. There are no colours in
a pipe, or with the environment variable NO_COLOR.
"""
import json
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.arguments import Parser, number
from engine.terminal import UsageError

GOOD, BAD, PLAIN = "\033[1;32m", "\033[31m", "\033[0m"  # the terminal's codes for green and bold, red, and normal text


def lines(rows: list[dict], answers: int, width: int, colour: bool) -> list[str]:
    """The lines to print for the rows of one problem."""
    found = [rows[0]["question"]]
    for row in rows:
        rewards, title = row["rewards"]["reward"], f"{row['stage']} step {row['step']}"
        if row["model"] != row["stage"]:
            title += f", {row['model']}"
        found += ["", f"{title}: mean reward {sum(rewards) / len(rewards):.2f}"]
        for text, reward, advantage in list(zip(row["completions"], rewards, row["advantages"]))[:answers]:
            line = f"{reward:5.2f} {advantage:+5.1f}  {' '.join(text.split())}"
            if len(line) > width:
                line = line[:width - 3] + "..."
            if colour and advantage:
                line = (GOOD if advantage > 0 else BAD) + line + PLAIN
            found.append(line)
    return found


def main(argv: list[str]) -> int:
    """Run the command line -> exit code."""
    parser = Parser(prog="samples.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--stage", default="zero")
    parser.add_argument("--problem", type=number(int, None, 4), default=1)
    parser.add_argument("--answers", type=number(int, None, 8), default=3)
    try:
        options = parser.parse_args(argv)
        path = options.out / "samples.jsonl"
        if not path.exists():
            raise UsageError(f"there is no {path}: run python train.py first")
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        rows = [row for row in rows if row["stage"] == options.stage]
        question = list(dict.fromkeys(row["question"] for row in rows))[options.problem - 1:options.problem]
        if not question:
            raise UsageError(f"{path} has no such problem of stage {options.stage!r}")
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        print("\n".join(lines([row for row in rows if row["question"] == question[0]], options.answers,
                              min(80, shutil.get_terminal_size().columns), colour)))
        return 0
    except (UsageError, ValueError, KeyError) as error:
        print(f"samples.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
