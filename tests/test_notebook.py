"""docs/walkthrough.ipynb runs from top to bottom, and what it shows is what it says."""
import json

import pytest

from tests.conftest import ROOT

NOTEBOOK = ROOT / "docs" / "walkthrough.ipynb"


def test_what_is_committed_was_executed():
    """The notebook is committed without its outputs, with an error in them, or too large to be shown."""
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(bool(cell["outputs"]) for cell in cells) >= len(cells) - 1
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    assert NOTEBOOK.stat().st_size < 400_000


def test_it_runs(tmp_path):
    """A cell calls what no longer exists. It needs experiments/requirements.txt, and four minutes."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("matplotlib"), pytest.importorskip("pandas"), pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, 4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source = first.source.replace('ROOT / "out" / "notebook"', f'Path({str(tmp_path / "notebook")!r})')
    done = nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": ROOT / "docs"}}).execute()
    outputs = ["".join(output.get("text", "")) for cell in done.cells if cell.cell_type == "code"
               for output in cell.outputs]
    by_hand = next(text for text in outputs if text.startswith("by hand:")).split()
    assert float(by_hand[2]) == pytest.approx(float(by_hand[4]), abs=1e-5)
