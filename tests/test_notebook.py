"""docs/walkthrough.ipynb runs from top to bottom, and shows the current code.

    jupyter execute --inplace docs/walkthrough.ipynb    writes its outputs again
"""
import inspect
import json

import pytest

import train
from tests.conftest import ROOT

NOTEBOOK = ROOT / "docs" / "walkthrough.ipynb"
FOLDER = 'OUT = Path("out/notebook")'  # the line of the notebook that says where its runs write
SHORTER = {  # settings of the notebook -> those of the test, which runs every cell and looks at no figure
    "base_tokens=2_400_000": "base_tokens=400_000",
    "rl_steps=60": "rl_steps=8",
    "student_base_tokens=2_000_000": "student_base_tokens=400_000",
    "distill_steps=12": "distill_steps=3",
}


def code_cells():
    """The code cells of the committed notebook."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def text_of(output):
    return "".join(output.get("text", ""))


def test_what_is_committed_was_executed():
    """The notebook must not be committed without its outputs, with an error in them, or too large to be shown."""
    cells = code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(bool(cell["outputs"]) for cell in cells) >= len(cells) - 1
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    assert NOTEBOOK.stat().st_size < 400_000


def test_the_loop_that_it_shows_is_that_of_train():
    """If train.run_grpo changes, the committed notebook must not still show the old code."""
    shown = [text_of(output) for cell in code_cells() for output in cell["outputs"]]
    assert any(inspect.getsource(train.run_grpo).strip() in text for text in shown)


def test_it_runs(tmp_path):
    """A cell must not call a function that does not exist, or find the runs of an earlier execution and train nothing.
    This test needs experiments/requirements.txt and a minute."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("matplotlib"), pytest.importorskip("pandas"), pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, 4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    for old, new in {FOLDER: f"OUT = Path({str(tmp_path / 'notebook')!r})", **SHORTER}.items():
        assert first.source.count(old) == 1
        first.source = first.source.replace(old, new)
    done = nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": ROOT / "docs"}}).execute()
    outputs = [text_of(output) for cell in done.cells if cell.cell_type == "code" for output in cell.outputs]
    by_hand = next(text for text in outputs if text.startswith("by hand:")).split()
    assert float(by_hand[2]) == pytest.approx(float(by_hand[4]), abs=1e-5)
    assert (tmp_path / "notebook" / "student.pt").exists()
