"""Data parallelism: several ranks hold the same weights, and each computes its own part of every batch.

    torchrun --standalone --nproc_per_node=2 train.py

A rank is one process, numbered from 0; world_size is their number. Each rank samples answers to its own problems from
its own seed, and nothing that was sampled travels. The ranks exchange only sums: how many rows and tokens a minibatch
has, the gradients (in Optimizer.step), and the metrics of a step. Rank 0 writes the files. Without torchrun there is
one rank, and no function here does anything. Names are those of torch.distributed.
"""
import os
import sys
from collections import defaultdict
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

PARENT = os.getppid()  # of a rank, the torchrun that started it


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes the run has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def init(device: str) -> None:
    """Meet the other ranks, if torchrun started this process. Raises ValueError if the machine has a GPU, but not one
    for each rank: nccl does not let two ranks share one."""
    if dist.is_torchelastic_launched():
        n_ranks, n_gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if device in ("auto", "cuda") and 0 < n_gpus < n_ranks:
            raise ValueError(f"{n_ranks} processes need {n_ranks} GPUs, and torch sees {n_gpus}: start fewer, or take "
                             "--device=cpu")
        if int(os.environ["LOCAL_RANK"]) < n_gpus:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def check_launcher() -> None:
    """Raises RuntimeError if torchrun is gone. After SIGKILL it cannot end its ranks, and they would train on."""
    if world_size() > 1 and os.getppid() != PARENT:
        raise RuntimeError("torchrun has ended, and so does this rank")


def per_rank(n: int) -> int:
    """Each rank's part of n problems."""
    assert n % world_size() == 0, f"{n} problems cannot be divided evenly among {world_size()} ranks"
    return n // world_size()


def all_reduce(x: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def all_reduce_gradients(parameters: list[Tensor]) -> None:
    """Add up the gradients of all ranks, in one exchange."""
    if world_size() > 1:
        total = all_reduce(torch.cat([p.grad.flatten() for p in parameters]))
        for p, grad in zip(parameters, total.split([p.numel() for p in parameters])):
            p.grad = grad.view_as(p)


def barrier() -> None:
    """Wait until all ranks have come here."""
    all_reduce(torch.zeros(1))


def broadcast(value):
    """Rank 0's value, on every rank."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


class Means:
    """The means that a step logs, over all ranks: sums and counts are kept as they come, and exchanged once.

    >>> means = Means()
    >>> means.add("length", 10, count=2), means.add("length", 2, count=1)
    (None, None)
    >>> means.compute()
    {'length': 4.0}
    """

    def __init__(self):
        self.sums, self.counts = defaultdict(float), defaultdict(float)

    def add(self, name: str, total: float | Tensor, count: float | Tensor) -> None:
        """Add `count` values that come to `total`. A tensor stays on its device, so that nothing waits for it here."""
        self.sums[name] += total
        self.counts[name] += count

    def compute(self) -> dict[str, float | None]:
        """Each mean, or None of no values. All ranks must have added the same names in the same order."""
        pairs = [[float(self.sums[name]), float(self.counts[name])] for name in self.sums]
        pairs = all_reduce(torch.tensor(pairs, dtype=torch.float64)).tolist()
        return {name: total / count if count else None for name, (total, count) in zip(self.sums, pairs)}


def end(code: int) -> NoReturn:
    """End this process with an exit code.

    subtle: a rank leaves without winding Python up. gloo's threads free what was exchanged last a little later, and
    need Python's lock for it. If the interpreter winds up meanwhile, C++ aborts the process.
    """
    sys.stdout.flush(), sys.stderr.flush()
    if dist.is_initialized():
        os._exit(code)
    sys.exit(code)
