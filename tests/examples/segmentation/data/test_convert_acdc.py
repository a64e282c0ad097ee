"""The converter, on a small tree of NIfTI files laid out as the official ACDC."""

import gzip
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

from segmentation.data.convert_acdc import convert, main, read_frame, split_patients
from segmentation.data.files import read_case, read_image, read_list, write_list
from segmentation.data.slices import load_slices, load_volumes, slice_path, volume_path
from segmentation.errors import InputError

SHAPE = (6, 5, 3)  # NIfTI's (X, Y, Z)


def write_nifti(path: Path, array: np.ndarray) -> None:
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)


def write_patient(root: Path, patient: str, ed: int = 1, es: int = 12) -> None:
    folder = root / patient
    folder.mkdir(parents=True)
    (folder / "Info.cfg").write_text(f"ED: {ed}\nES: {es}\nGroup: DCM\nHeight: 184.0\nNbFrame: 30\nWeight: 95.0\n")
    rng = np.random.default_rng([int(patient[-3:]), ed])
    for frame in (ed, es):
        write_nifti(folder / f"{patient}_frame{frame:02d}.nii.gz", rng.integers(0, 900, SHAPE).astype(np.int16))
        write_nifti(folder / f"{patient}_frame{frame:02d}_gt.nii.gz", rng.integers(0, 4, SHAPE).astype(np.uint8))
    write_nifti(folder / f"{patient}_4d.nii.gz", np.zeros((*SHAPE, 2), np.int16))


@pytest.fixture
def official(tmp_path):
    root = tmp_path / "official" / "training"
    for number in range(1, 5):
        write_patient(root, f"patient{number:03d}")
    return root.parent


@pytest.fixture
def lists(tmp_path):
    folder = tmp_path / "lists"
    for split, patients in {"train": (4, 1), "val": (2,), "test": (3,)}.items():
        write_list(folder / f"{split}.list", [f"patient{p:03d}_frame{f}" for p in patients for f in ("01", "02")])
    return folder


@pytest.fixture
def frame(official):
    """The end-systolic frame of patient002, a validation case in `lists`."""
    return official / "training" / "patient002" / "patient002_frame12.nii.gz"


def label_of(frame: Path) -> Path:
    return frame.with_name("patient002_frame12_gt.nii.gz")


def test_given_lists_decide_split_and_order(official, lists, tmp_path):
    out = tmp_path / "out"
    convert(official, out, lists)
    for split in ("train", "val", "test"):
        assert read_list(out / f"{split}.list") == read_list(lists / f"{split}.list")
    slices = read_list(out / "train_slices.list")
    assert slices[:4] == [f"patient004_frame{n}" for n in ("01_slice_1", "01_slice_2", "01_slice_3", "02_slice_1")]
    assert len(load_slices(out, slices, size=(8, 8))) == 2 * 2 * 3
    assert sorted(p.name for p in (out / "data").glob("*.h5")) == [
        f"patient{p}_frame{f}.h5" for p in ("002", "003") for f in ("01", "02")
    ]


def test_the_second_frame_is_end_systole_with_reversed_axes_scaled_over_the_volume(official, lists, frame, tmp_path):
    convert(official, tmp_path / "out", lists)
    (volume,) = load_volumes(tmp_path / "out", ["patient002_frame02"])
    raw = nibabel.load(frame).get_fdata()
    assert volume.image.shape == (3, 5, 6)
    np.testing.assert_allclose(volume.image, (raw.T - raw.min()) / (raw.max() - raw.min()), rtol=1e-6)
    np.testing.assert_array_equal(volume.label, nibabel.load(label_of(frame)).get_fdata().T)


def test_slices_are_scaled_with_their_volume(official, lists, tmp_path):
    convert(official, tmp_path / "out", lists)
    image, label = read_frame(official / "training" / "patient001" / "patient001_frame01.nii.gz")
    for i in range(3):
        path = slice_path(tmp_path / "out", f"patient001_frame01_slice_{i + 1}")
        stored_image, stored_label = read_case(path, num_classes=4)
        np.testing.assert_array_equal(stored_image, image[i])
        np.testing.assert_array_equal(stored_label, label[i])


def test_end_diastole_comes_first_even_where_its_number_is_higher(official, lists, tmp_path):
    shutil.rmtree(official / "training" / "patient002")
    write_patient(official / "training", "patient002", ed=11, es=4)  # as ACDC's patient090
    convert(official, tmp_path / "out", lists)
    stored, _ = read_case(volume_path(tmp_path / "out", "patient002_frame01"), num_classes=4)
    expected, _ = read_frame(official / "training" / "patient002" / "patient002_frame11.nii.gz")
    np.testing.assert_array_equal(stored, expected)


def test_a_root_without_the_training_level_will_do(official, lists, tmp_path):
    convert(official / "training", tmp_path / "out", lists)
    assert len(read_list(tmp_path / "out" / "train_slices.list")) == 12


def test_without_lists_the_seed_splits_the_patients(official, tmp_path):
    convert(official, tmp_path / "out", seed=1)
    splits = [{n.split("_")[0] for n in read_list(tmp_path / "out" / f"{s}.list")} for s in ("train", "val", "test")]
    assert [len(s) for s in splits] == [2, 1, 1]
    assert len(set().union(*splits)) == 4


def test_the_split_of_a_hundred_is_70_10_20_and_seeded():
    patients = [f"patient{n:03d}" for n in range(1, 101)]
    split = split_patients(patients, seed=0)
    assert {name: len(cases) for name, cases in split.items()} == {"train": 140, "val": 20, "test": 40}
    assert split == split_patients(patients, seed=0)
    assert split != split_patients(patients, seed=1)


def test_a_split_needs_three_patients():
    with pytest.raises(InputError, match="2 labelled patients cannot be split"):
        split_patients(["patient001", "patient002"], seed=0)


def refused(official: Path, lists: Path, message: str) -> None:
    out = official.parent / "refused"
    with pytest.raises(InputError, match=message):
        convert(official, out, lists)
    assert not list(out.glob("*.list"))  # no list promises what was not written


def test_a_folder_without_patients_is_refused(tmp_path, lists):
    refused(tmp_path / "nowhere", lists, "nowhere: holds no patientXXX folder")


@pytest.mark.parametrize("case", ["patient005_frame01", "patient002_frame03", "patient002"])
def test_a_listed_case_that_does_not_exist_is_refused(official, lists, case):
    write_list(lists / "val.list", [case])
    refused(official, lists, f"{case}: no such case")


@pytest.mark.parametrize("case", ["patient001_frame01", "patient001_frame02"])
def test_a_patient_in_two_lists_is_refused(official, lists, case):
    train = read_list(lists / "train.list")
    write_list(lists / "train.list", [name for name in train if name != case] or train)
    write_list(lists / "test.list", [case])
    refused(official, lists, r"lists: patient001_frame0. in train\.list and patient001_frame0. in test\.list")


def test_a_missing_list_is_refused(official, lists):
    (lists / "val.list").unlink()
    refused(official, lists, r"val\.list: no such list")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("patient002_frame12.nii.gz", "no such file; unpack patient002 again"),
        ("patient002_frame12_gt.nii.gz", "no such file; training cases alone need no label: unpack patient002_frame02"),
    ],
)
def test_a_missing_file_is_refused_before_anything_is_written(official, lists, frame, name, message):
    frame.with_name(name).unlink()
    refused(official, lists, f"{name}: {message}")
    assert not (official.parent / "refused").exists()


def without_label(official: Path, patient: str, frame: str) -> None:
    (official / "training" / patient / f"{patient}_{frame}_gt.nii.gz").unlink()


def test_a_training_case_without_a_label_is_written_as_an_image_alone(official, lists, tmp_path):
    convert(official, tmp_path / "whole", lists)
    without_label(official, "patient001", "frame12")
    splits, unlabelled = convert(official, tmp_path / "out", lists)
    assert unlabelled == ["patient001_frame02"]
    assert splits["train"] == read_list(lists / "train.list")
    slices = read_list(tmp_path / "out" / "train_slices.list")
    assert slices == read_list(tmp_path / "whole" / "train_slices.list")
    for name in slices:
        ours, theirs = (slice_path(tmp_path / out, name) for out in ("out", "whole"))
        np.testing.assert_array_equal(read_image(ours), read_image(theirs))
        if name.startswith("patient001_frame02"):
            with pytest.raises(InputError, match="no dataset `label`"):
                read_case(ours, num_classes=4)
        else:
            np.testing.assert_array_equal(read_case(ours, 4)[1], read_case(theirs, 4)[1])


def test_without_lists_patients_without_labels_train_behind_the_others(official, tmp_path):
    write_patient(official / "training", "patient005")
    without_label(official, "patient002", "frame12")
    splits, unlabelled = convert(official, tmp_path / "out", seed=1)
    assert unlabelled == ["patient002_frame02"]
    assert splits["train"][-2:] == ["patient002_frame01", "patient002_frame02"]
    assert splits == {
        **(labelled := split_patients([f"patient00{n}" for n in (1, 3, 4, 5)], seed=1)),
        "train": labelled["train"] + splits["train"][-2:],
    }


def test_an_info_with_a_byte_order_mark_and_a_name_in_latin_1_is_read(official, lists, frame, tmp_path):
    info = frame.with_name("Info.cfg")
    info.write_bytes(b"\xef\xbb\xbf" + info.read_bytes() + b"Physician: M\xfcller\n")
    convert(official, tmp_path / "out", lists)
    assert volume_path(tmp_path / "out", "patient002_frame01").is_file()


@pytest.mark.parametrize("content", [None, "", "ED: 1\n", "ED: 1\nES: soon\n"])
def test_an_info_without_the_frame_number_is_refused(official, lists, frame, content):
    info = frame.with_name("Info.cfg")
    info.unlink()
    if content is not None:
        info.write_text(content)
    refused(official, lists, r"patient002.Info\.cfg: gives no frame number")


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b"",
        lambda b: b[: len(b) // 2],
        lambda b: b"not gzip",
        lambda b: gzip.compress(b"x"),
        lambda b: gzip.compress(gzip.decompress(b)[:344] + bytes(4)),
    ],
)
def test_a_damaged_nifti_is_refused(official, lists, frame, damage):
    frame.write_bytes(damage(frame.read_bytes()))
    refused(official, lists, r"patient002_frame12\.nii\.gz: not a readable NIfTI")


def test_nifti_2_is_read(official, lists, frame, tmp_path):
    convert(official, tmp_path / "one", lists)
    for path in (frame, label_of(frame)):
        one = nibabel.load(path)
        nibabel.save(nibabel.Nifti2Image(np.asarray(one.dataobj), one.affine), path)
    assert nibabel.load(frame).header["sizeof_hdr"] == 540
    convert(official, tmp_path / "two", lists)
    (one,), (two,) = (load_volumes(tmp_path / out, ["patient002_frame02"]) for out in ("one", "two"))
    np.testing.assert_array_equal(one.image, two.image)
    np.testing.assert_array_equal(one.label, two.label)


@pytest.mark.parametrize("dtype", [np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]), np.dtype(np.complex64)])
@pytest.mark.parametrize("name", ["patient002_frame12.nii.gz", "patient002_frame12_gt.nii.gz"])
def test_colours_and_complex_numbers_are_refused(official, lists, frame, name, dtype):
    write_nifti(frame.with_name(name), np.zeros(SHAPE, dtype))
    refused(official, lists, rf"{name}: holds .*, not real numbers")


def test_shapes_that_differ_or_are_not_3d_are_refused(official, lists, frame):
    write_nifti(label_of(frame), np.zeros((6, 5, 4), np.uint8))
    refused(official, lists, r"frame12_gt\.nii\.gz: shape \(6, 5, 4\) where .*frame12\.nii\.gz has \(6, 5, 3\)")
    write_nifti(frame, np.zeros(SHAPE[:2], np.int16))
    refused(official, lists, r"patient002_frame12\.nii\.gz: shape \(6, 5\) where \(X, Y, Z\) was expected")


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_an_image_that_cannot_be_scaled_is_refused(official, lists, frame, value):
    image = np.zeros(SHAPE, np.float32)
    image[0, 0, 0] = value
    write_nifti(frame, image)
    refused(official, lists, r"patient002_frame12\.nii\.gz: intensities from .* cannot be scaled")


def test_labels_out_of_range_are_refused(official, lists, frame):
    write_nifti(label_of(frame), np.full(SHAPE, 4, np.uint8))
    refused(official, lists, r"_frame12_gt\.nii\.gz: holds the label 4\.0; each has to be one of 0, 1, 2, 3: mend")


def test_labels_that_nibabel_has_scaled_are_whole_numbers(official, lists, frame, tmp_path):
    label = np.zeros(SHAPE)
    label[0, 0], label[1, 1] = 3, 1
    image = nibabel.Nifti1Image(label, np.eye(4))
    image.header.set_data_dtype(np.uint8)
    nibabel.save(image, label_of(frame))
    assert (nibabel.load(label_of(frame)).get_fdata() % 1).any()  # 2.9999... for a 3
    convert(official, tmp_path / "out", lists)
    (volume,) = load_volumes(tmp_path / "out", ["patient002_frame02"])
    np.testing.assert_array_equal(volume.label, label.T)


def test_labels_between_whole_numbers_are_refused(official, lists, frame):
    write_nifti(label_of(frame), np.full(SHAPE, 0.5))
    refused(official, lists, r"patient002_frame12_gt\.nii\.gz: holds the label 0\.5;")


def test_the_command_line(official, lists, tmp_path, capsys):
    without_label(official, "patient001", "frame12")
    main([str(official), str(tmp_path / "out"), "--lists", str(lists)])
    expected = "4 train, 2 val and 2 test cases; 1 of them without a label, as images alone: patient001_frame02"
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: {expected}\n"
    assert read_list(tmp_path / "out" / "val.list") == ["patient002_frame01", "patient002_frame02"]


def test_the_command_line_pairs_by_voxel_where_it_is_asked_to(official, lists, frame, tmp_path):
    label = nibabel.load(label_of(frame)).get_fdata().astype(np.uint8)
    nibabel.save(nibabel.Nifti1Image(label, np.diag([2.0, 1, 1, 1])), label_of(frame))
    arguments = [str(official), str(tmp_path / "out"), "--lists", str(lists)]
    with pytest.raises(SystemExit, match=r"patient002_frame12_gt\.nii\.gz: by their headers voxels are .* --by-voxel"):
        main(arguments)
    main([*arguments, "--by-voxel"])
    (volume,) = load_volumes(tmp_path / "out", ["patient002_frame02"])
    np.testing.assert_array_equal(volume.label, label.T)


def test_the_command_line_ends_bad_input_with_one_line(tmp_path):
    with pytest.raises(SystemExit) as exit_:
        main([str(tmp_path), str(tmp_path / "out")])
    assert str(exit_.value).startswith("error: ")
    assert "\n" not in str(exit_.value)
