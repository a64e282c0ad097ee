"""A label in the order of its image's voxels: every way to store the same places, and headers that say little."""

from itertools import permutations, product
from pathlib import Path

import nibabel
import nrrd
import numpy as np
import pytest

from segmentation.data.convert_acdc import read_frame
from segmentation.data.convert_la import read_scan
from segmentation.data.orientation import Scan, paired
from segmentation.errors import InputError

SHAPE = (4, 5, 3)
SPACING = (1.5, 1.25, 8.0)
EVERY_TURN = list(product(permutations(range(3)), product((1, -1), repeat=3)))
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def numbered(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.int16).reshape(shape)


def oblique() -> np.ndarray:
    """An affine as scanners write: a turned frame, a spacing and an origin."""
    axes, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = axes * SPACING
    affine[:3, 3] = (-91.0, 12.5, 40.0)
    return affine


def stored(array: np.ndarray, affine: np.ndarray, order: tuple[int, ...], signs: tuple[int, ...]):
    """The same voxels at the same places with axes in another order, and those with a sign of -1 backwards."""
    turned = array.transpose(order)[tuple(slice(None, None, sign) for sign in signs)]
    to_old = np.zeros((4, 4))  # from new indices to old ones
    to_old[3, 3] = 1
    for new, (old, sign) in enumerate(zip(order, signs, strict=True)):
        to_old[old, new] = sign
        to_old[old, 3] = array.shape[old] - 1 if sign < 0 else 0
    return turned, affine @ to_old


def scan(array: np.ndarray, *affines: np.ndarray, name: str = "label", space: str = "RAS") -> Scan:
    return Scan(Path(name), array, affines, space)


@pytest.mark.parametrize(("order", "signs"), EVERY_TURN)
def test_the_same_places_come_back_whatever_the_order(order, signs):
    array, affine = stored(numbered(), oblique(), order, signs)
    corner, place = (0,) * 3, affine @ (0, 0, 0, 1)
    index = np.rint(np.linalg.inv(oblique()) @ place)[:3].astype(int)
    assert array[corner] == numbered()[tuple(index)]  # the helper above does what it says
    found = paired(scan(numbered(), oblique(), name="image"), scan(array, affine))
    np.testing.assert_array_equal(found, numbered())
    assert found.dtype == np.int16


def moved(affine: np.ndarray, *voxels: float) -> np.ndarray:
    shift = np.eye(4)
    shift[:3, 3] = voxels
    return affine @ shift


def scaled(affine: np.ndarray, *factors: float) -> np.ndarray:
    return affine @ np.diag([*factors, 1])


def rotated(affine: np.ndarray, degrees: float) -> np.ndarray:
    """Around the third axis, the spacing kept."""
    turn, (cos, sin) = np.eye(4), (np.cos(np.radians(degrees)), np.sin(np.radians(degrees)))
    turn[:2, :2] = [[cos, -sin], [sin, cos]]
    spacing = np.diag([*SPACING, 1])
    return affine @ np.linalg.inv(spacing) @ turn @ spacing


def without_origin(affine: np.ndarray) -> np.ndarray:
    return np.block([[affine[:3, :3], np.zeros((3, 1))], [0, 0, 0, 1]])


@pytest.mark.parametrize(
    "affine",
    [
        moved(oblique(), 0.4, -0.4, 0.4),
        scaled(oblique(), 1.0001, 0.9999, 1),
        rotated(oblique(), 1),
        without_origin(oblique()),
        np.full((4, 4), np.nan),
        np.diag([1.0, 1, 0, 1]),
    ],
    ids=["moved a little", "scaled a little", "rotated a little", "no origin", "NaN", "flat"],
)
def test_a_header_that_is_a_little_different_or_says_nothing_will_do(affine):
    for image, label in ((oblique(), affine), (affine, oblique())):
        found = paired(scan(numbered(), image, name="image"), scan(numbered() + 1, label))
        np.testing.assert_array_equal(found, numbered() + 1)


def test_without_affines_or_in_different_spaces_voxels_are_paired_as_stored():
    flipped, affine = stored(numbered(), oblique(), (0, 1, 2), (-1, 1, 1))
    for image in (scan(numbered(), name="image"), scan(numbered(), oblique(), name="image", space="scanner-xyz")):
        np.testing.assert_array_equal(paired(image, scan(flipped, affine)), flipped)


@pytest.mark.parametrize(
    ("affine", "message"),
    [
        (scaled(oblique(), 2, 1, 1), r"voxels are 1\.5 x 1\.25 x 8 mm in one and 3 x 1\.25 x 8 mm in the other"),
        (rotated(oblique(), 30), "axes are 30 degrees apart"),
        (moved(oblique(), 0, 0, 1), "they lie 8 mm apart"),
        (without_origin(stored(numbered(), oblique(), (0, 1, 2), (-1, 1, 1))[1]), "they lie .* mm apart"),
    ],
    ids=["spacing", "rotation", "place", "flipped without a place"],
)
def test_other_places_are_refused_by_both_names_unless_voxels_are_asked_for(affine, message):
    image, label = scan(numbered(), oblique(), name="image.nii"), scan(numbered() + 1, affine, name="label.nii")
    with pytest.raises(InputError, match=rf"image\.nii and label\.nii: by their headers {message}; .* --by-voxel"):
        paired(image, label)
    np.testing.assert_array_equal(paired(image, label, by_voxel=True), numbered() + 1)


def test_another_shape_is_refused_by_both_names():
    with pytest.raises(InputError, match=r"b\.nii: shape \(4, 5, 2\) where a\.nii has \(4, 5, 3\)"):
        paired(scan(numbered(), name="a.nii"), scan(numbered()[..., :2], name="b.nii"))


def test_axes_that_are_swapped_have_the_image_s_shape_once_they_are_turned():
    array, affine = stored(numbered(), oblique(), (1, 0, 2), (1, 1, 1))
    assert paired(scan(numbered(), oblique(), name="image"), scan(array, affine)).shape == SHAPE


# ACDC


@pytest.fixture
def frame(tmp_path):
    """An image of which each voxel has its own intensity, and where its label belongs."""
    nibabel.save(nibabel.Nifti1Image(numbered(), oblique()), tmp_path / "p_frame01.nii.gz")
    return tmp_path / "p_frame01.nii.gz"


def save_label(frame: Path, array: np.ndarray, affine: np.ndarray | None, kind=nibabel.Nifti1Image) -> None:
    nibabel.save(kind(array, affine), frame.with_name("p_frame01_gt.nii.gz"))


def ventricle() -> np.ndarray:
    label = np.zeros(SHAPE, np.uint8)
    label[:1, :2, :2] = 3
    return label


@pytest.mark.parametrize(("order", "signs"), EVERY_TURN)
def test_a_nifti_label_lies_where_its_header_says(frame, order, signs):
    save_label(frame, *stored(ventricle(), oblique(), order, signs))
    image, label = read_frame(frame)
    np.testing.assert_allclose(image, numbered().T / numbered().max(), rtol=1e-6)
    np.testing.assert_array_equal(label, ventricle().T)


def test_a_nifti_label_of_another_spacing_is_refused_unless_voxels_are_asked_for(frame):
    save_label(frame, ventricle(), scaled(oblique(), 1, 1, 2))
    with pytest.raises(InputError, match=r"p_frame01\.nii\.gz and .*p_frame01_gt\.nii\.gz: by their headers voxels"):
        read_frame(frame)
    np.testing.assert_array_equal(read_frame(frame, by_voxel=True)[1], ventricle().T)


def acdc_like(sform: np.ndarray, qform: np.ndarray, array: np.ndarray) -> nibabel.Nifti1Image:
    image = nibabel.Nifti1Image(array, sform)
    image.set_sform(sform, code=1)
    image.set_qform(qform, code=1)  # writes pixdim too
    return image


UNIT = np.diag([-1.0, -1, 1, 1])
QFORM = np.diag([-1.5, -1.5, 10.0, 1])


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ((UNIT, QFORM), (UNIT, QFORM)),
        ((UNIT, QFORM), (QFORM, QFORM)),  # by pixdim
        ((QFORM, QFORM), (UNIT, QFORM)),
        ((UNIT, QFORM), (UNIT, UNIT)),  # saved with the image's affine alone
    ],
)
def test_acdcs_own_scales_of_the_sform_will_do(tmp_path, image, label):
    frame = tmp_path / "p_frame01.nii.gz"
    nibabel.save(acdc_like(*image, numbered()), frame)
    nibabel.save(acdc_like(*label, ventricle()), tmp_path / "p_frame01_gt.nii.gz")
    np.testing.assert_array_equal(read_frame(frame)[1], ventricle().T)


def test_a_nifti_header_without_a_code_says_nothing(frame):
    flipped, affine = stored(ventricle(), oblique(), (0, 1, 2), (-1, 1, 1))
    label = nibabel.Nifti1Image(flipped, affine)
    label.set_sform(affine, code=0)
    label.set_qform(affine, code=0)
    nibabel.save(label, frame.with_name("p_frame01_gt.nii.gz"))
    np.testing.assert_array_equal(read_frame(frame)[1], flipped.T)


# LA


def header(affine: np.ndarray, space: str | None = "left-posterior-superior") -> dict:
    """Of an affine to right, anterior and superior."""
    affine = LPS @ affine if space in ("left-posterior-superior", "LPS") else affine
    fields = {"space directions": affine[:3, :3].T, "space origin": affine[:3, 3]}
    return {**fields, "space": space} if space else {**fields, "space dimension": 3}


def write_case(folder: Path, image: dict, label: np.ndarray, label_header: dict) -> None:
    folder.mkdir(exist_ok=True)
    nrrd.write(str(folder / "lgemri.nrrd"), numbered(), image)
    nrrd.write(str(folder / "laendo.nrrd"), label, label_header)


def atrium() -> np.ndarray:
    return ventricle() // 3 * 255


@pytest.mark.parametrize(("order", "signs"), EVERY_TURN)
def test_an_nrrd_label_lies_where_its_header_says(tmp_path, order, signs):
    array, affine = stored(atrium(), oblique(), order, signs)
    write_case(tmp_path / "A1", header(oblique()), array, header(affine))
    _, label = read_scan(tmp_path / "A1")
    np.testing.assert_array_equal(label, atrium() > 0)


@pytest.mark.parametrize("space", ["right-anterior-superior", "RAS"])
def test_an_nrrd_label_of_another_space_lies_where_its_header_says(tmp_path, space):
    image = np.diag([-0.625, -0.625, 1.25, 1])  # LPS as it stands
    image[:3, 3] = (50, 60, -70)
    array, affine = stored(atrium(), image, (0, 1, 2), (-1, -1, 1))  # RAS as it stands
    write_case(tmp_path / "A1", header(image), array, header(affine, space))
    np.testing.assert_array_equal(read_scan(tmp_path / "A1")[1], atrium() > 0)


@pytest.mark.parametrize("space", ["scanner-xyz", None])
def test_an_nrrd_label_of_one_other_space_is_turned_too(tmp_path, space):
    array, affine = stored(atrium(), oblique(), (1, 0, 2), (1, -1, 1))
    write_case(tmp_path / "A1", header(oblique(), space), array, header(affine, space))
    np.testing.assert_array_equal(read_scan(tmp_path / "A1")[1], atrium() > 0)


def test_nrrd_headers_that_say_nothing_will_do(tmp_path):
    for image, label in ((header(oblique()), {}), ({}, header(oblique())), ({}, {}), ({"spacings": [1, 1, 2]}, {})):
        write_case(tmp_path / "A1", image, atrium(), label)
        np.testing.assert_array_equal(read_scan(tmp_path / "A1")[1], atrium() > 0)


def test_nrrd_spacings_are_compared_where_there_are_no_directions(tmp_path):
    write_case(tmp_path / "A1", {"spacings": [1, 1, 2]}, atrium(), {"spacings": [1, 1, 1]})
    with pytest.raises(InputError, match="voxels are 1 x 1 x 2 mm in one and 1 x 1 x 1 mm in the other"):
        read_scan(tmp_path / "A1")


def test_an_nrrd_label_of_another_spacing_is_refused_unless_voxels_are_asked_for(tmp_path):
    write_case(tmp_path / "A1", header(oblique()), atrium(), header(scaled(oblique(), 1, 2, 1)))
    with pytest.raises(InputError, match=r"A1/lgemri\.nrrd and .*A1/laendo\.nrrd: by their headers voxels are"):
        read_scan(tmp_path / "A1")
    np.testing.assert_array_equal(read_scan(tmp_path / "A1", by_voxel=True)[1], atrium() > 0)
