"""The converter, on a small tree of NRRD files laid out as the 2018 atrial challenge."""

from pathlib import Path

import nrrd
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segmentation.data.convert_la import CROP, MARGIN, convert, cut, main, read_scan, split_cases
from segmentation.data.crops import case_path, load_cases
from segmentation.data.files import read_case, read_image, read_list, write_list
from segmentation.errors import InputError

SHAPE = (200, 190, 3)  # room for the cut in X and Y
CASES = ("A1", "B2", "C3", "D4", "E5")


def write_scan(folder: Path, image: np.ndarray, label: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    nrrd.write(str(folder / "lgemri.nrrd"), image)
    nrrd.write(str(folder / "laendo.nrrd"), label)


def scan_of(case: str, shape: tuple[int, ...] = SHAPE, value: int = 255) -> tuple[np.ndarray, np.ndarray]:
    image = np.random.default_rng([*case.encode()]).integers(0, 200, shape).astype(np.uint8)
    label = np.zeros(shape, np.uint8)
    label[90:120, 80:100, 1:] = value
    return image, label


@pytest.fixture
def source(tmp_path):
    for case in CASES:
        write_scan(tmp_path / "source" / case, *scan_of(case))
    return tmp_path / "source"


@pytest.fixture
def lists(tmp_path):
    train, test = tmp_path / "train.list", tmp_path / "test.list"
    write_list(train, ["D4", "A1"])
    write_list(test, ["C3"])
    return train, test


def test_given_lists_decide_split_and_order(source, lists, tmp_path):
    out = tmp_path / "out"
    assert convert(source, out, lists) == ({"train": ["D4", "A1"], "test": ["C3"]}, [])
    assert read_list(out / "train.list") == ["D4", "A1"]
    assert read_list(out / "test.list") == ["C3"]
    written = sorted(path for path in out.rglob("*") if path.is_file() and path.suffix != ".list")
    assert written == [case_path(out, case) for case in ("A1", "C3", "D4")]
    assert [volume.name for volume in load_cases(out, ["D4", "A1", "C3"])] == ["D4", "A1", "C3"]


def test_without_lists_the_first_cases_by_name_train(source, tmp_path):
    convert(source, tmp_path / "out")
    assert read_list(tmp_path / "out" / "train.list") == ["A1", "B2", "C3", "D4"]
    assert read_list(tmp_path / "out" / "test.list") == ["E5"]


@pytest.mark.parametrize(("count", "train"), [(2, 1), (3, 2), (100, 80), (154, 123)])
def test_the_split_is_80_to_20(count, train):
    cases = [f"c{n}" for n in range(count)]
    split = split_cases(cases)
    assert split["train"] + split["test"] == cases
    assert len(split["train"]) == train


def test_files_hold_the_normalised_scan_around_the_label(source, tmp_path):
    convert(source, tmp_path / "out")
    image, label = scan_of("B2")
    stored_image, stored_label = read_case(case_path(tmp_path / "out", "B2"), num_classes=2)
    window = (slice(90 - 41, 120 + 41), slice(80 - 46, 100 + 46))  # to 112: more than 30 + 2 * 25 and 20 + 2 * 25
    expected = (image.astype(float) - image.mean()) / image.std()
    np.testing.assert_allclose(stored_image, expected[window], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(stored_label, label[window] == 255)
    assert (stored_image.dtype, stored_label.dtype) == (np.float32, np.uint8)


def test_the_scan_is_normalised_before_it_is_cut(source):
    image, label = scan_of("A1")
    image[80:130, 70:110] = 250  # bright around the heart, so the mean of the cut is above the scan's
    write_scan(source / "A1", image, label)
    whole, whole_label = read_scan(source / "A1")
    assert whole.mean() == pytest.approx(0, abs=1e-4)
    assert whole.std() == pytest.approx(1, abs=1e-4)
    assert cut(whole, whole_label, MARGIN)[0].mean() > 0.05


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_labels_of_1_and_other_dtypes_will_do(source, dtype):
    image, label = scan_of("A1", value=1)
    write_scan(source / "A1", image.astype(dtype), label.astype(dtype))
    read_image, read_label = read_scan(source / "A1")
    np.testing.assert_allclose(read_image, (image.astype(float) - image.mean()) / image.std(), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(read_label, label)


def _boxes(size: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(0, size - 1), st.integers(0, size - 1)).map(lambda ends: (min(ends), max(ends)))


@given(boxes=st.tuples(_boxes(170), _boxes(300)), margin=st.integers(0, 60))
def test_the_cut_keeps_label_margin_and_slices(boxes, margin):
    image = np.arange(170 * 300 * 2, dtype=np.float32).reshape(170, 300, 2)
    label = np.zeros(image.shape, np.uint8)
    for ends in zip(*boxes, strict=True):
        label[(*ends, 0)] = 1  # two opposite corners of the box
    small_image, small_label = cut(image, label, margin)
    assert small_image.shape == small_label.shape
    assert small_label.sum() == label.sum()
    assert small_label.shape[2] == 2
    corner = np.unravel_index(int(small_image[0, 0, 0]), image.shape)[:2]
    for axis, (first, last) in enumerate(boxes):
        start, end = corner[axis], corner[axis] + small_image.shape[axis]
        before, behind = first - start, end - 1 - last
        if start > 0 and end < image.shape[axis]:
            assert before + behind + last - first + 1 == max(CROP, last - first + 1 + 2 * margin)
            assert behind - before in (0, 1)
        assert start == 0 or before >= margin
        assert end == image.shape[axis] or behind >= margin


def test_a_second_run_writes_the_same(source, tmp_path):
    for out in ("one", "two", "two"):
        convert(source, tmp_path / out)
    for case in CASES:
        for one, two in zip(*(read_case(case_path(tmp_path / out, case), 2) for out in ("one", "two")), strict=True):
            np.testing.assert_array_equal(one, two)


def refused(source: Path, message: str, lists: tuple[Path, Path] | None = None) -> None:
    out = source.parent / "refused"
    with pytest.raises(InputError, match=message):
        convert(source, out, lists)
    assert not list(out.glob("*.list"))  # no list promises what was not written


def test_a_folder_without_cases_is_refused(tmp_path):
    refused(tmp_path / "nowhere", r"nowhere: holds no folder with lgemri\.nrrd")


def test_one_case_is_not_split(tmp_path):
    write_scan(tmp_path / "source" / "A1", *scan_of("A1"))
    refused(tmp_path / "source", "1 labelled case cannot be split")


@pytest.mark.parametrize("name", ["lgemri.nrrd", "laendo.nrrd"])
def test_a_missing_file_is_refused_before_anything_is_written(source, lists, name):
    (source / "C3" / name).unlink()  # a test case
    refused(source, rf"C3.{name}: no such file", lists)
    assert not (source.parent / "refused").exists()


def test_a_training_case_without_a_label_is_written_whole_as_an_image_alone(source, lists, tmp_path):
    (source / "A1" / "laendo.nrrd").unlink()
    splits, unlabelled = convert(source, tmp_path / "out", lists)
    assert (splits["train"], unlabelled) == (["D4", "A1"], ["A1"])
    raw = scan_of("A1")[0].astype(float)
    np.testing.assert_allclose(
        read_image(case_path(tmp_path / "out", "A1")), (raw - raw.mean()) / raw.std(), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(InputError, match="no dataset `label`"):
        read_case(case_path(tmp_path / "out", "A1"), num_classes=2)
    assert len(load_cases(tmp_path / "out", ["D4", "C3"])) == 2


def test_without_lists_cases_without_labels_train_behind_the_others(source, tmp_path):
    for case in ("A1", "E5"):
        (source / case / "laendo.nrrd").unlink()
    splits, unlabelled = convert(source, tmp_path / "out")
    assert splits == {"train": ["B2", "C3", "A1", "E5"], "test": ["D4"]}
    assert unlabelled == ["A1", "E5"]


def test_a_listed_case_that_does_not_exist_is_refused(source, lists):
    write_list(lists[1], ["Z9"])
    refused(source, "Z9: no such case", lists)


def test_a_case_in_both_lists_is_refused(source, lists):
    write_list(lists[1], ["A1"])
    refused(source, r"test\.list: A1 in train\.list and A1 in test\.list are of one patient", lists)


def test_cases_of_one_data_set_are_not_one_patient(source, lists, tmp_path):
    for case in ("la_003", "la_004"):
        write_scan(source / case, *scan_of(case))
    write_list(lists[0], ["la_003"])
    write_list(lists[1], ["la_004"])
    assert convert(source, tmp_path / "out", lists)[0] == {"train": ["la_003"], "test": ["la_004"]}


def test_a_missing_list_is_refused(source, lists):
    lists[0].unlink()
    refused(source, r"train\.list: no such list", lists)


def test_a_negative_margin_is_refused(source, tmp_path):
    with pytest.raises(InputError, match="margin -1"):
        convert(source, tmp_path / "out", margin=-1)


@pytest.mark.parametrize("name", ["lgemri.nrrd", "laendo.nrrd"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b"",
        lambda b: b[:40],
        lambda b: b[: len(b) // 2],
        lambda b: b"not NRRD",
        lambda b: b.replace(b"\n\n", b"\n\nxx", 1),
        lambda b: b.replace(b"encoding: gzip", b"encoding: zipg"),
        lambda b: b.replace(b"sizes: ", b"sizes: x"),
        lambda b: b.replace(b"sizes: ", b"sizes: 9"),
        lambda b: b.replace(b"dimension: 3", b"dimension: 2"),
        lambda b: b.replace(b"type: ", b"type: x"),
    ],
)
def test_a_damaged_nrrd_is_refused(source, name, damage):
    path = source / "A1" / name
    path.write_bytes(damage(path.read_bytes()))
    refused(source, rf"A1.{name}: not a readable NRRD")


def test_shapes_that_differ_or_are_not_3d_are_refused(source):
    image, label = scan_of("A1")
    write_scan(source / "A1", image[..., :2], label)
    refused(source, r"A1.laendo\.nrrd: shape \(200, 190, 3\) where .*lgemri\.nrrd has \(200, 190, 2\)")
    write_scan(source / "A1", image[..., 1], label[..., 1])
    refused(source, r"A1.lgemri\.nrrd: shape \(200, 190\) where \(X, Y, Z\) was expected")


@pytest.mark.parametrize("value", [2, 254, 0.5, 254.99])
def test_other_labels_are_refused(source, value):
    image, label = scan_of("A1")
    label = label.astype(np.float64)
    label[0, 0, 0] = value
    write_scan(source / "A1", image, label)
    refused(source, rf"A1.laendo\.nrrd: holds the label {value}.*; each has to be one of 0, 1, 255")


@pytest.mark.parametrize("value", [254.99998, 255.0005, 0.9995])
def test_labels_next_to_whole_numbers_are_those(source, value):
    image, label = scan_of("A1")
    write_scan(source / "A1", image, np.where(label > 0, np.float32(value), np.float32(1e-5)))
    np.testing.assert_array_equal(read_scan(source / "A1")[1], label > 0)


def test_an_empty_label_is_refused(source):
    image, label = scan_of("A1")
    write_scan(source / "A1", image, 0 * label)
    refused(source, r"A1.laendo\.nrrd: the label is empty, .*; mend it, or take it away if")


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_an_image_that_cannot_be_normalised_is_refused(source, value):
    image = np.zeros(SHAPE, np.float32)
    image[0, 0, 0] = value
    write_scan(source / "A1", image, scan_of("A1")[1])
    refused(source, r"A1.lgemri\.nrrd: intensities from .* cannot be scaled")


def test_the_command_line(source, lists, tmp_path, capsys):
    main([str(source), str(tmp_path / "out"), "--train", str(lists[0]), "--test", str(lists[1])])
    assert capsys.readouterr().out.endswith("out: 2 train and 1 test cases\n")
    assert read_list(tmp_path / "out" / "test.list") == ["C3"]


def test_the_command_line_says_that_its_own_split_is_not_the_field_s(source, tmp_path, capsys):
    main([str(source), str(tmp_path / "out"), "--margin", "50"])
    assert "4 train and 1 test cases\nSplit in order of name: not the field's split" in capsys.readouterr().out
    image, _ = read_case(case_path(tmp_path / "out", "A1"), 2)
    label = scan_of("A1")[1]
    assert image.shape == cut(label.astype(np.float32), label, 50)[0].shape


def test_the_command_line_says_who_has_no_label(source, tmp_path, capsys):
    for case in "ABCDEF":
        write_scan(source / f"{case}0", *scan_of(f"{case}0"))
        (source / f"{case}0" / "laendo.nrrd").unlink()
    main([str(source), str(tmp_path / "out")])
    expected = "10 train and 1 test cases; 6 of them without a label, as images alone: A0, B0, C0, D0, E0, ...\n"
    assert expected in capsys.readouterr().out


def test_the_command_line_pairs_by_voxel_where_it_is_asked_to(source, lists, tmp_path):
    image, label = scan_of("D4")
    for name, array, spacing in (("lgemri.nrrd", image, 1.0), ("laendo.nrrd", label, 2.0)):
        nrrd.write(str(source / "D4" / name), array, {"space": "RAS", "space directions": np.diag([1, 1, spacing])})
    arguments = [str(source), str(tmp_path / "out"), "--train", str(lists[0]), "--test", str(lists[1])]
    with pytest.raises(SystemExit, match=r"D4/laendo\.nrrd: by their headers voxels are .* --by-voxel"):
        main(arguments)
    main([*arguments, "--by-voxel"])
    (volume,) = load_cases(tmp_path / "out", ["D4"])
    assert volume.label.sum() == (label > 0).sum()


def test_the_command_line_wants_both_lists_or_none(source, lists, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(source), str(tmp_path / "out"), "--train", str(lists[0])])
    assert "--train and --test go together" in capsys.readouterr().err


def test_the_command_line_ends_bad_input_with_one_line(tmp_path):
    with pytest.raises(SystemExit) as exit_:
        main([str(tmp_path), str(tmp_path / "out")])
    assert str(exit_.value).startswith("error: ")
    assert "\n" not in str(exit_.value)
