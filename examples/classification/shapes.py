"""Generated images of ten shapes, for where CIFAR-10 is not at hand."""

import torch
from torch import Tensor

NAMES = ("disc", "ring", "square", "frame", "triangle", "plus", "cross", "rows", "columns", "checks")
SIZE = 32  # pixels along each side, as CIFAR-10's


def shapes(count: int, seed: int, noise: float = 0.2) -> tuple[Tensor, Tensor]:
    """`count` images (count, 3, 32, 32), uint8, and their classes (count,), int64, equally many of each.

    Place, size, tilt (up to 11 degrees) and both colours are random; `noise` is the standard deviation of a pixel's, of
    a range of 1.
    """
    random = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=random)

    classes = torch.arange(count) % len(NAMES)
    x, y = _own_coordinates(uniform(-0.2, 0.2, 2), uniform(0.55, 0.8), uniform(-0.2, 0.2))
    inside = torch.stack(_masks(x, y))[classes, torch.arange(count)].unsqueeze(1)
    ground, figure = uniform(0.0, 0.3, 3, 1, 1), uniform(0.6, 1.0, 3, 1, 1)
    images = torch.where(inside, figure, ground) + noise * torch.randn(count, 3, SIZE, SIZE, generator=random)
    return (255 * images.clamp(0, 1)).to(torch.uint8), classes


def _own_coordinates(centre: Tensor, size: Tensor, tilt: Tensor) -> tuple[Tensor, Tensor]:
    """Every pixel's x and y, (N, 32, 32), with a shape's centre as origin and its size as unit, along its own axes."""
    line = torch.linspace(-1, 1, SIZE)
    x, y = (line[None, None, :] - centre[:, 0, None, None], line[None, :, None] - centre[:, 1, None, None])
    cos, sin, size = (value[:, None, None] for value in (tilt.cos(), tilt.sin(), size))
    return (cos * x + sin * y) / size, (cos * y - sin * x) / size


def _masks(x: Tensor, y: Tensor) -> list[Tensor]:
    """Where each of `NAMES` is."""
    radius, side = x.hypot(y), torch.maximum(x.abs(), y.abs())
    rows, columns = (5 * y).sin() > 0, (5 * x).sin() > 0
    return [
        radius < 1,
        (radius > 0.6) & (radius < 1),
        side < 0.9,
        (side > 0.5) & (side < 0.9),
        (y < 0.7) & (y > 1.8 * x.abs() - 1),
        (torch.minimum(x.abs(), y.abs()) < 0.25) & (side < 1),
        ((x.abs() - y.abs()).abs() < 0.35) & (side < 0.9),
        rows & (side < 0.95),
        columns & (side < 0.95),
        (rows == columns) & (side < 0.95),
    ]
