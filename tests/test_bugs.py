"""The bugs of docs/bugs.md. The test that the page names must notice each, and the harness must leave no trace."""
import doctest
import inspect
import json
import re
import sys

import pytest

import bugs
import grpo
from bugs import BUGS, CURVES, RUNS, table
from engine.settings import settings_of
from model import GPT
from patches import patched, run_tests
from tests.conftest import ROOT
from train import Config

PAGE = ROOT / "docs" / "bugs.md"
TESTS = {bug.test for bug in BUGS.values()}


@pytest.fixture(scope="module")
def correct():
    """The outcomes of all named tests without a bug."""
    return run_tests(TESTS)


def test_there_are_twelve(correct):
    """A named test that does not exist, or fails without a bug, would say nothing about a bug."""
    assert len(BUGS) == 12
    assert {name.partition("[")[0] for name in correct} == TESTS and not any(correct.values())


@pytest.mark.parametrize("name", BUGS)
def test_each_bug_is_noticed(correct, name):
    """The named test must fail because an assertion is false. Any other error would be a mistake in the patch."""
    bug = BUGS[name]
    found = run_tests([bug.test], bug.patches)
    assert found.keys() == {test for test in correct if test.partition("[")[0] == bug.test}
    assert set(found.values()) - {""} == {"AssertionError"}
    for owner, function, replacement in bug.patches:
        assert getattr(owner, function) is not replacement, "the patch is out again"


def test_no_bug_stays(correct):
    """If a patch stayed in a module, or in a dict of a test, all later tests of this process would test the bug."""
    assert run_tests(TESTS) == correct


def test_a_patch_reaches_every_name_of_a_function(monkeypatch):
    """A test that says `from grpo import make_batch` has its own name for the function, and WAYS of test_sampler.py is
    a dict. If a patch did not reach both, the test of a bug would run the correct function. The patch must be out again
    after an error."""
    import tests.test_sampler as other
    module, make_batch, generate = sys.modules[__name__], grpo.make_batch, GPT.generate
    monkeypatch.setattr(module, "imported", make_batch, raising=False)

    def one(*args):
        raise NotImplementedError

    def two(*args):
        raise NotImplementedError

    with pytest.raises(ZeroDivisionError):
        with patched([(grpo, "make_batch", one), (GPT, "generate", two)]):
            assert module.imported is grpo.make_batch is one and bugs.correct.make_batch is make_batch
            assert GPT.generate is other.WAYS["plain"] is two
            1 / 0
    assert module.imported is grpo.make_batch is make_batch and GPT.generate is other.WAYS["plain"] is generate


def test_a_bug_is_short():
    """A replacement of many lines would repeat the code of the project, which then changes without it."""
    for bug in BUGS.values():
        for _, _, function in bug.patches:
            assert len(inspect.getsource(function).splitlines()) <= 15
        assert bug.settings.keys() <= settings_of(Config).keys()


# The page and the stored curves

# One run does not tell their harm, so they have two seeds more.
WITH_SEEDS = ("pad_is_stop", "temperature", "batch_baseline", "answer_in_thought", "gradients_kept")


def test_every_bug_has_its_curve():
    """The page must not be about runs of other lengths or settings, or about a curve that nobody has."""
    curves = json.loads(CURVES.read_text(encoding="utf-8"))
    assert {f"{name}-0" for name in RUNS} <= curves.keys()
    assert {f"{name}-{seed}" for name in WITH_SEEDS for seed in (1, 2)} <= curves.keys()
    for key, curve in curves.items():
        assert curve["settings"] == RUNS[key.rpartition("-")[0]][1], key
        assert {len(values) for values in curve["rows"].values()} == {bugs.STEPS}, key
        assert curve["commit"] and "float32" in curve["machine"], key


def test_the_page_shows_what_was_measured():
    """A figure on the page must not differ from the stored curves. Each bug must be found by its name and its test."""
    text, curves = PAGE.read_text(encoding="utf-8"), json.loads(CURVES.read_text(encoding="utf-8"))
    sections = re.split(r"^## \d+\. ", text, flags=re.MULTILINE)[1:]
    assert len(sections) == 12
    for (name, bug), section in zip(BUGS.items(), sections):
        assert section.startswith(bug.symptom) and f"`{name}`" in section and bug.test in section, name
        assert table(curves, name) in section, f"{name}: python experiments/bugs.py --table"
        assert f"`{bug.field}`" in section
    assert bugs.all_runs(curves) in text


def test_the_figure(tmp_path):
    """The figure must be made from the stored curves: for each bug its own curve and the correct one."""
    pytest.importorskip("matplotlib")  # from experiments/requirements.txt, which CI has
    import matplotlib.pyplot as plt
    bugs.draw(bugs.read_curves(CURVES), tmp_path / "bugs.png")
    assert (tmp_path / "bugs.png").read_bytes().startswith(b"\x89PNG")
    assert (ROOT / "experiments" / "bugs.png").read_bytes().startswith(b"\x89PNG")
    panels = plt.gcf().axes
    lines = [len(panel.lines) for panel in panels]  # two for each seed
    assert [lines[i:i + 3] for i in range(0, 36, 3)] == [[6] * 3 if name in WITH_SEEDS else [2] * 3 for name in BUGS]
    names = bugs.draw(bugs.read_curves(CURVES), tmp_path / "quiz.png", quiz=True)
    titles = [text.get_text() for panel in plt.gcf().axes for text in panel.texts]
    assert sorted(names) == sorted(BUGS) != names and "A" in titles
    assert not any(bug.symptom in title for bug in BUGS.values() for title in titles)
    plt.close("all")


def test_a_figure_of_some_seeds(tmp_path):
    """A curve with another seed, whose control has none, must not keep the others from being drawn."""
    pytest.importorskip("matplotlib")
    curves = bugs.read_curves(CURVES)
    bugs.draw(curves | {"k1-1": curves["k1-0"]}, tmp_path / "bugs.png")
    assert (tmp_path / "bugs.png").exists()


def test_stored_curves_are_read_again(tmp_path):
    """JSON has no NaN, and a file with one could not be read elsewhere. A written curve must not remove another one."""
    curves = {"k1-0": {"rows": {"loss": [0.5, "nan", None]}, "pass@1": 0.25}}
    bugs.write_json(tmp_path / "bugs.json", curves)
    bugs.write_json(tmp_path / "bugs.json", bugs.read_curves(tmp_path / "bugs.json") | {"k1-1": curves["k1-0"]})
    text = (tmp_path / "bugs.json").read_text()
    assert json.loads(text) == curves | {"k1-1": curves["k1-0"]} and '"loss": [ 0.5, "nan", null ]' in text


def test_command_line(capsys, tmp_path, monkeypatch):
    """A mistake must not train anything, and --all must not train a bug again."""
    trained = []
    monkeypatch.setattr(bugs, "train_with", lambda name, *rest: trained.append(name) or {"rows": {}})
    for args in ([], ["k2"], ["--seed=x", "k1"], ["none", "--test"]):
        with pytest.raises(SystemExit) as ended:
            bugs.main(args)
        assert ended.value.code == 2 and "bugs.py" in capsys.readouterr().err
    assert not trained
    assert bugs.main(["k1", f"--out={tmp_path}"]) == 0 and bugs.main(["--all", f"--out={tmp_path}"]) == 0
    assert trained == ["k1", *(name for name in RUNS if name != "k1")]
    with pytest.raises(bugs.UsageError, match="base.pt is missing"):
        bugs.make_run(tmp_path, 0, 1, {})


def test_examples_in_the_docstrings():
    """An example in a docstring must not be wrong. pytest itself runs no doctests in experiments/."""
    assert doctest.testmod(bugs).failed == 0
