"""FixMatch (Sohn et al., 2020) for segmentation: equations 4-7 of the GapMatch paper.

With GAP around it (`GAPWrapper.perturbed`) it is GapMatch: `loss` at theta is equations 6-7, at theta* 8-9.
"""

import torch
from torch import nn

from ..losses import MaskedLoss, ce_dice_loss
from .cutmix import CutMix
from .method import Augmentation, Batch, Views, unlabelled_of
from .pseudo_label import PseudoLabel
from .targets import Mode
from .thresholds import Threshold


class FixMatch(PseudoLabel):
    """Pseudo-labels from a weak view, learnt on a strong one where they are confident.

    Args:
        weak: weak augmentation of images (B, C, *spatial): geometry.
        strong: strong augmentation of the weak view: intensities alone, so that pseudo-labels stay in place.
        tau: least confidence of a pseudo-label that counts (equation 5), or a threshold that adapts
            (`CurriculumThreshold` of FlexMatch, `SelfAdaptiveThreshold` of FreeMatch).
        cutmix: paste boxes between the strong views, their pseudo-labels and confidence with them; None for none.
        loss: R of equation 7, called with logits (B, K, *spatial), pseudo-label and mask (B, *spatial).
        mode: the model's mode while it makes pseudo-labels (`targets.Mode`). UniMatch's is "train".

    Raises:
        ValueError: `tau` is outside [0, 1], or `mode` is unknown.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import Batch, FixMatch
        >>> model = torch.nn.Conv2d(1, 3, kernel_size=1)
        >>> weak, strong = lambda images: images.flip(-1), lambda images: images * 0.8
        >>> method = FixMatch(weak, strong, tau=0.4)
        >>> views = method.prepare(model, Batch(torch.rand(2, 1, 8, 8)))
        >>> method.loss(model, views).backward()
        >>> views.inputs[0].shape, views.target.shape  # the strong view, and its pseudo-labels
        (torch.Size([2, 1, 8, 8]), torch.Size([2, 8, 8]))
    """

    def __init__(
        self,
        weak: Augmentation,
        strong: Augmentation,
        tau: float | Threshold = 0.95,
        cutmix: CutMix | None = None,
        loss: MaskedLoss = ce_dice_loss,
        mode: Mode = "eval",
    ) -> None:
        super().__init__(weak, tau, loss, mode)
        self.strong, self.cutmix = strong, cutmix

    @torch.no_grad()
    def prepare(self, model: nn.Module, batch: Batch) -> Views:
        """The strong view of the unlabelled images and the weak view's pseudo-labels (equations 4 and 5)."""
        weak = self.weak(unlabelled_of(batch))
        pseudo_label, confident = self.labels(model, weak)
        strong = self.strong(weak)
        if self.cutmix is not None:
            strong, pseudo_label, confident = self.cutmix(strong, pseudo_label, confident)
        return Views((strong,), pseudo_label, confident)
