"""The cells of the findings (a cell is a run with some flags and a seed): what is trained, what is stored, when a cell
is run again, and the page."""
import doctest
import itertools
import json
import os

import pytest

import findings
import measures
import tables
from controls import CONTROLS
from engine.files import load_checkpoint
from engine.terminal import UsageError
from findings import GONE, SEEDS, Cell
from measures import pass_at_k
from tables import Figure, Known, differs, figure
from train import STAGES

FLAGS = ("--preset=tiny --device=cpu --base_tokens=40000 --base_batch=4 --student_base_tokens=9000 --rl_steps=10 "
         "--distill_steps=1 --distill_prompts=64 --rl_max_new_tokens=40 --eval_problems=2")
CORES = os.cpu_count() or 1  # with as many jobs, each training has one thread
CELLS = {"first": Cell(("base", "zero", "student_base", "student"), FLAGS),
         "second, other": Cell(("zero",), f"{FLAGS} --scale=none", "first", {"zero": "shuffled"}, ("divergence",))}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Two cells that take a second or two, with one seed, in a folder of their own."""
    for name, value in {"CELLS": dict(CELLS), "SEEDS": (0,), "RESULTS": tmp_path / "results", "OUT": tmp_path / "out",
                        "PAGE": tmp_path / "findings.md"}.items():
        monkeypatch.setattr(findings, name, value)
    return tmp_path


def kept(name: str, seed: int) -> dict:
    """The result of a cell in experiments/results."""
    return json.loads((findings.RESULTS / f"{findings.slug(name)}-{seed}.json").read_text())


def test_cells_are_run_once_and_again_when_their_settings_change(small, monkeypatch):
    """A base must not be trained twice, and a result must not be kept if its flags or its control have changed. A cell
    that starts from another cell must not be refused because of models that it does not use. If a model is a control, a
    measure must use the control."""
    findings.run_cells(["first", "second, other"], jobs=CORES)
    files = {path.name: path.stat().st_mtime_ns for path in (small / "results").iterdir()}
    assert set(files) == {"first-0.json", "second_other-0.json"}
    first, second = findings.stored("first", 0), findings.stored("second, other", 0)
    assert len(first["models"]) == 4 and set(second["models"]) == {"zero"}
    assert len(first["curves"]["zero"]["length"]) == 10
    assert 0 < second["seconds"] and first["measures"] == {} and second["measures"]["divergence"]["kl"] > 0
    first_out, second_out = (findings.folder(name, 0) for name in findings.CELLS)
    base, same_base, zero, shuffled = (
        load_checkpoint(path)["model"]["embedding.weight"] for path in (
            first_out / "base.pt", second_out / "base.pt", first_out / "zero.pt", second_out / "shuffled.pt"))
    assert base.equal(same_base) and not zero.equal(shuffled) and not base.equal(shuffled)
    assert {path.name for path in second_out.glob("*.pt")} == {"base.pt", "shuffled.pt"}
    trained = []
    monkeypatch.setattr(findings, "train", lambda *args: trained.append(args))
    findings.run_cells(["first", "second, other"], jobs=CORES)
    assert not trained and files == {path.name: path.stat().st_mtime_ns for path in (small / "results").iterdir()}
    findings.CELLS["first"] = Cell(CELLS["first"].trains, f"{FLAGS} --rl_lr=0.01")
    assert findings.stored("first", 0) is None and findings.stored("second, other", 0)
    for controls in ({}, {"zero": "batch_baseline"}):  # its flags are the same
        findings.CELLS["second, other"] = Cell(("zero",), f"{FLAGS} --scale=none", "first", controls)
        assert findings.stored("second, other", 0) is None


def test_all_cells_of_the_page_are_stored():
    """A change of the settings that changes no stored cell must not repeat hours of training."""
    for name in findings.CELLS:
        for seed in SEEDS:
            assert findings.stored(name, seed) == kept(name, seed)


def store(folder, settings: dict, cell: Cell) -> None:
    """Store a result of the cell with these settings. They are those of a program in which the controls were
    settings."""
    findings.CELLS["cell"] = cell
    (folder / "results").mkdir(exist_ok=True)
    (folder / "results" / "cell-0.json").write_text(json.dumps({
        "settings": settings, "models": {model: {} for model in cell.trains}, "measures": {}}))


@pytest.mark.parametrize("flags, controls, field, is_stored", [
    ("--distill_epochs=1", {}, "distill_epochs", True), ("", {}, "distill_epochs", False), ("", {}, "wait_share", True),
    ("", {"base": "base_no_wait"}, "wait_share", False), ("", {}, "skip_no_signal", False),
    ("", {"zero": "all_completions"}, "skip_no_signal", True), ("", {}, "distill_longer", False),
    ("", {"student": "student_short"}, "distill_longer", True)])
def test_fields_that_a_stored_cell_lacks(small, flags, controls, field, is_stored):
    """A cell stored before a field existed must not count as trained with the field's default. Without distill_epochs a
    cell was trained with 1 epoch, whatever the default is. Without skip_no_signal the KL penalty acted on all rows."""
    cell = Cell(("base", "zero", "student"), flags, controls=controls)
    settings = {**findings.old_settings(cell), "eval_greedy": True}  # a field that no longer exists
    store(small, settings, cell)
    assert findings.stored("cell", 0)
    del settings[field]
    store(small, settings, cell)
    assert (findings.stored("cell", 0) is not None) == is_stored


def test_a_control_is_not_taken_for_another(small):
    """A stored result of a control must not count as a result of train.py or of another control. Older results name the
    control in a setting that the program does not have."""
    trains = ("base", "zero", "student")
    controls = [{}, {"zero": "shuffled"}, {"zero": "format_alone"}, {"zero": "batch_baseline"},
                {"zero": "all_completions"}, {"student": "student_short"}]
    controls += [{"base": f"base_{kind}", "zero": f"zero_{kind}"} for kind in ("no_working", "half_working", "no_wait")]
    cells = [Cell(trains, controls=names) for names in controls] + [Cell(trains, "--accuracy_weight=0.5")]
    for made in cells:
        for now in cells:
            store(small, findings.old_settings(made), now)
            assert (findings.stored("cell", 0) is not None) == (made is now), (made.controls, now.controls)
    assert {name for _, _, in_controls in GONE.values() for name in in_controls} == {
        name for name in CONTROLS if not name.startswith("zero_") and name != "student_rl"}


def test_each_control_that_a_cell_names_exists():
    """A control must not turn out to be unknown after hours of training, and a cell must not store a model under a name
    that no row uses."""
    for name, cell in findings.CELLS.items():
        assert set(cell.controls) <= set(cell.trains) and set(cell.controls.values()) <= set(CONTROLS), name
        assert all(stage in cell.table() for stage in cell.stages()), name
        for stage in cell.stages():  # a zero with another corpus starts from the base of this cell
            starts = cell.table()[stage].starts
            assert all(start in STAGES or start in cell.stages() for start in starts) or cell.is_r1, name


def test_commands_make_all_models_of_a_cell():
    """A model must not be missing after hours of training, and no control may be trained that the cell does not
    need."""
    commands = {name: cell.commands() for name, cell in findings.CELLS.items()}
    assert commands["default"] == [["train.py"], ["experiments/controls.py", "student_rl"]]
    assert commands["no KL"] == [["train.py", "--stage=base"], ["train.py", "--stage=zero"],
                                 ["train.py", "--stage=student_base"], ["experiments/controls.py", "student_short"]]
    assert commands["no std"] == [["train.py", "--stage=zero"]]
    assert commands["worked 0"] == [["experiments/controls.py", "zero_no_working"]]
    assert commands["short problems"] == [["experiments/controls.py", "student_short"],
                                          ["experiments/controls.py", "student_rl_short"]]
    assert commands["R1"] == [["r1.py"]] and commands["language 0"] == [["r1.py", "--stage=dev2"]]


def test_a_run_that_fails_is_one_line(small):
    """A failed run must not end in a traceback from a thread, and its cell must not be stored."""
    findings.CELLS["first"] = Cell(("base", "zero"), f"{FLAGS} --base_adam_lr=1e30")
    with pytest.raises(UsageError, match="says why"):
        findings.run_cells(["first"], jobs=CORES)
    assert not list((small / "results").glob("*"))


def test_bad_input(capsys):
    """Hours of training must not start with a misspelt flag, and the error must not be a traceback."""
    for arg, words in (("--only=12", "choose from 1, 2"), ("--only=", "invalid int"), ("--rows=3", "--rows=3"),
                       ("--jobs=0", "above 0")):
        assert findings.main([arg]) == 2
        line = capsys.readouterr().err
        assert words in line and line.count("\n") == 1


def test_the_page_is_made_of_what_is_stored(small, capsys):
    """The page must not need checkpoints, or stop at a row that has not been run."""
    text = "by hand\n<!-- 1 -->\nold\n<!-- end -->\nmore\n<!-- summary -->\n<!-- end -->\n"
    assert "old" in findings.page(findings.known(), text)
    said = capsys.readouterr().out
    assert all(f"finding {n} is left out" in said for n in findings.ROWS)


def test_the_committed_page_is_what_is_stored():
    """The page in the repository must not differ from the results in experiments/results."""
    text = findings.PAGE.read_text(encoding="utf-8")
    assert findings.page(findings.known(), text) == text


def test_only_what_stands_between_the_marks_is_replaced(monkeypatch):
    """A sentence must not be lost, a table must not be written twice, and a mark that is gone must be noticed."""
    monkeypatch.setattr(findings, "blocks", lambda k: {"1": ["", "| new |", ""], "1 more": ["", "| also |", ""]})
    text = "a\n<!-- 1 -->\nold\n<!-- end -->\nb\n<!-- 1 more -->\n<!-- end -->\nc\n"
    expected = "a\n<!-- 1 -->\n\n| new |\n\n<!-- end -->\nb\n<!-- 1 more -->\n\n| also |\n\n<!-- end -->\nc\n"
    assert findings.page(None, text) == findings.page(None, expected) == expected
    with pytest.raises(UsageError, match="<!-- 1 more -->"):
        findings.page(None, text.replace("1 more", "1 less"))


@pytest.mark.parametrize("number", findings.ROWS)
def test_findings_name_the_cells_that_they_need(number):
    """A finding must not read a cell that --only does not run, or have more than one figure in the summary. The lines of
    a table must have the same number of columns."""
    row = findings.ROWS[number]
    measured, holds, found = row.measure(Known({name: [kept(name, seed) for seed in SEEDS] for name in row.cells}))
    for name, lines in found.items():
        assert name == str(number) or name.startswith(f"{number} ")
        assert len({text.replace("\\|", "").count("|") for text in lines if text}) == 1
    assert holds in (True, False) and (measured.count("±") == 1 or measured == "5 of 6 parts")


def test_spreads():
    """The spread must not be the smaller one of standard deviation and standard error, and a share must be shown in
    percent."""
    assert figure([0.1, 0.3, 0.2], [0.05, 0.05, 0.05]) == Figure(pytest.approx(0.2), pytest.approx(0.1))
    assert figure([0.2, 0.2, 0.2], [0.01, 0.02, 0.03]) == Figure(pytest.approx(0.2), pytest.approx(0.02))
    assert differs(Figure(0.05, 0.06)).endswith("no difference")
    assert differs(Figure(-0.05, 0.04)) == "-5.0 ± 4.0 points"
    assert len(SEEDS) == 3


def test_pass_at_k_by_enumeration():
    """pass@k must not be 1 - (1 - c/n)^k, which is biased. It is the share of all k-subsets of the n samples that
    contain at least one of the c correct ones."""
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations([i < c for i in range(n)], k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_examples_in_the_docstrings():
    """An example in a docstring must not be wrong. pytest itself runs no doctests in experiments/."""
    for module in (findings, measures, tables):
        assert doctest.testmod(module).failed == 0
