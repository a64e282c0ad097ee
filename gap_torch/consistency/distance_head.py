"""What DTC and SASSNet share: a second head that learns signed distances from labels."""

import math
from abc import ABC

from torch import Tensor

from ..losses import SMOOTH, Criterion, at_least_float32, check_classes, check_target, dice_loss
from .method import Augmentation, Method, Outputs, Views, all_logits
from .signed_distances import signed_distances


class DistanceMethod(Method, ABC):
    """A method whose model returns (logits, z) in training mode, z in [-1, 1] the signed distances of K - 1 classes.

    Labels train both heads: Dice(p, y) + distance_weight * mean (z - s(y))^2, with s of `signed_distances`. The public
    code computes a cross-entropy too and leaves it out of the sum, so the loop's own criterion is not used here.

    Args:
        weak: weak augmentation of images (B, C, *spatial).
        distance_weight: weight of the squared difference.

    Raises:
        ValueError: `distance_weight` is negative or not finite.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import DTC, DistanceMethod, signed_distances
        >>> method, target = DTC(torch.nn.Identity()), torch.tensor([[0, 0, 1, 1]])
        >>> isinstance(method, DistanceMethod)
        True
        >>> logits = 20 * torch.nn.functional.one_hot(target, 2).mT.float()  # sure and right
        >>> method.labelled_loss(None, (logits, signed_distances(target, 2)), target) < 1e-4
        tensor(True)
    """

    def __init__(self, weak: Augmentation, distance_weight: float = 0.3) -> None:
        super().__init__()
        if not 0 <= distance_weight < math.inf:
            raise ValueError(f"distance_weight must be at least 0 and finite, got {distance_weight}.")
        self.weak, self.distance_weight = weak, distance_weight

    def labelled_loss(
        self, criterion: Criterion, outputs: Outputs, target: Tensor, views: Views | None = None
    ) -> Tensor:
        """Dice of the logits, and the squared difference of the distances; `criterion` is not called.

        Raises:
            ValueError: `outputs` has no signed distances, or distances of other classes than the logits; `target` is
                not as for `losses.dice_loss`.
        """
        logits, z = logits_and_distances(outputs)
        check_target(logits, target)
        squared = (z - signed_distances(target, logits.shape[1])).square().mean()
        return vnet_dice_loss(logits, target) + self.distance_weight * squared


def logits_and_distances(outputs: Outputs) -> tuple[Tensor, Tensor]:
    """Logits (B, K, *spatial) and signed distances (B, K - 1, *spatial), float32 at least.

    Raises:
        ValueError: the logits are of one class; there are no distances behind them, or distances of another shape.
    """
    logits, *others = all_logits(outputs)
    check_classes(logits)
    shape = (len(logits), logits.shape[1] - 1, *logits.shape[2:])
    if [other.shape for other in others] != [shape]:
        raise ValueError(
            "this method needs a model that returns (logits, signed distances) in training mode, here distances of "
            f"shape {shape}; behind the logits came {[tuple(other.shape) for other in others] or 'nothing'}."
        )
    return at_least_float32(logits), at_least_float32(others[0])


def vnet_dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Soft Dice loss; of two classes that of the foreground alone, as with one sigmoid (Milletari et al., 2016)."""
    if logits.shape[1] > 2:
        return dice_loss(logits, target)
    p, t = logits.softmax(dim=1)[:, 1], target == 1
    return 1 - (2 * (p * t).sum() + SMOOTH) / (p.square().sum() + t.sum() + SMOOTH)
