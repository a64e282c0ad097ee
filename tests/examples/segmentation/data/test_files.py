"""The h5 layout: what is read, what is refused, and ACDC's own split."""

from pathlib import Path
from zipfile import ZipFile

import h5py
import numpy as np
import pytest
import torch

from segmentation.data.files import (
    check_files,
    check_patients,
    patient_of,
    patients_for_share,
    read_case,
    read_image,
    read_list,
    split_by_patients,
    write_case,
    write_list,
)
from segmentation.data.resize import resize_nearest
from segmentation.data.slices import (
    load_slices,
    load_unlabelled,
    load_volumes,
    slice_path,
    volume_path,
    write_slices,
)
from segmentation.errors import InputError

SHARED = Path(__file__).parents[5] / "shared" / "data"
SLICE = (5, 7)


# What people put under `label` where they have none: all of it is accepted of an unlabelled case.
FILLERS = {
    "nothing": None,
    "zeros": lambda image: np.zeros(image.shape, np.uint8),
    "255": lambda image: np.full(image.shape, 255, np.uint8),
    "-1": lambda image: np.full(image.shape, -1, np.int16),
    "the image": lambda image: image,
    "another shape": lambda image: np.zeros((1, 2), np.uint8),
    "text": lambda image: "none",
    "NaN": lambda image: np.full(image.shape, np.nan),
}


def write_h5(path: Path, **datasets: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, data in datasets.items():
            file[name] = data
    return path


@pytest.fixture
def case(rng):
    return rng.random((3, *SLICE), dtype=np.float32), rng.integers(0, 4, (3, *SLICE), dtype=np.uint8)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# Lists


def test_a_list_is_read_in_order_without_suffix_and_blank_end(tmp_path):
    path = tmp_path / "train.list"
    path.write_bytes(b"patient099_frame01\r\npatient001_frame02.h5\n LA-case.1\n\n  \n")
    assert read_list(path) == ["patient099_frame01", "patient001_frame02", "LA-case.1"]


def test_a_list_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "train.list").write_bytes(b"\xef\xbb\xbfpatient001_frame01\r\npatient001_frame02\r\n")
    assert read_list(tmp_path / "train.list") == ["patient001_frame01", "patient001_frame02"]


def test_a_written_list_is_read_back(tmp_path):
    write_list(tmp_path / "new" / "a.list", ["b", "a"])
    assert read_list(tmp_path / "new" / "a.list") == ["b", "a"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b"a\n\nb\n", r"bad\.list:2: '' is not a name"),
        (b"a\nb c\n", r"bad\.list:2: 'b c' is not a name"),
        (b"../../etc/passwd\n", "is not a name"),
        (b"..\n", "is not a name"),
        (b"a\0b\n", "is not a name"),
        (b"\x89HDF\r\n\xff\xfe", "cannot be read as text"),
        (b"a\nb\na.h5\n", r"bad\.list:3: a is listed twice"),
    ],
)
def test_a_bad_list_is_refused(tmp_path, content, message):
    path = tmp_path / "bad.list"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_list(path)


def test_a_missing_list_and_a_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.list: no such list"):
        read_list(tmp_path / "none.list")
    with pytest.raises(InputError, match="cannot be read as text"):
        read_list(tmp_path)


# Cases


def test_a_written_case_is_read_back_bit_for_bit(tmp_path, case):
    write_case(tmp_path / "new" / "a.h5", *case)
    image, label = read_case(tmp_path / "new" / "a.h5", num_classes=4)
    assert (image.dtype, label.dtype) == (np.float32, np.uint8)
    np.testing.assert_array_equal(image, case[0])
    np.testing.assert_array_equal(label, case[1])
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.h5"]


def test_an_interrupted_write_leaves_the_old_case(tmp_path, case):
    path = tmp_path / "a.h5"
    write_case(path, *case)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_case(path, case[0], object())
    assert path.read_bytes() == before


def test_other_number_types_are_converted(tmp_path):
    path = write_h5(tmp_path / "a.h5", image=np.ones(SLICE, np.int16), label=np.full(SLICE, 3.0))
    image, label = read_case(path, num_classes=4)
    assert (image.dtype, label.dtype) == (np.float32, np.uint8)
    assert (image == 1).all()
    assert (label == 3).all()


def spoiled(value: float) -> np.ndarray:
    array = np.zeros(SLICE)
    array[1, 2] = value
    return array


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ({"label": spoiled(0)}, "no dataset `image`"),
        ({"image": spoiled(0)}, "no dataset `label`; unlabelled training cases alone need none: add it, or list this"),
        (
            {"image": spoiled(0), "label": spoiled(0)[:, :-1]},
            r"\(5, 7\) and label \(5, 6\) must be of one shape",
        ),
        ({"image": np.empty((0, 3)), "label": np.empty((0, 3))}, "the image is empty"),
        ({"image": spoiled(np.nan), "label": spoiled(0)}, "NaN or infinite"),
        ({"image": spoiled(np.inf), "label": spoiled(0)}, "NaN or infinite"),
        ({"image": spoiled(1e300), "label": spoiled(0)}, "NaN or infinite"),
        ({"image": spoiled(0), "label": spoiled(4)}, r"holds the label 4\.0; each has to be one of 0, 1, 2, 3"),
        ({"image": spoiled(0), "label": spoiled(4).astype(np.uint8)}, "holds the label 4;"),
        ({"image": spoiled(0), "label": spoiled(-1)}, r"holds the label -1\.0;"),
        ({"image": spoiled(0), "label": spoiled(0.5)}, r"holds the label 0\.5;"),
        ({"image": spoiled(0), "label": spoiled(0.998)}, r"holds the label 0\.998;"),
        ({"image": spoiled(0), "label": spoiled(3.9999)}, r"holds the label 3\.9999;"),
        ({"image": spoiled(0), "label": spoiled(np.nan)}, "holds the label nan;"),
        ({"image": spoiled(0), "label": spoiled(np.inf)}, "holds the label inf;"),
        ({"image": spoiled(0) > 0, "label": spoiled(0)}, "`image` holds bool, not numbers"),
        ({"image": spoiled(0), "label": "text"}, "`label` holds object, not numbers"),
        ({"image": "text", "label": spoiled(0)}, "`image` holds object, not numbers"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_a_bad_case_is_refused_by_name(tmp_path, datasets, message):
    path = write_h5(tmp_path / "bad.h5", **datasets)
    with pytest.raises(InputError, match=rf"bad\.h5.*{message}"):
        read_case(path, num_classes=4)


@pytest.mark.parametrize("label", FILLERS.values(), ids=FILLERS)
def test_an_image_is_read_whatever_lies_under_label(tmp_path, case, label):
    path = write_h5(tmp_path / "a.h5", image=case[0], **({} if label is None else {"label": label(case[0])}))
    image = read_image(path)
    assert image.dtype == np.float32
    np.testing.assert_array_equal(image, case[0])


def test_an_image_is_read_beside_a_label_that_is_damaged(tmp_path, case):
    path = tmp_path / "a.h5"
    write_case(path, *case)
    with h5py.File(path) as file:
        offset, size = file["label"].id.get_chunk_info(0)[2:4]
    content = bytearray(path.read_bytes())
    content[offset : offset + size] = bytes(size)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.h5"):
        read_case(path, num_classes=4)
    np.testing.assert_array_equal(read_image(path), case[0])


def test_a_case_without_a_label_is_written_and_read_back(tmp_path, case):
    write_case(tmp_path / "a.h5", case[0], None)
    np.testing.assert_array_equal(read_image(tmp_path / "a.h5"), case[0])
    with h5py.File(tmp_path / "a.h5") as file:
        assert list(file) == ["image"]


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ({"label": spoiled(0)}, "no dataset `image`; convert this case again"),
        ({"image": np.empty((0, 3))}, "the image is empty"),
        ({"image": spoiled(np.nan)}, "NaN or infinite"),
        ({"image": "text"}, "`image` holds object, not numbers"),
    ],
)
def test_a_bad_image_is_refused_by_name(tmp_path, datasets, message):
    path = write_h5(tmp_path / "bad.h5", **datasets)
    with pytest.raises(InputError, match=rf"bad\.h5.*{message}"):
        read_image(path)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_labels_next_to_whole_numbers_are_those(tmp_path, dtype):
    label = np.array([[0.0, 1e-4, -9e-4], [0.9995, 1.0005, 2.9995]]).astype(dtype)
    path = write_h5(tmp_path / "a.h5", image=np.zeros((2, 3)), label=label)
    assert read_case(path, num_classes=4)[1].tolist() == [[0, 0, 0], [1, 1, 3]]


def test_bool_labels_are_0_and_1(tmp_path):
    path = write_h5(tmp_path / "a.h5", image=spoiled(0), label=spoiled(1) > 0)
    label = read_case(path, num_classes=2)[1]
    assert label.dtype == np.uint8
    np.testing.assert_array_equal(label, spoiled(1))


def test_a_group_in_place_of_a_dataset_is_refused(tmp_path):
    path = write_h5(tmp_path / "bad.h5", label=spoiled(0))
    with h5py.File(path, "a") as file:
        file.create_group("image")
    with pytest.raises(InputError, match=r"bad\.h5.*no dataset `image`"):
        read_case(path, num_classes=4)


def test_num_classes_bounds_the_labels(tmp_path):
    path = write_h5(tmp_path / "a.h5", image=spoiled(0), label=spoiled(2))
    read_case(path, num_classes=3)
    with pytest.raises(InputError, match=r"label 2\.0; each has to be one of 0, 1:"):
        read_case(path, num_classes=2)


def test_a_missing_case_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.h5: no such file"):
        read_case(tmp_path / "none.h5", num_classes=4)


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.95])
def test_a_truncated_case_is_refused(tmp_path, case, kept):
    path = tmp_path / "bad.h5"
    write_case(path, *case)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept if kept >= 1 else kept * len(content))])
    with pytest.raises(InputError, match=r"bad\.h5: not a readable h5 file"):
        read_case(path, num_classes=4)


# Slices and volumes


def test_slices_are_resized_by_nearest_neighbour_alike(tmp_path, rng):
    label = rng.integers(0, 4, (6, 10), dtype=np.uint8)
    write_case(slice_path(tmp_path, "p_f_slice_1"), label.astype(np.float32) / 3, label)
    slices = load_slices(tmp_path, ["p_f_slice_1"], size=(16, 16))
    assert len(slices) == 1
    assert slices.names == ["p_f_slice_1"]
    assert (slices.images.shape, slices.images.dtype) == ((1, 1, 16, 16), torch.float32)
    assert (slices.labels.shape, slices.labels.dtype) == ((1, 16, 16), torch.uint8)
    torch.testing.assert_close(slices.images[:, 0] * 3, slices.labels.float())  # no value between two classes


def test_unlabelled_slices_are_the_labelled_ones_images(tmp_path, case):
    names = write_slices(tmp_path, "a", *case)
    bare = write_slices(tmp_path, "b", case[0], None)
    expected = load_slices(tmp_path, names, size=(8, 8))
    for theirs in (names, bare):
        unlabelled = load_unlabelled(tmp_path, theirs, size=(8, 8))
        assert unlabelled.labels is None
        assert unlabelled.names == theirs
        assert torch.equal(unlabelled.images, expected.images)
        assert torch.equal(unlabelled.image_batch(torch.tensor([2, 0])), expected.batch(torch.tensor([2, 0]))[0])


def test_unlabelled_slices_are_checked_too(tmp_path, case):
    write_case(slice_path(tmp_path, "a"), case[0], None)
    with pytest.raises(InputError, match=r"a\.h5: shape \(3, 5, 7\) where \(H, W\)"):
        load_unlabelled(tmp_path, ["a"], size=(8, 8))
    write_case(slice_path(tmp_path, "a"), 2 * case[0][0] + 1, None)
    with pytest.raises(InputError, match=r"a\.h5: the image runs from .* outside \[0, 1\]"):
        load_unlabelled(tmp_path, ["a"], size=(8, 8))


def test_slices_keep_the_order_of_their_names(tmp_path):
    for value in range(3):
        write_case(
            slice_path(tmp_path, f"s{value}"),
            spoiled(value).astype(np.float32),
            spoiled(value).astype(np.uint8),
        )
    slices = load_slices(tmp_path, ["s2", "s0", "s1"], size=(8, 8), intensities=None)
    assert slices.labels.amax((1, 2)).tolist() == [2, 0, 1]
    assert slices.images.amax((1, 2, 3)).tolist() == [2, 0, 1]


def test_resizing_to_the_same_size_changes_nothing(case):
    np.testing.assert_array_equal(resize_nearest(case[0][0], SLICE), case[0][0])


def test_resizing_keeps_corners_and_sides_apart():
    small = np.array([[1, 2], [3, 4]], np.uint8)
    large = resize_nearest(small, (4, 6))
    assert large.dtype == np.uint8
    assert large.tolist() == [[1, 1, 1, 2, 2, 2]] * 2 + [[3, 3, 3, 4, 4, 4]] * 2


def test_volumes_keep_their_own_size(tmp_path, case):
    write_case(volume_path(tmp_path, "p1_frame01"), *case)
    (volume,) = load_volumes(tmp_path, ["p1_frame01"])
    assert volume.name == "p1_frame01"
    np.testing.assert_array_equal(volume.image, case[0])
    np.testing.assert_array_equal(volume.label, case[1])


def test_write_slices_numbers_from_one(tmp_path, case):
    names = write_slices(tmp_path, "p1_frame01", *case)
    assert names == ["p1_frame01_slice_1", "p1_frame01_slice_2", "p1_frame01_slice_3"]
    image, _ = read_case(slice_path(tmp_path, names[2]), num_classes=4)
    np.testing.assert_array_equal(image, case[0][2])


def test_a_file_of_the_wrong_dimensions_is_refused(tmp_path, case):
    write_case(slice_path(tmp_path, "a"), *case)
    with pytest.raises(InputError, match=r"a\.h5: shape \(3, 5, 7\) where \(H, W\)"):
        load_slices(tmp_path, ["a"], size=(8, 8))
    write_case(volume_path(tmp_path, "a"), case[0][0], case[1][0])
    with pytest.raises(InputError, match=r"a\.h5: shape \(5, 7\) where \(D, H, W\)"):
        load_volumes(tmp_path, ["a"])


@pytest.mark.parametrize("value", [-0.01, 1.01, 255])
def test_intensities_out_of_range_are_refused_unless_any_are_welcome(tmp_path, case, value):
    case[0][1, 2, 3] = value
    write_case(volume_path(tmp_path, "a"), *case)
    write_slices(tmp_path, "a", *case)
    with pytest.raises(InputError, match=r"a\.h5: the image runs from .* outside \[0, 1\]"):
        load_volumes(tmp_path, ["a"])
    with pytest.raises(InputError, match=r"a_slice_2\.h5: the image runs from"):
        load_slices(tmp_path, ["a_slice_1", "a_slice_2"], size=(8, 8))
    assert load_volumes(tmp_path, ["a"], intensities=None)[0].image[1, 2, 3] == np.float32(value)


def test_rounding_at_the_ends_of_the_range_is_accepted(tmp_path, case):
    case[0][0, 0, :2] = -0.0009, 1.0009
    write_case(volume_path(tmp_path, "a"), *case)
    assert load_volumes(tmp_path, ["a"])


def test_num_classes_reaches_the_files(tmp_path, case):
    write_case(volume_path(tmp_path, "a"), *case)
    write_slices(tmp_path, "a", *case)
    with pytest.raises(InputError, match="has to be one of 0, 1:"):
        load_volumes(tmp_path, ["a"], num_classes=2)
    with pytest.raises(InputError, match="has to be one of 0, 1:"):
        load_slices(tmp_path, ["a_slice_1"], size=(8, 8), num_classes=2)


def test_check_files_names_the_first_missing_file(tmp_path, case):
    names = write_slices(tmp_path, "a", *case)
    write_case(volume_path(tmp_path, "b"), *case)
    check_files([slice_path(tmp_path, name) for name in names])
    check_files([volume_path(tmp_path, "b")])
    with pytest.raises(InputError, match=r"slices.c\.h5: no such file"):
        check_files([slice_path(tmp_path, name) for name in (*names, "c")])
    with pytest.raises(InputError, match=r"data.d\.h5: no such file"):
        check_files([volume_path(tmp_path, name) for name in ("b", "d")])


# The labelled share


def test_the_first_patients_in_list_order_are_labelled():
    names = ["p9_frame01_slice_2", "p1_frame01_slice_1", "p9_frame02_slice_1", "p10_frame01_slice_1"]
    assert split_by_patients(names, 1) == ([names[0], names[2]], [names[1], names[3]])
    assert split_by_patients(names, 2) == (names[:3], names[3:])


def test_a_patient_in_two_lists_is_refused_by_name():
    check_patients({"train": ["p1_f1", "p1_f2"], "val": ["p2_f1"]})
    complaint = r"p1_f1 in train\.list and p1_f2 in test\.list are of one patient, p1: .*`patient` of the task"
    with pytest.raises(InputError, match=complaint):
        check_patients({"train": ["p1_f1"], "val": ["p2_f1"], "test": ["p3_f1", "p1_f2"]})


# The names of other data sets: a rule that fits in one line, the names of one patient, and those of another one.
SCHEMES = {
    "ACDC": (patient_of, ("patient001_frame01", "patient001_frame02_slice_3"), "patient002_frame01"),
    "BraTS2019": (str, ("BraTS19_CBICA_AAP_1",), "BraTS19_2013_16_1"),
    "prostate": (str, ("prostate_01",), "prostate_02"),
    "LA of the decathlon": (str, ("la_003",), "la_004"),
    "FLARE22": (str, ("FLARE22_Tr_0001",), "FLARE22_Tr_0002"),
    "KiTS": (str, ("case_00001",), "case_00002"),
    "slices": (
        lambda name: name.split("_slice")[0],
        ("case_00001_slice_1", "case_00001_slice_2"),
        "case_00002_slice_1",
    ),
    "another separator": (lambda name: name.split("-")[0], ("p1-ED", "p1-ES"), "p2-ED"),
}


@pytest.mark.parametrize(("patient", "one", "other"), SCHEMES.values(), ids=SCHEMES)
def test_a_rule_tells_patients_apart(patient, one, other):
    check_patients({"train": one, "test": [other]}, patient)
    assert split_by_patients([*one, other], 1, patient) == ([*one], [other])
    with pytest.raises(InputError, match=f"{one[0]} in train.list and {one[-1]} in test.list are of one patient"):
        check_patients({"train": [one[0], other], "test": [one[-1]]}, patient)


def test_cases_of_one_patient_alone_are_refused():
    with pytest.raises(InputError, match=r"all 2 training cases are of one patient, la: .*`patient` of the task"):
        split_by_patients(["la_003", "la_004"], 1)


def test_all_patients_may_be_labelled():
    assert split_by_patients(["p1_a", "p2_a"], 2) == (["p1_a", "p2_a"], [])


def test_patients_are_drawn_by_a_seed():
    names = [f"p{number}_{part}" for number in range(8) for part in "ab"]
    draws = {tuple(split_by_patients(names, 2, seed=seed)[0]) for seed in range(20)}
    assert len(draws) > 5
    for labelled in draws:
        assert len({name[:2] for name in labelled}) == 2
        assert len(labelled) == 4
    assert split_by_patients(names, 2, seed=3) == split_by_patients(names, 2, seed=3)


@pytest.mark.parametrize("patients", [-1, 0, 3])
def test_a_split_of_none_or_of_more_than_there_are_is_refused(patients):
    with pytest.raises(InputError, match="of 2 patients: choose 1 to 2"):
        split_by_patients(["p1_a", "p2_a"], patients)


def test_the_field_counts_patients_so():
    assert [patients_for_share(percent, patients=70) for percent in (1, 5, 10, 20)] == [1, 3, 7, 14]  # ACDC
    assert [patients_for_share(percent, patients=80) for percent in (1, 5, 10)] == [1, 4, 8]  # LA


@pytest.mark.parametrize("percent", [0, -1, 100.1, float("nan")])
def test_a_share_outside_its_range_is_refused(percent):
    with pytest.raises(InputError, match="outside"):
        patients_for_share(percent, 70)


@pytest.fixture
def acdc_list(tmp_path):
    archive = SHARED / "acdc_train.zip"
    if not archive.is_file():
        pytest.skip(f"no ACDC data at {archive}")
    with ZipFile(archive) as files:
        (tmp_path / "train_slices.list").write_bytes(files.read("ACDC/train_slices.list"))
    return tmp_path / "train_slices.list"


@pytest.mark.parametrize(("percent", "expected"), [(1, 32), (5, 68), (10, 136)])
def test_acdc_splits_as_in_the_literature(acdc_list, percent, expected):
    names = read_list(acdc_list)
    assert len(names) == 1312
    labelled, unlabelled = split_by_patients(names, patients_for_share(percent, 70))
    assert labelled == names[:expected]
    assert unlabelled == names[expected:]
