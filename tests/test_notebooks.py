"""The notebooks of examples/notebooks run from the first cell to the last."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from command_tools import ROOT
from nbclient import NotebookClient

NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
LIBRARY = {"spikingjelly": "spikingjelly", "snntorch": "snntorch"}


def test_there_are_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["plain_torch", "snntorch", "spikingjelly"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell runs, and what the last one shows has a picture or a table in it."""
    if path.stem in LIBRARY:
        pytest.importorskip(LIBRARY[path.stem])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    shown = [output.get("data", {}) for output in notebook.cells[-1].outputs]
    assert any("image/png" in data or "text/html" in data for data in shown)
