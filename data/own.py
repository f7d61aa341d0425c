"""Your own problems and text from files, in place of the built-in ones or mixed with them.

    --problems=FILE  JSONL with one problem in each line: {"prompt": "Calculate 5 - 3.", "answer": "2"}. The optional
                     key "split" is "train" or "test"; without it, a hash of the prompt puts a tenth on the test side.
                     The optional key "solution" is the text of a thought, which solved examples need (--shots)
    --corpus=FILE    if the name ends in .jsonl, JSONL with one document in each line: {"text": ...}. Any other file is
                     plain text, with blank lines between its documents
    --corpus_share   the share of this text in the corpus, counted in tokens; the rest is the built-in corpus

Two answers are equal if both are numbers (integers, decimals, fractions) of the same value, or if both are the same
text apart from case and white space. A file with a bad line is refused. Problems that cannot be used are left out, and
`notes` says how many. A fiftieth of the text is kept for the held-out loss.
"""
import json
import random
import re
import zlib
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from data import arithmetic
from rewards import TAGS

LONGEST = 2_048  # most tokens of a document; a longer one is cut into several
NUMBER = re.compile(r"[-+]?([0-9]+(/0*[1-9][0-9]*)?|[0-9]*\.[0-9]+)")  # an integer, a fraction or a decimal
WRITTEN = re.compile(r"([-+]?)\$?([0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)(\.[0-9]+)?\.?")  # such as $1,234.50 or 5.


def normalize(text: str) -> str:
    """The text in lower case, with each stretch of white space replaced by one space."""
    return " ".join(text.split()).casefold()


@dataclass(frozen=True)
class Problem(arithmetic.Problem):
    """A problem from a file. `question` is the file's "prompt", `working` is its "solution". The answer may be spelled
    in several ways."""
    working: str = ""

    def canonical(self, answer: str) -> str:
        """One spelling for all equal answers.

        subtle: Fraction alone would also accept "1_000" and Arabic digits, and would take seconds for "1e3000000".

        >>> [Problem("?", "").canonical(a) for a in ("0.50", "2/4", "$1,234.", "New  Delhi")]
        ['1/2', '1/2', '1234', 'new delhi']
        """
        if len(answer) > 100:
            return normalize(answer)
        written = WRITTEN.fullmatch(answer)
        if written:
            answer = written[1] + written[2].replace(",", "") + (written[3] or "")
        return str(Fraction(answer)) if NUMBER.fullmatch(answer) else normalize(answer)

    def check(self, answer: str) -> bool:
        """Is this text equal to the answer?"""
        return self.canonical(answer) == self.canonical(self.answer)


def read_text(path: str) -> str:
    """The text of a file, without a byte-order mark. Raises ValueError, with the line number, if it is not UTF-8."""
    content = Path(path).read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {content[:error.start].count(10) + 1}: not UTF-8, convert the file") from None


def read_rows(path: str, *fields: str):
    """Yields (line number, row) for each line of JSONL that is not blank. Raises ValueError, with the line number, for
    a line that is not a JSON object, or in which one of `fields` is neither text nor a number."""
    for line_no, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line, parse_int=str, parse_float=str)  # a number becomes text, with all its digits
                "".join(row[field] for field in fields).encode()  # also raises an error for half of a surrogate pair
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(f"{path}, line {line_no}: not JSON with {' and '.join(fields)} ({error})") from None
            yield line_no, row


def read_problems(path: str) -> list[Problem]:
    """The problems of a file, without repeated prompts. Raises ValueError for a bad line."""
    return list({normalize(row["prompt"]): Problem(row["prompt"].strip(), row["answer"].strip())
                 for _, row in read_rows(path, "prompt", "answer")}.values())


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
        self.problems, self.by_prompt, rows, left_out = {"train": [], "test": []}, {}, [], []
        for line_no, row in read_rows(path, "prompt", "answer"):
            problem = Problem(row["prompt"].strip(), row["answer"].strip(), str(row.get("solution", "")).strip())
            prompt = normalize(problem.question)
            side = row.get("split", "test" if zlib.crc32(prompt.encode()) % 10 == 0 else "train")
            if side not in ("train", "test"):
                raise ValueError(f'{path}, line {line_no}: "split" must be "train" or "test"')
            rows.append((side, line_no, prompt, problem))
        tested = {prompt for side, _, prompt, _ in rows if side == "test"}
        examples = [problem for _, _, prompt, problem in rows if problem.working and prompt not in tested][:shots]
        if len(examples) < shots:
            raise ValueError(f'{path}: {len(examples)} training problems have a "solution", fewer than --shots={shots}')
        if examples:
            task.show(examples)
        shown = {normalize(problem.question) for problem in examples}
        rows = [row for row in rows if row[2] not in shown]
        for side, line_no, prompt, problem in sorted(rows):  # "test" first: a prompt on both sides is only tested
            answer_tokens = len(task.encoding.encode_ordinary(problem.answer))
            if (prompt and prompt not in self.by_prompt and len(task.encode_prompt(problem)) <= max_prompt_tokens
                    and 1 <= answer_tokens <= max_answer_tokens and not any(tag in problem.answer for tag in TAGS)):
                self.problems[side].append(problem)
                self.by_prompt[prompt] = problem
            else:
                left_out.append(line_no)
        n_train, n_test = len(self.problems["train"]), len(self.problems["test"])
        self.notes = [*task.notes, f"{path}: {n_train} problems to train on, {n_test} to test on"]
        if left_out:
            self.notes.append(f"{path}: {len(left_out)} problems left out, the first in line {min(left_out)}: empty, "
                              f"repeated, over {max_prompt_tokens} tokens, or with an answer that cannot be matched")
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
        texts = ([row["text"] for _, row in read_rows(path, "text")] if path.lower().endswith(".jsonl")
                 else re.split(r"\n[ \t\r]*\n\s*", read_text(path)))
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
