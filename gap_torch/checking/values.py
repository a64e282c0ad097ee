"""The arithmetic of the self-check: copies on the CPU, sums in float64, fingerprints of samples."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..sharding import is_sharded, local

Copies = dict[Tensor, Tensor]
"""Parameter -> a copy of it or of its gradient, on the CPU, in its own dtype."""


class Move(NamedTuple):
    """How the parameters went from theta to theta*."""

    distance: float
    wanted: float
    """What it should be."""
    exact: bool
    """Whether each number is where it should be, up to rounding."""


def copy_of(tensor: Tensor) -> Tensor:
    """A copy on the CPU; of a DTensor, of this process's part."""
    copy = local(tensor.detach()).detach().to("cpu", copy=True)
    return copy if copy.layout == torch.strided else copy.to_dense()


def gradients(params: list[Tensor]) -> Copies:
    """Copies of what is in `.grad`."""
    return {p: copy_of(p.grad) for p in params if p.grad is not None}


def any_gradient(params: list[Tensor]) -> bool:
    """Whether some `.grad` holds anything but zeros."""
    return any(bool(local(p.grad).any()) for p in params if p.grad is not None)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality that tells -0 from 0 and takes NaN for NaN."""
    return a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def unchanged(before: Copies) -> bool:
    """Whether the parameters still are what they were."""
    return all(same_bits(copy, copy_of(p)) for p, copy in before.items())


def moved(before: Copies) -> bool:
    """Whether the parameters are elsewhere, by more than the rounding of adding something and subtracting it again."""
    if unchanged(before):
        return False
    distance = math.sqrt(sum(_squares(_wide(copy_of(p)) - _wide(copy)) for p, copy in before.items()))
    size = math.sqrt(sum(_squares(_wide(copy)) for copy in before.values()))
    return distance > 16 * max(torch.finfo(copy.dtype).eps for copy in before.values()) * size


def measure(theta: Copies, theta_star: Copies, g1: Copies, eps: dict[Tensor, float], adaptive: bool) -> Move:
    """The move from `theta` to `theta_star`, against eps * g1 / ||g1|| in float64 (Algorithm 1, line 7) or ASAM's.

    Args:
        theta: the parameters before.
        theta_star: after.
        g1: the gradients of those that have one.
        eps: radius of each parameter's group.
        adaptive: as for the wrapper.
    """
    sizes = {p: _wide(theta[p]).abs() if adaptive else 1.0 for p in g1}
    norm = math.sqrt(sum(_squares(sizes[p] * _wide(g)) for p, g in g1.items()))
    scale = 1 / norm if 0 < norm < math.inf else 0.0
    distance, wanted, exact = 0.0, 0.0, True
    for p, start in theta.items():
        step = _wide(theta_star[p]) - _wide(start)
        along = torch.zeros_like(step)
        if p in g1 and scale:  # else its numbers may not be finite
            along = eps[p] * scale * sizes[p] ** 2 * _wide(g1[p])
        rounding = torch.finfo(start.dtype)
        # ||g1|| is itself rounded, and a sum over many numbers is so more than once
        slack = rounding.tiny + rounding.eps * (2 * _wide(start).abs() + 64 * along.abs())
        distance, wanted = distance + _squares(step), wanted + _squares(along)
        exact = exact and bool(((step - along).abs() <= slack).all())
    return Move(math.sqrt(distance), math.sqrt(wanted), exact)


def samples(inputs: Any) -> list[int]:
    """A fingerprint of each sample of a batch: equal bits, equal number, whatever else is in the batch.

    Args:
        inputs: what a model is called with. Its samples lie along the first dimension of the largest tensor that needs
            no gradient (those that do have come out of a network). Without such a tensor there are none.
    """
    tensors = [t for t in tree_leaves(inputs) if isinstance(t, Tensor) and _is_plain(t)]
    size = len(max(tensors, key=Tensor.numel)) if tensors else 0
    try:
        batch = [_row_sums(_bits(t.detach(), size)) for t in tensors if len(t) == size]
    except RuntimeError:  # tensors without values of their own: in torch.func's transforms, on the device "meta"
        return []
    return [hash(numbers) for numbers in zip(*batch, strict=True)]


def sharded(params: list[Tensor]) -> bool:
    """Whether any is a DTensor."""
    return any(is_sharded(p) for p in params)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _squares(tensor: Tensor) -> float:
    return float(tensor.abs().square().sum())


def _is_plain(tensor: Tensor) -> bool:
    whole = tensor.layout == torch.strided and not is_sharded(tensor)
    return whole and bool(tensor.ndim and tensor.numel()) and not tensor.requires_grad


def _bits(tensor: Tensor, rows: int = 1) -> Tensor:
    """As integers of the same size, (rows, -1)."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.reshape(-1).view(integers).view(rows, -1)


def _row_sums(bits: Tensor) -> list[int]:
    """Integers, whose sum doesn't depend on its order, unlike that of floating-point numbers."""
    odd = torch.arange(bits.shape[1], device=bits.device) * 0x1E3779B97F4A7C15 | 1
    return [int(total) for total in (bits.to(torch.int64) * odd).sum(1).tolist()]
