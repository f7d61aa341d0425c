"""The batches of pretraining. The corpus is written in the background and cut into rows. Each rank gets its own rows of
a batch."""
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from engine.parallel import rank, world_size

MADE: dict = {}  # finished corpora: both bases read the same one, perhaps different numbers of its rows


def rows_of(task, n_rows: int, length: int, seed: int, heldout: bool = False) -> tuple[Tensor, Tensor]:
    """What cut_rows returns, as tensors, kept in MADE."""
    key = task, length, seed, heldout
    if key not in MADE or len(MADE[key][1]) < n_rows:
        corpus, starts = cut_rows(task, n_rows, length, seed, heldout)
        MADE[key] = torch.from_numpy(corpus.astype(np.int32)), torch.from_numpy(starts)
    corpus, starts = MADE[key]
    return corpus, starts[:n_rows]


def cut_rows(task, n_rows: int, length: int, seed: int, heldout: bool = False) -> tuple[np.ndarray, np.ndarray]:
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


class Corpus:
    """n_steps batches of n_rows rows of the corpus, in random order and each row once; and 2 * n_rows held-out rows.

    The corpus is written in the background. Run.steps waits for it, so that the wait is not part of the first step.
    """

    def __init__(self, task, cfg, n_steps: int, n_rows: int):
        assert not n_steps or n_rows >= world_size(), "each rank needs at least one row of every batch"
        self.task, self.cfg, self.n_rows, self.length = task, cfg, n_rows, cfg.block_size + 1
        total = n_steps * n_rows
        self.made = None
        self.order = torch.randperm(total, generator=torch.Generator().manual_seed(cfg.seed))
        if n_steps:
            compiling = ", and compiling the model" if cfg.compile == "on" else ""
            print(f"writing a corpus of {total * self.length:,} tokens{compiling}", flush=True)
            pool = ThreadPoolExecutor(1)
            self.made = pool.submit(rows_of, task, total, self.length, cfg.seed)
            pool.shutdown(wait=False)

    def wait(self) -> None:
        """Wait until the corpus is written."""
        if self.made:
            self.made.result()

    def batch(self, number: int) -> Tensor:
        """This rank's rows of batch `number`, from 1 to n_steps: token ids (B, T+1)."""
        corpus, starts = self.made.result()
        return self.rows(corpus, starts[self.order[(number - 1) * self.n_rows:number * self.n_rows]])

    @property
    def heldout(self) -> Tensor:
        """This rank's held-out rows, (B, T+1)."""
        return self.rows(*rows_of(self.task, 2 * self.n_rows, self.length, self.cfg.seed, heldout=True))

    def rows(self, corpus: Tensor, starts: Tensor) -> Tensor:
        """This rank's rows of those that begin at `starts`: token ids (B, T+1)."""
        mine = starts[rank()::world_size()]
        return corpus[mine[:, None] + torch.arange(self.length)].long().to(self.cfg.device)
