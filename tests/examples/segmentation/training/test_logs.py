"""The live line in a narrow terminal, and logs that go on after a crash."""

import csv
import io
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from segmentation.training.logs import TRAIN_COLUMNS, CsvLog, RunLog

VALUES = {
    "loss_labelled": 0.4321,
    "loss_unlabelled": 0.1234,
    "loss_perturbed": 0.2,
    "confident": 0.9731,
    "grad_norm": 1234.5,
    "learning_rate": 0.01,
    "it_per_s": 12.345,
}


@pytest.mark.parametrize("width", [80, 100])
def test_the_live_line_fits_a_terminal(tmp_path: Path, width: int) -> None:
    screen = Console(width=width, force_terminal=True, file=io.StringIO())
    log = RunLog(tmp_path, "gapmatch", 0, 30_000, screen)
    log.step(29_980, VALUES)
    paper = Console(width=width, file=io.StringIO())
    paper.print(log.progress.get_renderable())
    log.close()
    (line,) = paper.file.getvalue().splitlines()
    for part in ("gapmatch", "━", "29980/30000", ":", "12.3it/s", "loss 0.555", "conf 97%", "||g1|| 1.2e+03"):
        assert part in line


@pytest.mark.parametrize(("part", "text"), [("discriminator", "D 62%"), ("disagreement", "differ 62%")])
def test_the_live_line_shows_whether_a_discriminator_or_a_twin_learns(tmp_path: Path, part: str, text: str) -> None:
    console = Console(file=io.StringIO())
    log = RunLog(tmp_path, "dan", 0, 100, console)
    log.step(20, {**VALUES, part: 0.625})
    log.close()
    assert f" {text} " in console.file.getvalue()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars(f"train/{part}")] == [0.625]
    (row,) = csv.DictReader((tmp_path / "train.csv").open())
    assert row[part] == "0.625"


@pytest.mark.parametrize("values", [VALUES, {"loss_labelled": 0.4, "learning_rate": 0.01, "it_per_s": 2.0}])
def test_a_log_file_has_one_line_a_row(tmp_path: Path, values: dict[str, float]) -> None:
    console = Console(file=io.StringIO())
    log = RunLog(tmp_path, "supervised", 0, 100, console)
    log.step(20, values)
    log.close()
    (line,) = console.file.getvalue().splitlines()
    assert line.startswith("supervised 20/100")
    assert "left" in line


@pytest.mark.parametrize(
    "damage",
    [
        "40,0.2",  # cut off by a crash
        "forty,0.2,,,,,,,,",
        "40,0.2,none,,,,,,,",
        "40,0.2,,,,,,,,,,",
        "\0\0\0",
        "",
    ],
)
def test_damaged_rows_are_dropped(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "train.csv"
    header, row = ",".join(TRAIN_COLUMNS), "20,0.5,0.25,,0.9,1e-05,,,0.01,3.1"
    path.write_text(f"{header}\n{row}\n{damage}\n60,0.1,,,,,,,,2\n")
    log = CsvLog(path, TRAIN_COLUMNS, 50)
    log.write({"iteration": 60, "loss_labelled": 0.125})
    log.close()
    assert path.read_text().split() == [header, row, "60,0.125,,,,,,,,"]


def test_rows_from_before_there_were_all_columns_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("iteration,loss_labelled,it_per_s\n20,0.5,3.1\n40,0.25\n")
    CsvLog(path, TRAIN_COLUMNS, 50).close()
    (row,) = csv.DictReader(path.open())
    assert {name: value for name, value in row.items() if value} == {
        "iteration": "20",
        "loss_labelled": "0.5",
        "it_per_s": "3.1",
    }


@pytest.mark.parametrize("foreign", [b"", b"a,b\n1,2\n", b"\xff\xfe\n\xff\n", b"iteration\n1\n"])
def test_a_foreign_file_is_started_anew(tmp_path: Path, foreign: bytes) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes(foreign)
    CsvLog(path, TRAIN_COLUMNS, 50).close()
    assert path.read_text().split() == [",".join(TRAIN_COLUMNS)]


def test_resuming_keeps_the_events_of_all_iterations_done(tmp_path: Path) -> None:
    first = RunLog(tmp_path, "gapmatch", 0, 100)
    for iteration in (20, 40, 60):  # 60 was lost: the checkpoint is of 40
        first.step(iteration, VALUES)
    first.close()
    second = RunLog(tmp_path, "gapmatch", 40, 100)
    second.step(60, VALUES)
    second.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss_labelled")] == [20, 40, 60]
