"""The phantom: the layout of ACDC, hearts built like hearts, the same for a seed bit for bit."""

import numpy as np
import pytest
from scipy import ndimage

from segmentation.data.files import check_files, read_list, split_by_patients
from segmentation.data.phantoms.heart import LV, MYOCARDIUM, RV, phantom_frame, write_phantom
from segmentation.data.slices import load_slices, load_volumes, slice_path, volume_path
from segmentation.errors import InputError

PATIENTS = range(1, 13)


@pytest.fixture(scope="module")
def frames():
    """(image, label) of end-diastole and end-systole of each patient."""
    return {p: [phantom_frame(0, p, frame, slices=6, size=96) for frame in (0, 1)] for p in PATIENTS}


def test_the_layout_is_acdc_s(tmp_path):
    write_phantom(tmp_path, train_patients=2, val_patients=1, test_patients=2, slices=3, size=48)
    names = {split: read_list(tmp_path / f"{split}.list") for split in ("train_slices", "train", "val", "test")}
    assert names["train"] == [f"patient{p}_frame{f}" for p in ("001", "002") for f in ("01", "02")]
    assert names["val"] == ["patient003_frame01", "patient003_frame02"]
    assert names["test"] == [f"patient{p}_frame{f}" for p in ("004", "005") for f in ("01", "02")]
    assert names["train_slices"][:4] == [
        "patient001_frame01_slice_1",
        "patient001_frame01_slice_2",
        "patient001_frame01_slice_3",
        "patient001_frame02_slice_1",
    ]
    check_files(slice_path(tmp_path, name) for name in names["train_slices"])
    check_files(volume_path(tmp_path, name) for name in names["val"] + names["test"])
    assert [len(side) for side in split_by_patients(names["train_slices"], 1)] == [6, 6]
    assert load_slices(tmp_path, names["train_slices"], size=(32, 32)).images.shape == (12, 1, 32, 32)
    assert [v.image.shape for v in load_volumes(tmp_path, names["test"])] == [(3, 48, 48)] * 4


def test_files_hold_what_phantom_frame_returns(tmp_path):
    write_phantom(tmp_path, 1, 1, 1, slices=2, size=32, seed=5)
    image, label = phantom_frame(5, 2, 1, slices=2, size=32)
    (volume,) = load_volumes(tmp_path, ["patient002_frame02"])
    np.testing.assert_array_equal(volume.image, image)
    np.testing.assert_array_equal(volume.label, label)


def test_the_same_seed_gives_the_same_bits(frames):
    image, label = phantom_frame(0, 3, 1, slices=6, size=96)
    np.testing.assert_array_equal(image, frames[3][1][0])
    np.testing.assert_array_equal(label, frames[3][1][1])


@pytest.mark.parametrize("other", [(1, 3, 1), (0, 4, 1), (0, 3, 0)])
def test_seeds_patients_and_frames_differ(frames, other):
    image, label = phantom_frame(*other, slices=6, size=96)
    assert not np.array_equal(image, frames[3][1][0])
    assert not np.array_equal(label, frames[3][1][1])


def test_images_are_scaled_over_the_volume(frames):
    for image, label in (frame for pair in frames.values() for frame in pair):
        assert (image.dtype, label.dtype) == (np.float32, np.uint8)
        assert image.shape == label.shape == (6, 96, 96)
        assert (image.min(), image.max()) == (0, 1)
        assert np.unique(label).tolist() == [0, 1, 2, 3]


def test_systole_empties_the_ventricle_and_thickens_its_wall(frames):
    for (_, diastole), (_, systole) in frames.values():
        assert (systole == LV).sum() < 0.85 * (diastole == LV).sum()
        assert (systole == RV).sum() < (diastole == RV).sum()
        share = [(label == MYOCARDIUM).sum() / (label >= MYOCARDIUM).sum() for label in (diastole, systole)]
        assert share[1] > share[0]


def test_the_heart_tapers_from_base_to_apex(frames):
    for _, label in (frame for pair in frames.values() for frame in pair):
        left, right = ((label >= MYOCARDIUM).sum((1, 2)), (label == RV).sum((1, 2)))
        assert (np.diff(left) < 0).all()
        assert left[-1] < 0.6 * left[0]
        assert right[0] > 0
        assert right[-1] < 0.1 * right[0]


def test_the_myocardium_is_a_closed_ring_around_the_cavity(frames):
    for _, label in (frame for pair in frames.values() for frame in pair):
        for plane in label:
            grown = ndimage.binary_dilation(plane == LV)
            assert set(np.unique(plane[grown])) <= {LV, MYOCARDIUM}
            assert ndimage.label(plane >= MYOCARDIUM)[1] == 1


def test_the_right_ventricle_lies_against_the_wall_of_the_left(frames):
    for _, label in (frame for pair in frames.values() for frame in pair):
        base = label[0]
        assert (ndimage.binary_dilation(base == MYOCARDIUM) & (base == RV)).any()
        pieces = np.bincount(ndimage.label(base == RV)[0].ravel())[1:]
        assert pieces.max() > 0.95 * pieces.sum()


def test_blood_is_brighter_than_muscle_in_every_patient(frames):
    for image, label in (pair[0] for pair in frames.values()):
        assert np.median(image[label == LV]) > 1.2 * np.median(image[label == MYOCARDIUM])


def test_patients_differ_in_brightness(frames):
    for tissue, ratio in ((LV, 1.2), (MYOCARDIUM, 1.5)):
        medians = [np.median(image[label == tissue]) for image, label in (pair[0] for pair in frames.values())]
        assert max(medians) > ratio * min(medians)


def test_islands_as_bright_as_blood_lie_around_the_heart(frames):
    """Of a ventricle's size and not touching the heart: what a threshold would take for one."""
    islands = 0
    for image, label in (pair[0] for pair in frames.values()):
        threshold = (np.median(image[label == LV]) + np.median(image[label == MYOCARDIUM])) / 2
        pieces, _ = ndimage.label(image[2] > threshold)
        areas = np.bincount(pieces.ravel())
        areas[np.unique(pieces[label[2] > 0])] = 0
        islands += ((areas >= 20) & (areas <= 400)).sum()
    assert islands > 3 * len(frames)


@pytest.mark.parametrize(
    "wrong",
    [
        {"train_patients": 0},
        {"val_patients": 0},
        {"test_patients": 0},
        {"slices": 0},
        {"size": 31},
        {"seed": -1},
    ],
)
def test_senseless_sizes_are_refused(tmp_path, wrong):
    with pytest.raises(InputError, match="a phantom needs"):
        write_phantom(tmp_path, **wrong)
    assert not list(tmp_path.iterdir())
