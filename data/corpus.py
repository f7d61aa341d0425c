"""The corpus of a task: its documents as tokens, and the rows that a base is trained on."""
import multiprocessing
import os
import random
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from data.tokenizer import END_OF_TEXT

PAGE_SHARE = 0.3          # share of the documents that are textbook pages (a page is longer than a thread)
CORPUS_PART = 10_000_000  # tokens that are written from one seed


def write_corpus(task, n_tokens: int, seed: str) -> np.ndarray:
    """At least n_tokens token ids, uint16 (n,), of a task's pages and threads, each followed by end of text. A large
    corpus is written by several processes, each part from a seed of its own. A longer corpus begins with the shorter
    one."""
    sizes = [min(CORPUS_PART, n_tokens - done) for done in range(0, n_tokens, CORPUS_PART)]
    if len(sizes) == 1:
        return write_part(task, n_tokens, seed)
    seeds = [seed, *(f"{seed}/{i}" for i in range(1, len(sizes)))]
    # A forked process has all that it needs. A spawned one would first import torch, which takes seconds.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(min(len(sizes), os.cpu_count() or 1), context) as pool:
        return np.concatenate(list(pool.map(write_part, [task] * len(sizes), sizes, seeds)))


def write_part(task, n_tokens: int, seed: str) -> np.ndarray:
    """At least n_tokens of them, by this process."""
    parts, size, rng = [], 0, random.Random(seed)
    while size < n_tokens:
        documents = [task.write_page(rng) if rng.random() < PAGE_SHARE else task.write_thread(rng)[0]
                     for _ in range(1000)]
        text = "".join(document + END_OF_TEXT for document in documents)
        parts.append(np.array(task.encoding.encode(text, allowed_special="all"), dtype=np.uint16))
        size += len(parts[-1])
    return np.concatenate(parts)


def corpus_rows(task, n_rows: int, length: int, seed: int, heldout: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The corpus and where its rows start -> (token ids (n,), starts (n_rows,) of rows of `length` tokens).

    A row starts where a document starts, so that the model has seen prompts at position 0, where RL puts them. A row
    usually ends in the middle of a document. What is left of that document is skipped, unless it is long enough to fill
    another row.
    """
    n_tokens, starts = int(1.35 * n_rows * length), []  # about a quarter is skipped; if it was more, make twice as many
    while len(starts) < n_rows:
        corpus = task.make_corpus(n_tokens, seed, heldout)
        documents = np.append(0, np.flatnonzero(corpus == task.stop_ids[0]) + 1)  # their starts
        starts, position = [], 0
        while position + length <= len(corpus):
            starts.append(position)
            position += length
            later = documents[documents.searchsorted(position):]  # the documents that start here or after it
            if len(later) and later[0] - position < length:  # what is left of this document does not fill a row
                position = int(later[0])
        n_tokens *= 2
    return corpus, np.array(starts[:n_rows])
