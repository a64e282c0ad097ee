"""From the official ACDC folders (NIfTI) to the community's h5 layout that `slices.py` reads.

    python -m segmentation.data.convert_acdc OFFICIAL_DIR OUT [--lists DIR]

What the shared h5 files hold, measured on all 1312 slices and 60 volumes, and kept here:
- Intensities are min-max scaled over a whole frame, not slice by slice: every volume spans exactly
  [0, 1], single slices do not (their maxima go down to 0.14).
- Axes are (D, H, W), the reverse of NIfTI's (X, Y, Z); slices are numbered from 1.
- `frame01` is end-diastole and `frame02` end-systole, whatever the official frame numbers are.
- Training cases lie there as slices, validation and test cases as volumes.

A training case without a segmentation is written with its image alone.
"""

import argparse
import random
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from segmentation.data.conversion import BY_VOXEL, NO_LABEL, require_labels, summary
from segmentation.data.files import Image, Label, check_patients, class_indices, read_list, write_case, write_list
from segmentation.data.orientation import Scan, paired
from segmentation.data.slices import volume_path, write_slices
from segmentation.errors import InputError
from segmentation.printing import show_every_character

NUM_CLASSES = 4
SPLITS = ("train", "val", "test")
FRAMES = ("frame01", "frame02")

# What nibabel and gzip raise for a damaged file, by the place of the damage.
_DAMAGE = (ImageFileError, HeaderDataError, WrapStructError, OSError, EOFError, ValueError, TypeError, zlib.error)


def convert(
    official: Path, out: Path, lists: Path | None = None, seed: int = 0, by_voxel: bool = False
) -> tuple[dict[str, list[str]], list[str]]:
    """Write `out` in the h5 layout, its four list files last; returns the cases of each split, and those unlabelled.

    official: the folder that holds patient001, ..., or its parent with a `training` folder.
    lists: a folder whose train.list, val.list and test.list name the cases of each split; without it the
    patients are split 70 / 10 / 20 % at random from `seed`; those who lack a label go to the end of the training list.
    by_voxel: whether image and label are paired as they are stored, whatever their headers say.
    Raises InputError for a folder, file or name that is missing or does not fit, naming it.
    """
    patients = find_patients(official)
    splits = read_splits(lists) if lists else split_by_labels(patients, seed)
    cases = [case for split in SPLITS for case in splits[split]]
    frames = {case: frame_path(patients, case) for case in cases}  # a missing one shows before the long work
    labels = {case: label_path(frame) for case, frame in frames.items()}
    require_labels(labels, splits["val"] + splits["test"])
    slices = [name for case in splits["train"] for name in write_slices(out, case, *read_frame(frames[case], by_voxel))]
    for case in splits["val"] + splits["test"]:
        write_case(volume_path(out, case), *read_frame(frames[case], by_voxel))
    for split in SPLITS:
        write_list(out / f"{split}.list", splits[split])
    write_list(out / "train_slices.list", slices)
    return splits, [case for case in cases if not labels[case].is_file()]


def find_patients(official: Path) -> dict[str, Path]:
    """Each patient's folder by the patient's name. Raises InputError where there is none."""
    root = official / "training" if (official / "training").is_dir() else official
    patients = {folder.name: folder for folder in root.glob("patient[0-9]*") if folder.is_dir()}
    if not patients:
        raise InputError(f"{root}: holds no patientXXX folder; give the unpacked official ACDC data")
    return patients


def read_splits(lists: Path) -> dict[str, list[str]]:
    """The cases of each split from list files. Raises InputError for a patient who is in two of them."""
    splits = {split: read_list(lists / f"{split}.list") for split in SPLITS}
    try:
        check_patients(splits)
    except InputError as error:
        raise InputError(f"{lists}: {error}") from None
    return splits


def split_by_labels(patients: dict[str, Path], seed: int) -> dict[str, list[str]]:
    """`split_patients` of those with both labels; the others are training cases behind the labelled ones."""

    def has_labels(patient: str) -> bool:
        return all(label_path(frame_path(patients, f"{patient}_{frame}")).is_file() for frame in FRAMES)

    labelled = [patient for patient in sorted(patients) if has_labels(patient)]
    splits = split_patients(labelled, seed)
    splits["train"] += [f"{patient}_{frame}" for patient in sorted(patients.keys() - set(labelled)) for frame in FRAMES]
    return splits


def split_patients(patients: Sequence[str], seed: int) -> dict[str, list[str]]:
    """A random 70 / 10 / 20 % split by patient, as cases. Raises InputError for fewer than three patients."""
    if len(patients) < 3:
        raise InputError(f"{len(patients)} labelled patients cannot be split in three; convert more of them")
    val, test = max(1, len(patients) // 10), max(1, len(patients) // 5)
    order = random.Random(seed).sample(patients, len(patients))
    parts = {"val": order[:val], "test": order[val : val + test], "train": order[val + test :]}
    return {split: [f"{p}_{frame}" for p in part for frame in FRAMES] for split, part in parts.items()}


def frame_path(patients: dict[str, Path], case: str) -> Path:
    """The official image of a case such as patient001_frame02 (frame01: ED, frame02: ES, by Info.cfg).

    Raises InputError where the case's name, its patient, Info.cfg or the image is amiss.
    """
    patient, _, frame = case.partition("_")
    phase = dict(zip(FRAMES, ("ED", "ES"), strict=True)).get(frame)
    if phase is None or patient not in patients:
        raise InputError(f"{case}: no such case in the official data; correct the list that names it")
    number = read_phase(patients[patient] / "Info.cfg", phase)
    image = patients[patient] / f"{patient}_frame{number:02d}.nii.gz"
    if not image.is_file():
        raise InputError(f"{image}: no such file; unpack {patient} again")
    return image


def label_path(image: Path) -> Path:
    """The official segmentation beside an official image."""
    return image.with_name(image.name.replace(".nii.gz", "_gt.nii.gz"))


def read_phase(info: Path, phase: str) -> int:
    """The frame number of a phase (`ED` or `ES`) in Info.cfg. Raises InputError where it says none."""
    try:
        lines = info.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        return int(fields[phase])
    except (OSError, KeyError, ValueError):
        raise InputError(f"{info}: gives no frame number for {phase}; unpack this patient again") from None


def read_frame(path: Path, by_voxel: bool = False) -> tuple[Image, Label | None]:
    """One official frame: image (D, H, W) float32, min-max scaled to [0, 1], and its label, uint8, if it has one.

    by_voxel: as of `orientation.paired`.
    Raises InputError where the files are damaged, not 3D, of different shapes or places, constant, not finite or
    labelled outside 0 ... 3.
    """
    scan = read_nifti(path)
    image = scan.voxels
    if image.ndim != 3:
        raise InputError(f"{path}: shape {image.shape} where (X, Y, Z) was expected; unpack this patient again")
    low, high = image.min(), image.max()
    if not (np.isfinite(high - low) and high > low):
        raise InputError(f"{path}: intensities from {low} to {high} cannot be scaled; unpack this patient again")
    label = read_label(label_path(path), scan, by_voxel).T if label_path(path).is_file() else None
    return ((image - low) / (high - low)).astype(np.float32).T, label


def read_label(path: Path, image: Scan, by_voxel: bool) -> Label:
    """An official segmentation, uint8, voxel by voxel that of `image`. Raises InputError for labels outside 0 ... 3."""
    return class_indices(path, paired(image, read_nifti(path), by_voxel), range(NUM_CLASSES), NO_LABEL)


def read_nifti(path: Path) -> Scan:
    """The voxels of a NIfTI file, of version 1 or 2, in float64. Raises InputError where it cannot be read."""
    try:
        image = nibabel.load(path)
        if not isinstance(image, nibabel.Nifti1Image):  # of which version 2 is a subclass
            raise ImageFileError
        numbers = image.get_data_dtype()
        if numbers.kind in "iuf":
            return Scan(path, image.get_fdata(), _affines(image))
    except _DAMAGE as error:  # by type: nibabel's texts run over several lines
        raise InputError(f"{path}: not a readable NIfTI file ({type(error).__name__}); unpack it again") from None
    raise InputError(f"{path}: holds {numbers}, not real numbers; save it as integers or floats")


def _affines(image: nibabel.Nifti1Image) -> Sequence[np.ndarray]:
    """The header's affine, and another one with the same axes and the lengths of `pixdim`; none if it states neither.

    In ACDC the two differ: the lengths of the sform's axes are 1, those of `pixdim` are the spacing.
    """
    if not image.header["sform_code"] and not image.header["qform_code"]:
        return ()
    scaled, spacing = image.affine.copy(), image.header["pixdim"][1:4]
    if (spacing > 0).all() and voxel_sizes(scaled).all():
        scaled[:3, :3] *= spacing / voxel_sizes(scaled)
    return image.affine, scaled


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; bad input ends it with one line on standard error and exit status 1."""
    show_every_character()
    parser = argparse.ArgumentParser(description="Convert the official ACDC folders to the h5 layout.")
    parser.add_argument("official", type=Path, help="the folder with patient001, ..., or its parent")
    parser.add_argument("out", type=Path, help="where to write the h5 layout")
    parser.add_argument("--lists", type=Path, help="a folder with train.list, val.list and test.list")
    parser.add_argument("--seed", type=int, default=0, help="of the random split used without --lists")
    parser.add_argument("--by-voxel", action="store_true", help=BY_VOXEL)
    options = parser.parse_args(arguments)
    try:
        splits, unlabelled = convert(options.official, options.out, options.lists, options.seed, options.by_voxel)
    except InputError as error:
        sys.exit(f"error: {error}")
    print(f"{options.out}: {summary(splits, unlabelled)}")


if __name__ == "__main__":
    main()
