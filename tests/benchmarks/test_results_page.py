"""docs/results.md is generated: that it was, since the presets have changed."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_page_is_of_today() -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("h5py")
    from benchmarks.lab import full_size, grid, power
    from benchmarks.lab import page as results_page

    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    protocols = {results_page.protocol(block.data_set, block.preset) for block in grid.BLOCKS}
    texts = results_page.PREAMBLE, results_page.HYPER_PARAMETERS, power.TEXT, full_size.TEXT
    for text in (*texts, *protocols):
        assert text in page, "run `python benchmarks/reproduce.py --report`"
