"""Curves and tables of the runs beside the grid, and of the pairs: by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lab import curves, full_size, grid, page, plots, power
from benchmarks.lab.records import Records

ROOT = Path(__file__).parents[2]


def _run(gap: bool, dice: list[float], eps: float = 0.1, weight: float = 1.0) -> dict[str, Any]:
    test = {"dice": dice[-1], "asd": 2.5, "empty": 7 * gap}
    return {
        "recipe": {"method": "fixmatch", "gap": gap, "weight": weight, "eps": eps, "seed": 0},
        "log": [{"it": 500 * (i + 1), "val": value} for i, value in enumerate(dice)],
        "best_val": max(dice),
        "best_it": 500 * (dice.index(max(dice)) + 1),
        "done": 500 * len(dice),
        "test_best": {**test, "dice": max(dice) + 1, "empty": 0},
        "test_last": test,
    }


def _write(folder: Path, name: str, date: str, *runs: dict[str, Any]) -> None:
    made = {
        "question": "Does it fall?",
        "how": "By hand",
        "device": "a GPU",
        "torch": "2",
        "commit": "abc",
        "date": date,
    }
    folder.mkdir(exist_ok=True)
    content = {**made, "runs": {str(index): run for index, run in enumerate(runs)}}
    (folder / f"acdc_1pct_full_size{name}_cuda.json").write_text(json.dumps(content))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    _write(tmp_path, "", "2026-02-02", _run(True, [50.0, 90.0], eps=0.02, weight=0.5), _run(False, [60.0, 30.0]))
    _write(tmp_path, "_weight1", "2026-02-01", _run(True, [70.0, 65.0, 40.0]), _run(False, [60.0, 61.0, 62.0]))
    (tmp_path / "acdc_other.json").write_text("{}")
    return tmp_path


def test_a_row_has_the_chosen_and_the_last_iterate(results: Path) -> None:
    rows = full_size.table(full_size.read(results)).rows
    assert rows[0] == [
        "GapMatch, weight 1, eps 0.1, seed 0",
        "70.0",
        "500 of 1,500",
        "71.0",
        "2.50",
        "0",
        "40.0",
        "2.50",
        "7",
    ]
    assert rows[3][:3] == ["FixMatch, weight 1, seed 0", "60.0", "500 of 1,000"]
    assert len(rows) == 4


def test_a_panel_a_file_and_the_oldest_first(results: Path) -> None:
    before, after = full_size.picture(full_size.read(results)).axes
    assert before.get_title() == "weight 1; GapMatch with eps 0.1"
    assert after.get_title() == "weight 0.5 and 1; GapMatch with eps 0.02"
    assert [text.get_text().strip() for text in before.texts] == ["40", "62"]
    assert [*before.get_lines()[0].get_ydata()] == [60.0, 61.0, 62.0]
    assert before.get_lines()[0].get_color() == after.get_lines()[0].get_color()


def test_the_page_says_how_they_were_made(results: Path) -> None:
    page.write(Records(results / "cells"), results / "docs" / "page.md", results / "docs" / "figures")
    text = (results / "docs" / "page.md").read_text()
    assert text.count("(a GPU, torch 2, commit abc, 2026-02-0") == 2
    assert "(figures/full_size_curves.png)" in text
    assert "| GapMatch, weight 0.5, eps 0.02, seed 0 | 90.0 |" in text


def test_the_recorded_runs_fall() -> None:
    """What the picture is there to show, in the figures that it is drawn from."""
    studies = full_size.read(ROOT / "benchmarks" / "results")
    runs = {(r["recipe"]["gap"], r["recipe"]["weight"]): r for study in studies for r in study["runs"].values()}
    for run in runs.values():
        assert run["best_val"] == pytest.approx(max(entry["val"] for entry in run["log"]), abs=0.01)
        assert run["log"][-1]["it"] == run["done"] == run["recipe"]["iterations"]
    assert runs[True, 1.0]["test_best"]["dice"] - runs[True, 1.0]["test_last"]["dice"] > 15


def test_a_mean_is_of_the_iterations_that_all_have() -> None:
    short, long = [(100, 10.0), (200, 20.0)], [(100, 30.0), (200, 50.0), (300, 60.0)]
    assert curves.mean_curve([short, long]) == [(100, 20.0), (200, 35.0)]
    figure = curves.draw({"a panel": {"FixMatch": [short, long]}})
    lines = figure.axes[0].get_lines()
    assert [[*line.get_ydata()] for line in lines] == [[10.0, 20.0], [30.0, 50.0, 60.0], [20.0, 35.0], [35.0]]
    assert [text.get_text().strip() for text in figure.axes[0].texts] == ["35"]
    assert lines[0].get_linewidth() < lines[2].get_linewidth()


def test_numbers_of_lines_that_end_together_stand_apart() -> None:
    ends = {"FixMatch": 50.0, "GapMatch": 51.0}
    figure = curves.draw({"a panel": {name: [[(100, dice)]] for name, dice in ends.items()}})
    low, high = figure.axes[0].texts
    assert (low.get_text().strip(), high.get_text().strip()) == ("50", "51")
    assert high.get_position()[1] - low.get_position()[1] >= 6


# ---------------------------------------------------------------- pairs


def _pair(seed: int, draw: int | None, plain: float, gain: float, eps: float = 0.02) -> dict[Any, dict[str, Any]]:
    """Of FixMatch and GapMatch; the last iterate has twice the gain."""
    found = {}
    for method, dice, last in ((grid.FIXMATCH, plain, plain), (grid.GAPMATCH, plain + gain, plain + 2 * gain)):
        cell = grid.cell("ACDC", "medium", method, 1, seed, {"weight": 0.5, "eps": eps}, draw)
        test = {"asd": 3.0 - method[1], "empty": 6 * method[1], "predictions": 120}
        found[cell] = {
            "state": "done",
            "validation_curve": [[1500, dice], [3000, last]],
            "test": {"dice": dice, **test},
            "test_last": {"dice": last, **test},
        }
    return found


def test_pairs_by_hand() -> None:
    found = _pair(0, None, 50.0, 1.0) | _pair(0, 1, 60.0, 3.0) | _pair(1, None, 52.0, 5.0)
    chosen, last, *other = power.table(found).rows
    assert chosen[:4] == ["eps 0.02", "chosen", "54.0\n3.00", "57.0\n2.00\n5.0 % empty"]
    assert chosen[4].startswith("+3.0 [+")
    assert chosen[5:] == ["2.0", "-1.00 [-1.00, -1.00]", "3 of 25", "4"]  # 7.84 * 4 / 9 = 3.5
    assert last[3] == "60.0\n2.00\n5.0 % empty"
    assert last[4].startswith("+6.0 [+")
    assert last[5] == "4.0"
    assert last[8] == "14"
    assert [row[2:] for row in other] == [[*["open"] * 5, "0 of 25", ""]] * 2


def test_a_pair_needs_both_its_runs_and_one_has_no_deviation() -> None:
    found = _pair(0, None, 50.0, 1.0) | _pair(1, None, 40.0, 9.0)
    del found[next(cell for cell in found if cell.seed == 1 and not cell.gap)]
    row = power.table(found).rows[0]
    assert row[4:] == ["+1.0 [-]", "-", "-1.00 [-]", "1 of 25", "-"]


def test_the_curves_of_pairs_have_a_panel_an_eps() -> None:
    assert plots.power_curves({}) is None
    found = _pair(0, None, 50.0, 1.0) | _pair(0, 1, 60.0, 3.0) | _pair(0, None, 50.0, 8.0, eps=0.1)
    weak, strong = plots.power_curves(found).axes
    assert weak.get_title() == "GapMatch with eps 0.02, 2 pairs"
    assert strong.get_title() == "GapMatch with eps 0.1, 1 pair"
    means = [[*line.get_ydata()] for line in weak.get_lines() if line.get_linewidth() > 2]
    assert means == [[55.0, 55.0], [57.0, 59.0]]
