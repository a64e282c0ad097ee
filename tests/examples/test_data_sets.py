"""The files that the docs show for new data sets run as they stand."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from segmentation import cli
from segmentation.data.photos import read_mask
from segmentation.errors import InputError

PAGE = Path(__file__).parents[2] / "docs" / "data_sets.md"
SCRIPTS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def _task(index: int, name: str) -> Any:
    names: dict[str, Any] = {"__name__": "of_the_page"}
    exec(compile(SCRIPTS[index], str(PAGE), "exec"), names)
    return names[name]


def _run(task: Any, out: Path, *arguments: str) -> int:
    return cli.main(task, "", ["--iterations", "2", "--device", "cpu", "--out", str(out), *arguments])


def test_the_page_s_rules_tell_its_names_apart() -> None:
    rows = re.findall(r"^\| (`.*) \| `patient=(.*)` \|$", PAGE.read_text(), re.MULTILINE)
    found = [[*map(eval(rule), re.findall(r"`(.*?)`", names))] for names, rule in rows]
    assert found == [["prostate_01", "FLARE22_Tr_0001", "BraTS19_2013_16_1"], ["case_00001"], ["p1", "p1"]]


def test_a_third_data_set_is_one_small_file(tmp_path: Path) -> None:
    assert _run(_task(0, "MNMS"), tmp_path, "--method", "supervised") == 0
    assert "MnMs phantom" in (tmp_path / "table.md").read_text()


def test_the_page_s_command_asks_for_what_it_says() -> None:
    task, command = _task(0, "MNMS"), re.search(r"^python mnms.py (.*)$", PAGE.read_text(), re.MULTILINE)
    job = cli.job(task, cli.parse(task, "", [*command[1].split(), "--device", "cpu"]))
    assert job.patients == 2
    assert [recipe.name for recipe in job.recipes] == ["supervised", "fixmatch", "gapmatch"]
    assert job.recipes[0].size == task.presets["cpu"]["size"]


def test_photographs_in_colours(tmp_path: Path) -> None:
    assert _run(_task(1, "LESIONS"), tmp_path, "--patients", "2", "--largest-component") == 0
    assert "labelled patients: 2" in (tmp_path / "table.md").read_text()
    volumes = json.loads((tmp_path / "gapmatch" / "result.json").read_text())["test"]["volumes"]
    assert [*volumes] == ["ISIC_test_0000", "ISIC_test_0001", "ISIC_test_0002"]
    picture = np.array(Image.open(tmp_path / "predictions.png").convert("RGB")).astype(int)
    assert (picture[..., 0] - picture[..., 2])[:, : picture.shape[1] // 8].max() > 50  # the first column is not grey
    assert not (tmp_path / "phantom" / "masks" / "ISIC_train_0002.png").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "masks/ISIC_train_0001.png").unlink(), "unlabelled training cases alone need no mask"),
        (lambda root: (root / "masks/ISIC_test_0000.png").write_bytes(b"no image"), "not a readable image"),
        (lambda root: _write_mask(root, "ISIC_train_0000", 7), "holds the label 7; each has to be one of 0, 1"),
        (lambda root: [_write_mask(root, f"ISIC_train_000{n}", 0) for n in (0, 1)], "of all labelled images are empty"),
    ],
    ids=["missing", "damaged", "out of range", "empty"],
)
def test_what_is_wrong_with_photographs_is_named(spoil, message: str, tmp_path: Path, capsys) -> None:
    task = _task(1, "LESIONS")
    task.write_phantom(tmp_path)
    spoil(tmp_path)
    arguments = ["--data", str(tmp_path), "--patients", "2", "--preset", "cpu"]
    assert _run(task, tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err


def _write_mask(root: Path, name: str, value: int) -> None:
    mask = root / "masks" / f"{name}.png"
    Image.fromarray(np.full_like(np.array(Image.open(mask)), value)).save(mask)


def test_a_mask_of_another_size_or_in_colours_is_refused(tmp_path: Path) -> None:
    task = _task(1, "LESIONS")
    task.write_phantom(tmp_path)
    photo, mask = (tmp_path / folder / "ISIC_val_0000.png" for folder in ("images", "masks"))
    mask.write_bytes(photo.read_bytes())
    with pytest.raises(InputError, match="has 3 channels"):
        read_mask(mask, 2)
    Image.new("L", (96, 5)).save(mask)
    with pytest.raises(InputError, match=r"\(5, 96\) where the photograph is \(72, 96\)"):
        task.read_volumes(tmp_path, ["ISIC_val_0000"])
