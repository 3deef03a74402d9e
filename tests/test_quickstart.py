"""The notebook of the examples runs from its first cell to its last."""

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


def test_the_notebook_runs_and_recommends(tmp_path):
    nbformat = pytest.importorskip("nbformat", reason='nbformat is not installed; pip install -e ".[dev]"')
    nbclient = pytest.importorskip("nbclient", reason='nbclient is not installed; pip install -e ".[dev]"')
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    streams = [
        output for cell in notebook.cells for output in cell.get("outputs", ()) if output.output_type == "stream"
    ]
    assert [output.text for output in streams if "it/s" in output.text] == [], "a progress bar of a library"
    known, visitor, table = [cell.outputs for cell in notebook.cells if "recommender.recommend" in cell.source]
    assert len(known[0].text.splitlines()) == 5
    assert visitor[0].data["text/plain"].count("Recommendation(") == 3
    assert "item_ids" in table[0].data["text/plain"]
    assert (tmp_path / "runs" / "quickstart" / "model" / "manifest.json").is_file()
