"""CutMix as a consistency method for segmentation (French et al., 2020)."""

import torch
from torch import nn

from ..losses import MaskedLoss, ce_dice_loss
from .cutmix import CutMix
from .method import Augmentation, Batch, Views, unlabelled_of
from .pseudo_label import PseudoLabel
from .targets import Mode
from .teacher import Teacher
from .thresholds import Threshold

EVERY_SAMPLE = CutMix(p=1.0)


class CutMixSeg(PseudoLabel):
    """Boxes pasted between the samples: the prediction on the mixed image is to be the same mix of predictions.

    French et al. compare with a teacher's probabilities, in boxes of half the area. Here the targets are its
    pseudo-labels, pasted together with their confidence, so that the loss is FixMatch's.

    Args:
        weak: weak augmentation of images (B, C, *spatial).
        cutmix: the boxes; `CutMix(p=1.0, share=(0.5, 0.5))` is nearest to the paper's.
        tau: least confidence of a pseudo-label that counts, or a threshold that adapts.
        loss: called with logits (B, K, *spatial), pseudo-label and mask (B, *spatial).
        mode: the mode of the model, or of the teacher, while it makes pseudo-labels (`targets.Mode`).
        teacher: what makes the pseudo-labels; `update` lets it follow the model. None for the model itself at theta.

    Raises:
        ValueError: `tau` is outside [0, 1], or `mode` is unknown.
    """

    def __init__(
        self,
        weak: Augmentation,
        cutmix: CutMix = EVERY_SAMPLE,
        tau: float | Threshold = 0.95,
        loss: MaskedLoss = ce_dice_loss,
        mode: Mode = "eval",
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__(weak, tau, loss, mode)
        self.cutmix, self.teacher = cutmix, teacher

    @torch.no_grad()
    def prepare(self, model: nn.Module, batch: Batch) -> Views:
        """The weak view of the unlabelled images and its pseudo-labels, with the same boxes in all of them."""
        weak = self.weak(unlabelled_of(batch))
        labels = self.labels(model if self.teacher is None else self.teacher, weak)
        mixed, pseudo_label, confident = self.cutmix(weak, *labels)
        return Views((mixed,), pseudo_label, confident)

    def update(self, model: nn.Module, batch: Batch) -> None:
        """The teacher, if there is one, follows `model`."""
        if self.teacher is not None:
            self.teacher.update(model)
