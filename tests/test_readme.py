"""The figures on the front page are the paper's, and those of the records."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.lab.published import FULLY_SUPERVISED, PUBLISHED
from segmentation.acdc import ACDC

ROOT = Path(__file__).parents[1]
README = " ".join((ROOT / "README.md").read_text().split())
RESULTS = ROOT / "benchmarks" / "results"
NAMES = {name.replace("_", " "): name for name, _ in PUBLISHED["ACDC"]}
FULL_SIZE = ("acdc_1pct_full_size_weight1_cuda.json", "acdc_1pct_full_size_cuda.json")


def test_what_the_paper_reports() -> None:
    one_percent = {row: round(dice[0], 1) for row, dice in ACDC.published[1].items()}
    (shown,) = re.findall(r"Dice of ([\d.]+) % for GapMatch and ([\d.]+) for labels alone \(([\d.]+)", README)
    assert [*map(float, shown)] == [one_percent["GapMatch"], one_percent["Supervised"], FULLY_SUPERVISED["ACDC"][0]]


def test_what_gap_adds_in_the_paper() -> None:
    shown = re.findall(r"(\w+(?: Label)?) (\d+\.\d) → (\d+\.\d)", README)
    assert len(shown) == 6
    for name, *values in shown:
        method = NAMES[name.lower()]
        assert [*map(float, values)] == [PUBLISHED["ACDC"][method, gap][1][0] for gap in (False, True)], name


@pytest.mark.parametrize(("when", "words"), [("test_best", "had"), ("test_last", "last iteration")])
def test_our_runs_at_full_size(when: str, words: str) -> None:
    runs = [run for file in FULL_SIZE for run in json.loads((RESULTS / file).read_text())["runs"].values()]
    dice = {gap: [f"{run[when]['dice']:.1f}" for run in runs if run["recipe"]["gap"] == gap] for gap in (True, False)}
    (ours,) = re.findall(rf"{words},?(?: to)? ([\d.]+ and [\d.]+)", README)
    assert ours == " and ".join(dice[True])
    assert " and ".join(dice[False]) in README


def test_our_run_on_a_cpu() -> None:
    dice = [
        json.loads((RESULTS / f"acdc_1pct_cpu_{method}_seed0.json").read_text())["test"]["dice"]
        for method in ("gapmatch", "fixmatch")
    ]
    assert "{:.1f} against {:.1f}".format(*dice) in README


def test_our_runs_in_pairs_are_those_of_the_results() -> None:
    (gains,) = re.findall(r"three seeds: (\S+ ± \S+),.* by (\S+) to (\S+)\. ", README)
    page = (ROOT / "docs" / "results.md").read_text()
    assert [gain for gain in gains if not re.search(rf"^\| gain \| {re.escape(gain)} ", page, re.MULTILINE)] == []
