"""The notebook of the toy boundary runs, from the repository's root and from its own folder."""

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


@pytest.mark.parametrize("folder", [ROOT, NOTEBOOK.parent], ids=["root", "examples"])
def test_it_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "python3" not in kernelspec.find_kernel_specs():
        pytest.skip("needs the kernel python3: pip install ipykernel")
    monkeypatch.setenv("TOY_ITERATIONS", "5")
    client = nbclient.NotebookClient(
        _notebook(), timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    outputs = [output for cell in client.execute().cells for output in cell.get("outputs", ())]
    shown = [output.data for output in outputs if output.output_type == "display_data"]
    tables = [data["text/markdown"] for data in shown if "text/markdown" in data]
    assert [text.count("\n| ") for text in tables] == [5, 5]  # a rule and four rows each
    assert sum("image/png" in data for data in shown) == 1


def test_it_is_committed_without_outputs() -> None:
    cells = [cell for cell in _notebook().cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
