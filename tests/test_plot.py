"""The figure of a run is made from its files."""
import doctest
import json

import pytest

from tests.conftest import copy, results

pytest.importorskip("matplotlib")  # from experiments/requirements.txt, which CI has

import plot  # noqa: E402


def test_figure(quick, tmp_path, capsys):
    """The figure must be written and must show the rows of RL. An error must be one line."""
    assert doctest.testmod(plot).failed == 0
    assert plot.main([str(quick), str(tmp_path / "figure.png")]) == 0
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert [len(line.get_xdata()) for line in plot.plt.gcf().axes[0].lines[:2]] == [5, 5]  # the steps of RL
    for args in ([], [str(quick)], [str(tmp_path), str(tmp_path / "other.png")]):
        assert plot.main(args) == 2 and capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "other.png").exists()


def test_which_models_are_drawn(quick, tmp_path):
    """A run without a student must have a figure too. The figure must show the control student_rl, but no other
    control, as these would fill it."""
    copy(quick, tmp_path, "log.jsonl")
    for names, drawn in ((["base", "zero"], ["base", "zero"]),
                         (["base", "zero", "student_base", "student", "shuffled", "student_rl"],
                          ["base", "zero", "student", "student_rl"])):
        found = results(quick)
        found["models"] = {name: found["models"]["zero"] for name in names}
        (tmp_path / "results.json").write_text(json.dumps(found))
        assert plot.main([str(tmp_path), str(tmp_path / "figure.png")]) == 0
        panels = plot.plt.gcf().axes
        assert [label.get_text() for label in panels[-1].get_yticklabels()] == drawn
        assert len(panels[0].lines) == 2 + len(drawn)  # the curve, its running mean, and the level of each model
