"""From the official ACDC folders (NIfTI) to the community's h5 layout that `data.py` reads.

    PYTHONPATH=examples python -m segmentation.convert_acdc OFFICIAL_DIR OUT [--lists DIR]

What the shared h5 files hold, measured on all 1312 slices and 60 volumes, and kept here:
- Intensities are min-max scaled over a whole frame, not slice by slice: every volume spans exactly
  [0, 1], single slices do not (their maxima go down to 0.14).
- Axes are (D, H, W), the reverse of NIfTI's (X, Y, Z); slices are numbered from 1.
- `frame01` is end-diastole and `frame02` end-systole, whatever the official frame numbers are.
- Training cases lie there as slices, validation and test cases as volumes.
"""

import argparse
import random
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from .data import Image, Label, check_patients, read_list, write_case, write_list
from .errors import InputError
from .slices import volume_path, write_slices

NUM_CLASSES = 4
SPLITS = ("train", "val", "test")

# What nibabel and gzip raise for a damaged file, by the place of the damage.
_DAMAGE = (ImageFileError, HeaderDataError, WrapStructError, OSError, EOFError, ValueError, zlib.error)


def convert(official: Path, out: Path, lists: Path | None = None, seed: int = 0) -> None:
    """Write `out` in the h5 layout, its four list files last.

    official: the folder that holds patient001, ..., or its parent with a `training` folder.
    lists: a folder whose train.list, val.list and test.list name the cases of each split; without it the
    patients are split 70 / 10 / 20 % at random from `seed`.
    Raises InputError for a folder, file or name that is missing or does not fit, naming it.
    """
    patients = find_patients(official)
    splits = read_splits(lists) if lists else split_patients(sorted(patients), seed)
    cases = [case for split in SPLITS for case in splits[split]]
    frames = {case: frame_path(patients, case) for case in cases}  # a missing one shows before the long work
    slices = [name for case in splits["train"] for name in write_slices(out, case, *read_frame(frames[case]))]
    for case in splits["val"] + splits["test"]:
        write_case(volume_path(out, case), *read_frame(frames[case]))
    for split in SPLITS:
        write_list(out / f"{split}.list", splits[split])
    write_list(out / "train_slices.list", slices)


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


def split_patients(patients: Sequence[str], seed: int) -> dict[str, list[str]]:
    """A random 70 / 10 / 20 % split by patient, as cases. Raises InputError for fewer than three patients."""
    if len(patients) < 3:
        raise InputError(f"{len(patients)} patients cannot be split in three; convert more of them")
    val, test = max(1, len(patients) // 10), max(1, len(patients) // 5)
    order = random.Random(seed).sample(patients, len(patients))
    parts = {"val": order[:val], "test": order[val : val + test], "train": order[val + test :]}
    return {split: [f"{p}_frame{f}" for p in part for f in ("01", "02")] for split, part in parts.items()}


def frame_path(patients: dict[str, Path], case: str) -> Path:
    """The official image of a case such as patient001_frame02 (frame01: ED, frame02: ES, by Info.cfg).

    Raises InputError where the case's name, its patient, Info.cfg or one of the two files is amiss.
    """
    patient, _, frame = case.partition("_")
    phase = {"frame01": "ED", "frame02": "ES"}.get(frame)
    if phase is None or patient not in patients:
        raise InputError(f"{case}: no such case in the official data; correct the list that names it")
    number = read_phase(patients[patient] / "Info.cfg", phase)
    image = patients[patient] / f"{patient}_frame{number:02d}.nii.gz"
    for path in (image, label_path(image)):
        if not path.is_file():
            raise InputError(f"{path}: no such file; unpack {patient} again")
    return image


def label_path(image: Path) -> Path:
    """The official segmentation beside an official image."""
    return image.with_name(image.name.replace(".nii.gz", "_gt.nii.gz"))


def read_phase(info: Path, phase: str) -> int:
    """The frame number of a phase (`ED` or `ES`) in Info.cfg. Raises InputError where it says none."""
    try:
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        return int(fields[phase])
    except (OSError, KeyError, ValueError):
        raise InputError(f"{info}: gives no frame number for {phase}; unpack this patient again") from None


def read_frame(path: Path) -> tuple[Image, Label]:
    """One official frame: image (D, H, W) float32, min-max scaled to [0, 1], and its label, uint8.

    Raises InputError where the files are damaged, not 3D, of different shapes, constant, not finite or
    labelled outside 0 ... 3.
    """
    image, label = read_nifti(path), read_nifti(label_path(path))
    if image.ndim != 3 or image.shape != label.shape:
        raise InputError(f"{path}: shapes {image.shape} and {label.shape} of image and label; both must be (D, H, W)")
    low, high = image.min(), image.max()
    if not (np.isfinite(high - low) and high > low):
        raise InputError(f"{path}: intensities from {low} to {high} cannot be scaled; unpack this patient again")
    if not np.isin(label, np.arange(NUM_CLASSES)).all():
        raise InputError(f"{label_path(path)}: labels outside 0 ... {NUM_CLASSES - 1}; is it an ACDC label?")
    return ((image - low) / (high - low)).astype(np.float32), label.astype(np.uint8)


def read_nifti(path: Path) -> np.ndarray:
    """A NIfTI file's array in float64, axes reversed: (X, Y, Z) becomes (D, H, W)."""
    try:
        return nibabel.Nifti1Image.from_filename(path).get_fdata().T
    except _DAMAGE as error:  # by type: nibabel's texts run over several lines
        raise InputError(f"{path}: not a readable NIfTI file ({type(error).__name__}); unpack it again") from None


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; bad input ends it with one line on standard error and exit status 1."""
    parser = argparse.ArgumentParser(description="Convert the official ACDC folders to the h5 layout.")
    parser.add_argument("official", type=Path, help="the folder with patient001, ..., or its parent")
    parser.add_argument("out", type=Path, help="where to write the h5 layout")
    parser.add_argument("--lists", type=Path, help="a folder with train.list, val.list and test.list")
    parser.add_argument("--seed", type=int, default=0, help="of the random split used without --lists")
    options = parser.parse_args(arguments)
    try:
        convert(options.official, options.out, options.lists, options.seed)
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
