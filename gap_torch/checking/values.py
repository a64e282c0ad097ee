"""The arithmetic of the self-check: copies on the CPU, sums in float64, fingerprints of samples."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..sharding import is_sharded, local

Copies = dict[Tensor, Tensor]
"""Parameter -> a copy of it or of its gradient, on the CPU, in its own dtype."""


def copy_of(tensor: Tensor) -> Tensor:
    """A copy on the CPU; of a DTensor, of this process's part."""
    return local(tensor.detach()).detach().to("cpu", copy=True)


def gradients(params: list[Tensor]) -> Copies:
    """Copies of what is in `.grad`."""
    return {p: copy_of(p.grad) for p in params if p.grad is not None}


def any_gradient(params: list[Tensor]) -> bool:
    """Whether some `.grad` holds anything but zeros."""
    return any(bool(local(p.grad).any()) for p in params if p.grad is not None)


def all_finite(params: list[Tensor]) -> bool:
    """Whether no `.grad` has an infinity or a NaN."""
    return all(bool(local(p.grad).isfinite().all()) for p in params if p.grad is not None)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality that tells -0 from 0 and takes NaN for NaN."""
    return a.shape == b.shape and torch.equal(_bits(a.contiguous()), _bits(b.contiguous()))


def unchanged(before: Copies) -> bool:
    """Whether the parameters still are what they were."""
    return all(same_bits(copy, copy_of(p)) for p, copy in before.items())


def moved(before: Copies) -> bool:
    """Whether the parameters are elsewhere, by more than the rounding of adding something and subtracting it again."""
    if unchanged(before):
        return False
    distance = length({p: wide(copy_of(p)) - wide(copy) for p, copy in before.items()})
    return distance > 16 * max(torch.finfo(copy.dtype).eps for copy in before.values()) * length(before)


def wide(tensor: Tensor) -> Tensor:
    """In float64."""
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def displacement(theta: Copies, g1: Copies, eps: dict[Tensor, float], adaptive: bool) -> Copies:
    """eps * g1 / ||g1|| in float64 (Algorithm 1, line 7), or ASAM's; zeros where ||g1|| is zero or not finite.

    Args:
        theta: the parameters before the move.
        g1: the gradients of those that have one.
        eps: radius of each parameter's group.
        adaptive: as for the wrapper.
    """
    size = {p: wide(theta[p]).abs() if adaptive else 1.0 for p in g1}
    norm = math.sqrt(sum((size[p] * wide(g).abs()).square().sum().item() for p, g in g1.items()))
    if not 0 < norm < math.inf:
        return {p: torch.zeros_like(wide(g)) for p, g in g1.items()}
    return {p: eps[p] * size[p] ** 2 * wide(g) / norm for p, g in g1.items()}


def length(tensors: Copies) -> float:
    """L2 norm over all."""
    return math.sqrt(sum(wide(t).abs().square().sum().item() for t in tensors.values()))


def moved_as(expected: Copies, theta: Copies, now: Copies) -> bool:
    """Whether every number of theta is where it is expected, up to the rounding of its dtype."""
    for p, start in theta.items():
        along = expected.get(p, torch.zeros_like(wide(start)))
        rounding = torch.finfo(start.dtype)
        # ||g1|| is itself rounded, and a sum over many numbers is so more than once
        slack = rounding.tiny + rounding.eps * (2 * wide(start).abs() + 64 * along.abs())
        if bool(((wide(now[p]) - wide(start) - along).abs() > slack).any()):
            return False
    return True


def equals_sum(total: Copies, parts: list[tuple[float, Copies]]) -> bool:
    """Whether `total` is the weighted sum of `parts`, up to the rounding of its dtype. Overflows are passed over."""
    for p in set(total).union(*(part for _, part in parts)):
        terms = [weight * wide(part[p]) for weight, part in parts if p in part]
        if p not in total:
            if any(bool(term.any()) for term in terms):
                return False
            continue
        error = wide(total[p]) - sum(terms)
        scale = sum(float(term.abs().max()) for term in terms if term.numel())
        if error.numel() and math.isfinite(scale) and bool(error.isfinite().all()):
            rounding = 16 * torch.finfo(total[p].dtype).eps * scale
            if float(error.abs().max()) > rounding:
                return False
    return True


def add_difference(total: Copies, now: Copies, before: Copies) -> None:
    """total += now - before, in float64; what isn't there is zero."""
    for p, value in now.items():
        change = wide(value) - wide(before[p]) if p in before else wide(value)
        total[p] = total[p] + change if p in total else change


def samples(inputs: Any) -> list[int]:
    """A fingerprint of each sample of a batch: equal bits, equal number, whatever else is in the batch.

    Args:
        inputs: what a model is called with. Its samples lie along the first dimension of the first tensor that needs
            no gradient (those that do have come out of a network). Without such a tensor there are none.
    """
    tensors = [t for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.ndim and _is_plain(t)]
    batch = [_bits(t.detach().contiguous(), len(t)) for t in tensors if len(t) == len(tensors[0]) and t.numel()]
    return [hash(numbers) for numbers in zip(*(_row_sums(bits) for bits in batch), strict=True)]


def random_state(device: torch.device) -> int:
    """A fingerprint of the state of the random numbers that a layer on `device` draws."""
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return _row_sums(state.view(1, -1))[0]


def sharded(params: list[Tensor]) -> bool:
    """Whether any is a DTensor."""
    return any(is_sharded(p) for p in params)


def _is_plain(tensor: Tensor) -> bool:
    return not tensor.requires_grad and tensor.layout == torch.strided and not is_sharded(tensor)


def _bits(tensor: Tensor, rows: int = 1) -> Tensor:
    """As integers of the same size, (rows, -1)."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.reshape(-1).view(integers).view(rows, -1)


def _row_sums(bits: Tensor) -> list[int]:
    """Integers, whose sum doesn't depend on its order, unlike that of floating-point numbers."""
    odd = torch.arange(bits.shape[1], device=bits.device) * 0x1E3779B97F4A7C15 | 1
    return [int(total) for total in (bits.to(torch.int64) * odd).sum(1).tolist()]
