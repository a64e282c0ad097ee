"""UniMatch (Yang et al., 2023) for segmentation."""

import torch
from torch import Tensor, nn

from ..batchnorm import frozen_running_stats
from ..losses import MaskedLoss, dice_loss
from .cutmix import CutMix
from .method import Augmentation, Batch, Outputs, Views, auxiliary_logits, logits_of, one_each, unlabelled_of
from .pseudo_label import PseudoLabel
from .targets import Mode, probabilities
from .thresholds import Threshold

HALF_OF_THE_SAMPLES = CutMix(p=0.5)


class UniMatch(PseudoLabel):
    """FixMatch with two strong views, and with perturbed features of the weak view.

    With y the confident classes of the weak view, R a loss over them, s_1 and s_2 strong views with boxes pasted into
    them, y_1 and y_2 the classes with the same boxes, and g(P(z)) what the decoder g makes of perturbed features:

        loss = R(f(s_1), y_1) / 4  +  R(f(s_2), y_2) / 4  +  R(g(P(z)), y) / 2

    Boxes come from other images: of a batch of 2B unlabelled images the model learns from the first B, and boxes are
    cut out of the other B, whose classes the model predicts in eval mode. The public code adds half of this loss to
    half of the labelled loss. It has the labelled images in one pass with the weak view, and takes the classes y from
    that pass too; here y comes from a pass of its own.

    The model returns (logits, logits of perturbed features) in training mode. The pass over the strong views needs no
    more than logits (`Views.attached`).

    Args:
        weak: weak augmentation of images (B, C, *spatial): geometry.
        strong: strong augmentation of the weak view: intensities alone, so that pseudo-labels stay in place.
        tau: least confidence of a pseudo-label that counts, or a threshold that adapts (to all 2B images).
        cutmix: pastes the boxes, which are drawn for each strong view apart.
        loss: R, called with logits (B, K, *spatial), pseudo-label and mask (B, *spatial).
        mode: the model's mode while it makes the pseudo-labels of the first B images (`targets.Mode`). The passes for
            pseudo-labels leave running statistics as they are.

    Raises:
        ValueError: `tau` is outside [0, 1], or `mode` is unknown; from `prepare`, an odd number of images; from
            `compare`, no logits of perturbed features.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import Batch, UniMatch
        >>> class TwoOutputs(torch.nn.Sequential):  # (logits, those of perturbed features)
        ...     def forward(self, images):
        ...         first, second = super().forward(images).chunk(2, dim=1)
        ...         return (first, second) if self.training else first
        >>> model = TwoOutputs(torch.nn.Conv2d(1, 2 * 3, kernel_size=1))
        >>> weak, strong = lambda images: images.flip(-1), lambda images: images * 0.8
        >>> method = UniMatch(weak, strong, tau=0.4)
        >>> views = method.prepare(model, Batch(torch.rand(4, 1, 8, 8)))
        >>> method.loss(model, views).backward()
    """

    def __init__(
        self,
        weak: Augmentation,
        strong: Augmentation,
        tau: float | Threshold = 0.95,
        cutmix: CutMix = HALF_OF_THE_SAMPLES,
        loss: MaskedLoss = dice_loss,
        mode: Mode = "train",
    ) -> None:
        super().__init__(weak, tau, loss, mode)
        self.strong, self.cutmix = strong, cutmix

    @torch.no_grad()
    def prepare(self, model: nn.Module, batch: Batch) -> Views:
        """Two inputs: the weak view, (B, C, *spatial), and both strong views in one batch, (2B, C, *spatial).

        `target` and `mask` belong to the strong views; `fixed` holds target and mask of the weak view.
        """
        images = unlabelled_of(batch)
        if len(images) % 2:
            raise ValueError(
                "UniMatch needs an even number of unlabelled images, of which it learns from the first half and pastes "
                f"from the other, got {len(images)}."
            )
        weak = self.weak(images)
        own, partners = weak.chunk(2)
        with frozen_running_stats(model):
            p = torch.cat([probabilities(model, own, self.mode), probabilities(model, partners, "eval")])
        labels = p.argmax(dim=1), self.threshold(p)
        mixed = [self._mixed(self.strong(weak), *labels) for _ in range(2)]
        strong, target, mask = (torch.cat(two) for two in zip(*mixed, strict=True))
        label, confident = (t.chunk(2)[0] for t in labels)
        return Views((own, strong), target, mask, fixed=(label, confident), attached=(True, False))

    def _mixed(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The first half of each, with boxes from the other half."""
        own, partners = zip(*(t.chunk(2) for t in tensors), strict=True)
        return self.cutmix(*own, partners=partners)

    def compare(self, outputs: tuple[Outputs, ...], views: Views) -> Tensor:
        """A quarter of each strong view's loss, and half of the loss of the perturbed features."""
        weak, strong = one_each(outputs, 2)
        features = self.criterion(auxiliary_logits(weak)[0], *views.fixed)
        assert views.target is not None
        assert views.mask is not None
        each = zip(*(t.chunk(2) for t in (logits_of(strong), views.target, views.mask)), strict=True)
        first, second = (self.criterion(*view) for view in each)
        return (first + second) / 4 + features / 2
