"""What pretraining reads, as each rank gets it."""
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from data.corpus import corpus_rows
from engine.parallel import rank, world_size

MADE: dict = {}  # the corpora that were made: both bases read the same one, the student's perhaps a shorter part of it


def rows_of(task, n_rows: int, length: int, seed: int, heldout: bool = False) -> tuple[Tensor, Tensor]:
    """data.corpus.corpus_rows as tensors, made once."""
    key = task, length, seed, heldout
    if key not in MADE or len(MADE[key][1]) < n_rows:
        corpus, starts = corpus_rows(task, n_rows, length, seed, heldout)
        MADE[key] = torch.from_numpy(corpus.astype(np.int32)), torch.from_numpy(starts)
    corpus, starts = MADE[key]
    return corpus, starts[:n_rows]


class Corpus:
    """n_steps batches of n_rows rows of the corpus in random order, each row once, and two batches of held-out ones.

    The corpus is written in the background. Run.steps waits for it before its clock starts.
    """

    def __init__(self, task, cfg, n_steps: int, n_rows: int):
        assert not n_steps or n_rows >= world_size(), "each rank needs at least one row of every batch"
        self.task, self.cfg, self.n_rows, self.length = task, cfg, n_rows, cfg.block_size + 1
        total = n_steps * n_rows
        self.made = None
        self.order = torch.randperm(total, generator=torch.Generator().manual_seed(cfg.seed))
        if n_steps:
            doing = ", and torch.compile" if cfg.compile == "on" else ""
            print(f"a corpus of {total * self.length:,} tokens{doing}", flush=True)
            pool = ThreadPoolExecutor(1)
            self.made = pool.submit(rows_of, task, total, self.length, cfg.seed)
            pool.shutdown(wait=False)

    def wait(self) -> None:
        """Wait until the corpus is written."""
        if self.made:
            self.made.result()

    def batch(self, number: int) -> Tensor:
        """This rank's rows of batch 1..n_steps, token ids (B, T+1)."""
        corpus, starts = self.made.result()
        return self.rows(corpus, starts[self.order[(number - 1) * self.n_rows:number * self.n_rows]])

    @property
    def heldout(self) -> Tensor:
        """This rank's held-out rows, (B, T+1)."""
        return self.rows(*rows_of(self.task, 2 * self.n_rows, self.length, self.cfg.seed, heldout=True))

    def rows(self, corpus: Tensor, starts: Tensor) -> Tensor:
        mine = starts[rank()::world_size()]
        return corpus[mine[:, None] + torch.arange(self.length)].long().to(self.cfg.device)
