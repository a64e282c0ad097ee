"""What a network's outputs mean: classes that exclude each other, or regions that may overlap.

Either has the same four functions. Losses are cross-entropy plus Dice, as nnU-Net adds them up, and mean squared
differences; all are computed in float32 at least.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from gap_torch.losses import SMOOTH, at_least_float32, cross_entropy, dice_loss


class Heads(ABC):
    """Outputs (B, K, *spatial) of a network, K classes or regions."""

    @abstractmethod
    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, K, *spatial), float32 at least."""

    @abstractmethod
    def labels(self, probabilities: Tensor, tau: float) -> tuple[Tensor, Tensor]:
        """Pseudo-labels, and where they count (bool): what `loss` takes."""

    @abstractmethod
    def loss(self, logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """Cross-entropy, a mean over all pixels, plus Dice loss, both of those in the mask alone; 0-dim.

        In Dice a class or region without a pixel in the mask counts 0, as in `dice_loss`.
        """

    def squared(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        """Mean squared difference to another network's probabilities, 0-dim."""
        return (self.probabilities(logits) - probabilities).square().mean()


class Classes(Heads):
    """Softmax: labels (B, *spatial), int64, count where the highest probability reaches tau."""

    def probabilities(self, logits: Tensor) -> Tensor:
        return at_least_float32(logits).softmax(dim=1)

    def labels(self, probabilities: Tensor, tau: float) -> tuple[Tensor, Tensor]:
        confidence, label = probabilities.max(dim=1)
        return label, confidence >= tau

    def loss(self, logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return cross_entropy(logits, target, mask) + dice_loss(logits, target, mask)


class Regions(Heads):
    """Sigmoid: a label a region, (B, K, *spatial), bool, counts where its probability is >= tau or <= 1 - tau."""

    def probabilities(self, logits: Tensor) -> Tensor:
        return at_least_float32(logits).sigmoid()

    def labels(self, probabilities: Tensor, tau: float) -> tuple[Tensor, Tensor]:
        return probabilities >= 0.5, (probabilities >= tau) | (probabilities <= 1 - tau)

    def loss(self, logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        logits = at_least_float32(logits)
        inside, y = mask.to(logits.dtype), target.to(logits.dtype)
        entropy = F.binary_cross_entropy_with_logits(logits, y, reduction="none")
        over = [0, *range(2, logits.ndim)]
        p, y = logits.sigmoid() * inside, y * inside
        overlap, size = (p * y).sum(over), y.sum(over)
        dice = 1 - (2 * overlap + SMOOTH) / (p.square().sum(over) + size + SMOOTH)
        return (entropy * inside).mean() + torch.where(size > 0, dice, 0.0).mean()
