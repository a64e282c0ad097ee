"""What the converters have in common."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from segmentation.errors import InputError

NO_LABEL = "mend it, or take it away if this case is to train without a label"
"""What to do about a label file that can't be used."""
BY_VOXEL = "pair image and label as they are stored, whatever their headers say"
"""What `--by-voxel` does."""
NAMED = 5
"""Cases without a label that `summary` names."""


def require_labels(paths: Mapping[str, Path], scored: Sequence[str]) -> None:
    """Raise InputError for the first case of `scored` of which the label, at `paths[case]`, is missing."""
    for case in scored:
        if not paths[case].is_file():
            raise InputError(
                f"{paths[case]}: no such file; training cases alone need no label: "
                f"unpack {case} again, or move it to the training list"
            )


def summary(splits: Mapping[str, Sequence[str]], unlabelled: Sequence[str]) -> str:
    """How many cases each split has, and which have no label."""
    *first, last = (f"{len(names)} {split}" for split, names in splits.items())
    counts = f"{', '.join(first)} and {last} cases"
    if not unlabelled:
        return counts
    names = ", ".join(unlabelled[:NAMED]) + ", ..." * (len(unlabelled) > NAMED)
    return f"{counts}; {len(unlabelled)} of them without a label, as images alone: {names}"
