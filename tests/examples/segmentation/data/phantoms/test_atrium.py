"""The phantom: the layout of LA, atria built like atria, the same for a seed bit for bit."""

import numpy as np
import pytest
from scipy import ndimage

from segmentation.data.crops import case_path, load_cases
from segmentation.data.files import read_case, read_list
from segmentation.data.phantoms.atrium import SIZE_SPREAD, atrium_case, write_atrium
from segmentation.errors import InputError

SIZE = (40, 40, 26)
SMALL = (24, 24, 16)
NUMBERS = range(1, 13)


@pytest.fixture(scope="module")
def cases():
    """(image, label) of each case."""
    return {number: atrium_case(0, number, SIZE) for number in NUMBERS}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("atrium")
    write_atrium(root, cases=(3, 2), size=SMALL, seed=5)
    return root


def test_the_layout_is_la_s(root):
    train, test = read_list(root / "train.list"), read_list(root / "test.list")
    assert train == ["case001", "case002", "case003"]
    assert test == ["case004", "case005"]
    assert (root / "2018LA_Seg_Training Set" / "case001" / "mri_norm2.h5").is_file()
    assert len(load_cases(root, train + test)) == 5


def test_files_hold_what_atrium_case_returns(root):
    image, label = atrium_case(5, 2, SMALL)
    stored_image, stored_label = read_case(case_path(root, "case002"), num_classes=2)
    np.testing.assert_array_equal(stored_image, image)
    np.testing.assert_array_equal(stored_label, label)


def test_the_same_seed_gives_the_same_bytes(root, tmp_path):
    write_atrium(tmp_path, cases=(3, 2), size=SMALL, seed=5)
    for path in (path for path in root.rglob("*") if path.is_file()):
        assert (tmp_path / path.relative_to(root)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("other", [(1, 3), (0, 4)])
def test_seeds_and_cases_differ(cases, other):
    image, label = atrium_case(*other, SIZE)
    assert image.shape != cases[3][0].shape or (label != cases[3][1]).any()


def test_images_are_normalised_over_the_volume(cases):
    for image, label in cases.values():
        assert (image.dtype, label.dtype) == (np.float32, np.uint8)
        assert image.shape == label.shape
        assert image.mean(dtype=np.float64) == pytest.approx(0, abs=1e-4)
        assert image.std(dtype=np.float64) == pytest.approx(1, abs=1e-4)
        assert np.unique(label).tolist() == [0, 1]


def test_volumes_differ_in_size_by_no_more_than_the_spread(cases):
    shapes = np.array([image.shape for image, _ in cases.values()])
    assert (np.abs(shapes / SIZE - 1) <= SIZE_SPREAD + 0.5 / np.array(SIZE)).all()
    assert (shapes.max(0) - shapes.min(0) >= 3).all()


def test_a_vein_that_coarse_voxels_cut_is_dropped():
    for number in range(1, 61):  # where about one in eight is cut
        assert ndimage.label(atrium_case(0, number, SMALL)[1])[1] == 1


def test_the_atrium_is_one_piece_of_a_plausible_share(cases):
    for _, label in cases.values():
        assert ndimage.label(label)[1] == 1
        assert 0.015 < label.mean() < 0.15
    shares = [label.mean() for _, label in cases.values()]
    assert max(shares) > 1.5 * min(shares)


def test_veins_leave_the_body_on_both_sides_behind_the_appendage(cases):
    """Veins are what an opening with a ball removes of the back half, which the appendage does not reach."""
    ball = ndimage.generate_binary_structure(3, 1)
    right, left = [], []
    for _, label in cases.values():
        body = ndimage.binary_opening(label, ball, iterations=3)
        x, y, _ = (axis - centre for axis, centre in zip(np.nonzero(label & ~body), _centre(body), strict=True))
        assert 0.05 < len(x) / label.sum() < 0.7
        right.append(((x < -5) & (y > 3)).sum())
        left.append(((x > 5) & (y > 3)).sum())
    for side in (right, left):
        assert np.mean(side) > 20  # without veins on a side, what the wobble of the surface leaves is about 10
        assert np.std(side) > 20  # some are hardly to be seen


def test_the_veins_reach_farther_than_the_body_and_the_body_lies_inside(cases):
    for _, label in cases.values():
        extent = [np.ptp(np.nonzero(label)[axis]) / label.shape[axis] for axis in range(3)]
        assert extent[0] > 0.45
        assert extent[0] * SIZE[0] > 1.1 * extent[1] * SIZE[1]
        edges = [label.take((0, -1), axis=axis).sum() for axis in range(3)]
        assert sum(edges) < 0.03 * label.sum()


def test_the_atrium_is_brighter_than_its_volume_yet_no_threshold_finds_it(cases):
    dice = []
    for image, label in cases.values():
        assert np.median(image[label > 0]) > np.quantile(image, 0.7)
        best = 0.0
        for threshold in np.linspace(-1, 3, 17):
            found = image > threshold
            best = max(best, 2 * (found & (label > 0)).sum() / (found.sum() + label.sum()))
        dice.append(best)
    assert np.mean(dice) < 0.5


def test_blood_goes_on_where_the_label_ends(cases):
    """At the valve, along cut veins and next to other cavities: some of the outer rim is as bright as inside."""
    for image, label in cases.values():
        rim = ndimage.binary_dilation(label, iterations=2) & ~ndimage.binary_dilation(label)
        assert (image[rim] > np.quantile(image[label > 0], 0.3)).mean() > 0.03


def test_no_two_patients_share_contrast(cases):
    levels = [np.median(image[label > 0]) for image, label in cases.values()]
    assert np.ptp(levels) > 0.4


@pytest.mark.parametrize("wrong", [{"cases": (0, 1)}, {"cases": (1, 0)}, {"size": (40, 40, 15)}, {"seed": -1}])
def test_senseless_sizes_are_refused(tmp_path, wrong):
    with pytest.raises(InputError, match="a phantom needs"):
        write_atrium(tmp_path, **wrong)
    assert not list(tmp_path.iterdir())


def _centre(mask):
    return [axis.mean() for axis in np.nonzero(mask)]
