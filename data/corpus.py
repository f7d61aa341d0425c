"""The corpus of a task: its documents as tokens. (engine/corpus.py cuts them into the rows of pretraining.)"""
import random

import numpy as np

from data.tokenizer import END_OF_TEXT

PAGE_SHARE = 0.3  # share of the documents that are textbook pages (a page is longer than a thread)


def write_corpus(task, n_tokens: int, seed: str) -> np.ndarray:
    """At least n_tokens token ids, uint16 (n,), of a task's pages and threads, each followed by end of text. A longer
    corpus begins with the shorter one."""
    chunks, n_written, rng = [], 0, random.Random(seed)
    while n_written < n_tokens:
        documents = [task.write_page(rng) if rng.random() < PAGE_SHARE else task.write_thread(rng)[0]
                     for _ in range(1000)]
        text = "".join(document + END_OF_TEXT for document in documents)
        chunks.append(np.array(task.encoding.encode(text, allowed_special="all"), dtype=np.uint16))
        n_written += len(chunks[-1])
    return np.concatenate(chunks)
