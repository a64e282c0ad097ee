"""From the 2018 Left Atrial Segmentation Challenge's folders (NRRD) to the community's h5 layout of LA.

    python -m segmentation.data.convert_la SOURCE OUT [--train LIST --test LIST] [--margin 25]

- Intensities get zero mean and unit variance over the whole scan, before it is cut.
- In X and Y the scan is cut to the label's box and a margin around it, or to 112 voxels where that is less; all slices
  are kept.
- Axes are NRRD's own, (X, Y, Z).
The community's shared files were made in the same way with narrower margins, of 10 to 19 voxels drawn anew for each
side (measured on all 100 of them): for its numbers take its files.

The cut needs the label, of test cases too: what is measured on such files is segmentation of an atrium already found.
A training case without a label is written with its image alone, whole.
"""

import argparse
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nrrd
import numpy as np
from rich.console import Console
from rich.progress import track

from segmentation.data.conversion import BY_VOXEL, NO_LABEL, require_labels, summary
from segmentation.data.crops import case_path
from segmentation.data.files import Image, Label, check_patients, class_indices, read_list, write_case, write_list
from segmentation.data.orientation import Scan, paired
from segmentation.errors import InputError
from segmentation.printing import show_every_character

IMAGE, LABEL = "lgemri.nrrd", "laendo.nrrd"
LABEL_VALUES = (0, 1, 255)  # the challenge writes 255, some tools 1
MARGIN = 25  # voxels around the label in X and Y
CROP = 112  # the field's crop in X and Y, which the cut leaves room for
TRAIN_SHARE = 0.8
# NRRD's names of the axes of space, and their signs as seen from right, anterior and superior
SPACES = {
    **dict.fromkeys(("right-anterior-superior", "ras"), (1, 1, 1)),
    **dict.fromkeys(("left-anterior-superior", "las"), (-1, 1, 1)),
    **dict.fromkeys(("left-posterior-superior", "lps"), (-1, -1, 1)),
}

# What pynrrd and the decompressors raise for a damaged file, by the place of the damage.
_DAMAGE = (nrrd.NRRDError, OSError, EOFError, StopIteration, LookupError, ValueError, TypeError, zlib.error)


def convert(
    source: Path,
    out: Path,
    lists: tuple[Path, Path] | None = None,
    margin: int = MARGIN,
    by_voxel: bool = False,
) -> tuple[dict[str, list[str]], list[str]]:
    """Write `out` in the h5 layout, its two list files last; returns the cases of each split, and those unlabelled.

    source: the folder that holds a folder for each case.
    lists: files that name the training and the test cases; without them the cases are split in order of name, and
    those without a label go to the end of the training list.
    margin: voxels to keep around the label in X and Y.
    by_voxel: whether image and label are paired as they are stored, whatever their headers say.
    An interrupted run is repeated: every file is written under its name only once it is whole.
    Raises InputError for a folder, file or name that is missing or does not fit, naming it.
    """
    if margin < 0:
        raise InputError(f"margin {margin} is below 0; give 0 or more voxels")
    folders = find_cases(source)
    splits = read_splits(lists) if lists else split_by_labels(folders)
    cases = [case for names in splits.values() for case in names]
    for case in cases:  # a missing one shows before the long work
        check_case(folders, case)
    labels = {case: folders[case] / LABEL for case in cases}
    require_labels(labels, splits["test"])
    for case in track(cases, "Converting", console=Console(stderr=True), transient=True):
        image, label = read_scan(folders[case], by_voxel)
        write_case(case_path(out, case), *((image, None) if label is None else cut(image, label, margin)))
    for split, names in splits.items():
        write_list(out / f"{split}.list", names)
    return splits, [case for case in cases if not labels[case].is_file()]


def find_cases(source: Path) -> dict[str, Path]:
    """Each case's folder by the case's name. Raises InputError where there is none."""
    files = (path for name in (IMAGE, LABEL) for path in source.glob(f"*/{name}"))
    folders = {path.parent.name: path.parent for path in files}
    if not folders:
        raise InputError(f"{source}: holds no folder with {IMAGE}; give the challenge's unpacked training set")
    return folders


def read_splits(lists: tuple[Path, Path]) -> dict[str, list[str]]:
    """The cases of each split from list files. Raises InputError for a case that is in both of them."""
    splits = {split: read_list(path) for split, path in zip(("train", "test"), lists, strict=True)}
    try:
        check_patients(splits, patient=str)  # a folder is a case; the task knows more of its patients
    except InputError as error:
        raise InputError(f"{lists[0]} and {lists[1]}: {error}") from None
    return splits


def split_by_labels(folders: dict[str, Path]) -> dict[str, list[str]]:
    """`split_cases` of those with a label; the others are training cases behind the labelled ones."""
    labelled = [case for case in sorted(folders) if (folders[case] / LABEL).is_file()]
    splits = split_cases(labelled)
    splits["train"] += sorted(folders.keys() - set(labelled))
    return splits


def split_cases(cases: Sequence[str]) -> dict[str, list[str]]:
    """The first 80 % and the rest: not the field's split. Raises InputError for fewer than two cases."""
    if len(cases) < 2:
        raise InputError(f"{len(cases)} labelled case cannot be split in two; convert more of them")
    train = max(1, int(len(cases) * TRAIN_SHARE))
    return {"train": list(cases[:train]), "test": list(cases[train:])}


def check_case(folders: dict[str, Path], case: str) -> None:
    """Raise InputError where a listed case, or its image, is missing."""
    if case not in folders:
        raise InputError(f"{case}: no such case in the challenge's data; correct the list that names it")
    if not (folders[case] / IMAGE).is_file():
        raise InputError(f"{folders[case] / IMAGE}: no such file; unpack this case again")


def read_scan(folder: Path, by_voxel: bool = False) -> tuple[Image, Label | None]:
    """A whole scan: image (X, Y, Z) float32 of zero mean and unit variance, and its label uint8 in {0, 1}, if any.

    by_voxel: as of `orientation.paired`.
    Raises InputError where the files are damaged, not 3D, of different shapes or places, constant or not finite, or
    where the label is empty or no label.
    """
    scan = read_nrrd(folder / IMAGE)
    image = scan.voxels
    if image.ndim != 3:
        raise InputError(f"{folder / IMAGE}: shape {image.shape} where (X, Y, Z) was expected; unpack this case again")
    low, high = float(image.min()), float(image.max())
    if not (np.isfinite(high - low) and high > low):
        raise InputError(f"{folder / IMAGE}: intensities from {low} to {high} cannot be scaled; unpack this case again")
    label = read_label(folder / LABEL, scan, by_voxel) if (folder / LABEL).is_file() else None
    image = (image - image.mean(dtype=np.float64)) / image.std(dtype=np.float64)
    return image.astype(np.float32), label


def read_label(path: Path, image: Scan, by_voxel: bool) -> Label:
    """The challenge's label as uint8 in {0, 1}, voxel by voxel that of `image`.

    Raises InputError if it is empty, or no label.
    """
    label = class_indices(path, paired(image, read_nrrd(path), by_voxel), LABEL_VALUES, NO_LABEL)
    if not label.any():
        raise InputError(f"{path}: the label is empty, so there is nothing to cut to; {NO_LABEL}")
    return (label > 0).astype(np.uint8)


def read_nrrd(path: Path) -> Scan:
    """An NRRD file's voxels with their axes in the file's order. Raises InputError where it cannot be read."""
    try:
        array, header = nrrd.read(str(path))
        affines, space = _affines(header), str(header.get("space", "")).lower()
    except _DAMAGE as error:  # by type: the texts of pynrrd and zlib say little about the file
        raise InputError(f"{path}: not a readable NRRD file ({type(error).__name__}); unpack it again") from None
    if array.dtype.kind not in "iuf":
        raise InputError(f"{path}: holds {array.dtype}, not real numbers; save it as integers or floats")
    return Scan(path, array, affines, "RAS" if space in SPACES else space)


def _affines(header: Mapping[str, Any]) -> Sequence[np.ndarray]:
    """Of the header: towards right, anterior and superior if it names its space; none if it states no directions."""
    directions = header.get("space directions")  # an axis a row
    spacings = np.asarray(header.get("spacings", ()))
    if directions is None and spacings.shape == (3,):
        directions = np.diag(spacings)
    if directions is None or np.shape(directions) != (3, 3):
        return ()
    affine = np.eye(4)
    affine[:3, :3] = np.transpose(directions)
    affine[:3, 3] = header.get("space origin", np.zeros(3))
    signs = SPACES.get(str(header.get("space", "")).lower(), (1, 1, 1))
    return [np.diag([*signs, 1]) @ affine]


def cut(image: Image, label: Label, margin: int) -> tuple[Image, Label]:
    """Image and label around the label: its box in X and Y, `margin` voxels about it, `CROP` at least; all of Z.

    Nothing is kept beyond the border of the scan.
    """
    window = []
    for axis in (0, 1):
        inside = np.nonzero(label.any(axis=tuple({0, 1, 2} - {axis})))[0]
        first, end = int(inside[0]), int(inside[-1]) + 1
        room = 2 * margin + max(CROP - (end - first) - 2 * margin, 0)
        start = first - room // 2
        window.append(slice(max(start, 0), end + room - room // 2))
    return image[tuple(window)], label[tuple(window)]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; bad input ends it with one line on standard error and exit status 1."""
    show_every_character()
    parser = argparse.ArgumentParser(description="Convert the 2018 atrial challenge's folders to the h5 layout of LA.")
    parser.add_argument("source", type=Path, help=f"the folder with CASE/{IMAGE} and CASE/{LABEL}")
    parser.add_argument("out", type=Path, help="where to write the h5 layout")
    parser.add_argument("--train", type=Path, help="a list of the training cases; the field's is shared with its code")
    parser.add_argument("--test", type=Path, help="a list of the test cases")
    parser.add_argument(
        "--margin", type=int, default=MARGIN, help=f"voxels around the label in X and Y (default: {MARGIN})"
    )
    parser.add_argument("--by-voxel", action="store_true", help=BY_VOXEL)
    options = parser.parse_args(arguments)
    if (options.train is None) != (options.test is None):
        parser.error("--train and --test go together: give both lists, or neither for a split of 80 / 20 %")
    lists = (options.train, options.test) if options.train else None
    try:
        splits, unlabelled = convert(options.source, options.out, lists, options.margin, options.by_voxel)
    except InputError as error:
        sys.exit(f"error: {error}")
    print(f"{options.out}: {summary(splits, unlabelled)}")
    if not lists:
        print("Split in order of name: not the field's split.")


if __name__ == "__main__":
    main()
