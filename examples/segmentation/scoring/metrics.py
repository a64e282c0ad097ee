"""Dice and average surface distance (ASD) of a segmented volume, class by class, computed by MONAI.

The field scores these benchmarks with `medpy.metric.binary.dc` and `.asd`: ASD from the prediction's surface
to the reference's, in voxels (unit spacing). MONAI's `symmetric=False` is the same quantity as it stands:
both libraries find the surface by eroding with the six face neighbours, count what lies outside the volume as
background, and measure exact Euclidean distances. `tests/examples/segmentation/scoring/test_metrics.py` holds them
together.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from monai.metrics import compute_average_surface_distance, compute_dice

from segmentation.errors import InputError


@dataclass(frozen=True)
class ClassScore:
    """How well one class of one volume is segmented.

    Attributes:
        dice: overlap in [0, 1].
        asd: average surface distance, prediction to reference, in voxels; NaN where it was not asked for.
        empty: whether the prediction has no voxel of this class.
    """

    dice: float
    asd: float
    empty: bool


def score(
    prediction: np.ndarray, reference: np.ndarray, num_classes: int, *, with_asd: bool = True
) -> list[ClassScore]:
    """Score every foreground class (1 .. num_classes - 1) of a whole volume.

    Empty masks follow the public code of the field where that code has a rule:

    ==========  =========  ====  ===  ==========================================
    prediction  reference  Dice  ASD
    ==========  =========  ====  ===  ==========================================
    empty       filled     0     0    the field's rule; watch `ClassScore.empty`
    empty       empty      1     0    right answer; `medpy`'s `dc` says 1 too
    filled      empty      0     0    no distance exists; `medpy` raises
    ==========  =========  ====  ===  ==========================================

    Args:
        prediction: integer labels, any spatial shape, (D, H, W) as a rule.
        reference: integer labels of the same shape.
        num_classes: number of classes, background (0) included.
        with_asd: False skips the ASD, which takes most of the time.

    Raises:
        InputError: when the shapes differ or a label lies outside 0 .. num_classes - 1.
    """
    if prediction.shape != reference.shape:
        raise InputError(f"prediction {prediction.shape} and reference {reference.shape} differ in shape")
    predicted = _one_hot(prediction, num_classes, "prediction")
    expected = _one_hot(reference, num_classes, "reference")
    dice = compute_dice(predicted, expected, include_background=False, ignore_empty=False)[0]
    asd = _asd(predicted, expected) if with_asd else torch.full_like(dice, torch.nan)
    empty = ~predicted[0, 1:].flatten(1).any(dim=1)
    return [ClassScore(*values) for values in zip(dice.tolist(), asd.tolist(), empty.tolist(), strict=True)]


def _asd(predicted: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the (ground truth|prediction) of class")  # see `score`
        # MONAI 1.6 deprecates an argument that it passes itself.
        warnings.simplefilter("ignore", FutureWarning)
        distances = compute_average_surface_distance(predicted, expected, symmetric=False)[0]
    filled = predicted.flatten(2).any(dim=2) & expected.flatten(2).any(dim=2)
    return distances.masked_fill(~filled[0, 1:], 0.0)


def _one_hot(labels: np.ndarray, num_classes: int, name: str) -> torch.Tensor:
    """(D, H, W) integers -> (1, num_classes, D, H, W) booleans, as MONAI's metrics take them."""
    if labels.size == 0 or labels.dtype.kind not in "biu":
        raise InputError(f"{name}: needs integer labels and at least one voxel, not {labels.dtype} {labels.shape}")
    low, high = labels.min(), labels.max()
    if low < 0 or high >= num_classes:
        raise InputError(f"{name}: labels {low} .. {high} reach outside 0 .. {num_classes - 1}")
    classes = np.arange(num_classes).reshape(-1, *[1] * labels.ndim)
    return torch.from_numpy(labels == classes)[None]
