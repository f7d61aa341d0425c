"""The findings' cells: what is trained, what is kept, when it is done again, and the page that is made of it."""
import doctest
import json

import pytest

import findings
import measures
import rows
from findings import SEEDS, Cell
from rows import Figure, Known, differs, figure
from run import Fault

FLAGS = ("--preset=tiny --device=cpu --base_tokens=40000 --student_base_tokens=40000 --rl_steps=10 --distill_steps=1 "
         "--distill_prompts=64 --rl_max_new_tokens=40 --eval_problems=8")
CELLS = {"first": Cell(("base", "zero", "student_base", "student"), FLAGS, measures=("conditional",)),
         "second, other": Cell(("zero",), f"{FLAGS} --scale=none", "first")}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Two cells of a second or two, one seed, and a folder of their own."""
    for name, value in {"CELLS": dict(CELLS), "SEEDS": (0,), "RESULTS": tmp_path / "results", "OUT": tmp_path / "out",
                        "PAGE": tmp_path / "findings.md"}.items():
        monkeypatch.setattr(findings, name, value)
    return tmp_path


def test_cells_are_run_once_and_again_when_their_settings_change(small, monkeypatch, capsys):
    """A base trained twice; a stale result kept after a flag has changed; a new field that makes all stale; a cell that
    takes more from its start than its base, and is refused for the start's other models."""
    findings.run_cells(["first", "second, other"], jobs=1)
    files = {path.name: path.stat().st_mtime_ns for path in (small / "results").iterdir()}
    assert set(files) == {"first-0.json", "second_other-0.json"}
    first, second = findings.stored("first", 0), findings.stored("second, other", 0)
    assert len(first["models"]) == 4 and set(second["models"]) == {"zero"}
    assert len(first["curves"]["zero"]["length"]) == 10
    assert 0 < second["seconds"] and set(first["measures"]) == {"conditional"}
    base, zero = ([(findings.folder(name, 0) / model).read_bytes() for name in findings.CELLS]
                  for model in ("base.pt", "zero.pt"))
    assert base[0] == base[1] and zero[0] != zero[1]
    trained = []
    monkeypatch.setattr(findings, "train", lambda *args: trained.append(args))
    findings.run_cells(["first", "second, other"], jobs=1)
    assert not trained and files == {path.name: path.stat().st_mtime_ns for path in (small / "results").iterdir()}
    path = small / "results" / "first-0.json"
    content = json.loads(path.read_text())
    del content["settings"]["wait_share"]  # as if the field had been added since, with a default that changes nothing
    path.write_text(json.dumps(content))
    assert findings.stored("first", 0)
    findings.CELLS["first"] = Cell(CELLS["first"].trains, f"{FLAGS} --rl_lr=0.01", measures=("conditional",))
    assert findings.stored("first", 0) is None and findings.stored("second, other", 0)


def test_a_run_that_fails_is_one_line(small, capsys):
    """A traceback from a thread; a cell that is kept although its run failed."""
    findings.CELLS["first"] = Cell(("base", "zero"), f"{FLAGS} --base_adam_lr=1e30")
    with pytest.raises(Fault, match="says why"):
        findings.run_cells(["first"], jobs=1)
    assert not list((small / "results").glob("*"))


def test_bad_input(capsys):
    for arg, words in (("--only=11", "1 to 10"), ("--only=", "unknown"), ("--rows=3", "unknown"),
                       ("--jobs=0", "unknown")):
        assert findings.main([arg]) == 2
        line = capsys.readouterr().err
        assert words in line and line.count("\n") == 1


def test_the_page_is_made_of_what_is_stored(small, capsys):
    """A page that needs checkpoints, or that breaks off where a row has not been run."""
    assert findings.page(findings.known()).startswith("# Findings")
    said = capsys.readouterr().out
    assert all(f"row {n} is left out" in said for n in findings.ROWS)


@pytest.mark.parametrize("number", findings.ROWS)
def test_rows_name_the_cells_that_they_need(number):
    """A row that reads a cell which --only does not run."""
    row = findings.ROWS[number]
    kept = {name: [json.loads((findings.RESULTS / f"{findings.slug(name)}-{seed}.json").read_text()) for seed in SEEDS]
            for name in row.cells}
    line, passed, details = row.measure(Known(kept))
    columns = {text.replace("\\|", "").count("|") for text in details if text.startswith("|")}
    assert line and passed in (True, False) and len(columns) == 1


def test_spreads():
    """The standard error over seeds for their deviation; the smaller of both spreads; points for shares."""
    assert figure([0.1, 0.3, 0.2], [0.05, 0.05, 0.05]) == Figure(pytest.approx(0.2), pytest.approx(0.1))
    assert figure([0.2, 0.2, 0.2], [0.01, 0.02, 0.03]) == Figure(pytest.approx(0.2), pytest.approx(0.02))
    assert differs(Figure(0.05, 0.06)).endswith("no difference")
    assert differs(Figure(-0.05, 0.04)) == "-5.0 ± 4.0 points"
    assert len(SEEDS) == 3


def test_examples_in_the_docstrings():
    for module in (findings, measures, rows):
        assert doctest.testmod(module).failed == 0
