"""The benchmark's command line, its processes and its arithmetic. Speed is not measured here: that needs the peers and
an idle machine."""
import contextlib
import dataclasses
import importlib.util
import io
from collections import deque
from functools import partial

import pytest
import torch

import bench
from model import GPTConfig

TINY = GPTConfig(bench.VOCAB, 64, n_layer=1, n_head=2, n_embd=16)


@pytest.mark.parametrize("arg, words", [
    ("--rep=3", "--rep=3"), ("--reps", "expected one argument"), ("--reps=0", "above 0"), ("--reps=x", "above 0"),
    ("--only=rl", "sampling"), ("--dtype=int8", "float32"), ("--device=tpu", "cuda"),
    ("--beside=nowhere", "no checkout")])
def test_bad_input(capsys, arg, words):
    """If a bad flag were ignored, ten minutes would be spent on another measurement."""
    assert bench.main([arg]) == 2
    printed = capsys.readouterr()
    assert words in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_missing_peers_are_named(capsys, monkeypatch):
    """A missing peer must not end in a traceback, and --beside must not need the peers."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert bench.main([]) == 2
    assert "pip install -r experiments/requirements.txt" in capsys.readouterr().err
    assert bench.parse([f"--beside={bench.ROOT}"]).beside == bench.ROOT


def test_another_checkout_is_run_by_its_own_code(tmp_path, capsys):
    """If the other process imported the modules of this checkout, --beside would compare our code with itself."""
    for name, seconds in ("ours", 2.0), ("other", 3.0):
        (tmp_path / name / "experiments").mkdir(parents=True)
        (tmp_path / name / "speed.py").write_text(f"SECONDS = {seconds}")
        (tmp_path / name / "experiments" / "bench.py").write_text(
            "from speed import SECONDS\ndef serve(pipe, side, name, options):\n    pipe.send(9.0)\n"
            "    while pipe.recv():\n        pipe.send(SECONDS)\n    pipe.send(100 * SECONDS)\n")
    case, option = "pretraining, 32 x 128", {"dtype": "float32", "device": "cpu"}
    sides = [(tmp_path / name, "ours") for name in ("ours", "other")]
    bench.measure(case, sides, [option, option], 3)
    row = capsys.readouterr().out
    assert "| 2,048 tokens/s | 1,365 tokens/s | 1.50 (1.50..1.50) |" in row and "200 / 300 MiB" in row


class End:
    """One end of a pipe: `send` appends to `sent`, and `recv` takes from `waiting`."""

    def __init__(self, waiting: deque, sent: deque):
        self.recv, self.send = waiting.popleft, sent.append


def served_here(checkout, side, name, options):
    """bench.launch without a process. The side runs at once: with each option, one turn of one step."""
    waiting = deque()
    with contextlib.redirect_stdout(io.StringIO()):  # serve silences its process
        bench.serve(End(deque([1, 0] * len(options)), waiting), side, name, options)
    return End(waiting, deque())


@pytest.mark.parametrize("group", dict.fromkeys(case.group for case in bench.CASES.values()))
def test_every_group_prints_its_rows(group, monkeypatch, capsys):
    """Our side of a case must not call a function that does not exist, its completions must not end early, and each
    group needs a signal. Otherwise only a benchmark of several minutes would show the bug. Here the shapes are tiny,
    and nothing is compiled."""
    for name, value in dict(TEACHER=TINY, STUDENT=TINY, B=2, T=16, P=2, G=8, NEW=8, N=16).items():
        monkeypatch.setattr(bench, name, value)
    torch.manual_seed(0)  # two answers may have the same reward, but not all eight
    cases = {}
    for name, case in bench.CASES.items():
        ours = case.ours
        if case.group in ("sampling", "real"):
            shape = dataclasses.replace(case.ours.keywords["shape"], vocab_size=bench.VOCAB, n_layer=1)
            ours = partial(bench.our_sampling, shape=shape, rows=16, new=3)
        cases[name] = dataclasses.replace(case, ours=ours, steps=1)
    monkeypatch.setattr(bench, "CASES", cases)
    monkeypatch.setattr(bench.CFG, "compile", "off")
    monkeypatch.setattr(bench, "launch", served_here)
    bench.compare(1, group, "float32", "cpu", bench.ROOT)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" MiB |")]
    names = [name for name, case in cases.items() if case.group == group and "peer" not in name]
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in names]
