import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


@pytest.fixture
def notebook():
    nbformat = pytest.importorskip("nbformat")
    return nbformat.read(NOTEBOOK, as_version=4)


def test_no_outputs_are_stored(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)


def test_it_runs(notebook, narrow_encoder, tmp_path):
    """From the first cell to the last, with a tiny encoder and one step in place of the parameters."""
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source += f"\nmodel, max_steps = Path({str(narrow_encoder)!r}), 1"
    place, patience = {"metadata": {"path": str(tmp_path)}}, {"timeout": 900, "startup_timeout": 900}
    nbclient.NotebookClient(notebook, resources=place, **patience).execute()

    assert (tmp_path / "runs/notebook/model.safetensors").is_file()
    assert (tmp_path / "results/notebook/significance.json").is_file()
    *_, encoded = (cell for cell in notebook.cells if cell.cell_type == "code")
    assert any("tensor" in json.dumps(output) for output in encoded.outputs)
    printed = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    assert "nDCG@10" in printed
    assert "Traceback" not in printed
