"""The figure of a run is made from its files."""
import doctest

import pytest

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
