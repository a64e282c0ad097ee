"""The processes of a run: one, or several that torchrun has started and that work as one.

Every rank takes the same way through the program; rank 0 alone writes and speaks. With one process nothing here does
anything, and no process group is made.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from segmentation.errors import InputError, UserError

S = TypeVar("S")
T = TypeVar("T")
P = ParamSpec("P")

PATIENCE = timedelta(days=1)
"""How long a rank waits for another. By default half an hour over gloo, which rank 0 may need to draw pictures of large
volumes; where one dies, torchrun ends the others."""


@contextmanager
def joined() -> Iterator[None]:
    """Within it, the processes of one torchrun are ranks of one group, and all but rank 0 print nothing."""
    if not (dist.is_available() and "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1):
        yield
        return
    # Objects and flags go over gloo even where gradients go over NCCL, so that asking for one does not wait for a GPU.
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=PATIENCE)
    with _silent_but_for_main():
        yield
    # Not after an exception: NCCL would wait for the other ranks, and nobody would see what has happened.
    dist.destroy_process_group()


def exit_status(program: Callable[[], object]) -> int:
    """Run `program` on the processes of one torchrun, as one: the door through which a command line goes.

    Returns:
        0; 2 for a UserError, which is printed on one line; 130 for Ctrl-C.
    """
    with joined():
        try:
            program()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            gathered(None)  # torchrun ends all when the first one ends, which must not be before this is out
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
    return 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return dist.get_rank() if world() > 1 else 0


def is_main() -> bool:
    """Is this the one that writes and speaks?"""
    return rank() == 0


def usable_device(name: str | None) -> torch.device:
    """The device called `name`, or the best one here; one GPU a rank. Raises InputError if it can't be used."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?|mps|xpu", name):
        raise InputError(f"--device {name!r}: not one of cpu, cuda, cuda:0, cuda:1 ..., mps and xpu.")
    try:
        device = own_device(torch.device(name))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):  # their texts run over several lines
        raise InputError(f"--device {name}: there is none here that this PyTorch can use; try --device cpu.") from None
    return device


def own_device(device: torch.device) -> torch.device:
    """`device`; for one of several ranks on GPUs, its own GPU, made the current one.

    Raises:
        InputError: the ranks can't work together on `device`.
    """
    if world() == 1 or device == torch.device("cpu"):
        return device
    if device != torch.device("cuda"):
        raise InputError(f"--device {device}: {world()} processes can work on `cpu` or, one on each GPU, on `cuda`.")
    index = int(os.environ["LOCAL_RANK"])
    if 0 < torch.cuda.device_count() <= index:
        raise InputError(f"--device cuda: more processes than GPUs ({torch.cuda.device_count()}); start one for each.")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def stacked(tensor: Tensor) -> Tensor:
    """`tensor` of every rank, alike in shape and dtype, as (world, *shape). Without gradient."""
    if world() == 1:
        return tensor.detach().unsqueeze(0)
    tensor = tensor.detach().contiguous()
    parts = [torch.empty_like(tensor) for _ in range(world())]
    dist.all_gather(parts, tensor)
    return torch.stack(parts)


def gathered(value: T) -> list[T]:
    """`value` of every rank, in their order; anything that can be pickled."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def same(value: object) -> bool:
    """Is `value` equal on all of them?"""
    values = gathered(value)
    return all(theirs == values[0] for theirs in values)


def any_rank(flag: bool) -> bool:
    """Is `flag` set on one of them?"""
    return bool(stacked(torch.tensor(flag)).any())


def together(work: Callable[P, T]) -> Callable[P, T]:
    """`work`, which gives what it makes on a rank once it is done on every one. A UserError on any is raised on all."""

    @wraps(work)
    def on_all(*args: P.args, **kwargs: P.kwargs) -> T:
        if world() == 1:
            return work(*args, **kwargs)
        results: list[T] = []
        problem: UserError | None = None
        try:
            results.append(work(*args, **kwargs))
        except UserError as error:
            problem = error
        for theirs in gathered(problem):
            if theirs is not None:
                raise theirs
        return results[0]

    return on_all


def on_main(work: Callable[P, object]) -> Callable[P, None]:
    """`work`, done on rank 0 alone; the others wait, and raise its UserError with it."""

    @together
    @wraps(work)
    def there(*args: P.args, **kwargs: P.kwargs) -> None:
        if is_main():
            work(*args, **kwargs)

    return there


def shared_out(work: Callable[[S], T], items: Sequence[S]) -> list[T]:
    """`work(item)` for all `items`, in their order, each done on one rank alone. Errors as in `together`."""
    mine = together(lambda: [work(item) for item in items[rank() :: world()]])()
    parts = gathered(mine)
    return [parts[i % world()][i // world()] for i in range(len(items))]


@contextmanager
def _silent_but_for_main() -> Iterator[None]:
    """An exception that nobody catches is still reported: it leaves the context first."""
    if is_main():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield
