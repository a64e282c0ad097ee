"""Predict and score whole volumes the way the field does on ACDC: slice by slice, then in 3D.

Protocol as in the public code of SSL4MIS and UniMatch: each slice is resized to the network's input size
(nearest), predicted, arg-maxed and resized back (nearest); Dice and ASD are then taken over the whole volume,
class by class.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import ranks
from .data import Volume, resize_nearest
from .errors import InputError
from .metrics import ClassScore, score


@dataclass(frozen=True)
class Evaluation:
    """Scores of every volume and foreground class, and their means.

    Means are as in the paper's tables: Dice in percent, ASD in voxels (NaN where it was not computed).

    Attributes:
        names: one name per volume.
        scores: `scores[volume][class - 1]`.
    """

    names: tuple[str, ...]
    scores: tuple[tuple[ClassScore, ...], ...]

    @property
    def class_dice(self) -> tuple[float, ...]:
        """Mean Dice over volumes, in percent, one per foreground class."""
        return tuple(100 * float(np.mean([s.dice for s in column])) for column in self._by_class)

    @property
    def class_asd(self) -> tuple[float, ...]:
        """Mean ASD over volumes, in voxels, one per foreground class."""
        return tuple(float(np.mean([s.asd for s in column])) for column in self._by_class)

    @property
    def dice(self) -> float:
        """Mean Dice over classes and volumes, in percent."""
        return float(np.mean(self.class_dice))

    @property
    def asd(self) -> float:
        """Mean ASD over classes and volumes, in voxels."""
        return float(np.mean(self.class_asd))

    @property
    def empty(self) -> int:
        """How many (volume, class) pairs were predicted empty; each counts as ASD 0, see `metrics.score`."""
        return sum(s.empty for volume in self.scores for s in volume)

    def to_dict(self) -> dict[str, Any]:
        """Means and single scores for JSON: Dice in percent, ASD in voxels or None where not computed."""
        return {
            "dice": self.dice,
            "asd": _number(self.asd),
            "class_dice": list(self.class_dice),
            "class_asd": [_number(asd) for asd in self.class_asd],
            "empty": self.empty,
            "volumes": {
                name: {
                    "dice": [100 * s.dice for s in volume],
                    "asd": [_number(s.asd) for s in volume],
                    "empty": [s.empty for s in volume],
                }
                for name, volume in zip(self.names, self.scores, strict=True)
            },
        }

    @property
    def _by_class(self) -> list[tuple[ClassScore, ...]]:
        return list(zip(*self.scores, strict=True))


def evaluate(
    model: nn.Module,
    volumes: Sequence[Volume],
    *,
    size: int,
    num_classes: int,
    device: torch.device | str,
    with_asd: bool = True,
) -> Evaluation:
    """Predict every volume and score it against its own label; with several ranks, each takes its share.

    Args:
        model: (B, 1, size, size) float32 images -> (B, num_classes, size, size) logits; left as it was found.
        volumes: with `name`, `image` (D, H, W) float32 and `label` (D, H, W) uint8.
        size: side of the network's input, pixels.
        num_classes: number of classes, background included.
        device: where the model lives.
        with_asd: False skips the ASD, which is most of the scoring time (validation during training).

    Raises:
        InputError: when there is no volume, or a volume's shapes or labels do not fit; names the volume.
    """
    if not volumes:
        raise InputError("volumes: nothing to evaluate")

    def scored(volume: Volume) -> tuple[ClassScore, ...]:
        try:
            prediction = segment_volume(model, volume.image, size, device)
            return tuple(score(prediction, volume.label, num_classes, with_asd=with_asd))
        except InputError as error:
            raise InputError(f"{volume.name}: {error}") from None

    scores = ranks.shared_out(scored, volumes)
    return Evaluation(tuple(volume.name for volume in volumes), tuple(scores))


def segment_volume(
    model: nn.Module, volume_image: np.ndarray, size: int, device: torch.device | str, *, batch: int = 32
) -> np.ndarray:
    """The labels of `predict_volume` alone, which saves the softmax and half the resizing."""
    (labels,) = _predicted(model, volume_image, size, device, batch, lambda logits: (_labels(logits),))
    return labels


def predict_volume(
    model: nn.Module,
    volume_image: np.ndarray,
    size: int,
    device: torch.device | str,
    *,
    batch: int = 32,
) -> tuple[np.ndarray, np.ndarray]:
    """Segment one volume slice by slice, in eval mode.

    Args:
        model: (B, 1, size, size) float32 images -> (B, C, size, size) logits. The training flag of each
            of its modules is put back afterwards.
        volume_image: (D, H, W) float32.
        size: side of the network's input, pixels.
        device: where the model lives.
        batch: slices per forward pass.

    Returns:
        Labels (D, H, W) uint8, and the entropy of the softmax (D, H, W) float32: in nats over log(C), so that
        0 is certain and 1 uniform.

    Raises:
        InputError: when the image is not a (D, H, W) array with at least one voxel.
    """
    labels, entropy = _predicted(
        model, volume_image, size, device, batch, lambda logits: (_labels(logits), _entropy(logits))
    )
    return labels, entropy


def _predicted(
    model: nn.Module,
    volume_image: np.ndarray,
    size: int,
    device: torch.device | str,
    batch: int,
    read: Callable[[Tensor], tuple[Tensor, ...]],
) -> list[np.ndarray]:
    """What `read` makes of the logits, each (B, size, size), as (D, H, W) in the volume's own size."""
    if volume_image.ndim != 3 or volume_image.size == 0:
        raise InputError(f"image: expected (D, H, W) with at least one voxel, got {volume_image.shape}")
    resized = torch.from_numpy(_resize(volume_image, (size, size)))
    slices = resized.unsqueeze(1).to(memory_format=torch.channels_last)
    with _eval_mode(model), torch.inference_mode():
        parts = [read(model(chunk.to(device))) for chunk in slices.split(batch)]
    height, width = volume_image.shape[1:]
    return [_resize(torch.cat(part).cpu().numpy(), (height, width)) for part in zip(*parts, strict=True)]


def _labels(logits: Tensor) -> Tensor:
    """(B, C, H, W) logits -> (B, H, W) uint8."""
    return logits.argmax(dim=1).to(torch.uint8)


def _entropy(logits: Tensor) -> Tensor:
    """(B, C, H, W) logits -> (B, H, W) float32 in [0, 1]."""
    probabilities = logits.float().softmax(dim=1)
    entropy = torch.special.entr(probabilities).sum(dim=1) / math.log(logits.shape[1])
    return entropy.clamp(max=1.0)


def _resize(volume: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return np.stack([resize_nearest(image, shape) for image in volume])


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, each module's own flag back afterwards: a frozen batch norm stays frozen."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
