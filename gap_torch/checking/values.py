"""The arithmetic of the self-check: copies on the CPU, sums in float64."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..sharding import is_sharded, local

Copies = dict[Tensor, Tensor]
"""Parameter -> a copy of it or of its gradient, on the CPU, in its own dtype."""


class Move(NamedTuple):
    """How the parameters went from theta to theta*."""

    distance: float
    wanted: float
    """What `distance` should be."""
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
    return a.shape == b.shape and a.dtype is b.dtype and torch.equal(bits(a), bits(b))


def bits(tensor: Tensor, rows: int = 1) -> Tensor:
    """The bits of a tensor as integers of the same size, (rows, -1)."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.reshape(-1).view(integers).view(rows, -1)


def unchanged(before: Copies) -> bool:
    """Whether the parameters still are what they were."""
    return all(same_bits(copy, copy_of(p)) for p, copy in before.items())


def moved(before: Copies) -> bool:
    """Whether the parameters are elsewhere, by more than the rounding of adding something and subtracting it again."""
    if unchanged(before):
        return False
    distance = math.sqrt(sum(_squares(_double(copy_of(p)) - _double(copy)) for p, copy in before.items()))
    size = math.sqrt(sum(_squares(_double(copy)) for copy in before.values()))
    return distance > 16 * max(torch.finfo(copy.dtype).eps for copy in before.values()) * size


def measure(theta: Copies, theta_star: Copies, g1: Copies, eps: dict[Tensor, float], adaptive: bool) -> Move:
    """The move from `theta` to `theta_star`, against eps * g1 / ||g1|| in float64 (Algorithm 1, line 7) or ASAM's.

    Args:
        theta: the parameters before.
        theta_star: the parameters after.
        g1: the gradients, of parameters that have one.
        eps: radius of each parameter's group.
        adaptive: as for the wrapper.
    """
    sizes = {p: _double(theta[p]).abs() if adaptive else 1.0 for p in g1}
    norm = math.sqrt(sum(_squares(sizes[p] * _double(g)) for p, g in g1.items()))
    scale = 1 / norm if 0 < norm < math.inf else 0.0
    distance, wanted, exact = 0.0, 0.0, True
    for p, start in theta.items():
        step = _double(theta_star[p]) - _double(start)
        along = torch.zeros_like(step)
        if p in g1 and scale:  # else its numbers may not be finite
            along = eps[p] * scale * sizes[p] ** 2 * _double(g1[p])
        rounding = torch.finfo(start.dtype)
        # ||g1|| is itself rounded, and a sum over many numbers is so more than once
        slack = rounding.tiny + rounding.eps * (2 * _double(start).abs() + 64 * along.abs())
        distance, wanted = distance + _squares(step), wanted + _squares(along)
        exact = exact and bool(((step - along).abs() <= slack).all())
    return Move(math.sqrt(distance), math.sqrt(wanted), exact)


def norm_of(copies: Copies, less: Copies | None = None, more: Copies | None = None) -> float:
    """L2 norm of `copies` - `less` + `more`, in float64; a missing entry counts as zero."""
    total = 0.0
    for p, copy in copies.items():
        combined = _double(copy)
        if less is not None and p in less:
            combined = combined - _double(less[p])
        if more is not None and p in more:
            combined = combined + _double(more[p])
        total += _squares(combined)
    return math.sqrt(total)


def loss_of(tensors: Any, grad_tensors: Any = None, *_: Any, **__: Any) -> float | None:
    """What torch.autograd.backward was called on, with these arguments, as a number; None if it is no number."""
    roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    weights = [grad_tensors] if grad_tensors is None or isinstance(grad_tensors, Tensor) else list(grad_tensors)
    numbers = all(isinstance(t, Tensor) and not is_sharded(t) and t.numel() == 1 for t in roots)
    if not numbers or any(w is not None for w in weights):
        return None
    return sum(t.detach().item() for t in roots)


def with_gradient(gradient: Tensor) -> tuple[list[bool], list[bool]]:
    """For each row, whether it has numbers other than zero, and any that are clear beside the batch's largest.

    Small numbers may be rounded to zero in another pass: in float32 below 1e-3, in bfloat16 below 1/2.
    """
    sizes = gradient.detach().reshape(len(gradient), -1).abs().amax(1).tolist()
    clear = max(1e-3, 64 * torch.finfo(gradient.dtype).eps) * max(sizes)
    return [size != 0 for size in sizes], [size > 0 and size >= clear for size in sizes]


def sharded(params: list[Tensor]) -> bool:
    """Whether any of `params` is a DTensor."""
    return any(is_sharded(p) for p in params)


def _double(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _squares(tensor: Tensor) -> float:
    return float(tensor.abs().square().sum())
