"""Cross-entropy plus Dice: the paper's H (equation 1) and, with a mask of confident pixels, its R (equation 7)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cross-entropy, summed over the pixels of `mask` and divided by the number of all pixels.

    Dividing by all of them (FixMatch, equation 4) lets a batch with few confident pixels weigh little.

    Args:
        logits: (B, C, *spatial), any floating dtype; computed in float32 at least.
        target: (B, *spatial), int64 class indices.
        mask: (B, *spatial), bool; None for every pixel.

    Returns:
        0-dim tensor.
    """
    losses = F.cross_entropy(wide(logits), target, reduction="none")
    return losses.mean() if mask is None else torch.where(mask, losses, 0.0).mean()


def dice_loss(logits: Tensor, target: Tensor, mask: Tensor | None = None, smooth: float = 1e-5) -> Tensor:
    """Soft Dice loss over the pixels of `mask`, mean over the classes, background included.

    1 - (2 sum(p t) + smooth) / (sum(p^2) + sum(t^2) + smooth), the sums over batch and space (Milletari et al.,
    "V-Net", 2016). An empty mask gives 0.

    Args and result as for `cross_entropy`.
    """
    probabilities = wide(logits).softmax(dim=1)
    index = torch.arange(logits.shape[1], device=logits.device).view(-1, *[1] * (target.ndim - 1))
    classes = target.unsqueeze(1) == index  # a byte each, where `one_hot` has eight
    if mask is not None:
        probabilities = torch.where(mask.unsqueeze(1), probabilities, 0.0)
        classes = classes & mask.unsqueeze(1)
    over = [0, *range(2, logits.ndim)]
    intersection = (probabilities * classes).sum(over)
    total = probabilities.square().sum(over) + classes.sum(over)
    return 1 - ((2 * intersection + smooth) / (total + smooth)).mean()


def ce_dice_loss(logits: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of cross-entropy and Dice loss, as the field weighs them.

    Args and result as for `cross_entropy`.
    """
    return (cross_entropy(logits, target, mask) + dice_loss(logits, target, mask)) / 2


def wide(logits: Tensor) -> Tensor:
    """`logits` in float32, or in float64 if they are."""
    return logits if logits.dtype == torch.float64 else logits.float()
