"""One run in several processes, each with its share of every batch: data parallel.

    python train.py --processes=2                              starts the others itself
    torchrun --standalone --nproc_per_node=2 train.py          is started as one of several

All processes hold the same weights and draw the same problems. Each samples for its share of the prompts, and the
samples are gathered; each computes the gradient of its share of the rows, and the gradients are added up, so that all
make the same update. On a CPU two processes sample quicker than two threads of one, as the operations of a small model
are too short to be divided. The first process (rank 0) writes the files; with one process nothing here does anything.
"""
import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

joined = False  # has this process been one of several?


class Lost(Exception):
    """Another process of the run has ended."""


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes the run has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def launched() -> int:
    """How many processes the run was launched with, by torchrun or by `start`; 0 if it was not."""
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys() else 0


def start(processes: int, command: list[str]) -> list[subprocess.Popen]:
    """Become the first of so many processes, and start the others, by a command that will `join` -> those started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    # A session of its own keeps Ctrl-C from them: they end when the first one has, at their next exchange with it.
    others = [subprocess.Popen(command, env=os.environ | names | {"RANK": str(r), "LOCAL_RANK": str(r)},
                               start_new_session=True) for r in range(1, processes)]
    try:
        join(0, init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=processes)
    except BaseException:
        for process in others:
            process.kill()
        raise
    return others


def join(gpu: int, **where) -> None:
    """Meet the other processes of the run: where the environment says, or where init_process_group's arguments do."""
    if gpu < torch.cuda.device_count():  # a run on the CPU may have more processes than there are GPUs
        torch.cuda.set_device(gpu)
    global joined
    joined = True
    with others_alive():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                                timeout=timedelta(minutes=5), **where)


def leave() -> None:
    """Be one process again."""
    if dist.is_initialized():
        dist.destroy_process_group()


def end(code: int) -> NoReturn:
    """End this process with an exit code; one that has been one of several without winding Python up.

    subtle: gloo's threads free what was exchanged last some time after, and need Python's lock for it. An interpreter
    that winds up meanwhile ends them in the middle of it, and C++ then aborts the process.
    """
    sys.stdout.flush(), sys.stderr.flush()
    if joined:
        os._exit(code)
    sys.exit(code)


@contextmanager
def others_alive():
    """Inside, what an exchange with a process that has ended raises becomes Lost."""
    try:
        yield
    except RuntimeError as error:
        raise Lost("lost another process of this run (the same command goes on from the last checkpoint): "
                   + str(error).splitlines()[0][:200]) from error


def share(items: list | Tensor) -> list | Tensor:
    """This process's part of what all processes hold."""
    n, r, world = len(items), rank(), world_size()
    return items[n * r // world:n * (r + 1) // world]


def add_up(x: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if world_size() > 1:
        with others_alive():
            dist.all_reduce(x)
    return x


def add_up_gradients(parameters: list[Tensor]) -> None:
    """The same for gradients, in one exchange; a process whose share was empty has none, which counts as 0."""
    if world_size() > 1:
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        together = add_up(torch.cat([p.grad.flatten() for p in parameters]))
        for p, grad in zip(parameters, together.split([p.numel() for p in parameters])):
            p.grad = grad.view_as(p)


def gather(items: list) -> list:
    """The lists of all processes, in order of rank, as one: what `share` has cut is whole again."""
    lists = [items] * world_size()
    if world_size() > 1:
        with others_alive():
            dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def broadcast(value):
    """The first process's value, in all of them."""
    values = [value]
    if world_size() > 1:
        with others_alive():
            dist.broadcast_object_list(values)
    return values[0]


def own(generator: torch.Generator | None) -> torch.Generator | None:
    """A generator for this process's draws alone, seeded by the one that all processes share and draw alike from."""
    if generator is None or world_size() == 1:
        return generator
    seeds = torch.randint(2**62, (world_size(),), generator=generator, device=generator.device)
    return torch.Generator(generator.device).manual_seed(seeds[rank()].item())
