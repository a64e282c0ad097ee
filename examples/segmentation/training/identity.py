"""What two runs must have in common for one to go on where the other stopped."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from segmentation.errors import OldRunError
from segmentation.methods import ENTRIES
from segmentation.recipe import BEFORE, Recipe

Identity = dict[str, Any]


def identity(
    task: str,
    recipe: Recipe,
    patients: Sequence[str],
    amp: torch.dtype | None,
    lists: Mapping[str, Sequence[str]],
    compiled: bool = False,
) -> Identity:
    """Everything that decides a run's result but the hardware, as plain values for a checkpoint.

    Args:
        task: name of the data set.
        recipe: what is run.
        patients: the labelled ones.
        amp: autocast dtype.
        lists: the names in each list file, in order.
        compiled: whether `torch.compile` makes the training passes: it rounds and draws dropout masks in its own way.
    """
    arithmetic = {"amp": str(amp), "compiled": compiled}
    return {"data set": task, **recipe.to_dict(), "labelled patients": list(patients), **arithmetic, **digests(lists)}


def digests(lists: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Of the names in each list file, in order: file -> a few hexadecimal digits."""
    return {f"{name}.list": _digest(names) for name, names in lists.items()}


def require_same(path: Path, theirs: Any, ours: Identity) -> None:
    """Raise OldRunError, naming the first difference, unless the checkpoint at `path` is of this very run."""
    if not isinstance(theirs, Mapping):
        raise OldRunError(f"{path}: does not say which run it is of", "choose another --out")
    options = {**ENTRIES[ours["method"]].options, **theirs.get("options", {})}  # there may have been fewer
    theirs = {**BEFORE, **theirs, "options": options}
    for key, value in ours.items():
        found = theirs.get(key)
        if found != value:
            raise OldRunError(
                f"{path}: was made with {key}={found}, this run has {key}={value}",
                "run it as before, or choose another --out",
            )


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]
