"""The lab: its grid, its plan, runs that happen once and go on where they stopped, and a report worked out by hand."""

import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

for package in ("h5py", "matplotlib", "monai", "rich", "scipy", "skimage"):
    pytest.importorskip(package, reason="pip install 'gap-torch[examples]'")

ROOT = Path(__file__).parents[2]
TINY = {
    "size": (32, 32),
    "width": 2,
    "labelled_batch": 3,
    "unlabelled_batch": 3,
    "iterations": 4,
    "validate_every": 2,
    "log_every": 1,
}


@pytest.fixture(autouse=True)
def lab(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The lab's modules, with study runs of four tiny iterations."""
    from benchmarks import reproduce
    from benchmarks.lab import grid, page, plan, plots, power, published, records, runs, scores

    for preset in ("study", "medium", "short"):
        monkeypatch.setitem(grid.TASKS["ACDC"].presets, preset, TINY)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield SimpleNamespace(
        grid=grid,
        plan=plan,
        plots=plots,
        power=power,
        records=records,
        page=page,
        runs=runs,
        scores=scores,
        published=published,
        reproduce=reproduce,
    )
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from segmentation.data.phantoms.heart import write_phantom

    root = tmp_path_factory.mktemp("phantom")
    write_phantom(root, train_patients=3, val_patients=1, test_patients=1, slices=2, size=32)
    return root


@pytest.fixture
def here(lab: SimpleNamespace, data: Path, tmp_path: Path) -> Any:
    """A lab in an empty folder."""
    records = lab.records.Records(tmp_path / "cells")
    return lab.runs.Lab({"ACDC": data}, records, tmp_path / "work", torch.device("cpu"))


def _supervised(lab: SimpleNamespace, seed: int = 0, **changes: Any) -> Any:
    return lab.grid.cell("ACDC", "study", lab.grid.SUPERVISED, 1, seed, changes)


def _test(dice: float, asd: float = 2.0, empty: int = 0) -> dict[str, Any]:
    return {"dice": dice, "asd": asd, "class_dice": [dice] * 3, "empty": empty, "predictions": 120}


def _record(cell: Any, dice: float = 50.0, asd: float = 2.0, **others: Any) -> dict[str, Any]:
    """An invented one, of before the last iteration was scored."""
    return {
        "state": "done",
        "recipe": cell.recipe.to_dict(),
        "kind": "cpu",
        "device": "a CPU",
        "threads": 1,
        "torch": "2",
        "wall_seconds": 10.0,
        "seconds_per_iteration": 0.1,
        "chosen_iteration": 600,
        "validation_dice": dice,
        "validation_curve": [[300, dice], [600, dice - 10]],
        "test": _test(dice, asd) if cell.tested else None,
        **others,
    }


# ---------------------------------------------------------------- the grid


def test_every_cell_is_there_once_and_has_a_name_of_its_own(lab: SimpleNamespace) -> None:
    cells = lab.grid.cells()
    assert max(Counter(cells).values()) == 1
    assert max(Counter(cell.name.lower() for cell in cells).values()) == 1
    assert not any(set(cell.name) & set("/\\ :*?") for cell in cells)


def test_every_cell_is_a_valid_recipe(lab: SimpleNamespace) -> None:
    for cell in lab.grid.cells():
        assert (cell.recipe.method, cell.recipe.gap, cell.recipe.seed) == (cell.method, cell.gap, cell.seed)
        assert lab.plan.passes(cell) >= 1


def test_names_say_what_is_run(lab: SimpleNamespace) -> None:
    cell, gapmatch = lab.grid.cell, lab.grid.GAPMATCH
    assert cell("ACDC", "paper", gapmatch, 1, 0).name == "acdc_1pct_paper_gapmatch_seed0"
    assert cell("LA", "paper", ("vat", True), 10, 2).name == "la_10pct_paper_vat+gap_seed2"
    changed = cell("ACDC", "study", gapmatch, 1, 1, {"alpha": 2.0, "eps": 0.2})
    assert changed.name == "acdc_1pct_study_gapmatch_eps0.2_alpha2_seed1"
    still = cell("ACDC", "study", gapmatch, 1, 1, {"freeze_statistics": False, "aligned": "predictions"})
    assert still.name == "acdc_1pct_study_gapmatch_aligned_predictions_no_freeze_statistics_seed1"
    vat = cell("ACDC", "study", ("vat", False), 1, 0, {"options": {"xi": 0.01, "radius": 6 / 256}})
    assert vat.name == "acdc_1pct_study_vat_option_xi0.01_seed0"
    assert vat.recipe.all_options["xi"] == 0.01
    momenta = ({"momentum": 0.5}, {"options": {"momentum": 0.5}})  # SGD's, and the thresholds'
    assert len({cell("ACDC", "study", ("flexmatch", False), 1, 0, momentum).name for momentum in momenta}) == 2
    drawn = cell("ACDC", "study", gapmatch, 1, 2, {"eps": 0.2}, draw=3)
    assert drawn.name == "acdc_1pct_study_gapmatch_eps0.2_draw3_seed2"
    assert drawn.repeat == (2, 3)
    with pytest.raises(TypeError, match="radius"):
        cell("ACDC", "study", ("vat", False), 1, 0, {"radius": 0.05})


def test_a_change_to_the_default_is_no_change(lab: SimpleNamespace) -> None:
    """So the sweeps share the cell of table 1."""
    plain = lab.grid.cell("ACDC", "study", lab.grid.GAPMATCH, 1, 0)
    assert lab.grid.cell("ACDC", "study", lab.grid.GAPMATCH, 1, 0, {"eps": 0.1, "alpha": 1.0}) == plain
    in_groups = [group for group in lab.grid.GROUPS if plain in lab.grid.cells([group])]
    assert in_groups == ["table 1", "hyper-parameters"]


def test_a_change_that_means_nothing_to_a_method_is_no_change(lab: SimpleNamespace) -> None:
    changes = {"eps": 0.02, "weight": 0.5}
    assert lab.grid.cell("ACDC", "study", lab.grid.FIXMATCH, 1, 0, changes).changes == (("weight", 0.5),)
    assert lab.grid.cell("ACDC", "study", lab.grid.SUPERVISED, 1, 0, changes).changes == ()


def test_pairs_are_complete_one_after_the_other(lab: SimpleNamespace) -> None:
    """FixMatch, then GapMatch of the same seed and draw; all draws, then the next seed; then the larger radius."""
    cells = lab.grid.cells(["power"])
    assert [cell.name.removeprefix("acdc_1pct_medium_") for cell in cells[:3]] == [
        "fixmatch_weight0.5_seed0",
        "gapmatch_weight0.5_eps0.02_seed0",
        "fixmatch_weight0.5_draw1_seed0",
    ]
    assert cells[50].name == "acdc_1pct_medium_gapmatch_weight0.5_seed0"  # 0.1 is the default
    repeats = [cell.repeat for cell in cells]
    assert repeats[:50:2] == repeats[1:50:2] == repeats[50:]
    assert repeats[50:] == [(seed, draw) for seed in range(5) for draw in lab.grid.DRAWS]
    assert all(cell.tested for cell in cells)


def test_the_eight_systems_are_run_with_gap_and_without_beside_the_anchors(lab: SimpleNamespace) -> None:
    short = lab.grid.cells(["systems"], ["short"])
    of_seed_0 = [(cell.method, cell.gap) for cell in short if cell.seed == 0]
    assert of_seed_0 == [*lab.grid.TABLE_1, *lab.grid.SYSTEMS]
    assert len({method for method, _ in lab.grid.SYSTEMS}) == 8
    assert all(cell.tested and cell.recipe.weight is None for cell in short)  # each by its own weights
    titles = [table.title for table in lab.page.comparisons({}, "ACDC", "short")]
    assert [title.split(" on ")[0] for title in titles] == ["Table 1", "Systems of table 1"]


def test_the_grid_holds_the_paper_s_tables_and_the_sweeps(lab: SimpleNamespace) -> None:
    published = lab.published.PUBLISHED["ACDC"]
    for preset, left_out in (("paper", ()), ("study", lab.grid.SYSTEMS)):
        wanted = {("ACDC", method, share) for method in published if method not in left_out for share in (1, 5, 10)}
        cells = lab.grid.cells(presets=[preset])
        assert wanted <= {(cell.data_set, (cell.method, cell.gap), cell.share) for cell in cells}
    swept = [cell for cell in lab.grid.cells(["hyper-parameters"]) if cell.seed == 0]
    gapmatch, fixmatch = 6 * 3 + 1 + 4 + 1 + 1 + 1, 3 + 4  # the default is in each sweep
    assert len(swept) == gapmatch + fixmatch
    assert sum(cell.tested for cell in swept) == 2


def test_the_paper_s_table_1(lab: SimpleNamespace) -> None:
    published, grid = lab.published.PUBLISHED, lab.grid
    assert published["ACDC"][grid.SUPERVISED] == {1: (27.7, 32.6), 5: (56.6, 6.15), 10: (83.8, 2.84)}
    assert published["LA"] == {
        grid.SUPERVISED: {1: (40.0, 21.2), 5: (52.6, 9.87), 10: (82.7, 3.26)},
        grid.GAPMATCH: {1: (79.8, 3.06), 5: (88.3, 1.77), 10: (91.0, 1.46)},
    }
    assert lab.published.FULLY_SUPERVISED == {"ACDC": (91.5, 0.57), "LA": (91.5, 1.51)}


# ---------------------------------------------------------------- the plan


def test_estimates_follow_passes_and_prefer_the_same_method(lab: SimpleNamespace) -> None:
    fixmatch, gapmatch = (lab.grid.cell("ACDC", "study", m, 1, 0) for m in (lab.grid.FIXMATCH, lab.grid.GAPMATCH))
    assert lab.plan.passes(_supervised(lab)) == 1
    assert lab.plan.passes(gapmatch) == pytest.approx(1 + 1 / 3 + 1 + 1)
    assert lab.plan.estimate(fixmatch, {}, "cpu").source == "guess"

    found = {_supervised(lab): _record(_supervised(lab), wall_seconds=30.0)}
    assert lab.plan.estimate(fixmatch, found, "cpu") == (pytest.approx(30 * 7 / 3), "scaled")
    assert lab.plan.estimate(fixmatch, found, "cuda").source == "guess"
    paper = replace(fixmatch, preset="paper")
    assert lab.plan.estimate(paper, found, "cpu").source == "guess"

    found[fixmatch] = _record(fixmatch, wall_seconds=44.0)
    assert lab.plan.estimate(replace(fixmatch, seed=1), found, "cpu") == (pytest.approx(44.0), "measured")
    found[fixmatch]["state"] = "failed"
    assert lab.plan.estimate(replace(fixmatch, seed=1), found, "cpu").source == "scaled"


def test_a_warm_up_is_made_of_labelled_passes(lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lab.grid.TASKS["ACDC"].presets, "study", {**TINY, "warm_up": 3})
    supervised, fixmatch = (lab.grid.cell("ACDC", "study", m, 1, 0) for m in (lab.grid.SUPERVISED, lab.grid.FIXMATCH))
    found = {supervised: _record(supervised, wall_seconds=12.0)}  # 3 s a pass
    assert lab.plan.estimate(fixmatch, found, "cpu") == (pytest.approx(3 * (3 + 7 / 3)), "scaled")


def test_the_plan_names_records_of_other_lists(
    lab: SimpleNamespace, here: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    lists, other = here.lists("ACDC"), {"train_slices.list": "0", "val.list": "0", "test.list": "0"}
    cells = [_supervised(lab, seed) for seed in range(3)]
    for cell, record in zip(cells, ({}, {"lists": lists}, {"lists": other}), strict=True):
        here.records.write(cell, _record(cell, **record))
    lab.reproduce.plan(here, cells, {"ACDC": lists})
    out = capsys.readouterr().out
    assert "3 done" in out
    assert [line.split()[1] for line in out.splitlines() if "other lists" in line] == [cells[2].name]
    lab.reproduce.plan(here, cells)
    assert "other lists" not in capsys.readouterr().out


def test_the_plan_adds_up(lab: SimpleNamespace, here: Any, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [_supervised(lab, seed) for seed in range(5)]
    here.records.write(cells[0], _record(cells[0], wall_seconds=120.0))
    here.records.write(cells[1], _record(cells[1], state="failed", reason="loss is nan"))
    here.records.write(cells[2], _record(replace(cells[2], changes=(("lr", 0.5),))))
    folder = here.folder(cells[3]) / "supervised"
    folder.mkdir(parents=True)
    (folder / "last.pt").touch()
    (here.folder(cells[3]) / "seconds").write_text("30")
    lab.reproduce.plan(here, cells)
    out = capsys.readouterr().out
    assert "5 cells: 1 done, 1 failed, 1 stale, 1 begun, 1 open." in out
    assert "about 3.5 min" in out  # 2 min for the open one, 1.5 min for what is left of the other
    assert "loss is nan" in out
    assert "another lr" in out


def test_the_plan_of_a_group_knows_the_times_of_the_others(
    lab: SimpleNamespace, here: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = _supervised(lab)
    here.records.write(cell, _record(cell, wall_seconds=60.0))
    fixmatch = lab.grid.cell("ACDC", "study", lab.grid.FIXMATCH, 1, 0)
    lab.reproduce.plan(here, [fixmatch])
    out = capsys.readouterr().out
    assert "scaled" in out
    assert "would take about 2.3 min" in out  # 7 / 3 passes for one


# ---------------------------------------------------------------- runs


def test_a_cell_is_run_recorded_and_never_run_again(lab: SimpleNamespace, here: Any) -> None:
    cell = _supervised(lab)
    assert here.attempt(cell)
    record = here.records.read(cell)
    assert record["state"] == here.records.state(cell) == "done"
    assert record["cell"]["name"] == cell.name
    assert record["recipe"] == json.loads(json.dumps(cell.recipe.to_dict()))
    assert record["labelled_names"] == ["patient001"]
    assert record["lists"] == here.lists("ACDC")
    assert record["lists"].keys() == {"train_slices.list", "val.list", "test.list"}
    assert [iteration for iteration, _ in record["validation_curve"]] == [2, 4]
    assert record["validation_dice"] == pytest.approx(max(dice for _, dice in record["validation_curve"]), rel=1e-3)
    assert record["test"]["predictions"] == 2 * 3  # frames, classes
    assert len(record["test"]["class_dice"]) == 3
    assert record["test_last"].keys() == record["test"].keys()
    assert (record["test_last"] == record["test"]) == (record["chosen_iteration"] == 4)
    assert {"device", "torch", "commit", "threads", "date", "seconds_per_iteration"} <= set(record)
    assert record["wall_seconds"] > 4 * record["seconds_per_iteration"]
    assert not list(here.folder(cell).glob("*/last.pt"))
    assert not (here.folder(cell) / "seconds").exists()

    written = here.records.path(cell).stat().st_mtime_ns
    assert not here.attempt(cell)
    assert here.records.path(cell).stat().st_mtime_ns == written


def test_a_changed_recipe_never_sees_the_test_volumes(
    lab: SimpleNamespace, here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from segmentation.slice_task import SliceTask

    read: list[str] = []
    original = SliceTask.read_volumes
    monkeypatch.setattr(SliceTask, "read_volumes", lambda *a: read.extend(a[2]) or original(*a))
    cell = _supervised(lab, lr=0.02)
    here.attempt(cell)
    assert here.records.read(cell)["test"] is None
    assert here.records.read(cell)["validation_dice"] >= 0
    assert {name.split("_")[0] for name in read} == {"patient004"}  # the fifth is the test's


def test_a_draw_labels_other_patients(lab: SimpleNamespace, here: Any) -> None:
    names = {}
    for draw in (None, 0, 1, 2, 3):
        cell = lab.grid.cell("ACDC", "study", lab.grid.SUPERVISED, 1, 0, draw=draw)
        here.attempt(cell)
        record = here.records.read(cell)
        assert record["cell"]["draw"] == record["patients_seed"] == draw
        content = torch.load(here.folder(cell) / "supervised" / "best.pt", weights_only=True)
        names[draw] = record["labelled_names"]
        assert content["iteration"] == record["chosen_iteration"]
    assert names[None] == ["patient001"]
    assert len({*map(tuple, names.values())}) > 1


def test_pairs_are_tested_though_they_differ_from_their_preset(lab: SimpleNamespace, here: Any) -> None:
    fixmatch, gapmatch, *_ = lab.grid.cells(["power"])
    for cell in (fixmatch, gapmatch):
        assert here.attempt(cell)
    found = here.records.of([fixmatch, gapmatch])
    assert [record["recipe"]["weight"] for record in found.values()] == [0.5, 0.5]
    assert found[gapmatch]["recipe"]["eps"] == 0.02
    row = lab.power.table(found).rows[1]
    gain = found[gapmatch]["test_last"]["dice"] - found[fixmatch]["test_last"]["dice"]
    assert (row[1], row[4]) == ("last", f"{gain:+.1f} [-]")


@pytest.mark.parametrize(("device", "presets"), [("cpu", ["medium", "short", "study"]), ("meta", ["paper"])])
def test_a_gpu_takes_what_is_not_reduced(
    device: str, presets: list[str], lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lab.reproduce, "usable_device", torch.device)
    asked: list[Any] = []
    monkeypatch.setattr(lab.reproduce, "run", lambda _, cells, *__: asked.extend(cells) or 0)
    assert lab.reproduce.main(["--run", "--device", device]) == 0
    assert {cell.preset for cell in asked} == {*presets}


def test_a_failure_is_recorded_and_does_not_stop_the_others(
    lab: SimpleNamespace, here: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, broken, good = _supervised(lab, lr=1e30), _supervised(lab, 1), _supervised(lab, 2)
    original = lab.runs.run

    def run(job: Any) -> None:
        if job.recipes[0].seed == 1:
            raise TypeError("a slip")
        original(job)

    monkeypatch.setattr(lab.runs, "run", run)
    lab.runs.work(here, [bad, broken, good], 600)
    assert here.records.read(bad)["state"] == "failed"
    assert "loss_labelled is" in here.records.read(bad)["reason"]
    assert here.records.read(broken) is None
    assert "a slip" in capsys.readouterr().out
    assert here.records.state(good) == "done"


def test_a_capture_that_fails_leaves_its_cell_open_and_ends_the_process(
    lab: SimpleNamespace, here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from segmentation.errors import CaptureError

    cell = _supervised(lab)

    def fails(job: Any) -> None:
        raise CaptureError("capturing the step failed")

    monkeypatch.setattr(lab.runs, "run", fails)
    with pytest.raises(CaptureError):
        lab.runs.work(here, [cell], 600)
    assert here.records.read(cell) is None


def test_what_the_budget_cuts_off_goes_on_to_the_same_end(
    lab: SimpleNamespace, here: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from segmentation.training.step import Trainer

    whole = replace(here, records=lab.records.Records(tmp_path / "other"), work=tmp_path / "other_work")
    cell, later = _supervised(lab), _supervised(lab, 1)
    whole.attempt(cell)

    steps: list[int] = []
    original = Trainer.step

    def step(self: Any, iteration: int) -> Any:
        steps.append(iteration)
        if steps == [0, 1, 2]:
            signal.raise_signal(signal.SIGALRM)  # the budget's end
        return original(self, iteration)

    monkeypatch.setattr(Trainer, "step", step)
    lab.runs.work(here, [cell, later], 600)
    assert here.records.read(cell) is here.records.read(later) is None
    assert here.spent(cell) > 0
    assert not here.folder(later).exists()

    before = here.spent(cell)
    lab.runs.work(here, [cell], 600)
    assert steps == [0, 1, 2, 3]
    ours, theirs = here.records.read(cell), whole.records.read(cell)
    assert ours["test"] == theirs["test"]
    assert ours["validation_curve"] == theirs["validation_curve"]
    assert ours["wall_seconds"] > before


def test_the_clock_counts_what_a_checkpoint_shows(lab: SimpleNamespace, here: Any) -> None:
    folder = here.folder(_supervised(lab))
    run = folder / "supervised"
    run.mkdir(parents=True)
    (folder / "seconds").write_text("1000")  # with no checkpoint to show for it
    with lab.runs.stopwatch(folder) as seconds:
        assert seconds() < 100
    assert lab.runs.spent(folder) == 0

    with lab.runs.stopwatch(folder):
        (run / "last.pt").touch()
    first = lab.runs.spent(folder)
    assert 0 < first < 100
    with lab.runs.stopwatch(folder) as seconds:
        assert seconds() > first
    assert lab.runs.spent(folder) == first  # nothing has come of that


@pytest.mark.parametrize("damage", ["", "12x", None])
def test_a_broken_clock_stops_nothing(
    damage: str | None, lab: SimpleNamespace, here: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = _supervised(lab)
    _interrupt(lab, here, cell)
    clock = here.folder(cell) / "seconds"
    assert float(clock.read_text()) > 0
    clock.unlink()
    if damage is not None:
        clock.write_text(damage)
    lab.reproduce.plan(here, [cell])
    assert "1 begun" in capsys.readouterr().out
    assert here.attempt(cell)
    assert here.records.state(cell) == "done"


def test_a_begun_cell_of_another_recipe_says_what_to_delete(
    lab: SimpleNamespace, here: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = _supervised(lab)
    _interrupt(lab, here, cell)
    monkeypatch.setitem(lab.grid.TASKS["ACDC"].presets, "study", {**TINY, "lr": 0.5})
    lab.runs.work(here, [cell], 600)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "stays open" in line)
    assert "was made with lr=0.01, this run has lr=0.5" in line
    assert line.endswith(f"delete {here.folder(cell)} to start anew.")
    assert "--out" not in line


def test_log_lines_name_the_cell(lab: SimpleNamespace, here: Any, capsys: pytest.CaptureFixture[str]) -> None:
    cell = _supervised(lab)
    here.attempt(cell)
    lines = [line for line in capsys.readouterr().out.splitlines() if "/4 " in line or "/2" in line]
    early = here.records.read(cell)["chosen_iteration"] < 4
    assert len(lines) == 4 + 2 + 2 + 2 * early  # steps, validations, the test volumes, and by the last iteration
    assert all(line.startswith(cell.name) for line in lines)


def _interrupt(lab: SimpleNamespace, here: Any, cell: Any) -> None:
    """Leave `cell` with a checkpoint and no record."""
    from segmentation.training import loop as train

    original = train._validate

    def validate(*arguments: Any) -> None:
        original(*arguments)
        signal.raise_signal(signal.SIGALRM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_validate", validate)
        lab.runs.work(here, [cell], 600)
    assert here.begun(cell)
    assert here.records.read(cell) is None


@pytest.mark.parametrize("in_the_background", [False, True])
def test_the_budget_ends_a_run_in_time(lab: SimpleNamespace, here: Any, in_the_background: bool) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if in_the_background else signal.default_int_handler)
    try:
        here = SimpleNamespace(attempt=lambda cell: time.sleep(30))
        started = time.perf_counter()
        lab.runs.work(here, [_supervised(lab)] * 3, 0.2)
        assert time.perf_counter() - started < 10
    finally:
        signal.signal(signal.SIGINT, before)
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_claimed_cell_is_left_alone_until_its_process_is_dead(lab: SimpleNamespace, here: Any) -> None:
    cell = _supervised(lab)
    lock = here.folder(cell) / "lock"
    lock.parent.mkdir(parents=True)
    hold = (
        f"import fcntl, time; file = open({str(lock)!r}, 'a'); fcntl.flock(file, fcntl.LOCK_EX); "
        "print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        assert not here.attempt(cell)
        assert here.records.read(cell) is None
    finally:
        other.kill()
        other.wait()
    assert here.attempt(cell)


def test_draws_are_of_different_patients(lab: SimpleNamespace) -> None:
    from segmentation.data.files import split_by_patients

    names = [f"patient{number:03}_frame01_slice_1" for number in range(lab.grid.TASKS["ACDC"].training_patients)]
    drawn = {tuple(split_by_patients(names, 1, seed=draw)[0]) for draw in lab.grid.DRAWS}
    assert len(drawn) == len(lab.grid.DRAWS)


def test_a_budget_is_of_minutes_or_seconds(lab: SimpleNamespace) -> None:
    assert [lab.reproduce.seconds(text) for text in ("60", "0.5", "780s")] == [3600.0, 30.0, 780.0]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_budget_that_is_over_runs_nothing(
    jobs: int, lab: SimpleNamespace, here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that the start of the processes has used up."""
    server = multiprocessing.get_context("forkserver")  # pickles as `spawn` does, and has imported torch
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: server)
    assert lab.reproduce.run(here, [_supervised(lab)], time.time() - 1, jobs) == 0
    assert not here.records.read(_supervised(lab))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_two_jobs_share_the_cells(
    lab: SimpleNamespace, here: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fork = multiprocessing.get_context("fork")  # which knows of the tiny runs, and takes no time to start
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: fork)
    cells = [_supervised(lab, seed) for seed in range(3)]
    lab.reproduce.run(here, cells, time.time() + 600, jobs=2)
    printed = capfd.readouterr().out  # of both at once: what one has begun to print may stand before it
    assert [printed.count(f"\n{cell.name}\n") for cell in cells] == [1] * 3
    assert [here.records.state(cell) for cell in cells] == ["done"] * 3


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_dead_process_is_told(
    lab: SimpleNamespace, here: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: fork)
    monkeypatch.setattr(lab.reproduce, "work", lambda *_: None)
    assert lab.reproduce.run(here, [], time.time() + 600, jobs=2) == 0
    monkeypatch.setattr(lab.reproduce, "work", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    assert lab.reproduce.run(here, [], time.time() + 600, jobs=2) == 1
    assert "2 of 2 processes died, with exit status -9, -9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "telling"),
    [
        (["--data-acdc", "nowhere"], "nowhere"),
        (["--data-la", "nowhere"], "nowhere"),
        (["--jobs", "0"], "--jobs must be at least 1, not 0"),
        (["--threads", "0"], "--threads must be at least 1, not 0"),
        (["--budget", "0"], "--budget must be finite and above 0, not 0 seconds"),
        (["--budget", "nan"], "--budget"),
        (["--budget=-5s"], "not -5 seconds"),
        (["--budget", "inf"], "--budget"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], telling: str, lab: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = ["--records", str(tmp_path / "cells"), "--work", str(tmp_path / "work")]
    assert lab.reproduce.main(["--run", "--device", "cpu", *folders, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert telling in captured.err
    assert captured.out == ""


def test_run_leaves_out_what_has_no_data(
    lab: SimpleNamespace, here: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    attempted: list[str] = []
    monkeypatch.setattr(lab.runs.Lab, "attempt", lambda self, cell: attempted.append(cell.name))
    acdc, done = _supervised(lab), _supervised(lab, 1)
    here.records.write(done, _record(done))
    lab.reproduce.run(here, [acdc, done, lab.grid.cell("LA", "paper", lab.grid.GAPMATCH, 1, 0)], time.time() + 60)
    assert attempted == [acdc.name]
    assert "without --data-la" in capsys.readouterr().out


# ---------------------------------------------------------------- the report


def test_a_record_of_another_recipe_counts_for_nothing(lab: SimpleNamespace, here: Any) -> None:
    cell = _supervised(lab)
    record = _record(cell)
    here.records.write(cell, {**record, "recipe": {**record["recipe"], "lr": 0.5}})
    assert here.records.state(cell) == "stale"
    assert here.records.of([cell]) == {}
    assert not here.attempt(cell)
    here.records.write(cell, {**record, "recipe": {**record["recipe"], "eps": 9.0}})  # means nothing without GAP
    assert here.records.state(cell) == "done"


def test_a_field_that_a_record_lacks_had_its_default(lab: SimpleNamespace, here: Any) -> None:
    for cell, field, state in (
        (_supervised(lab), "weight", "done"),
        (_supervised(lab, warm_up=1), "warm_up", "done"),  # means nothing to it
        (lab.grid.cell("ACDC", "study", lab.grid.FIXMATCH, 1, 0, {"warm_up": 1}), "warm_up", "stale"),
        (_supervised(lab, aligned="predictions"), "aligned", "done"),  # means nothing without GAP
        (lab.grid.cell("ACDC", "study", lab.grid.GAPMATCH, 1, 0, {"aligned": "predictions"}), "aligned", "stale"),
        (lab.grid.cell("ACDC", "study", ("em", False), 1, 0, {"ramp_up": 0.0}), "ramp_up", "done"),
        (lab.grid.cell("ACDC", "study", ("em", False), 1, 0), "ramp_up", "stale"),  # it has one of its own by now
        (lab.grid.cell("ACDC", "study", ("vat", False), 1, 0), "options", "done"),
        (lab.grid.cell("ACDC", "study", ("vat", False), 1, 0, {"options": {"xi": 0.01}}), "options", "stale"),
    ):
        record = _record(cell)
        del record["recipe"][field]
        here.records.write(cell, record)
        assert here.records.state(cell) == state


@pytest.mark.parametrize("damage", [b"", b'{"state": "do', b"\xff", b"[]", b"{}"])
def test_a_damaged_record_is_one_line(
    damage: bytes, lab: SimpleNamespace, here: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = here.records.path(lab.grid.cells()[0])
    path.parent.mkdir()
    path.write_bytes(damage)
    for what in ("--plan", "--report"):
        assert lab.reproduce.main([what, "--records", str(path.parent), "--page", str(path.parent / "page.md")]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {path}: ")
        assert error.count("\n") == 1


def test_means_deviations_and_gains_by_hand(lab: SimpleNamespace) -> None:
    grid = lab.grid
    dice = {False: [40.0, 50.0, 60.0], True: [46.0, 54.0]}  # seed 2 lacks its partner
    found = {}
    for gap, values in dice.items():
        for seed, value in enumerate(values):
            cell = grid.cell("ACDC", "study", ("vat", gap), 1, seed)
            found[cell] = _record(cell, value, asd=3.0 - gap - 0.5 * seed * gap)
    rows = {
        row[0]: row
        for table in lab.page.comparisons(found, "ACDC", "study")
        if "Table 2" in table.title
        for row in table.rows[-3:]
    }
    assert rows["VAT"][1] == "50.0 ± 10.0\n3.00 ± 0.00 (n = 3)"
    spread = math.sqrt(2 * 4.0**2)  # of 46 and 54
    assert rows["VAT + GAP"][1] == f"50.0 ± {spread:.1f}\n1.75 ± 0.35 (n = 2 of 3)"
    assert rows["gain"][1] == "+5.0 ± 1.4 [-]\n-1.25 ± 0.35 [-] (n = 2 of 3)"  # +6 and +4; -1 and -1.5
    assert [rows[name][2] for name in ("VAT", "VAT + GAP", "gain")] == ["-"] * 3  # the last iteration was not scored
    assert [rows[name][3] for name in ("VAT", "VAT + GAP", "gain")] == ["54.2\n2.99", "61.8\n3.10", "+7.6\n+0.11"]


def test_a_gain_is_of_the_seeds_that_both_have(lab: SimpleNamespace) -> None:
    found = {}
    for gap, seed, dice in ((False, 0, 10.0), (False, 1, 40.0), (True, 1, 45.0), (True, 2, 90.0)):
        cell = lab.grid.cell("ACDC", "study", ("vat", gap), 1, seed)
        found[cell] = _record(cell, dice)
    pairs = lab.scores.pairs(found, "ACDC", "study", "vat", 1)
    assert lab.scores.gains(pairs) == {(1, None): (5.0, 0.0)}


def test_single_runs_losses_failures_and_collapses_are_shown(lab: SimpleNamespace) -> None:
    grid = lab.grid
    plain, with_gap, failed = (
        grid.cell("ACDC", "study", ("em", False), 5, 0),
        grid.cell("ACDC", "study", ("em", True), 5, 0),
        grid.cell("ACDC", "study", ("em", True), 5, 1),
    )
    found = {
        plain: _record(plain, 60.0),
        with_gap: _record(with_gap, 20.0),
        failed: _record(failed, state="failed", reason="nan"),
    }
    found[with_gap]["test"]["empty"] = 61  # of 120
    table = next(t for t in lab.page.comparisons(found, "ACDC", "study") if "Table 2" in t.title)
    rows = {row[0]: row[1] for row in table.rows[:3]}
    assert rows["EM"] == "60.0 ± -\n2.00 ± - (n = 1 of 3)"
    assert rows["EM + GAP"] == "20.0 ± -\n2.00 ± -† (n = 1 of 3), 1 failed\n50.8 % empty"
    assert rows["gain"] == "-40.0 ± - [-]\n+0.00 ± - [-]† (n = 1 of 3)"


def test_columns_that_say_nothing_are_left_out(lab: SimpleNamespace) -> None:
    cell = lab.grid.cell("ACDC", "study", ("flexmatch", False), 1, 0)
    tables = {
        table.title.split(" on ")[0]: table for table in lab.page.comparisons({cell: _record(cell)}, "ACDC", "study")
    }
    thresholds, table_2 = tables["FixMatch with thresholds that adapt"], tables["Table 2"]
    assert list(thresholds.header) == ["Method", "1 %, ours", "1 %, ours, last"]  # the paper has no such row
    assert list(thresholds.rows[0]) == ["FlexMatch", "50.0 ± -\n2.00 ± - (n = 1 of 2)", "-"]
    assert list(table_2.header) == ["Method", *(f"{n} %, {whose}" for n in (1, 5, 10) for whose in ("ours", "paper"))]
    assert {row[1] for row in table_2.rows} == {"open"}


def test_empty_predictions_are_counted_over_all_seeds(lab: SimpleNamespace) -> None:
    cells = {(gap, s): lab.grid.cell("ACDC", "study", ("em", gap), 1, s) for gap in (False, True) for s in range(3)}
    found = {cell: _record(cell) for cell in cells.values()}
    found[cells[False, 0]]["test"]["empty"] = 60  # no more than half
    found[cells[False, 2]]["test"]["empty"] = 12

    def shown() -> list[str]:
        table = next(t for t in lab.page.comparisons(found, "ACDC", "study") if "Table 2" in t.title)
        return [row[1].split("(n = ")[0][-2:] + row[1].split(")")[1] for row in table.rows[:3]]

    assert shown() == ["0 \n20.0 % empty", "0 ", "] "]  # 72 of 360
    found[cells[False, 1]]["test"]["empty"] = 108
    assert shown() == ["† \n50.0 % empty", "0 ", "† "]
    del found[cells[True, 1]]  # the gain has no part in seed 1
    assert shown() == ["† \n50.0 % empty", "0 ", "] "]


def test_the_last_iterate_stands_beside_the_chosen_one(lab: SimpleNamespace) -> None:
    """Of three pairs, one of which is older than its scores."""
    cells = {(gap, s): lab.grid.cell("ACDC", "study", ("em", gap), 1, s) for gap in (False, True) for s in range(3)}
    found = {cell: _record(cell, 40.0 + 6 * cell.gap) for cell in cells.values()}
    for (gap, seed), cell in cells.items():
        if seed > 0:
            found[cell]["test_last"] = _test(30.0 + 10 * seed * gap, empty=90 * gap * (seed == 2))
    table = next(t for t in lab.page.comparisons(found, "ACDC", "study") if "Table 2" in t.title)
    assert table.header[:4] == ("Method", "1 %, ours", "1 %, ours, last", "1 %, paper")
    plain, with_gap, gain = (row[1:3] for row in table.rows[:3])
    assert plain == ("40.0 ± 0.0\n2.00 ± 0.00 (n = 3)", "30.0 ± 0.0\n2.00 ± 0.00 (n = 2 of 3)")
    assert with_gap[1] == "45.0 ± 7.1\n2.00 ± 0.00† (n = 2 of 3)\n37.5 % empty"
    assert gain[0] == "+6.0 ± 0.0 [+6.0, +6.0]\n+0.00 ± 0.00 [+0.00, +0.00] (n = 3)"
    assert gain[1] == "+15.0 ± 7.1 [-]\n+0.00 ± 0.00 [-]† (n = 2 of 3)"


def test_a_mean_counts_seeds_and_draws(lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    block = lab.grid.Block("table 2", "ACDC", "study", lab.grid.TABLE_2, (1,), (0, 1), draws=(None, 7))
    monkeypatch.setattr(lab.grid, "BLOCKS", (block,))
    cells = [cell for cell in lab.grid.cells() if cell.method == "em"]
    found = {cell: _record(cell, 40.0 + (2 + 2 * (cell.draw == 7)) * cell.gap) for cell in cells}

    def gain() -> str:
        table = next(t for t in lab.page.comparisons(found, "ACDC", "study") if "Table 2" in t.title)
        return table.rows[2][1].splitlines()[1].split("] ")[1], table.rows[2][1].split("\n")[0]

    assert gain() == ("(n = 2 seeds x 2 draws)", "+3.0 ± 1.2 [+2.0, +4.0]")
    del found[cells[-1]]
    assert gain()[0] == "(n = 3 of 2 seeds x 2 draws)"


def test_a_run_at_its_best_in_the_warm_up_is_marked(lab: SimpleNamespace) -> None:
    methods = ("supervised", False), ("fixmatch", False), ("fixmatch", True)
    supervised, plain, with_gap = (lab.grid.cell("ACDC", "study", method, 1, 0) for method in methods)
    found = {
        supervised: _record(supervised, chosen_iteration=100),
        plain: _record(plain, chosen_iteration=plain.recipe.warm_up),
        with_gap: _record(with_gap, chosen_iteration=plain.recipe.warm_up + 1),
    }
    table = next(t for t in lab.page.comparisons(found, "ACDC", "study") if "Table 1" in t.title)
    assert ["‡" in row[1] for row in table.rows] == [False, True, False, True]
    names = [label.get_text() for label in lab.plots.gain_by_method(found).axes[0].get_xticklabels()]
    assert "FixMatch‡" in names
    assert "EM" in names


def test_sweeps_compare_validation_over_the_same_seeds(lab: SimpleNamespace) -> None:
    grid = lab.grid
    default = [grid.cell("ACDC", "study", grid.GAPMATCH, 1, seed) for seed in range(3)]
    strong = [grid.cell("ACDC", "study", grid.GAPMATCH, 1, seed, {"eps": 0.5, "alpha": 2.0}) for seed in range(2)]
    found = {cell: _record(cell, 40.0 + 10 * cell.seed) for cell in (*default, *strong)}
    eps_alpha, _, tau, *_ = lab.page.sweeps(found)
    assert eps_alpha.rows[-1] == ["0.5", "open", "open", "45.0 ± 7.1\n35.0 ± 7.1 (n = 2)"]
    assert ["0.95", "45.0 ± 7.1\n35.0 ± 7.1 (n = 2), default"] in tau.rows  # seed 2 is not in the study


def test_a_second_preset_has_sections_and_pictures_of_its_own(
    lab: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(lab.plots, "save_plot", lambda figure, path: drawn.setdefault(path.stem, figure))
    monkeypatch.setitem(lab.grid.TASKS["ACDC"].presets, "other", TINY)
    more = [batch._replace(preset="other") for batch in lab.grid.BLOCKS if batch.preset == "study"]
    monkeypatch.setattr(lab.grid, "BLOCKS", (*lab.grid.BLOCKS, *more))
    monkeypatch.setattr(lab.grid, "PRESETS", (*lab.grid.PRESETS, "other"))
    records = lab.records.Records(tmp_path / "cells")
    for cell in lab.grid.cells(presets=["study", "medium", "other"]):
        if cell.seed == 0:
            records.write(cell, _record(cell))
    page = tmp_path / "results.md"
    lab.page.write(records, page, tmp_path)
    headings = [line for line in page.read_text().splitlines() if line.startswith("#")]
    assert len(set(headings)) == len(headings)
    assert drawn.keys() == lab.plots.CAPTIONS.keys()
    assert [axes.get_title() for axes in drawn["eps_alpha"].axes] == ["reduced scale (study)", "reduced scale (other)"]


def test_the_report_of_nothing_is_all_open(lab: SimpleNamespace, tmp_path: Path) -> None:
    page = tmp_path / "docs" / "results.md"
    lab.page.write(lab.records.Records(tmp_path / "cells"), page, tmp_path / "docs" / "figures")
    text = page.read_text()
    assert "open" in text
    assert "png" not in text
    assert not (tmp_path / "docs" / "figures").exists()


def test_the_report_has_every_section_and_picture(lab: SimpleNamespace, tmp_path: Path) -> None:
    records = lab.records.Records(tmp_path / "cells")
    run = [cell for cell in lab.grid.cells(presets=["study", "medium"]) if cell.seed == 0]
    for cell in run:
        records.write(cell, _record(cell))
    page, figures = tmp_path / "docs" / "results.md", tmp_path / "figures"
    arguments = ["--report", "--records", str(records.folder), "--page", str(page), "--figures", str(figures)]
    assert lab.reproduce.main(arguments) == 0
    text = page.read_text()
    for name in lab.plots.CAPTIONS:
        assert (figures / f"{name}.png").stat().st_size > 10_000
        assert f"(../figures/{name}.png)" in text
    for wanted in ("## ACDC, full scale", "## ACDC, reduced scale", "Table 3 on ACDC, ours at reduced scale", "a CPU"):
        assert wanted in text
    assert "0 of 102 cells have run" in text
    assert not re.search("on ACDC$", text, re.MULTILINE)  # no table of a scale at which nothing has run
