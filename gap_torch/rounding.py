"""Half-precision parameters move by whole units in the last place: a small perturbation is rounded away."""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
ENOUGH = 0.5


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
        theta: the same before.
        directions: what they were moved along: g1.
        norm: ||g1||, finite and not zero.
    """
    wanted = math.hypot(*(float(e) / norm * _norm(g) for e, g in zip(eps, directions, strict=True)))
    found = math.hypot(*(_norm(a.float() - b.float()) for a, b in zip(theta_star, theta, strict=True)))
    if found < ENOUGH * wanted:
        dtype = str(theta[0].dtype).removeprefix("torch.")
        warnings.warn(
            f"GAP: only {found / wanted:.0%} of the perturbation is left after rounding to {dtype}. Keep parameters "
            f"in float32 (autocast still computes in {dtype}), or raise eps.",
            stacklevel=2,
        )


def _norm(tensor: Tensor) -> float:
    return torch.linalg.vector_norm(tensor, dtype=torch.float32).item()
