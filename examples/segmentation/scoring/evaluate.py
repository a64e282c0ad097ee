"""Score whole volumes the way the field does: Dice and ASD in 3D, class by class, then means."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from segmentation import ranks
from segmentation.data.files import Volume
from segmentation.errors import InputError
from segmentation.scoring.counting import counting
from segmentation.scoring.metrics import ClassScore, score


@dataclass(frozen=True)
class Evaluation:
    """Scores of every volume and foreground class, and their means.

    Means are as in the paper's tables: Dice in percent, ASD in voxels.

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
        """Means and single scores for JSON: Dice in percent, ASD in voxels."""
        return {
            "dice": self.dice,
            "asd": self.asd,
            "class_dice": list(self.class_dice),
            "class_asd": list(self.class_asd),
            "empty": self.empty,
            "volumes": {
                name: {
                    "dice": [100 * s.dice for s in volume],
                    "asd": [s.asd for s in volume],
                    "empty": [s.empty for s in volume],
                }
                for name, volume in zip(self.names, self.scores, strict=True)
            },
        }

    @property
    def _by_class(self) -> list[tuple[ClassScore, ...]]:
        return list(zip(*self.scores, strict=True))


def evaluate(
    segment: Callable[[np.ndarray], np.ndarray],
    volumes: Sequence[Volume],
    num_classes: int,
    *,
    title: str | None = None,
) -> Evaluation:
    """Predict every volume and score it against its own label; with several ranks, each takes its share.

    Args:
        segment: image float32 -> labels uint8 of the same shape.
        volumes: with `name`, `image` float32 and `label` uint8 of one 3D shape.
        num_classes: number of classes, background included.
        title: of a count of the volumes that are done; None counts nothing.

    Raises:
        InputError: when there is no volume, or a volume's shapes or labels do not fit; names the volume.
    """
    if not volumes:
        raise InputError("volumes: nothing to evaluate")

    def scored(volume: Volume) -> tuple[ClassScore, ...]:
        try:
            labels = segment(volume.image)
            count()
            return tuple(score(labels, volume.label, num_classes))
        except InputError as error:
            raise InputError(f"{volume.name}: {error}") from None

    with counting(title, len(volumes[:: ranks.world()])) if title else nullcontext(lambda: None) as count:
        scores = ranks.shared_out(scored, volumes)
    return Evaluation(tuple(volume.name for volume in volumes), tuple(scores))
