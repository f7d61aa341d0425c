"""Files: atomic writes, checkpoints, and the lock of a run's folder.

A run may be killed at any moment. So a write either replaces a whole file or leaves the old one as it was. Checkpoints
are loaded with weights_only=True, which executes no code in them.
"""
import json
import os
import sqlite3
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import BinaryIO

import torch

from engine.parallel import rank
from engine.pretrained.families import make_model
from engine.terminal import UsageError
from model import GPT


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file, which replaces `path` in one step when the `with` block ends. Raises UsageError if it
    cannot be written; `path` then has its old content."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError for a full disk
        temporary.unlink(missing_ok=True)
        if isinstance(error.__context__, KeyboardInterrupt):  # ... and for Ctrl-C, too
            raise KeyboardInterrupt from None
        raise UsageError(f"cannot write {path}: {error}; the old files are intact, so the run can be resumed") from None


def write_file(path: Path, content: bytes) -> None:
    """Write a whole file or nothing, on rank 0 only."""
    if not rank():
        with whole_file(path) as file:
            file.write(content)


def log_rows(out: Path) -> list[dict]:
    """The rows of log.jsonl, without an incomplete last line, which a killed run may leave."""
    path = out / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError:
        raise UsageError(f"{path} is not a nanoR1 log: remove it, or use another --out") from None


def save_checkpoint(path: Path, content: dict) -> None:
    """Write a whole checkpoint or nothing, on rank 0 only. It is written piece by piece, because a checkpoint in memory
    would be a second copy of the model."""
    if not rank():
        with whole_file(path) as file:
            torch.save(content, file)


def load_checkpoint(path: Path, stage: str | None = None) -> dict:
    """The content of a checkpoint. Raises UsageError if the file is missing, is not a complete nanoR1 checkpoint, or is
    a checkpoint of another stage than `stage`."""
    if not path.exists():
        raise UsageError(f"{path} is missing: train this stage first (without --stage all stages are trained)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about foreign pickles; our line below is enough
            content = torch.load(path, map_location="cpu", weights_only=True)
        stored = {1: content["stage"]}[content["nanor1"]]  # 1 is the format of these checkpoints
    except Exception:  # torch.load raises many kinds for files that are cut off, foreign or malicious
        raise UsageError(f"{path} is not a complete nanoR1 checkpoint: remove it, and repeat the command") from None
    if stage not in (None, stored):
        raise UsageError(f"{path} is a checkpoint of {stored}, not of {stage}: rename it or remove it")
    return content


def finished_models(out: Path, first: Iterable[str]) -> list[str]:
    """The names of the finished stages with a NAME.pt in a folder: those in `first`, in their order, then the others.
    Of the others, a file counts only if it is named after the stage stored in it, which a copy is not."""
    names = [name for name in first if (out / f"{name}.pt").exists()]
    left_out = (*names, "resume", *(f"{name}_best" for name in names))
    others = [path for path in sorted(out.glob("*.pt")) if path.stem not in left_out]
    return names + [path.stem for path in others if stage_of(path) == path.stem]


def stage_of(path: Path) -> str | None:
    """The stage that wrote a checkpoint; None if the file is not a nanoR1 checkpoint."""
    try:
        return load_checkpoint(path)["stage"]
    except UsageError:
        return None


def build_model(content: dict) -> GPT:
    """The model in a checkpoint's content, on the CPU, with the compute dtype that it was trained with."""
    model = make_model(content["shape"], getattr(torch, content["config"]["dtype"]))
    model.load_state_dict(content["model"])
    return model


def check_base(path: Path, cfg, vocab_size: int) -> None:
    """Raises UsageError if --base is no checkpoint, or one of another tokenizer or block_size."""
    shape = load_checkpoint(path)["shape"]
    for name, value in {"vocab_size": vocab_size, "block_size": cfg.block_size}.items():
        if shape[name] != value:
            raise UsageError(f"--base={path} has {name} {shape[name]}, and this run {value}: they must be equal")


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """Create a folder, and lock it until the `with` block or this process ends, even if the process is killed. Rank 0
    holds the lock for all ranks. Raises UsageError if another run holds it.

    The lock is one of SQLite, which uses the file locks of the operating system, whichever it is.
    """
    if rank():
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(out / "lock", timeout=0)) as holder:
        try:
            holder.execute("BEGIN EXCLUSIVE")
        except sqlite3.Error as error:
            if "is locked" not in str(error):  # such as "disk I/O error": this file system has no locks
                print(f"cannot lock {out} ({error}): make sure that no other run writes into it", file=sys.stderr)
                yield
                return
            raise UsageError(f"cannot lock {out}: another run is writing into it; wait, or use another --out") from None
        yield
