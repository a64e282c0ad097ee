"""What changes over a run: the learning rate, and the weight of the consistency loss."""

import math

from segmentation.recipe import Recipe

STEP = 2_500
"""Iterations after which "step" divides the learning rate by ten."""


def learning_rate(recipe: Recipe, iteration: int) -> float:
    """Of an iteration, counted from 0."""
    if recipe.lr_schedule == "constant":
        return recipe.lr
    if recipe.lr_schedule == "step":
        return recipe.lr * 0.1 ** (iteration // STEP)
    return recipe.lr * (1 - iteration / recipe.iterations) ** recipe.power


def ramp(progress: float, ramp_up: float) -> float:
    """exp(-5 (1 - t)^2) where t is how far the ramp-up has come, 1 after it: the field's Gaussian, from 0.0067.

    Args:
        progress: of the run, in [0, 1).
        ramp_up: share of the run that it takes; 0 for none.
    """
    left = max(0.0, 1 - progress / ramp_up) if ramp_up else 0.0
    return math.exp(-5 * left**2)
