"""Cross-entropy plus Dice: the paper's H (equation 1) and, with a mask of confident pixels, its R (equation 7).

Further losses have probabilities as their target, for methods that learn from soft predictions.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Criterion = Callable[[Tensor, Tensor], Tensor]
"""Logits and target to a 0-dim loss."""
MaskedLoss = Callable[[Tensor, Any, Any], Tensor]
"""Logits, target, and a mask or None, to a 0-dim loss."""
SoftLoss = Callable[[Tensor, Any], Tensor]
"""Logits and target probabilities to a 0-dim loss."""
SMOOTH = 1e-5  # of the Dice loss


def cross_entropy(logits: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cross-entropy, summed over the pixels of `mask` and divided by the number of all pixels.

    Dividing by all pixels (FixMatch, equation 4) lets a batch with few confident pixels weigh little.

    Args:
        logits: (B, C, *spatial), any floating dtype; computed in float32 at least.
        target: (B, *spatial), int64 class indices from 0 to C - 1, under the mask and beside it.
        mask: (B, *spatial), bool; None for every pixel.

    Returns:
        0-dim tensor.

    Raises:
        ValueError: `logits` are of one class; `target` or `mask` has another dtype or shape; on the CPU also, an index
            is out of range. On CUDA and under torch.compile indices are not checked, because the host would have to
            wait: there the result of a wrong index is undefined.

    Examples:
        >>> import torch
        >>> from gap_torch.losses import cross_entropy
        >>> logits, target = torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64)
        >>> cross_entropy(logits, target)  # ln 2
        tensor(0.6931)
        >>> cross_entropy(logits, target, mask=target == 1)  # no pixel counts
        tensor(0.)
    """
    check_target(logits, target, mask)
    return _cross_entropy(logits, target, mask)


def dice_loss(logits: Tensor, target: Tensor, mask: Tensor | None = None, smooth: float = SMOOTH) -> Tensor:
    """Soft Dice loss over the pixels of `mask`, mean over the classes, background included.

    1 - (2 sum(p t) + smooth) / (sum(p^2) + sum(t^2) + smooth), the sums over batch and space (Milletari et al.,
    "V-Net", 2016). An empty mask gives 0.

    With a mask, a class that no pixel under the mask has counts 0: where confident pixels lack a class, nothing is
    known about the other pixels. Without this rule the loss of such a class, P / (P + smooth) with P = sum(p^2), is
    flat until P comes near `smooth`, and falls to 0 there, which can drive a class that pseudo-labels have yet to find
    out of all predictions (docs/acdc.md).

    Args:
        logits: as for `cross_entropy`.
        target: as for `cross_entropy`.
        mask: as for `cross_entropy`.
        smooth: added to numerator and denominator of each class.

    Returns:
        0-dim tensor.

    Raises:
        ValueError: as for `cross_entropy`.

    Examples:
        >>> import torch
        >>> from gap_torch.losses import dice_loss
        >>> target = torch.tensor([[0, 0, 1, 1]])
        >>> logits = 20 * torch.nn.functional.one_hot(target, 2).mT.float()  # sure and right
        >>> dice_loss(logits, target) < 1e-4
        tensor(True)
        >>> dice_loss(-logits, target) > 0.999  # sure and wrong
        tensor(True)
    """
    check_target(logits, target, mask)
    return _dice_loss(logits, target, mask, smooth)


def ce_dice_loss(logits: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of cross-entropy and Dice loss, as the field weighs them.

    Args:
        logits: as for `cross_entropy`.
        target: as for `cross_entropy`.
        mask: as for `cross_entropy`.

    Returns:
        0-dim tensor.

    Raises:
        ValueError: as for `cross_entropy`.

    Examples:
        >>> import torch
        >>> from gap_torch.losses import ce_dice_loss, cross_entropy, dice_loss
        >>> logits, target = torch.rand(2, 3, 8, 8), torch.randint(3, (2, 8, 8))
        >>> mask = torch.rand(2, 8, 8) > 0.5
        >>> both = cross_entropy(logits, target, mask), dice_loss(logits, target, mask)
        >>> torch.allclose(ce_dice_loss(logits, target, mask), sum(both) / 2)
        True
    """
    check_target(logits, target, mask)
    return (_cross_entropy(logits, target, mask) + _dice_loss(logits, target, mask, SMOOTH)) / 2


def soft_cross_entropy(logits: Tensor, probabilities: Tensor) -> Tensor:
    """Cross-entropy with soft targets: the sum over classes of -p log softmax(logits), mean over pixels.

    It is least where prediction and target agree, and is the target's entropy there. Its gradient is that of the
    Kullback-Leibler divergence.

    Args:
        logits: (B, K, *spatial), any floating dtype; computed in float32 at least.
        probabilities: (B, K, *spatial), any floating dtype, each pixel's summing to 1 (not checked).

    Returns:
        0-dim tensor.

    Raises:
        ValueError: `logits` are of one class; `probabilities` have another shape, or no floating dtype.

    Examples:
        >>> import torch
        >>> from gap_torch.losses import soft_cross_entropy
        >>> soft_cross_entropy(torch.zeros(1, 2, 4), torch.full((1, 2, 4), 0.5))  # ln 2
        tensor(0.6931)
    """
    _check_soft(logits, probabilities)
    return -(probabilities * at_least_float32(logits).log_softmax(dim=1)).sum(dim=1).mean()


def mean_squared(logits: Tensor, probabilities: Tensor) -> Tensor:
    """Squared difference of softmax(logits) and the target, mean over pixels and classes.

    The mean goes over classes too, as in the field's code for Mean Teacher and ICT: with a sum over classes, weights
    would depend on K.

    Args:
        logits: as for `soft_cross_entropy`.
        probabilities: as for `soft_cross_entropy`.

    Returns:
        0-dim tensor.

    Raises:
        ValueError: as for `soft_cross_entropy`.

    Examples:
        >>> import torch
        >>> from gap_torch.losses import mean_squared
        >>> logits = torch.rand(2, 3, 8, 8)
        >>> mean_squared(logits, logits.softmax(dim=1))
        tensor(0.)
    """
    _check_soft(logits, probabilities)
    return (at_least_float32(logits).softmax(dim=1) - probabilities).square().mean()


def soft_dice_loss(logits: Tensor, probabilities: Tensor, smooth: float = SMOOTH) -> Tensor:
    """Soft Dice loss (`dice_loss`) with soft targets, mean over the classes: small classes count as much as large ones.

    It is 0 where prediction and target agree.

    Args:
        logits: as for `soft_cross_entropy`.
        probabilities: as for `soft_cross_entropy`.
        smooth: added to numerator and denominator of each class.

    Returns:
        0-dim tensor.

    Raises:
        ValueError: as for `soft_cross_entropy`.

    Examples:
        >>> import torch
        >>> from gap_torch.losses import soft_dice_loss
        >>> logits = torch.rand(2, 3, 8, 8)
        >>> soft_dice_loss(logits, logits.softmax(dim=1)) < 1e-4
        tensor(True)
    """
    _check_soft(logits, probabilities)
    p, q = at_least_float32(logits).softmax(dim=1), at_least_float32(probabilities)
    over = [0, *range(2, logits.ndim)]
    intersection = (p * q).sum(over)
    total = (p.square() + q.square()).sum(over)
    return 1 - ((2 * intersection + smooth) / (total + smooth)).mean()


def check_classes(logits: Tensor) -> Tensor:
    """Check that there are classes for softmax to tell apart.

    Args:
        logits: (B, K, *spatial).

    Returns:
        `logits`.

    Raises:
        ValueError: K is 1, as in a network that was made for a sigmoid: a softmax over one class is 1 everywhere, and
            no loss here would train anything.

    Examples:
        >>> import torch
        >>> from gap_torch.losses import check_classes
        >>> check_classes(torch.zeros(1, 2, 8, 8)).shape
        torch.Size([1, 2, 8, 8])
    """
    if logits.ndim < 2 or logits.shape[1] < 2:
        raise ValueError(
            f"logits must be of 2 classes or more, got shape {(*logits.shape,)}. For a binary task give a network with "
            "one output channel a second one, for the background: softmax takes the place of the sigmoid."
        )
    return logits


def check_target(logits: Tensor, target: Tensor, mask: Tensor | None = None) -> None:
    """Check that `target` and `mask` are of these logits.

    Dice itself would broadcast a target of another shape, and take a wrong index for a pixel of no class.

    Args:
        logits: (B, C, *spatial).
        target: as for `cross_entropy`.
        mask: as for `cross_entropy`.

    Raises:
        ValueError: as `cross_entropy`.

    Examples:
        >>> import torch
        >>> from gap_torch.losses import check_target
        >>> check_target(torch.zeros(1, 2, 8, 8), torch.full((1, 8, 8), 255))
        Traceback (most recent call last):
            ...
        ValueError: target must hold classes from 0 to 1, got values from 255 to 255.
    """
    check_classes(logits)
    shape = (*logits.shape[:1], *logits.shape[2:])
    _check_kind("target", target, torch.int64, shape)
    if mask is not None:
        _check_kind("mask", mask, torch.bool, shape)
    if target.device.type == "cpu" and target.numel() and not torch.compiler.is_compiling():
        _check_range(target, logits.shape[1])


def at_least_float32(logits: Tensor) -> Tensor:
    """`logits` in float32; float64 stays float64.

    Examples:
        >>> import torch
        >>> from gap_torch.losses import at_least_float32
        >>> at_least_float32(torch.zeros(2, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return logits if logits.dtype == torch.float64 else logits.float()


def _cross_entropy(logits: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    losses = F.cross_entropy(at_least_float32(logits), target, reduction="none")
    return losses.mean() if mask is None else torch.where(mask, losses, 0.0).mean()


def _dice_loss(logits: Tensor, target: Tensor, mask: Tensor | None, smooth: float) -> Tensor:
    probabilities = at_least_float32(logits).softmax(dim=1)
    index = torch.arange(logits.shape[1], device=logits.device).view(-1, *[1] * (target.ndim - 1))
    classes = target.unsqueeze(1) == index  # a byte each, where `one_hot` has eight
    if mask is not None:
        probabilities = torch.where(mask.unsqueeze(1), probabilities, 0.0)
        classes = classes & mask.unsqueeze(1)
    over = [0, *range(2, logits.ndim)]
    intersection, size = (probabilities * classes).sum(over), classes.sum(over)
    losses = 1 - (2 * intersection + smooth) / (probabilities.square().sum(over) + size + smooth)
    return losses.mean() if mask is None else torch.where(size > 0, losses, 0.0).mean()


def _check_kind(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must be of {dtype}, got {tensor.dtype}.")
    if tensor.shape != shape:
        raise ValueError(
            f"{name} must be of shape {shape}, as the logits without their classes, got {(*tensor.shape,)}."
        )


def _check_soft(logits: Tensor, probabilities: Tensor) -> None:
    check_classes(logits)
    if not probabilities.is_floating_point():
        raise ValueError(f"probabilities must be of a floating dtype, got {probabilities.dtype}.")
    if probabilities.shape != logits.shape:
        raise ValueError(
            f"probabilities must be of shape {(*logits.shape,)}, as the logits, got {(*probabilities.shape,)}."
        )


def _check_range(target: Tensor, classes: int) -> None:
    low, high = target.aminmax()
    if low < 0 or high >= classes:
        raise ValueError(f"target must hold classes from 0 to {classes - 1}, got values from {low} to {high}.")
