"""The notebook of the toy boundary runs, from the repository's root; from its own folder it finds what it imports."""

from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
kernelspec = pytest.importorskip("jupyter_client.kernelspec")

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "toy_boundary.ipynb"


def _notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def _run(notebook: Any, folder: Path) -> Any:
    if "python3" not in kernelspec.find_kernel_specs():
        pytest.skip("needs the kernel python3: pip install ipykernel")
    resources = {"metadata": {"path": str(folder)}}
    return nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()


def test_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_ITERATIONS", "5")
    outputs = [output for cell in _run(_notebook(), ROOT).cells for output in cell.get("outputs", ())]
    shown = [output.data for output in outputs if output.output_type == "display_data"]
    tables = [data["text/markdown"] for data in shown if "text/markdown" in data]
    assert [text.count("\n| ") for text in tables] == [5, 5]  # a rule and four rows each
    assert sum("image/png" in data for data in shown) == 1


def test_from_its_own_folder_it_finds_what_it_imports() -> None:
    notebook = _notebook()
    notebook.cells = next([cell] for cell in notebook.cells if cell.cell_type == "code")
    assert "import toy_boundary" in notebook.cells[0].source
    _run(notebook, NOTEBOOK.parent)


def test_it_is_committed_without_outputs() -> None:
    cells = [cell for cell in _notebook().cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
