"""docs/results.md is generated: that it was, since the presets have changed."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_page_is_of_today() -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("h5py")
    from benchmarks.lab import grid, report

    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    protocols = [report.protocol(cell.preset, cell.recipe) for cell in grid.cells(["table 1"])]
    for text in (report.PREAMBLE, report.HYPER_PARAMETERS, *dict.fromkeys(protocols)):
        assert text in page, "run `python benchmarks/reproduce.py --report`"
