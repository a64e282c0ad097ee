"""The ranks of a process group compare notes, so that a mistake of one is an error on all and not a hang."""

import zlib
from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor


def check_together(group: "dist.ProcessGroup", check: Callable[[], None], params: Iterable[Tensor]) -> None:
    """Run `check` on every rank of `group`, and compare their parameters. One small gather.

    Args:
        group: all of its ranks call this.
        check: raises RuntimeError where something is wrong.
        params: parameters, of which number, shapes and dtypes are compared.

    Raises:
        RuntimeError: on every rank, where `check` failed on any or the parameters differ; and where a rank does not
            come within the group's time-out.
    """
    problem: RuntimeError | None = None
    try:
        check()
    except RuntimeError as error:
        problem = error
    notes = _gather(group, (problem and str(problem), _fingerprint(params)))
    if problem is not None:
        raise problem
    for rank, (theirs, _) in enumerate(notes):
        if theirs is not None:
            raise RuntimeError(f"first_step() failed on rank {rank} of the process group, where it said: {theirs}")
    if len({fingerprint for _, fingerprint in notes}) > 1:
        found = ", ".join(f"rank {rank} {fingerprint}" for rank, (_, fingerprint) in enumerate(notes))
        raise RuntimeError(f"first_step(): the ranks' optimizers hold different parameters: {found}.")


def _gather(group: "dist.ProcessGroup", note: Any) -> list[Any]:
    notes: list[Any] = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(notes, note, group)
    except RuntimeError as error:
        raise RuntimeError(
            "first_step(): another rank of the process group did not come within the group's time-out, or has "
            "stopped: every rank must call first_step() in the same iterations."
        ) from error
    return notes


def _fingerprint(params: Iterable[Tensor]) -> str:
    """The same text for the same shapes and dtypes in the same order."""
    looks = [(tuple(p.shape), str(p.dtype)) for p in params]
    return f"{len(looks)} tensors (shapes and dtypes: {zlib.crc32(repr(looks).encode()):08x})"
