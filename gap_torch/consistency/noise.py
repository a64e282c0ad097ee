"""The noise of medical imaging's semi-supervised codes since UA-MT (Yu et al., 2019)."""

import math

import torch
from torch import Tensor


def clipped_noise(like: Tensor, deviation: float) -> Tensor:
    """Gaussian noise, cut off at two standard deviations, in shape, dtype and on the device of `like`.

    Args:
        like: images of any shape.
        deviation: standard deviation before the cut, in units of the image's intensities.
    """
    return deviation * torch.randn_like(like).clamp(-2, 2)


def check_noise(deviation: float) -> None:
    """Raise ValueError for a standard deviation that is negative or not finite."""
    if not 0 <= deviation < math.inf:
        raise ValueError(f"noise must be at least 0 and finite, got {deviation}.")
