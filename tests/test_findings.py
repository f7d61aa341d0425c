"""The cells of the findings (a cell is a run with some flags and a seed): what is trained, what is stored, when a cell
is run again, and the page."""
import dataclasses
import doctest
import itertools
import json
import os

import pytest

import cells
import findings
import measures
import tables
from cells import SEEDS, Cell
from controls import CONTROLS
from engine.files import load_checkpoint
from engine.terminal import UsageError
from measures import pass_at_k
from tables import Figure, Known, differs, figure
from train import STAGES
from variants import VARIANTS

FLAGS = ("--preset=tiny --device=cpu --base_tokens=40000 --base_batch=4 --student_base_tokens=9000 --rl_steps=10 "
         "--distill_steps=1 --distill_prompts=64 --rl_max_new_tokens=40 --eval_problems=2")
CORES = os.cpu_count() or 1  # with as many jobs, each training has one thread
CELLS = {"first": Cell(("base", "zero", "student_base", "student"), FLAGS, dtype="float32"),
         "second, other": Cell(("zero",), f"{FLAGS} --scale=none", "first", {"zero": "shuffled"}, ("divergence",),
                               "float32")}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Two cells that take a second or two, with one seed, in a folder of their own."""
    for name, value in {"CELLS": dict(CELLS), "SEEDS": (0,), "RESULTS": tmp_path / "results",
                        "OUT": tmp_path / "out"}.items():
        monkeypatch.setattr(cells, name, value)
        if hasattr(findings, name):
            monkeypatch.setattr(findings, name, value)
    return tmp_path


def kept(name: str, seed: int) -> dict:
    """The result of a cell in experiments/results."""
    return json.loads((cells.RESULTS / f"{cells.slug(name)}-{seed}.json").read_text())


def test_cells_are_run_once_and_again_when_their_settings_change(small, monkeypatch):
    """A base must not be trained twice, and a result must not be kept if its flags or its control have changed. A cell
    that starts from another cell must not be refused because of models that it does not use. If a model is a control, a
    measure must use the control."""
    cells.run_cells(["first", "second, other"], jobs=CORES)
    files = {path.name: path.stat().st_mtime_ns for path in (small / "results").iterdir()}
    assert set(files) == {"first-0.json", "second_other-0.json"}
    first, second = cells.stored("first", 0), cells.stored("second, other", 0)
    assert len(first["models"]) == 4 and set(second["models"]) == {"zero"}
    assert len(first["rows"]["zero"]["length"]) == 10 and first["machine"]["dtype"] == "float32"
    assert 0 < second["seconds"] and first["measures"] == {} and second["measures"]["divergence"]["kl"] > 0
    first_out, second_out = (cells.folder(name, 0) for name in cells.CELLS)
    base, same_base, zero, shuffled = (
        load_checkpoint(path)["model"]["embedding.weight"] for path in (
            first_out / "base.pt", second_out / "base.pt", first_out / "zero.pt", second_out / "shuffled.pt"))
    assert base.equal(same_base) and not zero.equal(shuffled) and not base.equal(shuffled)
    assert {path.name for path in second_out.glob("*.pt")} == {"base.pt", "shuffled.pt"}
    trained = []
    monkeypatch.setattr(cells, "train", lambda *args: trained.append(args))
    cells.run_cells(["first", "second, other"], jobs=CORES)
    assert not trained and files == {path.name: path.stat().st_mtime_ns for path in (small / "results").iterdir()}
    for change in ({"flags": f"{FLAGS} --rl_lr=0.01"}, {"flags": f"{FLAGS} --eval_every=5"}, {"dtype": "bfloat16"},
                   {"start": "second, other"}):
        cells.CELLS["first"] = dataclasses.replace(CELLS["first"], **change)
        assert cells.stored("first", 0) is None and cells.stored("second, other", 0)
    for controls in ({}, {"zero": "batch_baseline"}):  # its flags are the same
        cells.CELLS["second, other"] = dataclasses.replace(CELLS["second, other"], controls=controls)
        assert cells.stored("second, other", 0) is None


def test_a_variant_that_diverges_is_a_result(small, monkeypatch):
    """A variant that diverges must be stored with the steps that it took, and must not be run again and again. Any
    other run that fails must not be stored."""
    flags = f"{FLAGS} --rl_lr=1e30"
    cells.CELLS["first"] = Cell(("base",), FLAGS, dtype="float32")
    cells.CELLS["diverges"] = Cell(("zero",), flags, "first", {"zero": "rloo"}, dtype="float32", may_diverge=True)
    cells.run_cells(["diverges"], jobs=CORES)
    found = cells.stored("diverges", 0)
    assert found["models"] == {} and len(found["rows"]["zero"]["accuracy"]) < 10 and found["seconds"] >= 0
    cells.CELLS["fails"] = Cell(("zero",), flags, "first", dtype="float32")
    with pytest.raises(UsageError, match="says why"):
        cells.run_cells(["fails"], jobs=CORES)
    assert cells.stored("fails", 0) is None


@pytest.mark.parametrize("path", sorted(cells.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_stored_results_are_of_a_cell(path):
    """A change of the settings that changes no stored cell must not repeat hours of training, and no result may stay
    that belongs to no cell. The metrics must be of each step."""
    found = json.loads(path.read_text())
    name, seed = found["cell"], found["seed"]
    assert path.name == f"{cells.slug(name)}-{seed}.json" and cells.stored(name, seed) == found
    assert found["commit"] and found["seconds"] > 0
    if not cells.CELLS[name].is_r1 and "zero" in found["models"]:
        assert {len(values) for values in found["rows"]["zero"].values()} == {found["settings"]["rl_steps"]}


def test_each_control_that_a_cell_names_exists():
    """A control must not turn out to be unknown after hours of training, and a cell must not store a model under a name
    that no row uses."""
    for name, cell in cells.CELLS.items():
        assert set(cell.controls) <= set(cell.trains) and set(cell.controls.values()) <= {*CONTROLS, *VARIANTS}, name
        assert all(stage in cell.table() for stage in cell.stages()), name
        for stage in cell.stages():  # a zero with another corpus starts from the base of this cell
            starts = cell.table()[stage].starts
            assert all(start in STAGES or start in cell.stages() for start in starts) or cell.is_r1, name


def test_commands_make_all_models_of_a_cell():
    """A model must not be missing after hours of training, and no control may be trained that the cell does not
    need."""
    commands = {name: cell.commands() for name, cell in cells.CELLS.items()}
    assert commands["default"] == [["train.py"], ["experiments/controls.py", "student_rl"]]
    assert commands["tokens 1/4"] == [["train.py", "--stage=base"], ["train.py", "--stage=zero"]]
    assert commands["sequence"] == [["train.py", "--stage=zero"]]
    assert commands["worked 0"] == [["experiments/controls.py", "zero_no_working"]]
    assert commands["short problems"] == [["experiments/controls.py", "student_short"]]
    assert commands["stress gspo"] == [["experiments/variants.py", "gspo"]]
    assert commands["R1"] == [["r1.py"]] and commands["language 0"] == [["r1.py", "--stage=dev2"]]


def test_a_run_that_fails_is_one_line(small):
    """A failed run must not end in a traceback from a thread, and its cell must not be stored."""
    cells.CELLS["first"] = Cell(("base", "zero"), f"{FLAGS} --base_adam_lr=1e30", dtype="float32")
    with pytest.raises(UsageError, match="says why"):
        cells.run_cells(["first"], jobs=CORES)
    assert not list((small / "results").glob("*"))


def test_bad_input(capsys):
    """Hours of training must not start with a misspelt flag, and the error must not be a traceback."""
    for arg, words in (("--only=15", "choose from"), ("--only=", "invalid choice"), ("--rows=3", "--rows=3"),
                       ("--jobs=0", "above 0")):
        assert findings.main([arg]) == 2
        line = capsys.readouterr().err
        assert words in line and line.count("\n") == 1


def test_the_tables_need_stored_results_alone(small, capsys):
    """A page must not need checkpoints, or stop at a row that has not been run."""
    assert list(findings.blocks(findings.known())) == ["summary"]
    assert findings.blocks_of_variants(findings.known()) == {}
    assert findings.main(["--figure"]) == 2
    said = capsys.readouterr().out
    assert all(f"finding {n}: left out" in said for n in findings.FINDINGS) and "variants: left out" in said


def test_each_finding_has_a_claim_and_a_bar():
    """The summary must not lack a finding because its section is written differently."""
    assert list(findings.sections(findings.PAGE.read_text(encoding="utf-8"))) == list(findings.FINDINGS)


def test_the_committed_pages_are_what_is_stored():
    """The pages in the repository must not differ from the results in experiments/results."""
    for path, text in findings.pages(findings.known()).items():
        assert path.read_text(encoding="utf-8") == text, "python experiments/findings.py"


def test_only_what_stands_between_the_marks_is_replaced(tmp_path):
    """A sentence must not be lost, a table must not be written twice, and a mark that is gone must be noticed."""
    blocks = {"1": ["", "| new |", ""], "1 more": ["", "| also |", ""]}
    expected = "a\n<!-- 1 -->\n\n| new |\n\n<!-- end -->\nb\n<!-- 1 more -->\n\n| also |\n\n<!-- end -->\nc\n"
    page = tmp_path / "page.md"
    for text in ("a\n<!-- 1 -->\nold\n<!-- end -->\nb\n<!-- 1 more -->\n<!-- end -->\nc\n", expected):
        page.write_text(text)
        assert findings.renewed(page, blocks) == expected
    page.write_text(text.replace("1 more", "1 less"))
    with pytest.raises(UsageError, match="<!-- 1 more -->"):
        findings.renewed(page, blocks)


@pytest.mark.parametrize("number", findings.FINDINGS)
def test_findings_name_the_cells_that_they_need(number):
    """A finding must not read a cell that --only does not run, or have more than one figure in the summary. The lines of
    a table must have the same number of columns."""
    finding = findings.FINDINGS[number]
    measured, holds, found = finding.measure(
        Known({name: [kept(name, seed) for seed in SEEDS] for name in finding.cells}))
    for name, lines in found.items():
        assert name == str(number) or name.startswith(f"{number} ")
        assert len({text.replace("\\|", "").count("|") for text in lines if text}) == 1
    assert holds in (True, False) and (measured.count("±") == 1 or measured.endswith(" of 6 parts"))


@pytest.mark.parametrize("number, cell", ((9, "default rloo"), (14, "stress no_clip")))
def test_a_finding_with_a_run_that_diverged(number, cell):
    """Findings that are about runs that may diverge must not end in an error if one does."""
    k = findings.known()
    first, *others = k.cells[cell]
    k = Known(k.cells | {cell: [first | {"models": {}}, *others]})
    measured, _, found = findings.FINDINGS[number].measure(k)
    assert any("| diverged |" in line for lines in found.values() for line in lines) == (number == 14)
    assert "±" in measured


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
    for module in (cells, findings, measures, tables):
        assert doctest.testmod(module).failed == 0
