"""Files that are written whole or not at all, checkpoints, and the lock of a folder.

Checkpoints are loaded with weights_only=True, which executes nothing in them.
"""
import json
import os
import sqlite3
import warnings
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import BinaryIO

import torch

from engine.parallel import rank
from engine.pretrained.weights import make_model
from engine.terminal import UsageError
from model import GPT, GPTConfig


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, whose content takes the place of `path` whole or not at all. Raises UsageError, with the old
    content intact, if it cannot be written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        temporary.unlink(missing_ok=True)
        if isinstance(error.__context__, KeyboardInterrupt):  # torch.save makes a RuntimeError of that, too
            raise KeyboardInterrupt from None
        raise UsageError(f"cannot write {path}: {error}; what was saved before is intact") from None


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, if this is rank 0."""
    if not rank():
        with whole_file(path) as file:
            file.write(content)


def log_rows(out: Path) -> list[dict]:
    """The rows of log.jsonl, without a last line that a killed run left unfinished."""
    path = out / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError:
        raise UsageError(f"{path} is not a nanoR1 log: remove it, or use another --out") from None


def save_checkpoint(path: Path, content: dict) -> None:
    """Write a checkpoint whole or not at all, if this is rank 0. It goes to the file piece by piece: in memory it would
    be a second copy of the model."""
    if not rank():
        with whole_file(path) as file:
            torch.save(content, file)


def load_checkpoint(path: Path, stage: str | None = None) -> dict:
    """A checkpoint's content, read without executing anything in it. Raises UsageError if the file is not a checkpoint
    of ours, or one of another stage than the one named."""
    if not path.exists():
        raise UsageError(f"{path} is missing: an earlier stage makes it (python train.py runs them all)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's lines about foreign pickles, beside the one of ours
            content = torch.load(path, map_location="cpu", weights_only=True)
        found = {1: content["stage"]}[content["nanor1"]]  # 1 is the format of these checkpoints
    except Exception:  # torch.load raises a dozen kinds for what is cut off, foreign or malicious
        raise UsageError(f"{path} is not a whole nanoR1 checkpoint: remove it to have it made again") from None
    if stage not in (None, found):
        raise UsageError(f"{path} is a checkpoint of {found}")
    return content


def finished_models(out: Path, first: Iterable[str]) -> list[str]:
    """The names of all NAME.pt in a folder that finished stages left: those in `first` in their order, then the rest.
    (Copies and foreign files are named otherwise than the stage in them.)"""
    names = [name for name in first if (out / f"{name}.pt").exists()]
    left_out = (*names, "resume", *(f"{name}_best" for name in names))
    others = [path for path in sorted(out.glob("*.pt")) if path.stem not in left_out]
    return names + [path.stem for path in others if stage_of(path) == path.stem]


def stage_of(path: Path) -> str | None:
    """The stage that left a checkpoint; None if the file is not one of ours."""
    try:
        return load_checkpoint(path)["stage"]
    except UsageError:
        return None


def build_model(content: dict) -> GPT:
    """The model of a checkpoint's content, on the CPU, with the type of matrix products that it was trained with."""
    model = make_model(GPTConfig(**content["shape"]), getattr(torch, content["config"]["dtype"]))
    model.load_state_dict(content["model"])
    return model


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """Make a folder, and lock it until the `with` or this process ends, however it ends; rank 0 does so for all ranks.

    SQLite's locks are the operating system's, on every system. Raises UsageError if another run holds the lock.
    """
    if rank():
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(out / "lock", timeout=0)) as holder:
        try:
            holder.execute("BEGIN EXCLUSIVE")
        except sqlite3.Error:
            raise UsageError(f"cannot lock {out}: another run is writing into it; wait, or use another --out") from None
        yield
