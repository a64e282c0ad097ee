"""Half-precision parameters move by whole units in the last place: a small perturbation is rounded away."""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
ENOUGH = 0.5


def warn_if_rounded_away(
    theta_star: Sequence[Tensor], theta: Sequence[Tensor], directions: Sequence[Tensor], scale: float
) -> bool:
    """Warn if theta* - theta is less than half as long as scale * direction. Waits for the device.

    Args:
        theta_star: the parameters after the perturbation, at least one, in half precision.
        theta: the same before.
        directions: what they were moved along: g1.
        scale: eps / ||g1||, possibly not finite, or infinite for a zero gradient.

    Returns:
        Whether there was a perturbation to judge by.
    """
    wanted = scale * _norm(directions)
    if not (math.isfinite(wanted) and wanted > 0):
        return False
    share = _norm([(after.float() - before.float()) for after, before in zip(theta_star, theta, strict=True)]) / wanted
    if share < ENOUGH:
        dtype = str(theta[0].dtype).removeprefix("torch.")
        warnings.warn(
            f"GAP: only {share:.0%} of the perturbation is left after rounding to {dtype}. Keep the parameters in "
            f"float32 (autocast still computes in {dtype}), or raise eps.",
            stacklevel=3,
        )
    return True


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.hypot(*(torch.linalg.vector_norm(t, dtype=torch.float32).item() for t in tensors))
