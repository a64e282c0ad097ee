"""What is measured: how many points are right, and how far they are from the decision boundary.

Distances are Euclidean, in the moons' units (their radius is 1).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .moons import Data

Model = Callable[[Tensor], Tensor]
"""Points (N, 2) to logits (N, 2)."""
WINDOW = (-1.5, 2.5, -1.05, 1.55)  # left, right, bottom, top of the pictures, and where a boundary is looked for
GRID = 0.02  # distance of two grid points: how finely a boundary is known
NEAR = 0.1  # of the boundary: the moons' own noise
SURE = 0.95  # probability from which on a model counts as sure: the edge of the margin in the pictures


@dataclass(frozen=True)
class Score:
    accuracy: float
    """Per cent of all points."""
    margin: float
    """Mean distance of the points to the decision boundary; that of a point on the wrong side is negative."""
    margin_5: float
    """5th percentile of the same distances."""
    near: float
    """Per cent of the points within `NEAR` of the boundary: the density under it, summed along it."""
    unsure: float
    """Per cent of the points in the margin band, where the model is less than 95 % sure."""


@torch.no_grad()
def score(model: Model, data: Data) -> Score:
    """How `model` does on all points, labelled or not."""
    probability = model(data.points).softmax(dim=1)
    right = probability.argmax(dim=1) == data.classes
    distance = distances(data.points, boundary(model))
    margin = torch.where(right, distance, -distance)
    unsure = probability.amax(dim=1) < SURE
    return Score(
        100 * right.float().mean().item(),
        margin.mean().item(),
        margin.sort().values[len(margin) // 20].item(),
        100 * (distance < NEAR).float().mean().item(),
        100 * unsure.float().mean().item(),
    )


def grid() -> Tensor:
    """Points of `WINDOW`, (rows, columns, 2), `GRID` apart."""
    left, right, bottom, top = WINDOW
    x, y = torch.arange(left, right + GRID / 2, GRID), torch.arange(bottom, top + GRID / 2, GRID)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)


@torch.no_grad()
def boundary(model: Model) -> Tensor:
    """Where the lines of the grid cross the decision boundary, (N, 2): N = 0 if none does.

    A crossing is interpolated between the two grid points beside it, so a linear model's is exact.
    """
    points = grid()
    logits = model(points.view(-1, 2)).view(points.shape)
    difference = logits[..., 1] - logits[..., 0]
    crossings = []
    for dim in (0, 1):
        size = points.shape[dim] - 1
        before, after = difference.narrow(dim, 0, size), difference.narrow(dim, 1, size)
        crosses = (before > 0) != (after > 0)
        share = (before / (before - after))[crosses]
        crossings.append(
            points.narrow(dim, 0, size)[crosses].lerp(points.narrow(dim, 1, size)[crosses], share[:, None])
        )
    return torch.cat(crossings)


def distances(points: Tensor, line: Tensor) -> Tensor:
    """Distance of each of `points` (N, 2) to the nearest of `line` (M, 2); infinite where M = 0."""
    return torch.cdist(points, line).amin(dim=1) if len(line) else torch.full((len(points),), math.inf)


@torch.no_grad()
def probability_over_window(model: Model) -> Tensor:
    """Probability of the lower moon over `WINDOW`, (rows, columns)."""
    points = grid()
    return model(points.view(-1, 2)).softmax(dim=1)[:, 1].view(points.shape[:2])
