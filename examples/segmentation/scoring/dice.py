"""Mean Dice of many volumes, for validation: counted on the network's device, for which the host waits once."""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from segmentation import ranks
from segmentation.data.files import Volume
from segmentation.errors import InputError
from segmentation.scoring.predict import on_device

Segment = Callable[[Iterable[np.ndarray]], Iterable[Tensor]]
"""Images -> the labels of each, integers in its own shape, on the network's device."""


def mean_dice(segment: Segment, volumes: Sequence[Volume], num_classes: int) -> float:
    """Mean Dice over foreground classes and volumes in percent, as `evaluate` has it; with several ranks, shared out.

    Args:
        segment: images float32 -> labels of the shape of each volume's own.
        volumes: with `name`, `image` float32 and `label` uint8.
        num_classes: number of classes, background included.

    Raises:
        InputError: when there is no volume, or a volume's shapes or labels do not fit; names the volume.
    """
    if not volumes:
        raise InputError("volumes: nothing to evaluate")
    shares = [volumes[rank :: ranks.world()] for rank in range(ranks.world())]
    parts = ranks.shared_out(lambda share: _scores(segment, share, num_classes), shares)
    scores = [score for part in parts for score in part]
    return 100 * math.fsum(scores) / len(scores)


def _scores(segment: Segment, volumes: Sequence[Volume], num_classes: int) -> list[float]:
    """Dice in [0, 1] of each volume and foreground class."""
    predictions = segment(volume.image for volume in volumes)
    counts = [_counts(volume, labels, num_classes) for volume, labels in zip(volumes, predictions, strict=True)]
    scores = []
    for volume, of_class in zip(volumes, torch.stack(counts).tolist() if counts else [], strict=True):
        for name, total in zip(("prediction", "reference"), [*zip(*of_class, strict=True)][1:], strict=True):
            if sum(total) != volume.label.size:
                raise InputError(f"{volume.name}: {name}: labels reach outside 0 .. {num_classes - 1}")
        scores += [_dice(*of_one) for of_one in of_class[1:]]
    return scores


def _counts(volume: Volume, labels: Tensor, num_classes: int) -> Tensor:
    """(num_classes, 3): voxels of each class in both, in the prediction, and in the reference; on its device."""
    if labels.shape != volume.label.shape:
        shapes = f"prediction {tuple(labels.shape)} and reference {volume.label.shape}"
        raise InputError(f"{volume.name}: {shapes} differ in shape")
    reference = on_device(volume.label, labels.device)
    masks = [(labels == index, reference == index) for index in range(num_classes)]
    return torch.stack([torch.stack([*map(torch.count_nonzero, (p & e, p, e))]) for p, e in masks])


def _dice(both: int, predicted: int, expected: int) -> float:
    """Of two empty masks 1, and of one 0, as in `metrics.score`."""
    return 2 * both / (predicted + expected) if predicted + expected else 1.0
