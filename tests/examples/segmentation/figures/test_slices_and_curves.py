"""The figures are written, show what they are given, and handle logs with gaps."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread

from segmentation.errors import InputError
from segmentation.figures.curves import LogFiles, save_curves
from segmentation.figures.slices import middle_slice, save_predictions
from segmentation.task import Case

pytestmark = pytest.mark.filterwarnings("error")  # matplotlib warns where a picture would come out wrong
CLASSES = ("RV", "Myo", "LV")


def case(shape: tuple[int, int] = (120, 100), methods: tuple[str, ...] = ("FixMatch", "GapMatch")) -> Case:
    image = np.random.default_rng(0).random(shape, dtype=np.float32)
    reference = np.zeros(shape, np.uint8)
    reference[60:80, 30:50] = 1
    reference[64:76, 34:46] = 2
    entropy = np.linspace(0, 1, image.size, dtype=np.float32).reshape(shape)
    return Case(image, reference, dict.fromkeys(methods, (reference, entropy)), "patient001")


def test_one_column_per_picture_and_one_row_per_case(tmp_path, figures):
    save_predictions(tmp_path / "new" / "p.png", [case(), case((64, 90))], CLASSES)
    assert imread(tmp_path / "new" / "p.png").shape[1] == 1800  # twice the width of a README
    axes = figures[0].axes[:12]
    titles = ["Image", "Reference", "FixMatch", "GapMatch", "FixMatch\nentropy", "GapMatch\nentropy"]
    assert [ax.get_title() for ax in axes] == titles + [""] * 6
    assert axes[0].get_ylabel() == "patient001"
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == list(CLASSES)


def test_titles_of_many_methods_do_not_touch(tmp_path, figures):
    four = ("Pseudo Label", "Pseudo Label + GAP", "Mean Teacher", "Mean Teacher + GAP")
    methods = ("Supervised", *four, "GapMatch", "CCT")
    save_predictions(tmp_path / "p.png", [case(methods=methods), case(methods=methods)], CLASSES)
    *pictures, _bar = figures[0].axes
    assert len(pictures) == 2 * (2 + 7 + 7)
    assert [ax.get_title() for ax in pictures[9:16]] == [m.replace(" + ", "\n+ ") + "\nentropy" for m in methods]
    assert {ax.images[0].get_clim() for ax in pictures[9:16]} == {(0, 1)}
    renderer = FigureCanvasAgg(figures[0]).get_renderer()
    for line in (pictures[:9], pictures[9:16]):
        boxes = [ax.title.get_window_extent(renderer) for ax in line]
        assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_pictures_are_cropped_around_the_reference(tmp_path, figures):
    given = case()
    save_predictions(tmp_path / "p.png", [given], CLASSES)
    image = figures[0].axes[0].images[0].get_array()
    np.testing.assert_array_equal(image, given.image[46:94, 16:64])  # 48 x 48 centred on rows 60-79, columns 30-49
    entropy = figures[0].axes[5].images[0]
    np.testing.assert_array_equal(entropy.get_array(), given.predictions["GapMatch"][1][46:94, 16:64])
    assert entropy.get_clim() == (0, 1)


def test_each_overlay_shows_its_own_labels(tmp_path, figures):
    given = case()
    nothing = np.zeros_like(given.reference)
    given = replace(given, predictions={"empty": (nothing, given.image), "same": (given.reference, given.image)})
    save_predictions(tmp_path / "p.png", [given], CLASSES)
    image, reference, empty, same = (ax.images for ax in figures[0].axes[:4])
    assert len(image) == 1
    alpha = reference[1].get_array()[..., 3]
    np.testing.assert_array_equal(alpha > 0, given.reference[46:94, 16:64] > 0)
    assert len(np.unique(reference[1].get_array().reshape(-1, 4), axis=0)) == 3
    np.testing.assert_array_equal(same[1].get_array(), reference[1].get_array())
    assert empty[1].get_array()[..., 3].max() == 0


@pytest.mark.parametrize("corner", [(slice(0, 9), slice(0, 9)), (slice(-9, None), slice(-9, None))])
def test_a_reference_at_the_border_keeps_the_window_inside(tmp_path, figures, corner):
    given = case()
    reference = np.zeros_like(given.reference)
    reference[corner] = 3
    save_predictions(tmp_path / "p.png", [replace(given, reference=reference)], CLASSES)
    assert figures[0].axes[0].images[0].get_array().shape == (48, 48)


def test_small_and_empty_slices_are_shown_whole(tmp_path, figures):
    small, empty = case((30, 40)), case()
    small = replace(small, reference=np.ones((30, 40), np.uint8))
    empty = replace(empty, reference=np.zeros_like(empty.reference))
    save_predictions(tmp_path / "p.png", [small, empty], CLASSES)
    assert figures[0].axes[0].images[0].get_array().shape == (30, 40)
    assert figures[0].axes[6].images[0].get_array().shape == (120, 100)


def test_middle_slice_has_the_most_foreground():
    label = np.zeros((4, 8, 8), np.uint8)
    label[1, :2] = 3
    label[2, :4] = 1
    image = np.arange(4.0)[:, None, None] + np.zeros((4, 8, 8))
    middle = middle_slice(Case(image, label, {"GapMatch": (label, image)}, "case"))
    assert (middle.image == 2).all()
    np.testing.assert_array_equal(middle.reference, label[2])
    np.testing.assert_array_equal(middle.predictions["GapMatch"], (label[2], image[2]))
    assert middle.name == "case"


def test_bad_cases_name_the_culprit(tmp_path):
    path, given = tmp_path / "p.png", case()
    with pytest.raises(InputError, match="cases"):
        save_predictions(path, [], CLASSES)
    with pytest.raises(InputError, match="'patient001': its methods differ"):
        save_predictions(path, [given, case(methods=("FixMatch",))], CLASSES)
    with pytest.raises(InputError, match=r"'patient001': .* one 2D shape"):
        save_predictions(path, [replace(given, reference=given.reference[1:])], CLASSES)
    with pytest.raises(InputError, match="'patient001': a label is above 1"):
        save_predictions(path, [given], CLASSES[:1])
    with pytest.raises(InputError, match="class_names: 7"):
        save_predictions(path, [given], list("abcdefg"))
    with pytest.raises(InputError, match=r"p\.nonsense"):
        save_predictions(tmp_path / "p.nonsense", [given], CLASSES)


def csv(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def log(folder: Path) -> LogFiles:
    header = "iteration,loss_labelled,loss_unlabelled,confident,grad_norm,learning_rate,it_per_s"
    training = [f"{i},{1 / i},{2 / i},0.5,{0.1 * i},0.01,5" for i in range(1, 31)]
    return LogFiles(
        csv(folder / "train.csv", header, *training),
        csv(folder / "val.csv", "iteration,dice", "10,20", "20,60"),
    )


def curves(figure: Figure) -> list[list[np.ndarray]]:
    return [[line.get_xydata() for line in ax.lines] for ax in figure.axes]


def test_each_panel_shows_its_column(tmp_path, figures):
    save_curves(tmp_path / "c.png", {"GapMatch": log(tmp_path)})
    assert imread(tmp_path / "c.png").shape[1] == 1800
    losses, confident, norm, dice = curves(figures[0])
    iteration = np.arange(1, 31)  # thirty points are too few to be averaged
    np.testing.assert_allclose(losses[0], np.stack([iteration, 1 / iteration], 1))
    np.testing.assert_allclose(losses[1], np.stack([iteration, 2 / iteration], 1))
    np.testing.assert_allclose(confident[0][:, 1], 0.5)
    np.testing.assert_allclose(norm[0][:, 1], 0.1 * iteration)
    np.testing.assert_allclose(dice[0], [[10, 20], [20, 60]])
    assert figures[0].axes[0].get_yscale() == "log"
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["GapMatch"]


def test_a_method_looks_the_same_whatever_stands_beside_it(tmp_path, figures):
    of = log(tmp_path)
    for names in (["Supervised", "FixMatch", "GapMatch"], ["GapMatch", "CutMix"], list("abcdefg")):
        save_curves(tmp_path / "c.png", dict.fromkeys(names, of))
    all_three, two, seven = (
        [(line.get_color(), line.get_marker()) for line in figure.axes[1].lines] for figure in figures
    )
    assert two[0] == all_three[2]
    assert two[1] != two[0]
    assert len(set(seven)) == 7


def test_missing_columns_and_empty_cells_are_left_out(tmp_path, figures):
    supervised = LogFiles(
        csv(
            tmp_path / "s.csv",
            "iteration,loss_labelled,loss_unlabelled",
            "1,0.5,",
            "2,nan,",
            "3,0.25,",
            "4,inf,",
        )
    )
    save_curves(tmp_path / "c.png", {"Supervised": supervised, "GapMatch": log(tmp_path)})
    losses, confident, norm, dice = curves(figures[0])
    np.testing.assert_allclose(losses[0], [[1, 0.5], [3, 0.25]])
    assert [len(panel) for panel in (losses, confident, norm, dice)] == [3, 1, 1, 1]


def test_a_panel_without_data_is_left_out_and_the_others_close_up(tmp_path, figures):
    unvalidated = csv(tmp_path / "val.csv", "iteration,dice")
    training = csv(tmp_path / "t.csv", "iteration,loss_labelled,confident,grad_norm", "1,0.5,0.1,2", "2,0.4,0.2,1")
    save_curves(tmp_path / "c.png", {"GapMatch": LogFiles(training, unvalidated)})
    save_curves(
        tmp_path / "c.png", {"Supervised": LogFiles(csv(tmp_path / "s.csv", "iteration,loss_labelled", "1,0.5"))}
    )
    three, one = figures
    assert [len(ax.lines) for ax in three.axes] == [1, 1, 1]
    assert [ax.get_ylabel() for ax in three.axes] == ["loss", "share of all", r"norm $\|g_1\|$"]
    losses, confident, norm = (ax.get_position() for ax in three.axes)
    assert losses.x1 < confident.x0
    assert norm.y1 < losses.y0
    assert norm.x0 < losses.x1 < confident.x1 < norm.x1 + 0.01  # as wide as both above
    assert [ax.get_ylabel() for ax in one.axes] == ["loss"]
    assert one.axes[0].get_position().width > 0.8
    assert one.get_figheight() < three.get_figheight()


def test_of_runs_without_a_log_line_an_empty_panel_says_so(tmp_path, figures):
    save_curves(tmp_path / "c.png", {"m": LogFiles(csv(tmp_path / "h.csv", "iteration,loss_labelled"))})
    assert [[text.get_text() for text in ax.texts] for ax in figures[0].axes] == [["not logged"]]


def test_a_run_killed_at_once_or_in_mid_line_still_draws(tmp_path, figures):
    cut = csv(tmp_path / "cut.csv", "iteration,loss_labelled,confident", "1,0.5,0.1", "2,0.4")
    header_only = csv(tmp_path / "header.csv", "iteration,loss_labelled,confident")
    save_curves(tmp_path / "c.png", {"cut": LogFiles(cut), "header": LogFiles(header_only)})
    losses, confident = curves(figures[0])
    np.testing.assert_allclose(losses[0], [[1, 0.5], [2, 0.4]])
    np.testing.assert_allclose(confident[0], [[1, 0.1]])


def test_zeros_before_the_first_confident_pixel_fit_the_log_axes(tmp_path):
    zeros = csv(tmp_path / "z.csv", "iteration,loss_unlabelled,grad_norm", "1,0,0", "2,0,0")
    save_curves(tmp_path / "c.png", {"GapMatch": LogFiles(zeros)})


def test_long_curves_are_running_means(tmp_path, figures):
    rows = [f"{i},{1 + (-1) ** i}" for i in range(1000)]
    save_curves(tmp_path / "c.png", {"m": LogFiles(csv(tmp_path / "t.csv", "iteration,loss_labelled", *rows))})
    values = curves(figures[0])[0][0][20:-20, 1]
    np.testing.assert_allclose(values, 1, atol=1e-9)


def test_bad_logs_name_the_culprit(tmp_path):
    path = tmp_path / "c.png"
    with pytest.raises(InputError, match="runs: 0"):
        save_curves(path, {})
    with pytest.raises(InputError, match=r"nowhere\.csv: cannot read"):
        save_curves(path, {"m": LogFiles(tmp_path / "nowhere.csv")})
    with pytest.raises(InputError, match=r"bad\.csv: no column `iteration`"):
        save_curves(path, {"m": LogFiles(csv(tmp_path / "bad.csv", "step,loss", "1,2"))})
    with pytest.raises(InputError, match=r"word\.csv: .*soon"):
        save_curves(path, {"m": LogFiles(csv(tmp_path / "word.csv", "iteration,confident", "1,soon"))})
