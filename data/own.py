"""Problems and text of one's own, from files, in place of the built-in ones or beside them.

    --problems=FILE  JSONL, {"prompt": "Calculate 5 - 3.", "answer": "2"} a line and, if wanted, "split": "train" or
                     "test"; without it a hash of the prompt puts a tenth of the lines on the test side
    --corpus=FILE    JSONL (a name that ends in .jsonl), {"text": ...} a line, a document each; or plain text, whose
                     documents are its paragraphs: what stands between blank lines. A document of more than 2,048
                     tokens is cut into such
    --corpus_share   how much of what the base reads is that text; the rest is the built-in corpus

Two answers are equal if both are numbers (integers, decimals, fractions) of exactly the same value, or else the same
text but for case and white space. A file with a bad line is refused, with the line's number; problems that cannot be
posed or answered are left out and counted (`notes`). A fiftieth of the text is not read but kept for the held-out loss.
"""
import json
import random
import re
import zlib
from collections.abc import Iterable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np

from data import arithmetic
from data.tokenizer import get_tokenizer
from rewards import TAGS

SIDES = ("train", "test")
LONGEST = 2_048  # tokens of a document


class Numeral(str):
    """A JSON number, as its digits stand in the file: no float would keep them all."""


def number(text: str) -> Fraction | None:
    """The exact value of an integer, a decimal or a fraction in ASCII digits; None for anything else.

    >>> number("0.50") == number("1/2") == number("+2/4"), number("1e9")
    (True, None)
    """
    if len(text) > 100 or not re.fullmatch(r"[-+]?([0-9]+(/0*[1-9][0-9]*)?|[0-9]*\.[0-9]+)", text):
        return None
    return Fraction(text)


class Problem(arithmetic.Problem):
    """A problem from a file: its question is the file's prompt, and equal answers need not be spelt alike."""

    def canonical(self, answer: str) -> str:
        """The same for answers that are equal.

        >>> [Problem("?", "").canonical(a) for a in ("0.50", "2/4", "New  Delhi")]
        ['1/2', '1/2', 'new delhi']
        """
        value = number(answer)
        return plain(answer) if value is None else str(value)

    def check(self, answer: str) -> bool:
        """Is this the answer?

        >>> [Problem("A half?", "1/2").check(a) for a in ("0.5", "2/4", "0.51", "half")]
        [True, True, False, False]
        """
        return self.canonical(answer) == self.canonical(self.answer)


def plain(text: str) -> str:
    """The text in lower case, white space as single blanks."""
    return " ".join(text.split()).casefold()


# Files


def read_text(path: str) -> str:
    """Raises ValueError, with the line, if the file is not UTF-8; OSError if it cannot be read."""
    content = Path(path).read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {content[:error.start].count(10) + 1}: not UTF-8 text") from None


def numeral(text: str) -> Numeral:
    """A JSON number without an exponent, unless it is beyond all answers: 1e3 is 1000."""
    value = Decimal(text)
    return Numeral(format(value, "f") if abs(value.adjusted()) < 100 else text)


def no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def read_rows(path: str, wanted: dict[str, tuple[type, ...]]) -> Iterable[tuple[int, dict]]:
    """(line number, object) of each line that is not blank. Raises ValueError, with the line, for one that is no JSON
    object, or lacks a field in `wanted` of one of these types (str or Numeral)."""
    for at, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line, parse_float=numeral, parse_int=Numeral, parse_constant=no_number)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {at}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {at}: not a JSON object")
            for key, types in wanted.items():
                if type(row.get(key)) not in types:
                    raise ValueError(f'{path}, line {at}: "{key}" must be given, as text'
                                     + " or a number" * (Numeral in types))
                if any("\ud800" <= letter <= "\udfff" for letter in row[key]):
                    raise ValueError(f'{path}, line {at}: "{key}" holds half of a character (a lone surrogate)')
            yield at, row


def fingerprint(path: str) -> str:
    """The path with a checksum of the file, so that a run notices that it has changed; "" for no file."""
    return f"{path} (crc32 {zlib.crc32(Path(path).read_bytes()):08x})" if path else ""


def path_of(text: str) -> str:
    """The path in a fingerprint, or in a path."""
    return re.sub(r" \(crc32 [0-9a-f]{8}\)$", "", text)


# What a run asks of a task: see "Your own problems, text, task" in the README


class OwnProblems:
    """The problems of a file, with the corpus of another task.

    max_prompt_tokens and max_answer_tokens are what fits. Raises ValueError for a bad line, or if a side is empty.
    """

    def __init__(self, task, path: str, max_prompt_tokens: int, max_answer_tokens: int):
        self.make_corpus, encoding = task.make_corpus, get_tokenizer()
        self.sides, left_out, sizes = {side: {} for side in SIDES}, {}, [0]
        for at, row in read_rows(path, {"prompt": (str,), "answer": (str, Numeral)}):
            question, answer = row["prompt"].strip(), row["answer"].strip()
            side = row.get("split", SIDES[zlib.crc32(plain(question).encode()) % 10 == 0])
            if side not in SIDES:
                raise ValueError(f'{path}, line {at}: "split" must be one of {", ".join(SIDES)}')
            problem = Problem(question, answer)
            size = len(encoding.encode_ordinary(problem.prompt))
            for wrong, why in (
                (not question, "an empty prompt"),
                (size > max_prompt_tokens, f"a prompt of more than {max_prompt_tokens} tokens"),
                (not answer or any(tag in answer for tag in TAGS)
                 or len(encoding.encode_ordinary(answer)) > max_answer_tokens, "an answer that no reward could match"),
                (plain(question) in self.sides[side], "a prompt that was there before"),
            ):
                if wrong:
                    left_out.setdefault(why, []).append(at)
                    break
            else:
                self.sides[side][plain(question)] = problem
                sizes.append(size)
        both = [question for question in self.sides["train"] if question in self.sides["test"]]
        for question in both:
            del self.sides["train"][question]
        self.max_prompt_tokens = max(sizes)
        self.held_out = SIDES[1:]
        self.notes = [f"{path}: {len(self.sides['train'])} problems to train on, {len(self.sides['test'])} to test on"]
        self.notes += [f"{path}: {len(lines)} left out for {why}, the first in line {lines[0]}"
                       for why, lines in left_out.items()]
        if both:
            self.notes.append(f"{path}: {len(both)} of the test side not trained on, though given for that too")
        self.listed = {side: list(problems.values()) for side, problems in self.sides.items()}
        if not self.listed["train"] or len(self.listed["test"]) < 2:
            raise ValueError("; ".join(self.notes) + "; needed are 1 and 2 at least")

    def make_problem(self, rng: random.Random) -> Problem:
        return rng.choice(self.listed["train"])

    def heldout_problems(self, n: int, kind: str, seed: int) -> list[Problem]:
        """n different problems of the test side, or all of them if there are fewer."""
        pool = self.listed[kind]
        return random.Random(f"{kind}/{seed}").sample(pool, min(n, len(pool)))

    def parse(self, text: str) -> Problem:
        """The file's problem with this prompt, or one without an answer."""
        for problems in self.sides.values():
            if plain(text) in problems:
                return problems[plain(text)]
        return Problem(text.strip(), "")


class OwnCorpus:
    """The text of a file as the share of the corpus, with the problems of another task. Raises ValueError for a bad
    line, or if there is no text."""

    def __init__(self, task, path: str, share: float):
        self.task, self.share, encoding = task, share, get_tokenizer()
        self.held_out, self.max_prompt_tokens = task.held_out, task.max_prompt_tokens
        self.make_problem, self.heldout_problems, self.parse = task.make_problem, task.heldout_problems, task.parse
        if path.lower().endswith(".jsonl"):
            texts = [row["text"] for _, row in read_rows(path, {"text": (str,)})]
        else:
            texts = re.split(r"\n[ \t\r]*\n\s*", read_text(path))
        texts = [text for text in texts if text.strip()]
        random.Random("own text").shuffle(texts)
        parts = [np.zeros(0, dtype=np.uint16)]
        for text in texts:
            ids = np.array(encoding.encode_ordinary(text), dtype=np.uint16)
            for at in range(0, len(ids), LONGEST - 1):
                parts += ids[at:at + LONGEST - 1], np.array([encoding.eot_token], dtype=np.uint16)
        tokens = np.concatenate(parts)
        if len(tokens) < 10_000:
            raise ValueError(f"{path}: {len(tokens)} tokens are too little text, 10,000 are the least")
        self.kept = {True: tokens[:len(tokens) // 50], False: tokens[len(tokens) // 50:]}  # held out, to be read
        self.n_tokens = len(self.kept[False])
        self.notes = [*task.notes, f"{path}: {len(texts)} documents of {len(tokens)} tokens together"]

    def make_corpus(self, n_tokens: int, seed: int, heldout: bool = False) -> np.ndarray:
        """As the built-in corpus's; the text is read again, in another order, where there is too little of it."""
        rng, own, parts, read = random.Random(f"own/{seed}"), [], [], 0
        others = documents(self.task.make_corpus(int(n_tokens * (1 - self.share)) + 1, seed, heldout))[::-1]
        size = 0
        while size < n_tokens:
            if read <= size * self.share:
                if not own:
                    own = documents(self.kept[heldout])
                    rng.shuffle(own)
                parts.append(own.pop())
                read += len(parts[-1])
            elif others:
                parts.append(others.pop())
            else:
                break
            size += len(parts[-1])
        return np.concatenate(parts)


def documents(tokens: np.ndarray) -> list[np.ndarray]:
    """The documents of a corpus, each with its end of text."""
    ends = np.flatnonzero(tokens == get_tokenizer().eot_token) + 1
    return [part for part in np.split(tokens, ends) if len(part)]
