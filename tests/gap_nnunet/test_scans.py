"""What lies in imagesUn: all that is wrong with it, each entry with a file's name."""

import gzip
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("nnunetv2", reason="pip install 'gap-torch[nnunet]'")

from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from gap_nnunet import scans
from gap_nnunet.problems import Problems
from gap_nnunet.scans import Labelled

from .data import SHAPE, write, write_dataset

DESCRIBED = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {}, "file_ending": ".nii.gz"}
VOLUMES = Labelled(channels=1, flat=False, thick_axis=0)


def _empty(folder: Path, *names: str) -> None:
    (folder / "imagesUn").mkdir(exist_ok=True)
    for name in names:
        (folder / "imagesUn" / name).touch()


def test_the_cases_are_those_of_the_file_names(tmp_path: Path) -> None:
    assert scans.find(tmp_path, DESCRIBED) == {}
    _empty(tmp_path, "a_0000.nii.gz", "a_0001.nii.gz", "b_1_0001.nii.gz", "b_1_0000.nii.gz", ".DS_Store")
    found = scans.find(tmp_path, DESCRIBED)
    assert {case: [Path(p).name for p in paths] for case, paths in found.items()} == {
        "a": ["a_0000.nii.gz", "a_0001.nii.gz"],
        "b_1": ["b_1_0000.nii.gz", "b_1_0001.nii.gz"],
    }


def test_colours_may_be_channels_of_one_file(tmp_path: Path) -> None:
    """As nnU-Net reads PNG: what counts is how many files a labelled case has."""
    described = {"channel_names": {"0": "R", "1": "G", "2": "B"}, "labels": {}, "file_ending": ".png"}
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "imagesTr" / "case_0000.png").touch()
    _empty(tmp_path, "a_0000.png")
    assert list(scans.find(tmp_path, described)) == ["a"]
    (tmp_path / "imagesTr" / "case_0001.png").touch()
    with pytest.raises(Problems, match=r"a lacks channels: add a_0001\.png"):
        scans.find(tmp_path, described)


def test_all_names_that_are_wrong_are_told_at_once(tmp_path: Path) -> None:
    _empty(tmp_path, "a_0000.nii.gz", "b_0000.nrrd", "c.nii.gz", "d_0000.nii.gz", "d_0001.nii.gz", "d_0002.nii.gz")
    (tmp_path / "imagesUn" / "more").mkdir()
    with pytest.raises(Problems) as raised:
        scans.find(tmp_path, DESCRIBED)
    told = {
        "b_0000.nrrd does not end with .nii.gz",
        "c.nii.gz has no channel in its name",
        "more is a folder",
        "a lacks channels: add a_0001.nii.gz",
        "d has more channels than a labelled case's 2: d_0002.nii.gz",
    }
    assert len(raised.value.entries) == len(told)
    assert all(part in str(raised.value) for part in told)


def test_a_scan_in_both_folders_is_an_error(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, "Dataset001_A")
    images, unlabelled = folder / "imagesTr", folder / "imagesUn"
    labelled = {"case0": [str(images / "case0_0000.nii.gz")], "case1": [str(images / "case1_0000.nii.gz")]}
    (unlabelled / "case0_0000.nii.gz").write_bytes((unlabelled / "scan0_0000.nii.gz").read_bytes())
    (unlabelled / "renamed_0000.nii.gz").write_bytes((images / "case1_0000.nii.gz").read_bytes())
    described = {**DESCRIBED, "channel_names": {"0": "MRI"}}
    with pytest.raises(Problems) as raised:
        scans.check_apart(scans.find(folder, described), labelled)
    name, content = raised.value.entries
    assert "case0_0000.nii.gz is in imagesTr, too" in name
    assert "renamed_0000.nii.gz is the same file as" in content
    assert content.split(" as ")[1].endswith("case1_0000.nii.gz: delete one.")


def test_a_description_that_is_missing_or_incomplete_is_named(tmp_path: Path) -> None:
    with pytest.raises(Problems, match=r"dataset\.json is missing"):
        scans.read_dataset_json(tmp_path)
    (tmp_path / "dataset.json").write_text('{"labels": {},}')
    with pytest.raises(Problems, match=r"dataset\.json is no JSON"):
        scans.read_dataset_json(tmp_path)
    (tmp_path / "dataset.json").write_text('{"labels": {}}')
    with pytest.raises(Problems) as raised:
        scans.read_dataset_json(tmp_path)
    assert [entry.split(" has no ")[1].split(":")[0] for entry in raised.value.entries] == [
        "'file_ending'",
        "'channel_names'",
    ]


def test_the_fingerprint_tells_what_the_labelled_scans_have_in_common() -> None:
    fingerprint = {"spacings": [[5, 1, 1], [6, 2, 2]], "shapes_after_crop": [[6, 9, 9], [1, 9, 9]]}
    assert Labelled.of(fingerprint, 1) == VOLUMES
    assert Labelled.of({**fingerprint, "spacings": [[5, 1, 1], [1, 1, 1]]}, 1).thick_axis is None
    assert Labelled.of({**fingerprint, "shapes_after_crop": [[1, 9, 9]]}, 1).flat


def _wrong(tmp_path: Path, array: np.ndarray, labelled: Labelled = VOLUMES, **of_file: tuple[float, ...]) -> list[str]:
    path = tmp_path / "x_0000.nii.gz"
    write(path, array.astype(np.float32), **of_file)
    entries = scans.check_content([str(path)], SimpleITKIO(), labelled)
    assert all(str(path) in entry for entry in entries)
    return entries


def test_content_that_is_right_has_no_problems(tmp_path: Path) -> None:
    assert _wrong(tmp_path, np.ones(SHAPE)) == []


def test_content_that_nnunet_would_misread_is_told(tmp_path: Path) -> None:
    ones = np.ones(SHAPE)
    _wrong(tmp_path, np.where(np.arange(32) == 3, np.nan, ones))
    (entry,) = scans.check_content([str(tmp_path / "x_0000.nii.gz")], NibabelIO(), VOLUMES)
    assert "NaN" in entry  # SimpleITK reads 0 for it
    (entry,) = _wrong(tmp_path, 0 * ones)
    assert "0 everywhere" in entry
    (entry,) = _wrong(tmp_path, ones[:1])
    assert "is one slice, the labelled scans are volumes" in entry
    (entry,) = _wrong(tmp_path, ones, Labelled(1, True, 0))
    assert "is a volume, the labelled scans are of one slice" in entry
    (entry,) = _wrong(tmp_path, ones.transpose(1, 2, 0), spacing=(1.0, 1.0, 5.0))
    assert "thick slices along axis 2" in entry
    assert "along axis 0" in entry
    (entry,) = _wrong(tmp_path, np.stack([ones, ones]), spacing=(1.0, 5.0, 1.0, 1.0))
    assert "holds 2 images for 1 channels" in entry


def test_a_file_that_cannot_be_read_is_named_among_its_channels(tmp_path: Path) -> None:
    good, cut, small = (tmp_path / f"x_000{c}.nii.gz" for c in range(3))
    text = tmp_path / "x_0003.nii.gz"
    write(good, np.ones(SHAPE, np.float32))
    write(small, np.ones(SHAPE, np.float32)[:3])
    cut.write_bytes(good.read_bytes()[:-20])  # SimpleITK reads it all the same
    text.write_bytes(gzip.compress(b"no image"))
    (entry,) = scans.check_content([str(good), str(cut)], SimpleITKIO(), VOLUMES)
    assert entry == f"{cut} is cut off or damaged: replace it."
    (entry,) = scans.check_content([str(good), str(text)], SimpleITKIO(), VOLUMES)
    assert entry.startswith(f"{text} cannot be read (")
    (entry,) = scans.check_content([str(good), str(small)], SimpleITKIO(), VOLUMES)
    assert entry == f"{good}, {small} differ in shape or spacing: resample them alike."
