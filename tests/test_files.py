"""Files are written completely or not at all, foreign files are refused and kept, and a run locks its folder."""
import contextlib
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from engine.files import save_checkpoint, write_file
from tests.conftest import QUICK, ROOT, copy, main, rows, weights_equal


def test_out_that_cannot_be_written(tmp_path, refused):
    """A file at the path of --out must not end in a traceback, or be overwritten."""
    (tmp_path / "file").write_text("precious")
    assert "file" in refused("--preset=tiny", f"--out={tmp_path / 'file' / 'out'}")
    assert "file" in refused("--preset=tiny", f"--out={tmp_path / 'file'}")
    assert (tmp_path / "file").read_text() == "precious"


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path(__file__).parent / "bomb_went_off",)


@pytest.mark.parametrize("kind", ["truncated", "text", "foreign", "malicious", "other stage"])
def test_foreign_checkpoints(quick, tmp_path, refused, kind):
    """A checkpoint may come from outside. Its content must not be executed, and it must not be overwritten or end in a
    traceback."""
    path = tmp_path / "base.pt"
    if kind == "truncated":
        path.write_bytes((quick / "base.pt").read_bytes()[:-1000])
    elif kind == "text":
        path.write_text("hello")
    elif kind == "foreign":
        torch.save({"model": {}}, path)
    elif kind == "malicious":
        path.write_bytes(pickle.dumps(Bomb()))
    else:
        path.write_bytes((quick / "student.pt").read_bytes())
    before = path.read_bytes()
    assert "base.pt" in refused(*QUICK, f"--out={tmp_path}")
    assert path.read_bytes() == before and not (Path(__file__).parent / "bomb_went_off").exists()


def test_full_disk(quick, tmp_path, refused):
    """A failed write must not destroy the old checkpoint. A limit on the size of a file takes the place of a full disk:
    there is room for base.pt, but not for the checkpoint of the next stage."""
    copy(quick, tmp_path, "base.pt", "log.jsonl", "results.json")
    before, (_, hard) = (quick / "base.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before), hard))
    try:
        line = refused(*QUICK, "--stage=zero", f"--out={tmp_path}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert "cannot write" in line and "intact" in line
    assert not list(tmp_path.glob("*.tmp")) and (tmp_path / "base.pt").read_bytes() == before
    assert main([*QUICK, "--stage=zero", f"--out={tmp_path}"]) == 0
    assert weights_equal(quick / "zero.pt", tmp_path / "zero.pt")


def test_a_file_is_whole_or_as_before(tmp_path, monkeypatch):
    """If a file were written in place, a power failure would leave half a file."""
    path, replace = tmp_path / "base.pt", os.replace
    path.write_bytes(b"before")
    seen = []
    monkeypatch.setattr(os, "replace", lambda *args: (seen.append(path.read_bytes()), replace(*args)))
    write_file(path, b"after")
    assert seen == [b"before"] and path.read_bytes() == b"after" and list(tmp_path.iterdir()) == [path]


def test_only_rank_0_writes(tmp_path, monkeypatch):
    """Two ranks must not write the same file at once."""
    monkeypatch.setattr("engine.files.rank", lambda: 1)
    write_file(tmp_path / "log.jsonl", b"{}")
    save_checkpoint(tmp_path / "base.pt", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, content, words", [
    ("log.jsonl", "dear diary\n", "not a nanoR1 log"), ("results.json", "[1, 2]", "not written by nanoR1"),
    ("results.json", '{"config": {', "not written by nanoR1")])
def test_foreign_files_are_kept(tmp_path, refused, name, content, words):
    """A foreign file that happens to have the name of one of ours must not be overwritten."""
    (tmp_path / name).write_text(content)
    assert words in refused(*QUICK, f"--out={tmp_path}")
    assert (tmp_path / name).read_text() == content


def test_ctrl_c_while_saving_is_no_full_disk(tmp_path):
    """If torch.save is interrupted, it still tries to finish its file, and raises another error there. The run must not
    report this error as a failed write."""
    path = tmp_path / "base.pt"
    path.write_bytes(b"old")

    class Interrupting:
        """A value that raises KeyboardInterrupt when it is pickled."""
        def __reduce__(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {"nanor1": 1, "stage": Interrupting()})

    def failing(content, file):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise RuntimeError("unexpected pos")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", failing)
        save_checkpoint(path, {})
    assert path.read_bytes() == b"old" and not list(tmp_path.glob("*.tmp"))


# The lock


@contextlib.contextmanager
def paused_run(out, *args):
    """Start a run in a process of its own, and pause it by SIGSTOP in the stage zero -> the process, which is killed at
    the end."""
    process = subprocess.Popen([sys.executable, "train.py", *args, f"--out={out}"], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while not (out / "log.jsonl").exists() or not any(row["stage"] == "zero" for row in rows(out)):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.002)
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)  # until it has stopped
        yield process
    finally:
        process.kill()
        process.communicate()


def test_two_runs_on_one_out(quick, tmp_path, refused, capfd):
    """Two runs must not overwrite each other's files. The lock must not block --ask or another --out, and must not
    remain after a run is killed. The first run is paused, so only the second one could change its files."""
    out, other = tmp_path / "out", tmp_path / "other"
    copy(quick, out, "base.pt")
    with paused_run(out, *QUICK) as process:
        before = {path: path.read_bytes() for path in out.iterdir()}
        assert "another run is writing" in refused(*QUICK, f"--out={out}")
        assert "another run is writing" in refused(*QUICK, "--stage=zero", "--rl_steps=4", f"--out={out}")
        assert before == {path: path.read_bytes() for path in out.iterdir()}
        copy(quick, other, "base.pt")
        assert main([*QUICK, "--stage=base", f"--out={other}"]) == 0
        capfd.readouterr()
        assert main(["--ask=8*7-19", f"--out={out}"]) == 0
        assert capfd.readouterr().out.startswith("8*7-19 = 37\nbase ")
        assert process.poll() is None and before == {path: path.read_bytes() for path in out.iterdir()}
        process.kill()
        process.wait()
        assert main([*QUICK, "--stage=zero", f"--out={out}"]) == 0
    assert weights_equal(quick / "zero.pt", out / "zero.pt")
