"""What the tables say, in a log and in Markdown, and what lands on disk."""

import json
import re

import numpy as np
import pytest

from segmentation.errors import InputError
from segmentation.figures.tables import Row, print_table, write_json, write_markdown
from segmentation.scoring.evaluate import Evaluation
from segmentation.scoring.metrics import ClassScore

EVALUATION = Evaluation(
    ("a", "b"),
    (
        (ClassScore(0.5, 1.5, False), ClassScore(0.6, 0.5, False), ClassScore(0.7, 0.25, False)),
        (ClassScore(0.7, 2.5, False), ClassScore(0.8, 0.75, False), ClassScore(0.0, 0.0, True)),
    ),
)
CLASSES = ("RV", "Myo", "LV")
PUBLISHED = {"Supervised": (27.7, 32.6), "GapMatch": (86.8, 0.81)}
CELLS = ["55.0", "0.92", "60.0", "70.0", "35.0", "1"]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| \n").split("|")]


def test_the_log_has_plain_unbroken_lines(capsys):
    method = "GapMatch [eps 0.1], a label with brackets that rich could take for markup"
    print_table([Row(method, EVALUATION, 0.1634, 12500, "seed 0")], "ACDC, 1 %", class_names=CLASSES)
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert output.startswith("ACDC, 1 %")
    (line,) = [line for line in output.splitlines() if method in line]
    assert line.replace(method, "").split() == [*CELLS, "0.163", "12,500", "seed", "0"]
    assert all(name in output for name in ("Method", "Dice %", "ASD voxel", "RV %", "Myo %", "LV %", "Empty"))


def test_a_dict_read_back_from_json_gives_the_same_row(tmp_path):
    rows = [Row("m", EVALUATION), Row("m", json.loads(json.dumps(EVALUATION.to_dict())))]
    _, _, _, _, first, second = write_markdown(tmp_path / "t.md", rows, "t", class_names=CLASSES).splitlines()
    assert first == second


def test_columns_that_no_row_fills_are_left_out(tmp_path):
    header = write_markdown(tmp_path / "t.md", [Row("m", EVALUATION)], "t", class_names=CLASSES).splitlines()[2]
    assert cells(header) == ["Method", "Dice %", "ASD voxel", "RV %", "Myo %", "LV %", "Empty"]


def test_the_last_iteration_stands_beside_the_chosen_one(tmp_path):
    last = Evaluation(("a",), ((ClassScore(0.2, 4.0, False),) * 3,))
    rows = [Row("m", EVALUATION, last=last), Row("read back", EVALUATION, last=last.to_dict()), Row("none", EVALUATION)]
    header, _, *lines = write_markdown(tmp_path / "t.md", rows, "t", class_names=CLASSES).splitlines()[2:]
    assert cells(header)[:5] == ["Method", "Dice %", "ASD voxel", "Dice % last", "ASD last"]
    assert [cells(line)[1:5] for line in lines] == [["55.0", "0.92", "20.0", "4.00"]] * 2 + [["55.0", "0.92", "", ""]]


def test_markdown_is_returned_and_written(tmp_path):
    path = tmp_path / "new" / "table.md"
    rows = [Row("FixMatch|weak", EVALUATION, 0.25), Row("GapMatch", EVALUATION, 0.5)]
    text = write_markdown(path, rows, "Test volumes", class_names=CLASSES)
    assert path.read_text(encoding="utf-8") == text
    title, _, header, rule, first, second = text.splitlines()
    assert title == "**Test volumes**"
    assert r"FixMatch\|weak" in first
    assert cells(second) == ["GapMatch", *CELLS, "0.500"]
    assert len(cells(rule)) == len(cells(header)) == len(cells(second))


def test_published_rows_stand_below_our_own(tmp_path):
    text = write_markdown(tmp_path / "t.md", [Row("GapMatch", EVALUATION)], "t", CLASSES, PUBLISHED)
    ours, *theirs = (cells(line) for line in text.splitlines()[4:])
    assert ours[0] == "GapMatch"
    for line, (method, (dice, asd)) in zip(theirs, PUBLISHED.items(), strict=True):
        assert line[0] == f"{method} (paper)"
        assert (float(line[1]), float(line[2])) == (dice, asd)


def test_validation_without_asd_shows_a_dash(tmp_path):
    rows = [Row("m", EVALUATION.to_dict() | {"asd": None})]
    assert cells(write_markdown(tmp_path / "t.md", rows, "t", class_names=CLASSES).splitlines()[4])[2] == "-"


def test_class_names_belong_to_the_data_set(tmp_path):
    la = Evaluation(("a",), ((ClassScore(0.9, 1.0, False),),))
    text = write_markdown(tmp_path / "t.md", [Row("m", la)], "t", class_names=("LA",))
    assert cells(text.splitlines()[2])[3] == "LA %"
    with pytest.raises(InputError, match="'m': 1 classes, expected 3"):
        print_table([Row("m", la)], "t", class_names=CLASSES)


def test_bad_rows_name_the_culprit():
    with pytest.raises(InputError, match="'m': no asd, empty"):
        print_table([Row("m", {"dice": 1.0, "class_dice": [1.0, 1.0, 1.0]})], "t", class_names=CLASSES)


def test_json_is_whole_or_not_there(tmp_path):
    path = tmp_path / "deep" / "result.json"
    write_json(path, {"loss": [1.5, float("nan")], "pair": (1, float("inf"))})
    assert json.loads(path.read_text()) == {"loss": [1.5, None], "pair": [1, None]}
    with pytest.raises(InputError, match=re.escape(str(path))):
        write_json(path, {"array": np.zeros(2)})
    assert json.loads(path.read_text())["loss"] == [1.5, None]
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        write_json(tmp_path / "file" / "result.json", {})
