"""Make two files for train.py: problems of reasoning-gym's chain_sum, and a corpus of forum threads about them.

    pip install -r experiments/requirements.txt
    python experiments/chain_sum.py out/chain_sum
    python train.py --problems=out/chain_sum/problems.jsonl --corpus=out/chain_sum/corpus.jsonl --corpus_share=0.5 \\
        --rl_max_new_tokens=44 --out=out/chain_sum

problems.jsonl has 20,000 different problems of 2 to 4 terms of one or two digits; 1,000 of them are held out for tests.
A base as small as ours cannot answer such a prompt unless its corpus has similar ones. So corpus.jsonl has 60,000
threads about the training problems, in the response styles of the built-in corpus, including wrong steps
(`data.arithmetic.write_answer`).
"""
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.arithmetic import STYLES, Problem, write_answer
from engine.files import write_file
from engine.terminal import UsageError

PROBLEMS, TESTED, THREADS = 20_000, 1_000, 60_000


def chain_sums(n: int, max_digits: int) -> list[dict]:
    """n different entries of reasoning-gym's chain_sum, in random order. Raises UsageError if there are fewer."""
    import reasoning_gym
    found = {}
    for entry in reasoning_gym.create_dataset("chain_sum", seed=0, size=20 * n, min_terms=2, max_terms=4, min_digits=1,
                                              max_digits=max_digits):
        found.setdefault(entry["question"], entry)
        if len(found) == n:
            return list(found.values())
    raise UsageError(f"chain_sum has fewer than {n} different problems")


def threads(entries: list[dict], n: int) -> list[str]:
    """n forum threads about these problems."""
    rng, texts = random.Random(0), []
    for _ in range(n):
        entry, (style,) = rng.choice(entries), rng.choices(tuple(STYLES), tuple(STYLES.values()))
        expression = entry["metadata"]["expression"].replace(" ", "")
        texts.append(Problem(entry["question"], "").prompt + write_answer(rng, expression, style)[0])
    return texts


def main(argv: list[str]) -> int:
    """Run the command line -> exit code."""
    try:
        if len(argv) != 1 or argv[0].startswith("-"):
            raise UsageError("it needs a folder to write into: python experiments/chain_sum.py DIR")
        folder, entries = Path(argv[0]), chain_sums(PROBLEMS, max_digits=2)
        folder.mkdir(parents=True, exist_ok=True)
        problems = [{"prompt": entry["question"], "answer": entry["answer"], "split": "test" if i < TESTED else "train"}
                    for i, entry in enumerate(entries)]
        texts = [{"text": text} for text in threads(entries[TESTED:], THREADS)]
        for name, rows in (("problems", problems), ("corpus", texts)):
            write_file(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
        return 0
    except ImportError:
        print("chain_sum.py: pip install -r experiments/requirements.txt first", file=sys.stderr)
    except (UsageError, OSError) as error:
        print(f"chain_sum.py: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
