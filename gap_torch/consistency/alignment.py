"""A prediction after the perturbation against the prediction before it.

The GapMatch paper wants the predictions "aligned before and after perturbation" when GAP joins another method. That can
be read in three ways, which differ in the loss at theta*:

1. the method's own loss once more, with the targets of theta: `method.loss(model, views)`;
2. the perturbed prediction against the unperturbed one, whatever the method's own loss is: `alignment`;
3. the perturbed prediction against the confident classes of the unperturbed one, by the paper's R, with alpha alone as
   its weight: `hard_alignment`. The method's own loss gives the direction, however small its weight is.

For FixMatch they nearly agree, since its targets are predictions at theta (equations 8-9): one-hot and on the weak view
in the first reading, on the strong view in the other two.
"""

import torch
from torch import Tensor

from ..losses import MaskedLoss, at_least_float32, ce_dice_loss
from .divergence import kl_divergence
from .method import Outputs, all_logits
from .thresholds import Threshold, as_threshold


def alignment(outputs: Outputs, before: Outputs) -> Tensor:
    """Mean over the pixels of KL(softmax(before) || softmax(outputs)): zero, with zero gradient, where both agree.

    Args:
        outputs: logits (B, K, *spatial) of the perturbed model; or a tuple with auxiliary logits, over which the mean
            is taken.
        before: logits of the unperturbed model for the same inputs, in the same form. No gradient reaches them.

    Returns:
        0-dim tensor.

    Raises:
        ValueError: `outputs` and `before` differ in the number of logits, or in their shape.
        TypeError: `outputs` or `before` is neither a tensor nor a tuple or list of tensors.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import alignment
        >>> before = torch.rand(2, 3, 8, 8)  # logits at theta
        >>> alignment(before, before) < 1e-6  # the logits at theta* are the same
        tensor(True)
    """
    pairs = _pairs(outputs, before)
    return torch.stack([kl_divergence(a, p).mean() for a, p in pairs]).mean()


def hard_alignment(
    outputs: Outputs, before: Outputs, tau: float | Threshold = 0.95, loss: MaskedLoss = ce_dice_loss
) -> Tensor:
    """R (equation 7) of the perturbed prediction and the confident classes of the unperturbed one.

    Args:
        outputs: as for `alignment`.
        before: as for `alignment`.
        tau: least confidence of a class that counts (equation 5), or a threshold that adapts.
        loss: R, called with logits (B, K, *spatial), classes and mask (B, *spatial).

    Returns:
        0-dim tensor.

    Raises:
        ValueError: as for `alignment`, and where `tau` is outside [0, 1].
        TypeError: as for `alignment`.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import hard_alignment
        >>> before = torch.rand(2, 3, 8, 8)  # logits at theta, nowhere confident
        >>> hard_alignment(before, before, tau=0.95)
        tensor(0.)
    """
    threshold = as_threshold(tau)
    pairs = _pairs(outputs, before)
    return torch.stack([loss(a, p.argmax(dim=1), threshold(p)) for a, p in pairs]).mean()


def _pairs(outputs: Outputs, before: Outputs) -> list[tuple[Tensor, Tensor]]:
    """Logits of `outputs`, and the probabilities of their counterparts in `before`, to which no gradient goes."""
    after, fixed = all_logits(outputs), all_logits(before)
    if len(after) != len(fixed):
        raise ValueError(
            f"outputs has {len(after)} logits, before {len(fixed)}: "
            "both must come from the same model in the same mode."
        )
    return [(a, at_least_float32(b.detach()).softmax(dim=1)) for a, b in zip(after, fixed, strict=True)]
