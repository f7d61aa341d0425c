"""The corpus of a task: its documents as tokens, and the rows that pretraining cuts from it."""
import multiprocessing
import os
import random
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from data.tokenizer import END_OF_TEXT

PAGE_SHARE = 0.3          # share of the documents that are textbook pages (a page is longer than a thread)
CORPUS_PART = 10_000_000  # tokens written from one seed by one process


def write_corpus(task, n_tokens: int, seed: str) -> np.ndarray:
    """At least n_tokens token ids, uint16 (n,), of a task's pages and threads, each followed by end of text. Several
    processes write a large corpus, each with its own seed. A longer corpus begins with the shorter one."""
    lengths = [min(CORPUS_PART, n_tokens - done) for done in range(0, n_tokens, CORPUS_PART)]
    if len(lengths) == 1:
        return write_part(task, n_tokens, seed)
    seeds = [seed, *(f"{seed}/{i}" for i in range(1, len(lengths)))]
    # A forked process starts at once. A spawned one would first import torch, which takes seconds.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(min(len(lengths), os.cpu_count() or 1), context) as pool:
        return np.concatenate(list(pool.map(write_part, [task] * len(lengths), lengths, seeds)))


def write_part(task, n_tokens: int, seed: str) -> np.ndarray:
    """The token ids of a corpus that one process writes from one seed."""
    chunks, n_written, rng = [], 0, random.Random(seed)
    while n_written < n_tokens:
        documents = [task.write_page(rng) if rng.random() < PAGE_SHARE else task.write_thread(rng)[0]
                     for _ in range(1000)]
        text = "".join(document + END_OF_TEXT for document in documents)
        chunks.append(np.array(task.encoding.encode(text, allowed_special="all"), dtype=np.uint16))
        n_written += len(chunks[-1])
    return np.concatenate(chunks)


def corpus_rows(task, n_rows: int, length: int, seed: int, heldout: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The corpus, and the starts of its rows -> (token ids (n,), starts (n_rows,) of rows of `length` tokens).

    A row starts with a document, so that the model sees prompts at position 0, as in RL. A row usually ends inside a
    document. The rest of that document is skipped, unless it is long enough to fill another row.
    """
    n_tokens, starts = int(1.35 * n_rows * length), []  # about a quarter is skipped; if that is not enough, double it
    while len(starts) < n_rows:
        corpus = task.make_corpus(n_tokens, seed, heldout)
        documents = np.append(0, np.flatnonzero(corpus == task.stop_ids[0]) + 1)  # starts of documents
        starts, position = [], 0
        while position + length <= len(corpus):
            starts.append(position)
            position += length
            later = documents[documents.searchsorted(position):]  # those that start here or later
            if len(later) and later[0] - position < length:  # the rest of this document does not fill a row
                position = int(later[0])
        n_tokens *= 2
    return corpus, np.array(starts[:n_rows])
