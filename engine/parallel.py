"""Data parallelism: several ranks hold the same weights, and each computes its own shard of every batch.

    torchrun --standalone --nproc_per_node=2 train.py

A rank is one process; ranks are numbered from 0, and world_size is how many there are. Each rank samples answers to its
own problems with its own seed, and rollouts are never gathered. After the start the ranks exchange only sums: the
gradients (Optimizer.step), the metrics of a step, and the counts of an evaluation. Rank 0 writes the files. Without
torchrun, there is one rank, and nothing is exchanged. The names are those of torch.distributed.
"""
import os
import sys
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from engine.terminal import UsageError

PARENT = os.getppid()  # the process that started this one; for a rank it is torchrun


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes the run has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def init(device: str) -> None:
    """Connect to the other ranks, if torchrun started this process. Raises UsageError if the machine has GPUs but fewer
    than ranks, because nccl does not let two ranks share a GPU."""
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        n_ranks, n_gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if device in ("auto", "cuda") and 0 < n_gpus < n_ranks:
            raise UsageError(f"{n_ranks} processes need {n_ranks} GPUs, and torch sees {n_gpus}: start fewer, or add "
                             "--device=cpu")
        if int(os.environ["LOCAL_RANK"]) < n_gpus:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def check_shares(cfg) -> None:
    """Raises UsageError if the problems of a step cannot be divided evenly among the ranks."""
    for name, value in vars(cfg).items():
        n = world_size()
        if name.endswith("_prompts") and value % n:
            nearest = max(n, round(value / n) * n)
            raise UsageError(f"--{name}={value} cannot be divided evenly among {n} processes: take --{name}={nearest}")


def check_launcher() -> None:
    """Raises RuntimeError if torchrun has ended. After SIGKILL it cannot end its ranks, and they would train on."""
    if world_size() > 1 and os.getppid() != PARENT:
        raise RuntimeError("torchrun has ended, so this rank ends, too")


def all_reduce(x: Tensor) -> Tensor:
    """Sum x over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def barrier() -> None:
    """Wait until all ranks have called this."""
    all_reduce(torch.zeros(1))


def broadcast(value):
    """Rank 0's value, on every rank."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def sums_over_ranks(values: dict[str, tuple]) -> dict[str, tuple[float, float]]:
    """Add up the pairs (total, count) of all ranks by name. A rank may lack a name, if it has nothing to count."""
    mine = {name: (float(total), float(count)) for name, (total, count) in values.items()}
    if world_size() == 1:
        return mine
    gathered: list = [None] * world_size()
    dist.all_gather_object(gathered, mine)
    names = dict.fromkeys(name for pairs in gathered for name in pairs)
    return {name: tuple(sum(pairs.get(name, (0.0, 0.0))[i] for pairs in gathered) for i in range(2)) for name in names}


def end(code: int) -> NoReturn:
    """End this process with an exit code.

    subtle: a rank skips Python's shutdown. The threads of gloo free the last message a little later, and need Python's
    lock to do so. If the interpreter shuts down meanwhile, C++ aborts the process.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream:
            stream.flush()
    if dist.is_initialized():
        os._exit(code)
    sys.exit(code)
