"""Print a table of the corpus: each response style with its share, how often it is correct, and an example.

    python experiments/styles.py [arithmetic|countdown]
"""
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.arithmetic import Arithmetic
from data.countdown import Countdown

TASKS = {"arithmetic": Arithmetic, "countdown": Countdown}


def style_table(task, n: int = 20_000, seed: int = 0) -> str:
    """A Markdown table of the response styles in a task's forum, counted over n threads."""
    rng, rows = random.Random(f"table/{seed}"), {style: [] for style in task.styles}
    for _ in range(n):
        text, style, right = task.write_thread(rng)
        rows[style].append((right, text.split("Assistant: ")[1]))
    lines = ["| style | share of threads | correct | example |", "|---|---|---|---|"]
    for style, found in rows.items():
        share, right = len(found) / n, sum(right for right, _ in found) / len(found)
        examples = [text for _, text in found if "wait" in text or style != "rechecked"]
        example = min(examples, key=lambda text: abs(len(text) - 60))
        lines.append(f"| {style} | {share:.1%} | {right:.0%} | `{example}` |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Run the command line -> exit code."""
    name, *others = argv or ["arithmetic"]
    if others or name not in TASKS:
        print(f"styles.py: python experiments/styles.py [{'|'.join(TASKS)}]", file=sys.stderr)
        return 2
    print(style_table(TASKS[name]()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
