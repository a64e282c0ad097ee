"""The figures on the front page are the paper's, and those of the records."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lab.published import PUBLISHED
from segmentation.acdc import ACDC

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FULL_SIZE = ("acdc_1pct_full_size_weight1_cuda.json", "acdc_1pct_full_size_cuda.json")


def _row(begin: str) -> list[str]:
    """FixMatch's and GapMatch's column of the row that begins so."""
    (row,) = (line for line in README.splitlines() if line.startswith(f"| {begin}"))
    return [cell.strip() for cell in row.split("|")[2:4]]


def _record(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text())


def test_the_papers_row() -> None:
    assert _row("the paper") == ["-", f"**{ACDC.published[1]['GapMatch'][0]}**"]
    assert f"(labels alone: {ACDC.published[1]['Supervised'][0]})" in README


def test_what_gap_adds_in_the_paper() -> None:
    shown = re.findall(r"(\w+(?: Label)?) (\d+\.\d) → (\d+\.\d)", " ".join(README.split()))
    assert len(shown) == 6
    for name, *values in shown:
        of = name.lower().replace(" ", "_")
        assert [*map(float, values)] == [PUBLISHED["ACDC"][of, gap][1][0] for gap in (False, True)], name


@pytest.mark.parametrize(("row", "when"), [("ours, 8,500", "test_best"), ("the same at the last", "test_last")])
def test_our_runs_at_full_size(row: str, when: str) -> None:
    runs = [run for file in FULL_SIZE for run in _record(file)["runs"].values()]
    assert {run["recipe"]["iterations"] for run in runs} == {8500}
    dice = [[f"{run[when]['dice']:.1f}" for run in runs if run["recipe"]["gap"] == gap] for gap in (False, True)]
    assert _row(row) == [", ".join(numbers) for numbers in dice]


def test_our_run_on_a_cpu() -> None:
    names = ("fixmatch", "gapmatch")
    dice = [_record(f"acdc_1pct_cpu_{name}_seed0.json")["test"]["dice"] for name in names]
    assert _row("ours, 1,500") == [f"{number:.1f}" for number in dice]


@pytest.mark.parametrize(
    ("preset", "row", "whose"), [("study", "ours, 600", "methods"), ("short", "the same with weight 1", "of the paper")]
)
def test_our_short_runs_are_those_of_the_results(preset: str, row: str, whose: str) -> None:
    results = (ROOT / "docs" / "results.md").read_text()
    page = results.split(f"\n## ACDC, reduced scale: {preset}")[1].split("\n## ")[0]
    for name, dice in zip(("FixMatch", "GapMatch"), _row(row), strict=True):
        assert f"| {name} | {dice}<br>" in page
    gains = re.findall(r"^\| gain \| ([-+]\d+\.\d) ± ", page.split("### Systems of table 1")[-1], re.MULTILINE)
    assert f"{whose} by {min(gains, key=float)} to {max(gains, key=float)}" in " ".join(README.split())
