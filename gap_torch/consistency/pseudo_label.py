"""Pseudo-Label (Lee, 2013) for segmentation, with a threshold on confidence."""

import torch
from torch import Tensor, nn

from ..losses import MaskedLoss, ce_dice_loss
from .method import Augmentation, Batch, Method, Outputs, Views, logits_of, only, unlabelled_of
from .targets import Mode, check_mode, probabilities
from .thresholds import Threshold, as_threshold


class PseudoLabel(Method):
    """The model's own confident classes on a view are the labels of that very view.

    Lee's paper labels every sample, and the weight of the loss grows over training instead: that is `tau=0`, and a
    `weight` that grows with progress.

    Args:
        weak: weak augmentation of images (B, C, *spatial).
        tau: least confidence of a pseudo-label that counts, or a threshold that adapts.
        loss: called with logits (B, K, *spatial), pseudo-label and mask (B, *spatial).
        mode: the model's mode while it makes pseudo-labels (`targets.Mode`).

    Raises:
        ValueError: `tau` is outside [0, 1], or `mode` is unknown.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import Batch, PseudoLabel
        >>> model = torch.nn.Conv2d(1, 3, kernel_size=1)
        >>> method = PseudoLabel(weak=lambda images: images.flip(-1), tau=0.4)
        >>> views = method.prepare(model, Batch(torch.rand(2, 1, 8, 8)))
        >>> method.loss(model, views).backward()
        >>> views.target.shape, views.mask.dtype
        (torch.Size([2, 8, 8]), torch.bool)
    """

    def __init__(
        self,
        weak: Augmentation,
        tau: float | Threshold = 0.95,
        loss: MaskedLoss = ce_dice_loss,
        mode: Mode = "eval",
    ) -> None:
        super().__init__()
        check_mode(mode)
        self.weak, self.threshold, self.criterion, self.mode = weak, as_threshold(tau), loss, mode

    @torch.no_grad()
    def prepare(self, model: nn.Module, batch: Batch) -> Views:
        """The weak view of the unlabelled images and its pseudo-labels."""
        weak = self.weak(unlabelled_of(batch))
        return Views((weak,), *self.labels(model, weak))

    def labels(self, model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """The classes that `model` sees in `images`, and where it is confident: (B, *spatial), int64 and bool."""
        p = probabilities(model, images, self.mode)
        return p.argmax(dim=1), self.threshold(p)

    def compare(self, outputs: tuple[Outputs, ...], views: Views) -> Tensor:
        """The loss between the prediction on the view and its pseudo-labels."""
        return self.criterion(logits_of(only(outputs)), views.target, views.mask)
