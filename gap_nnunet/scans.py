"""The scans in imagesUn: which there are, and whether nnU-Net would take them for what they are."""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .problems import Problems

FOLDER = "imagesUn"
LABELLED = "imagesTr"
THICK = 2.0  # a slice this many times thicker than its pixels are wide tells the axes of a scan apart

Cases = dict[str, list[str]]
"""The image files of each case, channel by channel."""


def read_dataset_json(raw: Path) -> dict[str, Any]:
    """The dataset's own description.

    Raises:
        Problems: there is none, it cannot be read, or it lacks what nnU-Net needs of it.
    """
    path = raw / "dataset.json"
    if not path.is_file():
        raise Problems(str(raw), [f"{path} is missing: nnU-Net's description of channels, labels and file ending."])
    try:
        described = json.loads(path.read_text())
    except ValueError as error:
        raise Problems(str(raw), [f"{path} is no JSON ({error}): mend it."]) from error
    missing = [key for key in ("labels", "file_ending") if key not in described]
    missing += [] if {"channel_names", "modality"} & {*described} else ["channel_names"]
    if missing:
        raise Problems(str(raw), [f"{path} has no {key!r}: see nnU-Net's dataset format." for key in missing])
    return dict(described)


def channels(dataset_json: Mapping[str, Any]) -> int:
    """How many a case has: a file each, but for colours, which nnU-Net reads from one."""
    return len(dataset_json["channel_names"] if "channel_names" in dataset_json else dataset_json["modality"])


def find(raw: Path, dataset_json: Mapping[str, Any]) -> Cases:
    """The cases in imagesUn, by their file names alone; none without that folder.

    Raises:
        Problems: a file of another ending or name than nnU-Net's, or a case that lacks channels: all of them at once.
    """
    folder, ending = raw / FOLDER, dataset_json["file_ending"]
    expected = _files_of_a_labelled_case(raw, ending) or channels(dataset_json)
    found: dict[str, dict[int, str]] = {}
    problems = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name.startswith(".") or (ending.startswith(".tif") and path.suffix == ".json"):
            continue  # a system's own files; the spacing beside a TIFF
        name = re.fullmatch(rf"(.+)_(\d{{4}}){re.escape(ending)}", path.name)
        if path.is_dir():
            problems.append(f"{path} is a folder: move the scans in it to {folder}.")
        elif not path.name.endswith(ending):
            problems.append(f"{path} does not end with {ending}, dataset.json's file_ending: convert it.")
        elif name is None:
            problems.append(f"{path} has no channel in its name: nnU-Net's names are CASE_0000{ending}, CASE_0001...")
        else:
            found.setdefault(name[1], {})[int(name[2])] = str(path)
    for case, files in found.items():
        absent = [f"{case}_{c:04d}{ending}" for c in range(expected) if c not in files]
        surplus = [Path(files[c]).name for c in files if c >= expected]
        if absent:
            problems.append(f"{folder / case} lacks channels: add {', '.join(absent)}, or take the case out.")
        if surplus:
            problems.append(
                f"{folder / case} has more channels than a labelled case's {expected}: {', '.join(surplus)}."
            )
    if problems:
        raise Problems(str(folder), problems)
    return {case: [files[c] for c in sorted(files)] for case, files in found.items()}


def _files_of_a_labelled_case(raw: Path, ending: str) -> int:
    """0 if there is none."""
    names = (re.fullmatch(rf".+_(\d{{4}}){re.escape(ending)}", path.name) for path in (raw / LABELLED).glob("*"))
    return len({name[1] for name in names if name})


def check_labels(labelled: Mapping[str, Mapping[str, Any]]) -> None:
    """nnU-Net takes all that is in imagesTr for labelled.

    Args:
        labelled: the files of each case, `images` and `label`.

    Raises:
        Problems: a label is missing.
    """
    problems = [
        f"{files['images'][0]} has no label, {files['label']}: add it, or move the scan to {FOLDER}."
        for files in labelled.values()
        if not Path(files["label"]).is_file()
    ]
    if problems:
        raise Problems(LABELLED, problems)


def check_apart(unlabelled: Cases, labelled: Cases) -> None:
    """No scan may be in both: it would be learnt from without its label, and validated on.

    Raises:
        Problems: the same case, or the same file under another name.
    """
    problems = [f"{unlabelled[case][0]} is in imagesTr, too: delete one." for case in unlabelled if case in labelled]
    known = {content: path for path, content in _contents(labelled, {_size(p) for p in _paths(unlabelled)})}
    for path, content in _contents(unlabelled, {_size(p) for p in _paths(labelled)}):
        if content in known and Path(path).name != Path(known[content]).name:
            problems.append(f"{path} is the same file as {known[content]}: delete one.")
    if problems:
        raise Problems(FOLDER, problems)


def _paths(cases: Cases) -> Iterator[str]:
    return (path for paths in cases.values() for path in paths)


def _size(path: str) -> int:
    return Path(path).stat().st_size


def _contents(cases: Cases, sizes: set[int]) -> Iterator[tuple[str, bytes]]:
    """Path and digest of the files of one of these sizes: only those could be another file's copy."""
    for path in _paths(cases):
        if _size(path) in sizes:
            yield path, hashlib.sha256(Path(path).read_bytes()).digest()


@dataclass(frozen=True)
class Labelled:
    """What the labelled scans have in common, of nnU-Net's fingerprint. Axes are as nnU-Net reads them."""

    channels: int
    flat: bool
    """Images of one slice."""
    thick_axis: int | None
    """Along which all have thick slices; None where they differ, or have none."""

    @classmethod
    def of(cls, fingerprint: Mapping[str, Any], channels: int) -> "Labelled":
        axes = {thick_axis(spacing) for spacing in fingerprint["spacings"]}
        flat = all(shape[0] == 1 for shape in fingerprint["shapes_after_crop"])
        return cls(channels, flat, axes.pop() if len(axes) == 1 else None)


def thick_axis(spacing: Iterable[float]) -> int | None:
    """The axis along which a scan's slices are thick, if they are."""
    mm = np.asarray([*spacing])
    axis = int(mm.argmax())
    return axis if mm[axis] >= THICK * np.delete(mm, axis).max() else None


def check_content(files: Sequence[str], reader: Any, labelled: Labelled) -> list[str]:
    """What is wrong with one case's images, each entry with a file's name; empty if nothing is."""
    if any(map(_damaged, files)):
        return [f"{path} is cut off or damaged: replace it." for path in files if _damaged(path)]
    try:
        images, properties = reader.read_images(files)
    except Exception:  # whatever a reader raises: the next lines find out which file it is
        return [*_unreadable(files, reader)] or [f"{', '.join(files)} differ in shape or spacing: resample them alike."]
    first, spacing = files[0], [float(mm) for mm in properties["spacing"]]
    problems = []
    if len(images) != labelled.channels:
        problems.append(f"{first} holds {len(images)} images for {labelled.channels} channels: split it.")
    if not np.isfinite(images).all():
        problems.append(f"{first} holds NaN or infinite values: replace them.")
    elif not images.any():
        problems.append(f"{first} is 0 everywhere: take it out.")
    if (images.shape[1] == 1) != labelled.flat:
        ours, theirs = ("one slice", "volumes") if images.shape[1] == 1 else ("a volume", "of one slice")
        problems.append(f"{first} is {ours}, the labelled scans are {theirs}: convert it, or take it out.")
    axis = thick_axis(spacing)
    if None not in (axis, labelled.thick_axis) and axis != labelled.thick_axis:
        problems.append(
            f"{first} has its thick slices along axis {axis} (spacing {spacing}, as nnU-Net reads it), the "
            f"labelled scans along axis {labelled.thick_axis}: store it in their orientation."
        )
    return problems


def _damaged(path: str) -> bool:
    """Whether a compressed file lacks its end: SimpleITK reads as much as there is, and says nothing."""
    if not path.endswith(".gz"):
        return False
    try:
        with gzip.open(path) as file:
            while file.read(2**24):
                pass
    except (EOFError, OSError, zlib.error):
        return True
    return False


def _unreadable(files: Sequence[str], reader: Any) -> Iterator[str]:
    for path in files:
        try:
            reader.read_images([path])
        except Exception as error:
            reason = str(error).strip().splitlines()
            yield f"{path} cannot be read ({reason[-1] if reason else type(error).__name__}): replace it."
