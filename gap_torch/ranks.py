"""The ranks of a process group compare notes, so that a mistake of one rank is an error on all ranks and not a hang."""

import zlib
from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist

from .knobs import KEYS


def check_together(
    group: "dist.ProcessGroup", check: Callable[[], object], param_groups: Iterable[dict[str, Any]]
) -> None:
    """Run `check` on every rank of `group`, and compare what the ranks are to optimize. One small gather.

    Args:
        group: process group whose ranks all call this function.
        check: raises where something is wrong.
        param_groups: the optimizer's; number, shapes and dtypes of the parameters and GAP's knobs are compared.

    Raises:
        RuntimeError: on every rank, where `check` failed on any rank or the groups differ; and where a rank does not
            come within the group's time-out.
        Exception: what `check` raised here.
    """
    problem: Exception | None = None
    try:
        check()
    except Exception as error:
        problem = error
    try:
        notes = _gather(group, (problem and str(problem), _fingerprint(param_groups)))
    except RuntimeError as error:
        raise error from (problem or error.__cause__)
    if problem is not None:
        raise problem
    for rank, (theirs, _) in enumerate(notes):
        if theirs is not None:
            raise RuntimeError(f"first_step() failed on rank {rank} of the process group, where it said: {theirs}")
    if len({fingerprint for _, fingerprint in notes}) > 1:
        found = "; ".join(f"rank {rank}: {fingerprint}" for rank, (_, fingerprint) in enumerate(notes))
        raise RuntimeError(f"first_step(): the ranks' optimizers differ. {found}.")


def _gather(group: "dist.ProcessGroup", note: Any) -> list[Any]:
    notes: list[Any] = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(notes, note, group)
    except RuntimeError as error:
        raise RuntimeError(
            f"first_step(): the ranks of the process group could not compare notes ({error}). Every rank must call "
            "first_step() in the same iterations."
        ) from error
    return notes


def _fingerprint(param_groups: Iterable[dict[str, Any]]) -> str:
    """A text that is equal where knobs are equal, and shapes and dtypes of the parameters, in order, are too."""
    groups = list(param_groups)
    looks = [(tuple(p.shape), str(p.dtype)) for group in groups for p in group["params"]]
    knobs = [[group[key] for key in KEYS if isinstance(group.get(key), (int, float))] for group in groups]
    return f"{len(looks)} tensors (shapes and dtypes {zlib.crc32(repr(looks).encode()):08x}), eps, alpha ... {knobs}"
