"""The figures of volumes are written, show the slices and surfaces they are given, and take odd labels."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from segmentation.errors import InputError
from segmentation.figures import volumes as figures3d
from segmentation.figures.cases import CLASS_COLOURS
from segmentation.figures.volumes import save_surfaces, save_volumes
from segmentation.task import Case

pytestmark = pytest.mark.filterwarnings("error")  # matplotlib warns where a picture would come out wrong
SHAPE = (60, 56, 20)
CLASSES = ("atrium", "veins")
FULL = figures3d.DPI
BOTH = pytest.mark.parametrize("save", [save_volumes, save_surfaces])


@pytest.fixture(autouse=True)
def _coarse(monkeypatch) -> None:
    """Few pixels, for speed; tests that look at pixels ask for `FULL`."""
    monkeypatch.setattr(figures3d, "DPI", 30)


def box(*parts: tuple[int, int], value: int = 1, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    labels = np.zeros(shape, np.uint8)
    labels[tuple(slice(*part) for part in parts)] = value
    return labels


REFERENCE = box((20, 41), (16, 27), (6, 13))  # centre of mass at (30, 21, 9)


def case(prediction: np.ndarray = REFERENCE, methods: tuple[str, ...] = ("FixMatch", "GapMatch")) -> Case:
    rng = np.random.default_rng(0)
    image, entropy = rng.standard_normal(SHAPE, np.float32), rng.random(SHAPE, np.float32)
    return Case(image, REFERENCE, dict.fromkeys(methods, (prediction, entropy)), "case7")


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


@BOTH
@pytest.mark.parametrize(("methods", "cases"), [("ABC", 1), ("A", 2)])
def test_pictures_are_twice_as_wide_as_a_readme(tmp_path, monkeypatch, save, methods, cases):
    monkeypatch.setattr(figures3d, "DPI", FULL)
    save(tmp_path / "new" / "p.png", [case(methods=tuple(methods))] * cases, CLASSES)
    assert (tmp_path / "new" / "p.png").read_bytes().startswith(b"\x89PNG")
    assert imread(tmp_path / "new" / "p.png").shape[1] == 1800


def test_one_row_per_method_of_each_case(tmp_path, figures):
    save_volumes(tmp_path / "p.png", [case(), replace(case(), name="case8")], CLASSES)
    *axes, _bar = figures[0].axes
    assert [ax.get_title() for ax in axes] == ["axial", "coronal", "sagittal", "entropy, axial"] + [""] * 12
    assert [ax.get_ylabel() for ax in axes[::4]] == ["FixMatch", "GapMatch"] * 2
    assert [[text.get_text() for text in ax.texts] for ax in axes[::4]] == [["case7"], [], ["case8"], []]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == [*CLASSES, "reference"]


def test_slices_pass_through_the_middle_of_the_reference(tmp_path, figures):
    given = case()
    save_volumes(tmp_path / "p.png", [given], CLASSES)
    axial, coronal, sagittal, entropy = (ax.images[0].get_array() for ax in figures[0].axes[:4])
    x, y = slice(6, 54), slice(0, 48)  # 48 voxels around the reference, moved into the volume
    np.testing.assert_array_equal(axial, given.image[x, y, 9].T)
    np.testing.assert_array_equal(coronal, given.image[x, 21, ::-1].T)  # the head on top
    np.testing.assert_array_equal(sagittal, given.image[30, y, ::-1].T)
    np.testing.assert_array_equal(entropy, given.predictions["FixMatch"][1][x, y, 9].T)
    assert figures[0].axes[3].images[0].get_clim() == (0, 1)


def test_all_slices_have_one_scale_and_square_voxels(tmp_path, figures):
    large = box((5, 55), (0, 56), (0, 20))
    given = case(methods=("GapMatch",))
    save_volumes(tmp_path / "p.png", [given, replace(given, reference=large)], CLASSES)
    for ax in figures[0].axes[:8]:
        (left, top), (right, bottom) = ax.transData.transform([(0, 0), (10, 10)])
        assert right - left == pytest.approx(top - bottom, rel=0.01)
        assert right - left == pytest.approx(
            np.ptp(figures[0].axes[0].transData.transform([(0, 0), (10, 0)])[:, 0]), rel=0.01
        )


def test_prediction_is_filled_and_reference_a_line(tmp_path, figures):
    given = case(box((20, 37), (16, 27), (9, 10), value=2))
    save_volumes(tmp_path / "p.png", [given], CLASSES)
    axial, coronal, _, entropy = figures[0].axes[:4]
    fill = axial.images[1].get_array()
    np.testing.assert_array_equal(fill[..., 3] > 0, given.predictions["FixMatch"][0][6:54, :48, 9].T > 0)
    np.testing.assert_allclose(fill[20, 20, :3], to_rgb(CLASS_COLOURS[1]))
    assert np.count_nonzero(coronal.images[1].get_array()[..., 3]) == 17  # one line of voxels
    assert [line.get_edgecolor()[0].tolist()[:3] for line in axial.collections] == [
        list(to_rgb(CLASS_COLOURS[1])),
        [1, 1, 1],
    ]
    low, high = axial.collections[1].get_paths()[0].vertices.min(0), axial.collections[1].get_paths()[0].vertices.max(0)
    np.testing.assert_array_equal(low, [13.5, 15.5])  # 20 - 6 and 16, less half a pixel
    np.testing.assert_array_equal(high, [34.5, 26.5])
    assert not entropy.collections


ODD = {
    "empty": np.zeros(SHAPE, np.uint8),
    "everything": np.ones(SHAPE, np.uint8),
    "at the border": box((0, 9), (50, 56), (0, 20)),
    "in a corner": box((59, 60), (55, 56), (19, 20)),
    "both classes": REFERENCE + box((30, 41), (16, 27), (6, 13)),
}


@BOTH
@pytest.mark.parametrize("name", ODD)
def test_odd_labels_are_drawn(tmp_path, figures, save, name):
    odd = replace(case(ODD[name], methods=("GapMatch",)), reference=ODD[name])
    save(tmp_path / "p.png", [odd], CLASSES)
    assert imread(tmp_path / "p.png").shape[1] == 270


@BOTH
def test_cases_may_differ_in_size_and_be_smaller_than_the_window(tmp_path, save):
    small = box((3, 8), (2, 6), (1, 3), shape=(12, 10, 4))
    entropy = np.zeros(small.shape, np.float32)
    tiny = Case(entropy, small, {"GapMatch": (small, entropy)})
    save(tmp_path / "p.png", [tiny, case(methods=("GapMatch",))], CLASSES)
    save(tmp_path / "p.png", [tiny], CLASSES)


def test_a_panel_per_method_and_one_for_the_reference(tmp_path, figures):
    half = box((20, 41), (16, 27), (6, 9))  # 3 of 7 slices: Dice 6 / 10
    given = case(half)
    predictions = {**given.predictions, "Supervised": (ODD["empty"], given.image)}
    save_surfaces(tmp_path / "p.png", [replace(given, predictions=predictions)], CLASSES[:1])
    assert len(figures[0].axes) == 3  # the empty one has none
    assert [*texts(figures[0])] == [
        *("FixMatch", "GapMatch", "Supervised", "Reference", "case7"),
        *("Dice 60.0 %", "Dice 60.0 %", "empty", "Dice 0.0 %"),
    ]
    assert not figures[0].legends


def test_a_prediction_that_is_the_reference_has_its_dice(tmp_path, figures):
    save_surfaces(tmp_path / "p.png", [case(REFERENCE, methods=("GapMatch",))], CLASSES[:1])
    assert "Dice 100.0 %" in texts(figures[0])


def test_dice_is_the_mean_over_classes(tmp_path, figures):
    save_surfaces(tmp_path / "p.png", [case(ODD["both classes"])], CLASSES)
    # Atrium 10 of 21 layers: 20 / 31; veins predicted where there are none: 0.
    assert texts(figures[0])[-1] == f"Dice {100 * (20 / 31) / 2:.1f} %"
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == list(CLASSES)


def test_surfaces_of_a_row_share_view_limits_and_scale(tmp_path, figures):
    save_surfaces(tmp_path / "p.png", [case(box((10, 30), (16, 50), (2, 18)))], CLASSES)
    first, *others = figures[0].axes
    for ax in others:
        assert (ax.get_xlim(), ax.get_ylim(), ax.get_zlim()) == (first.get_xlim(), first.get_ylim(), first.get_zlim())
        assert (ax.elev, ax.azim) == (first.elev, first.azim)
        assert ax.get_window_extent().size == pytest.approx(first.get_window_extent().size)


def test_surfaces_lie_whole_in_the_middle_of_their_cells(tmp_path, monkeypatch):
    monkeypatch.setattr(figures3d, "DPI", FULL)
    lopsided = box((4, 56), (48, 54), (8, 12)) + box((50, 56), (4, 48), (8, 12))  # an L in a larger box
    save_surfaces(tmp_path / "p.png", [replace(case(lopsided.copy()), reference=lopsided)], CLASSES[:1])
    coloured = np.ptp(imread(tmp_path / "p.png")[..., :3], axis=2) > 0.2
    cells = np.split(coloured[:, 60:], 3, axis=1)  # beside the name
    for cell in cells:
        _, columns = np.nonzero(cell)
        assert np.ptp(columns) > 0.75 * 580
        assert columns.min() + columns.max() == pytest.approx(580, abs=30)  # smoothing rounds off the corners
    counts = [np.count_nonzero(cell) for cell in cells]
    assert counts == pytest.approx([counts[-1]] * 3, rel=0.01)  # the last is covered by nothing


@pytest.mark.parametrize("finest", [160, 11])
def test_a_surface_lies_where_its_voxels_are(monkeypatch, finest):
    monkeypatch.setattr(figures3d, "FINEST", finest)  # 11: in blocks of 2
    ball = np.linalg.norm(np.indices((21, 21, 21)) - 10, axis=0) < 7.5
    triangles, colours = figures3d._surface(ball, CLASS_COLOURS[0])
    radius = np.linalg.norm(triangles - 10, axis=-1)
    assert radius.mean() == pytest.approx(7.5, abs=0.7)
    assert np.abs(triangles.mean(axis=(0, 1)) - 10).max() < 0.1
    assert colours.shape == (len(triangles), 3)
    assert 0 <= colours.min() < colours.max() <= 1
    brightest = triangles[colours.sum(axis=1).argmax()].mean(axis=0) - 10
    assert brightest[2] > 3  # lit from above,
    assert brightest[1] < 0  # and from the viewer's side


@pytest.mark.parametrize("corner", [(0, 0, 0), (20, 9, 4)])
def test_a_single_voxel_has_a_surface(corner):
    mask = np.zeros((21, 10, 5), bool)
    mask[corner] = True
    triangles, _ = figures3d._surface(mask, CLASS_COLOURS[0])
    np.testing.assert_allclose(triangles.mean(axis=(0, 1)), corner, atol=0.2)


def test_classes_have_colours_that_differ_in_light_and_shadow():
    ball = np.linalg.norm(np.indices((15, 15, 15)) - 7, axis=0) < 5
    means = [figures3d._surface(ball, colour)[1].mean(axis=0) for colour in CLASS_COLOURS]
    distances = [np.linalg.norm(a - b) for i, a in enumerate(means) for b in means[:i]]
    assert min(distances) > 0.1


@BOTH
def test_bad_cases_name_the_culprit(tmp_path, save):
    path, given = tmp_path / "p.png", case()
    with pytest.raises(InputError, match="cases"):
        save(path, [], CLASSES)
    with pytest.raises(InputError, match="'case7': no method"):
        save(path, [replace(given, predictions={})], CLASSES)
    with pytest.raises(InputError, match="'case7': its methods differ"):
        save(path, [given, case(methods=("FixMatch",))], CLASSES)
    with pytest.raises(InputError, match=r"'case7': .* one 3D shape"):
        save(path, [replace(given, reference=given.reference[1:])], CLASSES)
    with pytest.raises(InputError, match=r"'case7': .* one 3D shape"):
        save(path, [replace(given, image=given.image[0])], CLASSES)
    with pytest.raises(InputError, match="'case7': a label is above 1"):
        save(path, [case(ODD["both classes"])], CLASSES[:1])
    with pytest.raises(InputError, match="class_names: 7"):
        save(path, [given], list("abcdefg"))
    with pytest.raises(InputError, match=r"p\.nonsense"):
        save(tmp_path / "p.nonsense", [given], CLASSES)
