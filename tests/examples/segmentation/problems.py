"""Small problems in the plane and in space: a task, a recipe, and pools of made-up samples."""

from typing import Any

import torch
from torch import Tensor

from segmentation.acdc import ACDC
from segmentation.data.crops import Crops
from segmentation.data.slices import Slices
from segmentation.la import LA
from segmentation.recipe import Recipe
from segmentation.task import Pool

COMMON: dict[str, Any] = {
    "width": 2,
    "iterations": 8,
    "lr": 0.1,
    "weight": 1.0,
    "ramp_up": 0.0,
    "average_decay": 0.5,
    "statistics_samples": 3,
}
PLANE = {"size": (32, 32), "labelled_batch": 3, "unlabelled_batch": 3}
SPACE = {"size": (32, 32, 16), "labelled_batch": 2, "unlabelled_batch": 2, "seed": 2}
OTHERS = {"unlabelled_loss": "dice", "weight": 0.7, "alpha": 0.8, "targets": "eval"}  # than a recipe's own
PROBLEMS = {  # tau: some pixels are confident and some are not
    "2D": (ACDC, Recipe(**COMMON, **PLANE, tau=0.3)),
    "3D": (LA, Recipe(**{**COMMON, **SPACE, **OTHERS}, tau=0.55)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "uamt": {"bound": 1.8},  # by its own the teacher is nowhere sure at the start
    "dtc": {"k": 15.0},  # its own, 1,500, multiplies rounding by a thousand an iteration, and more with GAP
}
"""Other than a method's own."""


def pools(recipe: Recipe, classes: int) -> tuple[Pool, Pool]:
    """Three labelled samples and four without labels."""
    plane = len(recipe.size) == 2
    shape = recipe.size if plane else (36, 33, 18)
    images, labels = zip(*(sample(shape, classes, seed) for seed in range(7)), strict=True)
    names = [f"case{number}" for number in range(7)]
    if plane:
        stacked = torch.stack(images).unsqueeze(1)
        return Slices(names[:3], stacked[:3], torch.stack(labels[:3])), Slices(names[3:], stacked[3:], None)
    return Crops(names[:3], images[:3], labels[:3], recipe.size), Crops(names[3:], images[3:], None, recipe.size)


def sample(shape: tuple[int, ...], classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Nested shapes, one a class and the brighter the farther inside, under noise."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(shape, generator=generator)
    axes = torch.meshgrid(*(torch.linspace(-1, 1, side) for side in shape[-2:]), indexing="ij")
    depth = (1.1 - (axes[0].abs() + 0.7 * axes[1].abs())) * classes
    label = depth.clamp(0, classes - 1).byte().expand(shape)
    image = 0.5 * label / classes + 0.5 * noise
    return image if classes == 4 else (image - image.mean()) / image.std(), label.contiguous()
