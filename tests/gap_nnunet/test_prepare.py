"""From raw files to what training reads, by nnU-Net's own preprocessing."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("nnunetv2", reason="pip install 'gap-torch[nnunet]'")

from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from gap_nnunet import folders
from gap_nnunet.prepare import prepare
from gap_nnunet.problems import Problems

from .conftest import PREPROCESSED, RAW, in_threads
from .data import SHAPE, write, write_dataset

NAME = "Dataset007_Prepare"
FOLDER = PREPROCESSED / NAME
UNLABELLED = FOLDER / "nnUNetPlans_2d_unlabelled"


@pytest.fixture
def dataset() -> Path:
    """Three labelled scans and two without labels, prepared in 2D; the raw folder."""
    for root in (RAW, PREPROCESSED):
        shutil.rmtree(root / NAME, ignore_errors=True)
    raw = write_dataset(RAW, NAME, labelled=3, unlabelled=2)
    _prepare()
    return raw


def _prepare(processes: int = 1, clean: bool = False) -> None:
    with in_threads():
        prepare("7", ["2d"], processes=processes, clean=clean)


def _made() -> dict[str, int]:
    """When each case was made."""
    return {path.stem: path.stat().st_mtime_ns for path in UNLABELLED.glob("*.pkl")}


def test_scans_are_preprocessed_by_nnunet_with_the_labelled_cases_plan(dataset: Path) -> None:
    assert folders.cases(UNLABELLED) == ["scan0", "scan1"]
    assert folders.cases(FOLDER / "nnUNetPlans_2d") == ["case0", "case1", "case2"]
    fingerprint = json.loads((FOLDER / "dataset_fingerprint.json").read_text())
    assert len(fingerprint["spacings"]) == 3
    plans = PlansManager(str(FOLDER / "nnUNetPlans.json"))
    configuration = plans.get_configuration("2d")
    for case in ("scan0", "scan1"):
        data, seg, _, properties = nnUNetDatasetBlosc2(str(UNLABELLED), [case]).load_case(case)
        image = [str(dataset / "imagesUn" / f"{case}_0000.nii.gz")]
        preprocessor = configuration.preprocessor_class(verbose=False)
        described = json.loads((dataset / "dataset.json").read_text())
        expected = preprocessor.run_case(image, None, plans, configuration, described)
        np.testing.assert_array_equal(data[:], expected[0])
        np.testing.assert_array_equal(seg[:], expected[1])
        assert properties["class_locations"] == {}


def test_few_labelled_cases_are_left_out_one_by_one(dataset: Path) -> None:
    splits = json.loads((FOLDER / "splits_final.json").read_text())
    assert splits == [
        {"train": ["case1", "case2"], "val": ["case0"]},
        {"train": ["case0", "case2"], "val": ["case1"]},
        {"train": ["case0", "case1"], "val": ["case2"]},
    ]


def test_a_split_of_other_cases_is_told(dataset: Path, capsys: pytest.CaptureFixture) -> None:
    file = FOLDER / "splits_final.json"
    split = {"train": ["case0", "case1"], "val": ["case2"], "unlabelled": ["old"]}  # nnU-Net reads its own two
    for splits, told in (([split], False), ([{**split, "val": ["old"]}], True)):
        file.write_text(json.dumps(splits))
        capsys.readouterr()
        _prepare()
        assert ("is of other cases than imagesTr" in capsys.readouterr().out) == told
        assert json.loads(file.read_text()) == splits


def test_what_is_there_is_left_and_the_rest_is_done(dataset: Path, capsys: pytest.CaptureFixture) -> None:
    before = _made()
    (UNLABELLED / "scan1.pkl").unlink()  # as if it had been killed in the middle
    write(dataset / "imagesUn" / "scan2_0000.nii.gz", np.ones(SHAPE, np.float32))
    capsys.readouterr()
    _prepare()
    after = _made()
    assert set(after) == {"scan0", "scan1", "scan2"}
    assert after["scan0"] == before["scan0"]
    assert "2d: 1 of the 3 cases in imagesUn are there." in capsys.readouterr().out
    assert not (UNLABELLED / ".part").exists()


def test_a_scan_that_was_changed_is_done_anew_and_one_that_is_gone_goes(dataset: Path) -> None:
    before = _made()
    write(dataset / "imagesUn" / "scan0_0000.nii.gz", 2 * np.ones(SHAPE, np.float32))
    later = time.time() + 1
    os.utime(dataset / "imagesUn" / "scan0_0000.nii.gz", (later, later))
    (dataset / "imagesUn" / "scan1_0000.nii.gz").unlink()
    _prepare()
    assert set(_made()) == {"scan0"}
    assert _made()["scan0"] > before["scan0"]
    assert {path.name for path in UNLABELLED.iterdir()} == {"scan0.b2nd", "scan0_seg.b2nd", "scan0.pkl"}


def test_scans_of_another_plan_are_done_anew(dataset: Path, capsys: pytest.CaptureFixture) -> None:
    before = _made()
    file = FOLDER / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["2d"]["spacing"] = [2.0, 2.0]
    file.write_text(json.dumps(plans))
    _prepare()
    assert "is of another plan" in capsys.readouterr().out
    assert all(_made()[case] > before[case] for case in before)
    data = nnUNetDatasetBlosc2(str(UNLABELLED), ["scan0"]).load_case("scan0")[0]
    assert data.shape == (1, 6, 16, 16)
    labelled = nnUNetDatasetBlosc2(str(FOLDER / "nnUNetPlans_2d"), ["case0"]).load_case("case0")[0]
    assert labelled.shape == (1, 6, 16, 16)


def test_plans_are_made_anew_by_the_planner_that_made_them(dataset: Path) -> None:
    file = FOLDER / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    file.write_text(json.dumps({**plans, "experiment_planner_used": "ResEncUNetPlanner"}))
    _prepare(clean=True)
    assert json.loads(file.read_text())["experiment_planner_used"] == "ResEncUNetPlanner"


def test_labelled_scans_without_a_label_are_told_where_they_belong(dataset: Path) -> None:
    (dataset / "labelsTr" / "case1.nii.gz").unlink()
    with pytest.raises(Problems, match=r"case1_0000\.nii\.gz has no label, .*: add it, or move the scan to imagesUn"):
        _prepare()
    for case in range(3):
        (dataset / "imagesTr" / f"case{case}_0000.nii.gz").unlink()
    with pytest.raises(Problems, match=r"imagesTr has no scans that end with \.nii\.gz"):
        _prepare()
    (dataset / "imagesTr").rmdir()
    with pytest.raises(Problems, match=r"imagesTr has no scans"):
        _prepare()


def test_a_configuration_that_nobody_knows_is_an_error(dataset: Path, capsys: pytest.CaptureFixture) -> None:
    with in_threads(), pytest.raises(ValueError, match=r"'2D' is no configuration of nnUNetPlans, which has 2d, "):
        prepare("7", ["2D"], processes=1)
    with in_threads():
        prepare("7", ["3d_lowres"], processes=1)  # which nnU-Net plans for large scans alone
    assert "3d_lowres: not in the plans" in capsys.readouterr().out


def test_another_labelled_case_means_another_plan(dataset: Path, capsys: pytest.CaptureFixture) -> None:
    write_dataset(RAW, NAME, labelled=4, unlabelled=2)
    _prepare()
    assert "The fingerprint is of 3 labelled cases, imagesTr has 4" in capsys.readouterr().out
    assert len(json.loads((FOLDER / "dataset_fingerprint.json").read_text())["spacings"]) == 4
    assert len(folders.cases(FOLDER / "nnUNetPlans_2d")) == 4


def test_all_scans_that_are_wrong_are_told_and_the_others_done(dataset: Path) -> None:
    unlabelled = dataset / "imagesUn"
    write(unlabelled / "zero_0000.nii.gz", np.zeros(SHAPE, np.float32))
    (unlabelled / "cut_0000.nii.gz").write_bytes((unlabelled / "scan0_0000.nii.gz").read_bytes()[:200])
    write(unlabelled / "good_0000.nii.gz", np.ones(SHAPE, np.float32))
    with pytest.raises(Problems) as raised:
        _prepare()
    assert [Path(entry.split()[0]).name for entry in raised.value.entries] == ["cut_0000.nii.gz", "zero_0000.nii.gz"]
    assert folders.cases(UNLABELLED) == ["good", "scan0", "scan1"]


def test_in_processes_of_their_own(dataset: Path) -> None:
    from gap_nnunet.prepare import _run

    assert sorted(_run(len, [[1], [1, 2], [3, 4, 5]], 2)) == [1, 2, 3]


def test_a_process_that_is_killed_is_an_error_that_says_what_to_do() -> None:
    from gap_nnunet.prepare import _run

    with pytest.raises(RuntimeError, match="want of memory: try -np 1"):
        list(_run(os._exit, [1], 2))


def test_nothing_is_done_without_folders_or_for_a_second_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="Could not find a dataset with the ID 99"):
        prepare("99", ["2d"])
    with pytest.raises(ValueError, match="not trained on scans without labels"):
        prepare("7", ["3d_cascade_fullres"])
    monkeypatch.delenv("nnUNet_preprocessed")
    with pytest.raises(ValueError, match="nnUNet_preprocessed is not set"):
        prepare("7", ["2d"])
