"""CutMix as a consistency method for segmentation (French et al., 2020)."""

import torch
from torch import Tensor, nn

from ..losses import MaskedLoss, ce_dice_loss, mean_squared
from .cutmix import CutMix
from .method import Augmentation, Batch, Method, Outputs, Views, logits_of, only, unlabelled_of
from .pseudo_label import PseudoLabel
from .targets import Mode, check_mode, probabilities
from .teacher import Teacher
from .thresholds import Threshold, as_threshold

EVERY_SAMPLE = CutMix(p=1.0)
HALF_OF_EVERY_SAMPLE = CutMix(p=1.0, share=(0.5, 0.5), aspect=2.0)


class CutMixSeg(PseudoLabel):
    """Boxes pasted between the samples: the prediction on the mixed image is to be the same mix of pseudo-labels.

    French et al. compare with a teacher's probabilities (`CutMixMeanTeacher`). Here the targets are pseudo-labels,
    pasted together with their confidence, so that the loss is FixMatch's.

    Args:
        weak: weak augmentation of images (B, C, *spatial).
        cutmix: pastes the boxes.
        tau: least confidence of a pseudo-label that counts, or a threshold that adapts.
        loss: called with logits (B, K, *spatial), pseudo-label and mask (B, *spatial).
        mode: the mode of the model, or of the teacher, while it makes pseudo-labels (`targets.Mode`).
        teacher: makes the pseudo-labels; `update` lets it follow the model. None for the model itself at theta.

    Raises:
        ValueError: `tau` is outside [0, 1], or `mode` is unknown.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import Batch, CutMixSeg
        >>> model = torch.nn.Conv2d(1, 3, kernel_size=1)
        >>> method = CutMixSeg(weak=lambda images: images.flip(-1), tau=0.4)
        >>> views = method.prepare(model, Batch(torch.rand(2, 1, 8, 8)))
        >>> method.loss(model, views).backward()
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


class CutMixMeanTeacher(Method):
    """CutMix as in French et al.: the prediction on the mixed image is to be the same mix of a teacher's probabilities.

        loss = c mean_v sum_k (p_k - q_k)^2

    with q the pasted probabilities and c the share of pixels whose highest probability reaches tau: one number a batch.
    The paper pastes between two batches; here the partner is the sample before, as in `CutMix`.

    Args:
        teacher: makes the targets; `update` lets it follow the model.
        weak: weak augmentation of images (B, C, *spatial).
        cutmix: pastes the boxes. By default a box is half of the image (in 3D at most half), and its sides are at least
            half of the image's, as in French et al.
        tau: least confidence of a pixel that counts in c, or a threshold that adapts.
        mode: the teacher's mode (`targets.Mode`).

    Raises:
        ValueError: `tau` is outside [0, 1], or `mode` is unknown.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import Batch, CutMixMeanTeacher, Teacher
        >>> model = torch.nn.Conv2d(1, 3, kernel_size=1)
        >>> method = CutMixMeanTeacher(Teacher(model), weak=lambda images: images.flip(-1), tau=0.4)
        >>> views = method.prepare(model, Batch(torch.rand(2, 1, 8, 8)))
        >>> method.loss(model, views).backward()
        >>> method.update(model, Batch(torch.rand(2, 1, 8, 8)))  # after the optimizer step
    """

    def __init__(
        self,
        teacher: Teacher,
        weak: Augmentation,
        cutmix: CutMix = HALF_OF_EVERY_SAMPLE,
        tau: float | Threshold = 0.97,
        mode: Mode = "train",
    ) -> None:
        super().__init__()
        check_mode(mode)
        self.teacher, self.weak, self.cutmix, self.mode = teacher, weak, cutmix, mode
        self.threshold = as_threshold(tau)

    @torch.no_grad()
    def prepare(self, model: nn.Module, batch: Batch) -> Views:
        """The weak view with boxes, the teacher's probabilities with the same boxes, and c in `fixed`."""
        weak = self.weak(unlabelled_of(batch))
        mixed, target = self.cutmix(weak, probabilities(self.teacher, weak, self.mode))
        return Views((mixed,), target, fixed=self.threshold(target).to(target.dtype).mean())

    def compare(self, outputs: tuple[Outputs, ...], views: Views) -> Tensor:
        """c times the squared difference, summed over the classes, mean over the pixels."""
        logits = logits_of(only(outputs))
        assert views.target is not None
        return views.fixed * logits.shape[1] * mean_squared(logits, views.target)

    def update(self, model: nn.Module, batch: Batch) -> None:
        """The teacher follows `model`."""
        self.teacher.update(model)
