"""Two moons, of which a handful of points have labels."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Data:
    points: Tensor
    """(N, 2), float32."""
    classes: Tensor
    """(N,), int64: 0 for the upper moon, 1 for the lower. Only those of `labelled` are trained on."""
    labelled: Tensor
    """Indices of the labelled points, (L,), int64."""


def two_moons(seed: int, points: int = 200, labels: int = 4, noise: float = 0.1) -> Data:
    """Two half circles of radius 1, one inside the other, with Gaussian noise and `labels` random labels in each."""
    random = torch.Generator().manual_seed(seed)
    classes = torch.arange(points) % 2
    angle = math.pi * torch.rand(points, generator=random)
    upper = torch.stack([angle.cos(), angle.sin()], dim=1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], dim=1)
    moons = torch.where(classes[:, None] == 0, upper, lower) + noise * torch.randn(points, 2, generator=random)
    shuffled = torch.randperm(points, generator=random)
    labelled = torch.cat([shuffled[classes[shuffled] == moon][:labels] for moon in (0, 1)])
    return Data(moons, classes, labelled)
