"""Norm, backup with perturbation, and restoration of CUDA tensors in one Triton launch each.

As `multi_tensor`, which takes over whatever the kernels can't: tensors elsewhere, complex ones, with gaps in memory, or
of a subclass. Theta is read once for the copy and the perturbation, so that memory sees the least that is possible: 7
transfers of the parameters' size.

Not to be called while a CUDA graph is being captured: the tables of addresses come from the host's memory, which will
have changed by the time of a replay.
"""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import multi_tensor
from .multi_tensor import arithmetic, is_dense, same_order, to_device
from .sharding import PLAIN

# What `GAPWrapper(fused=None)` does. No GPU has run these kernels yet: `benchmarks/overhead.py --device cuda`, with
# both paths side by side, is to decide.
BY_DEFAULT = False
DEVICES = {"cuda"}
DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
Row = tuple[Tensor, ...]
Moved = tuple[Sequence[Tensor], Sequence[Tensor]]
"""Parameters at theta*, and the copies of their theta."""


def available() -> bool:
    """Whether Triton is installed. It comes with torch's builds for CUDA on Linux."""
    return find_spec("triton") is not None


def chosen(fused: bool | None, foreach: bool) -> bool:
    """Whether `GAPWrapper` with these arguments is to use the kernels.

    Raises:
        ValueError: they contradict each other.
        RuntimeError: fused, without Triton.
    """
    if fused is None:
        return BY_DEFAULT and foreach and available()
    if fused and not foreach:
        raise ValueError("fused=True and foreach=False contradict each other: choose one.")
    if fused and not available():
        raise RuntimeError("fused=True needs Triton, which is not installed (pip install triton): leave it out.")
    return fused


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norm of all `tensors`, as `multi_tensor.global_norm`. Two launches for all of one device and dtype."""
    batches, rest = _split([(tensor,) for tensor in tensors])
    by_device: dict[torch.device, list[_Batch]] = defaultdict(list)
    for batch in batches:
        by_device[batch.device].append(batch)
    norms = [_norm(device, of_device) for device, of_device in by_device.items()]
    if rest:
        norms.append(multi_tensor.global_norm([tensor for (tensor,) in rest]))
    return to_device(norms[0] if len(norms) == 1 else multi_tensor.global_norm(norms), tensors[0].device)


def backup_and_perturb(
    params: Sequence[Tensor],
    copies: Sequence[Tensor],
    grads: Sequence[Tensor],
    norm: Tensor,
    eps: float | Tensor,
    moved: list[Moved],
) -> None:
    """`multi_tensor.backup` and `multi_tensor.perturb` in one.

    Args:
        params: tensors of theta, no two of which share memory (`disjoint`).
        copies: memory for theta, of the same shapes and dtypes.
        grads: g1.
        norm: ||g1||, 0-dim.
        eps: radius of the perturbation.
        moved: takes in what has moved, as it does, so that the caller can put it back if this raises.
    """
    batches, rest = _split(list(zip(params, copies, grads, strict=True)))
    if rest:
        theta, memory, g1 = zip(*rest, strict=True)
        multi_tensor.backup(theta, memory)
        moved.append((theta, memory))
        multi_tensor.perturb(theta, g1, norm, eps)
    for batch in batches:
        _backup_and_perturb(batch, norm, eps)
        # Right after the launch: sooner, and a launch that fails would be undone from copies that were not written. (A
        # KeyboardInterrupt in the last lines of Triton's launcher would still be missed.)
        moved.append((batch.lists[0], batch.lists[1]))
        _tell_autograd(batch.lists[0])


def restore(params: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
    """As `multi_tensor.restore`."""
    batches, rest = _split(list(zip(params, copies, strict=True)))
    for batch in batches:
        with _on(batch.device):
            _kernels().copy[batch.grid](*batch.addresses, *batch.tables, TYPE=_type(batch.dtypes[0]), **batch.options)
        _tell_autograd(batch.lists[0])
    if rest:
        theta, memory = zip(*rest, strict=True)
        multi_tensor.restore(theta, memory)


def disjoint(tensors: Sequence[Tensor]) -> bool:
    """Whether no two of `tensors` share memory. If they do, one must not move before the other has been copied."""
    return _disjoint(tuple((t.data_ptr(), t.data_ptr() + _extent(t) * t.element_size()) for t in tensors if t.numel()))


class _Batch(NamedTuple):
    """What one launch takes."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    lists: list[tuple[Tensor, ...]]
    """All parameters, all copies, and so on,"""
    addresses: list[Tensor]
    """where each of them lies,"""
    tables: tuple[Tensor, Tensor, Tensor]
    """and their sizes, owners and starts."""
    options: dict[str, Any]

    @property
    def grid(self) -> tuple[int]:
        """As many programs as there are blocks."""
        return (self.tables[1].numel(),)


def _split(rows: Sequence[Row]) -> tuple[list[_Batch], list[Row]]:
    """The `rows` that the kernels take, by device and dtypes, and the rest. A row: see `_take`."""
    alike: dict[tuple[torch.device, tuple[torch.dtype, ...]], list[Row]] = defaultdict(list)
    rest = []
    for row in rows:
        if _take(row):
            alike[row[0].device, tuple([tensor.dtype for tensor in row])].append(row)
        else:
            rest.append(row)
    return [_batch(device, dtypes, group) for (device, dtypes), group in alike.items()], rest


def _batch(device: torch.device, dtypes: tuple[torch.dtype, ...], rows: list[Row]) -> _Batch:
    lists = list(zip(*rows, strict=True))
    addresses = [tuple([tensor.data_ptr() for tensor in tensors]) for tensors in lists]
    block, stream = _kernels().BLOCK, _stream(device)
    options = {
        "ALIGNED": all(address % 16 == 0 for column in addresses for address in column),
        "BLOCK": block,
        **_kernels().LAUNCH,
    }
    sizes = tuple([tensor.numel() for tensor in lists[0]])
    tables = _blocks(sizes, block, device, stream)
    return _Batch(device, dtypes, lists, [_table(column, device, stream) for column in addresses], tables, options)


def _norm(device: torch.device, batches: list[_Batch]) -> Tensor:
    counts = [batch.grid[0] for batch in batches]
    sums = torch.empty(sum(counts), dtype=torch.float64, device=device)
    norm = torch.empty((), dtype=torch.float64, device=device)
    with _on(device):
        for batch, part in zip(batches, sums.split(counts), strict=True):
            _kernels().squares[batch.grid](
                *batch.addresses, *batch.tables, part, TYPE=_type(batch.dtypes[0]), **batch.options
            )
        _kernels().root[(1,)](sums, norm, sums.numel(), WIDTH=_kernels().WIDTH, **_kernels().LAUNCH)
    return norm


def _backup_and_perturb(batch: _Batch, norm: Tensor, eps: float | Tensor) -> None:
    with _on(batch.device):
        _kernels().backup_and_perturb[batch.grid](
            *batch.addresses,
            *batch.tables,
            to_device(norm, batch.device),
            _radius(eps, batch.device),
            PARAM=_type(batch.dtypes[0]),
            GRAD=_type(batch.dtypes[2]),
            WIDE=_type(arithmetic(batch.dtypes[0])),
            **batch.options,
        )


def _take(row: Row) -> bool:
    """Whether the kernels, which walk memory, can take these: one tensor, or with its copy, or with that and its g1."""
    first, *others = row
    return (
        first.device.type in DEVICES
        and first.numel() > 0
        and is_dense(first)
        and all(type(t) in PLAIN and t.dtype in DTYPES and not t.is_neg() for t in row)
        and all(t.device == first.device and t.shape == first.shape and same_order(first, t) for t in others)
        and all(copy.dtype == first.dtype for copy in others[:1])
    )


def _tell_autograd(tensors: Sequence[Tensor]) -> None:
    # Else a backward through a graph that was built at theta would quietly use the weights of theta*.
    for tensor in tensors:
        torch.autograd.graph.increment_version(tensor)


# ---------------------------------------------------------------- tables on the device

# Parameters and copies stay where they are from step to step, and gradients often return to the same places. A table
# belongs to a stream, within which it is there before a kernel reads it, and read before its memory is used again.


def _radius(eps: float | Tensor, device: torch.device) -> Tensor:
    return to_device(eps, device) if isinstance(eps, Tensor) else _constant(eps, device, _stream(device))


@lru_cache(maxsize=64)
def _constant(value: float, device: torch.device, stream: int) -> Tensor:
    """`value` on the device. Triton would hand a number over as float32."""
    return torch.full((), value, dtype=torch.float64, device=device)


@lru_cache(maxsize=64)
def _table(values: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """`values` as int64, without the host waiting for the device."""
    table = torch.tensor(values, dtype=torch.int64, device="cpu")  # whatever the user's default device
    if device.type != "cuda":
        return table.to(device)
    # The copy is still under way when the pinned memory is given back: torch's allocator of pinned memory is told of
    # such copies (CachingHostAllocator_recordEvent, which copy_ calls) and hands it out again only when they are done.
    return table.pin_memory().to(device, non_blocking=True)


@lru_cache(maxsize=64)
def _blocks(sizes: tuple[int, ...], block: int, device: torch.device, stream: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sizes; for each block the index of its tensor; and its first element there."""
    owners: list[int] = []
    starts: list[int] = []
    for owner, size in enumerate(sizes):
        first = range(0, size, block)
        starts += first
        owners += [owner] * len(first)
    return tuple(_table.__wrapped__(tuple(column), device, stream) for column in (sizes, owners, starts))  # type: ignore[return-value]


@lru_cache(maxsize=8)
def _disjoint(intervals: tuple[tuple[int, int], ...]) -> bool:
    ordered = sorted(intervals)
    return all(end <= start for (_, end), (start, _) in pairwise(ordered))


def _extent(tensor: Tensor) -> int:
    """Elements from the first to the last in memory."""
    if tensor.is_contiguous():
        return tensor.numel()
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _kernels() -> Any:
    from . import triton_kernels  # only here, for torch does not always come with Triton

    return triton_kernels


def _type(dtype: torch.dtype) -> Any:
    return _kernels().TYPES[dtype]


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _on(device: torch.device) -> AbstractContextManager[None]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
