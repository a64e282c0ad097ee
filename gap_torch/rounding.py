"""Half-precision parameters move by whole units in the last place: a small perturbation is rounded away."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .tensors import flattened
from .warning import warn

HALF = (torch.float16, torch.bfloat16)
ENOUGH = 0.5
# That many elements are widened at a time.
ELEMENTS_AT_ONCE = 2**16


def warn_if_rounded_away(
    eps: Sequence[float | Tensor],
    theta_star: Sequence[Tensor],
    theta: Sequence[Tensor],
    directions: Sequence[Tensor],
    norm: float,
) -> None:
    """Warn if theta* - theta is less than half as long as eps / norm * direction. Waits for the device.

    Args:
        eps: radius, one for each parameter.
        theta_star: the parameters after the perturbation, in half precision.
        theta: the parameters before the perturbation, in half precision.
        directions: what the parameters were moved along: g1.
        norm: ||g1||, finite and not zero.
    """
    wanted = math.hypot(*(float(e) / norm * _norm(g) for e, g in zip(eps, directions, strict=True)))
    found = math.hypot(*(_distance(a, b) for a, b in zip(theta_star, theta, strict=True)))
    if found < ENOUGH * wanted:
        dtype = str(theta[0].dtype).removeprefix("torch.")
        warn(
            f"GAP: only {found / wanted:.0%} of the perturbation is left after rounding to {dtype}. Keep parameters "
            f"in float32 (autocast still computes in {dtype}), or raise eps."
        )


def _norm(tensor: Tensor) -> float:
    (flat,) = flattened(tensor)
    return _joined([torch.linalg.vector_norm(part, dtype=torch.float32) for part in flat.split(ELEMENTS_AT_ONCE)])


def _distance(a: Tensor, b: Tensor) -> float:
    x, y = flattened(a, b)
    pairs = zip(x.split(ELEMENTS_AT_ONCE), y.split(ELEMENTS_AT_ONCE), strict=True)
    return _joined([torch.linalg.vector_norm(p.float() - q.float()) for p, q in pairs])


def _joined(norms: list[Tensor]) -> float:
    return torch.linalg.vector_norm(torch.stack(norms)).item()
