"""The figure of a run, and the page about one problem, are made from a run's files and leave them as they are."""
import doctest
import re

import pytest

import walkthrough
from conftest import QUICK
from train import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a few steps, up to zero."""
    out = tmp_path_factory.mktemp("run")
    assert main([*QUICK, "--stage=base", f"--out={out}"]) == main([*QUICK, "--stage=zero", f"--out={out}"]) == 0
    return out


def test_figure(run, tmp_path, capsys):
    """The figure would not be written, would show the rows of another stage, or an error would not be one line. This
    test needs experiments/requirements.txt, which CI has."""
    pytest.importorskip("matplotlib")
    import plot

    assert doctest.testmod(plot).failed == 0
    assert plot.main([str(run), str(tmp_path / "figure.png")]) == 0
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    for args in ([], [str(run)], [str(tmp_path), str(tmp_path / "other.png")]):
        assert plot.main(args) == 2 and capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "other.png").exists()


def test_walkthrough(run, tmp_path, monkeypatch, capsys):
    """The page would come from other settings than the run's, change the run, or show advantages that do not belong to
    the rewards beside them."""
    monkeypatch.setattr(walkthrough, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(walkthrough, "ROOT", tmp_path)
    monkeypatch.setattr(walkthrough, "LOOKS", {0: "at first", 3: "then"})
    monkeypatch.setattr(walkthrough, "SAMPLES", 32)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert walkthrough.main([str(run), "8*7-19"]) == 0
    assert before == {path.name: path.read_bytes() for path in run.iterdir()}
    page = (tmp_path / "page.md").read_text()
    assert re.findall("^## (.*)", page, re.MULTILINE) == ["at first", "then", "after 5 steps: zero"]
    assert "`8*7-19`" in page and "seed 0" in page
    for table in page.split("| a group | reward | advantage |\n|---|---|---|\n")[1:]:
        cells = [line.split(" | ")[1:] for line in table.split("\n\n")[0].splitlines()]
        rewards, advantages = [float(row[0]) for row in cells], [float(row[1].rstrip(" |")) for row in cells]
        assert len(rewards) == 8 and abs(sum(advantages)) < 0.05
        assert sorted(rewards) == [r for _, r in sorted(zip(advantages, rewards))]
    for args in ([], [str(tmp_path)], [str(run), "8*"]):
        assert walkthrough.main(args) == 2 and capsys.readouterr().err.count("\n") == 1
    assert doctest.testmod(walkthrough).failed == 0
