"""Your own problems and text from files, in place of the built-in ones or mixed with them.

    --problems=FILE  JSONL with one problem in each line: {"prompt": "Calculate 5 - 3.", "answer": "2"}. The optional
                     key "split" is "train" or "test"; without it, a hash of the prompt puts a tenth on the test side.
                     The optional key "solution" is the text of a thought, which solved examples need (--shots)
    --corpus=FILE    if the name ends in .jsonl, JSONL with one document in each line: {"text": ...}. Any other file is
                     plain text, with blank lines between its documents
    --corpus_share   the share of this text in the corpus, counted in tokens; the rest is the built-in corpus

The prompt may also be called "question" or "problem". In an answer as GSM8K has it, "... #### 72", the part after ####
is the answer, and the part before it the solution. Without "answer", the last \\boxed{...} of "solution" is the answer,
as in MATH. data/answers.py says when two answers are equal.

A file with a bad line is refused. Problems that cannot be used are left out, and `notes` says how many. A fiftieth of
the text is kept for the held-out loss.
"""
import json
import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import arithmetic
from data.answers import canonical, last_boxed, normalize, spelled_only
from rewards import TAGS

LONGEST = 2_048  # most tokens of a document; a longer one is cut into several
PROMPT = ("prompt", "question", "problem")  # what the key of a prompt may be called


@dataclass(frozen=True)
class Problem(arithmetic.Problem):
    """A problem from a file. `question` is the file's "prompt", `working` is its "solution". The answer may be spelled
    in several ways."""
    working: str = ""

    def canonical(self, answer: str) -> str:
        """One spelling for all equal answers."""
        return canonical(answer)

    def check(self, answer: str) -> bool:
        """Is this text equal to the answer?"""
        return canonical(answer) == canonical(self.answer)


class Line(NamedTuple):
    """A problem of a file, with its side ("train" or "test") and the number of its line."""
    side: str
    number: int
    problem: Problem


class Number(str):
    """A number of a JSON file as text, with all its digits."""


def read_text(path: str) -> str:
    """The text of a file, without a byte-order mark. Raises ValueError, with the line number, if it is not UTF-8."""
    content = Path(path).read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {content[:error.start].count(10) + 1}: not UTF-8, convert the file") from None


def read_rows(path: str, parse: Callable) -> list[tuple]:
    """(line number, parse(row)) for each line of JSONL that is not blank. Raises ValueError, with the line number, for
    a line that is not a JSON object, and where parse raises it."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append((number, parse(read_object(line))))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    return rows


def read_object(line: str) -> dict:
    """The JSON object of a line, in which numbers are text with all their digits."""
    try:
        row = json.loads(line, parse_int=Number, parse_float=Number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object (each line must be one)")
    return row


def text_of(row: dict, *names: str, numbers: bool = True) -> str:
    """The text (or number) under the first of these keys that is there. Raises ValueError for anything else."""
    name = next((name for name in names if name in row), None)
    if name is None:
        wanted, there = (", ".join(f'"{name}"' for name in found) for found in (names, row))
        raise ValueError(f"no {wanted.replace(', ', ' or ')}; its keys are {there or 'none'}")
    value = row[name]
    if not numbers and isinstance(value, Number):
        raise ValueError(f'"{name}" is a number, not text')
    if not isinstance(value, str):
        raise ValueError(f'"{name}" is {json.dumps(value)[:40]}, not text{" or a number" if numbers else ""}')
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f'"{name}" has half of a character (a surrogate)')
    return value


def parse_problem(row: dict) -> tuple[str, Problem]:
    """A row of a file of problems -> (its side, "train" or "test", and the problem)."""
    question = text_of(row, *PROMPT).strip()
    solution = text_of(row, "solution", numbers=False) if "solution" in row else ""
    if "answer" in row:
        before, marks, answer = text_of(row, "answer").rpartition("####")
        if marks:  # GSM8K
            solution = solution or re.sub("<<.*?>>", "", before)
    else:  # MATH
        answer = last_boxed(text_of(row, "answer", "solution"))
        if answer is None:
            raise ValueError('no "answer", and no \\boxed{...} in "solution"')
    side = row.get("split", "test" if zlib.crc32(normalize(question).encode()) % 10 == 0 else "train")
    if side not in ("train", "test"):
        raise ValueError('"split" must be "train" or "test"')
    return side, Problem(question, answer.strip(), solution.strip())


def read_problems(path: str, task, max_prompt_tokens: int, max_answer_tokens: int) -> tuple[list[Line], list[str]]:
    """The problems of a file that can be used, and notes about the others.

    Left out are: an empty prompt; a prompt that was there before (one that is on both sides counts as test); a prompt
    or an answer that is too long; an answer that is empty or has one of the four tags. Raises ValueError for a bad
    line.
    """
    lines = [Line(side, number, problem) for number, (side, problem) in read_rows(path, parse_problem)]
    usable, prompts = [], set()
    for line in sorted(lines, key=lambda line: (line.side != "test", line.number)):
        problem, prompt = line.problem, normalize(line.problem.question)
        answer_fits = 1 <= len(task.encoding.encode_ordinary(problem.answer)) <= max_answer_tokens
        has_tag = any(tag in problem.answer for tag in TAGS)
        if prompt and prompt not in prompts and answer_fits and not has_tag:
            if len(task.encode_prompt(problem)) <= max_prompt_tokens:
                usable.append(line)
                prompts.add(prompt)
    notes, used = [], {line.number for line in usable}
    left_out = [line.number for line in lines if line.number not in used]
    spelled = [line.number for line in lines if line.number in used and spelled_only(line.problem.answer)]
    if left_out:
        notes.append(f"{path}: {len(left_out)} problems left out, the first in line {left_out[0]}: empty, repeated, "
                     f"over {max_prompt_tokens} tokens, or with an answer that cannot be matched")
    if spelled:
        notes.append(f"{path}: {len(spelled)} answers hold a unit, several numbers or LaTeX, and are matched letter by "
                     f"letter only, the first in line {spelled[0]}")
    return sorted(usable, key=lambda line: line.number), notes


def fingerprint(path: str) -> str:
    """The path with a checksum of the file, so that a run notices if the file changes; "" if the path is empty. The
    checksum of a folder covers its small files, and the names and sizes of its weights."""
    if not path:
        return ""
    checksum = 0
    for file in sorted(Path(path).iterdir()) if Path(path).is_dir() else [Path(path)]:
        if file.suffix == ".safetensors":
            checksum = zlib.crc32(f"{file.name} {file.stat().st_size}".encode(), checksum)
        elif file.suffix in (".json", ".jinja") or file == Path(path):
            checksum = zlib.crc32(file.read_bytes(), checksum)
    return f"{path} (crc32 {checksum:08x})"


def path_of(text: str) -> str:
    """The path in a fingerprint. A path without a checksum stays as it is."""
    return re.sub(r" \(crc32 [0-9a-f]{8}\)$", "", text)


class OwnProblems:
    """The problems of a file; everything else is the wrapped task's. A prompt has at most max_prompt_tokens tokens, an
    answer at most max_answer_tokens. The first `shots` training problems with a solution become solved examples
    (engine/pretrained/chat.py). Raises ValueError for a bad line, or if there are too few problems."""

    def __init__(self, task, path: str, max_prompt_tokens: int, max_answer_tokens: int, shots: int = 0):
        self.task, self.held_out, self.max_prompt_tokens = task, ("test",), max_prompt_tokens
        lines, notes = read_problems(path, task, max_prompt_tokens, max_answer_tokens)
        examples = [line for line in lines if line.side == "train" and line.problem.working][:shots]
        if len(examples) < shots:
            raise ValueError(f'{path}: {len(examples)} training problems have a "solution", fewer than --shots={shots}')
        if examples:  # they make every prompt longer, so some prompts may no longer fit
            task.show([line.problem for line in examples])
            lines, notes = read_problems(path, task, max_prompt_tokens, max_answer_tokens)
        lines = [line for line in lines if line not in examples]
        self.by_prompt = {normalize(line.problem.question): line.problem for line in lines}
        self.problems = {side: [line.problem for line in lines if line.side == side] for side in ("train", "test")}
        n_train, n_test = len(self.problems["train"]), len(self.problems["test"])
        self.notes = [*task.notes, f"{path}: {n_train} problems to train on, {n_test} to test on", *notes]
        if n_train < 1 or n_test < 2:
            raise ValueError("; ".join(self.notes) + "; at least 1 to train on and 2 to test on are needed")

    def __getattr__(self, name: str):
        return getattr(vars(self).get("task"), name)  # subtle: during unpickling there is no task yet

    def make_problem(self, rng: random.Random, longer: bool = False) -> Problem:
        """A random training problem. `longer` changes nothing."""
        return rng.choice(self.problems["train"])

    def heldout_problems(self, n: int, kind: str, seed: int) -> list[Problem]:
        """n different problems of the test side, or all of them if there are fewer."""
        return random.Random(f"{kind}/{seed}").sample(self.problems[kind], min(n, len(self.problems[kind])))

    def parse(self, text: str) -> Problem:
        """The file's problem with this prompt, or else a problem without an answer."""
        return self.by_prompt.get(normalize(text)) or Problem(text.strip(), "")


class OwnCorpus:
    """The text of a file as a share of the corpus; everything else is the wrapped task's. Raises ValueError for a bad
    line, or if there is too little text."""

    def __init__(self, task, path: str, share: float):
        dtype = np.uint16 if task.encoding.n_vocab <= 2**16 else np.int32
        self.task, self.share, documents = task, share, [np.zeros(0, dtype)]
        if path.lower().endswith(".jsonl"):
            texts = [text for _, text in read_rows(path, lambda row: text_of(row, "text"))]
        else:
            texts = re.split(r"\n[ \t\r]*\n\s*", read_text(path))
        texts = [text for text in texts if text.strip()]
        random.Random("own text").shuffle(texts)
        for text in texts:
            ids = task.encoding.encode_ordinary(text)
            documents += [np.array([*ids[at:at + LONGEST - 1], task.stop_ids[0]], dtype)
                          for at in range(0, len(ids), LONGEST - 1)]
        tokens = np.concatenate(documents)
        if len(tokens) < 10_000:
            raise ValueError(f"{path}: {len(tokens)} tokens are too little text, at least 10,000 are needed")
        self.tokens = {True: tokens[:len(tokens) // 50], False: tokens[len(tokens) // 50:]}  # True: held out
        self.notes = [*task.notes, f"{path}: {len(texts)} documents of {len(tokens)} tokens together"]

    __getattr__ = OwnProblems.__getattr__

    def split_documents(self, tokens: np.ndarray) -> list[np.ndarray]:
        """The documents of a corpus, each with its end-of-text token."""
        ends = np.flatnonzero(tokens == self.stop_ids[0]) + 1
        return [document for document in np.split(tokens, ends) if len(document)]

    def make_corpus(self, n_tokens: int, seed: int, heldout: bool = False) -> np.ndarray:
        """At least n_tokens token ids (n,), with the share of your text spread evenly. A text that is too short is
        repeated, in another order."""
        rng, own, documents, n_all, n_own = random.Random(f"own/{seed}"), [], [], 0, 0
        others = self.split_documents(self.task.make_corpus(int(n_tokens * (1 - self.share)) + 1, seed, heldout))[::-1]
        while n_all < n_tokens:
            if not own:
                own = self.split_documents(self.tokens[heldout])
                rng.shuffle(own)
            source = own if n_own <= n_all * self.share else others
            documents.append(source.pop())
            n_all += len(documents[-1])
            if source is own:
                n_own += len(documents[-1])
        return np.concatenate(documents)
