"""FixMatch (Sohn et al., 2020) for segmentation: equations 4-7 of the GapMatch paper.

With GAP around it (`GAPWrapper.perturbed`) it is GapMatch: `loss` at theta is equations 6-7, at theta* 8-9.
"""

import torch
from torch import Tensor, nn

from ..losses import MaskedLoss, ce_dice_loss
from .cutmix import CutMix
from .method import Augmentation, Method, Outputs, Views, logits_of
from .targets import Mode, check_mode, probabilities
from .thresholds import Threshold, threshold


class FixMatch(Method):
    """Pseudo-labels from a weak view, learnt on a strong one where they are confident.

    Args:
        weak: weak augmentation of a batch (B, C, *spatial): geometry.
        strong: strong augmentation of the weak view: intensities alone, so that pseudo-labels stay in place.
        tau: least confidence of a pseudo-label that counts (equation 5), or a threshold that adapts
            (`CurriculumThreshold` of FlexMatch, `SelfAdaptiveThreshold` of FreeMatch).
        cutmix: paste boxes between the strong views, their pseudo-labels and confidence with them; None for none.
        loss: R of equation 7, called with logits (B, K, *spatial), pseudo-label and mask (B, *spatial).
        mode: the model's mode while it makes pseudo-labels (`targets.Mode`). UniMatch's is "train".

    Raises:
        ValueError: `tau` is outside [0, 1], or `mode` is unknown.
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
        super().__init__()
        check_mode(mode)
        self.weak, self.strong, self.threshold, self.cutmix = weak, strong, threshold(tau), cutmix
        self.criterion, self.mode = loss, mode

    @torch.no_grad()
    def prepare(self, model: nn.Module, unlabelled: Tensor) -> Views:
        """The strong view of `unlabelled` (B, C, *spatial) and the weak view's pseudo-labels (equations 4 and 5)."""
        weak = self.weak(unlabelled)
        p_weak = probabilities(model, weak, self.mode)
        strong, pseudo_label, confident = self.strong(weak), p_weak.argmax(dim=1), self.threshold(p_weak)
        if self.cutmix is not None:
            strong, pseudo_label, confident = self.cutmix(strong, pseudo_label, confident)
        return Views(strong, pseudo_label, confident)

    def compare(self, outputs: Outputs, views: Views) -> Tensor:
        """R between the pseudo-labels and the prediction on the strong view (equations 6-7; at theta*, 8-9)."""
        return self.criterion(logits_of(outputs), views.target, views.mask)
