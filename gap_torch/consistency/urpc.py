"""Uncertainty Rectified Pyramid Consistency (Luo et al., Medical Image Analysis 80:102517, 2022)."""

import math

import torch
from torch import Tensor, nn

from ..losses import Criterion, at_least_float32, check_classes
from .method import Augmentation, Batch, Method, Outputs, Views, only, unlabelled_of, with_auxiliary_logits


class URPC(Method):
    """The predictions of all levels of the decoder are to agree with their mean, less where they diverge more.

    p_s is the prediction at scale s of S, the model's own included, p_c = (sum_s p_s) / S, and v goes over the pixels:

        D_s = sum_k p_s log(p_s / p_c)                      uncertainty of each pixel, KL(p_s || p_c)
        w_s = exp(-D_s)
        loss = (1 / S) sum_s [ sum_v w_s ||p_s - p_c||^2 / sum_v w_s  +  mean_v D_s ]

    Nothing is held fixed: the gradient goes through p_c and w_s too. KL(p_s || p_c) and the square's sum over classes
    are, to our knowledge, the paper's, where its authors' code has KL(p_c || p_s) and the mean over classes. The
    quotient for each scale and the mean of D_s are that code's.

    The model returns the logits of its decoder's other levels behind its own, in the size of the input.

    Args:
        weak: weak augmentation of images (B, C, *spatial).

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import Batch, URPC
        >>> class TwoScales(torch.nn.Sequential):  # (logits, another level's logits)
        ...     def forward(self, images):
        ...         first, second = super().forward(images).chunk(2, dim=1)
        ...         return (first, second) if self.training else first
        >>> model = TwoScales(torch.nn.Conv2d(1, 2 * 3, kernel_size=1))
        >>> method = URPC(weak=lambda images: images.flip(-1))
        >>> views = method.prepare(model, Batch(torch.rand(2, 1, 8, 8)))
        >>> method.loss(model, views).backward()
    """

    def __init__(self, weak: Augmentation) -> None:
        super().__init__()
        self.weak = weak

    @torch.no_grad()
    def prepare(self, model: nn.Module, batch: Batch) -> Views:
        """Weak views of the unlabelled images; the targets come with the predictions."""
        return Views((self.weak(unlabelled_of(batch)),))

    def compare(self, outputs: tuple[Outputs, ...], views: Views) -> Tensor:
        """The disagreement of the scales.

        Raises:
            ValueError: `outputs` has one scale alone, or logits of one class.
        """
        log_p, log_c = _log_probabilities(only(outputs))
        p, c = log_p.exp(), log_c.exp()
        divergence = (p * (log_p - log_c)).sum(dim=2).flatten(1)
        weight = (-divergence).exp()  # at least 1 / S, so the sum is not zero
        distance = (p - c).square().sum(dim=2).flatten(1)
        return ((weight * distance).sum(dim=1) / weight.sum(dim=1) + divergence.mean(dim=1)).mean()

    def labelled_loss(
        self, criterion: Criterion, outputs: Outputs, target: Tensor, views: Views | None = None
    ) -> Tensor:
        """`criterion` of labelled images' logits, mean over the scales.

        Raises:
            ValueError: `outputs` has one scale alone.
        """
        return torch.stack([criterion(logits, target) for logits in with_auxiliary_logits(outputs)]).mean()


class MedicalURPC(URPC):
    """URPC as in SSL4MIS, its authors' code: D_s = KL(p_c || p_s), and the square's mean over the classes.

        loss = (1 / S) sum_s [ mean_v w_s ||p_s - p_c||^2 / K / (mean_v w_s + 1e-8)  +  mean_v D_s ]

    In that code there is also dropout and noise before the heads of the network.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import Batch, MedicalURPC
        >>> class TwoScales(torch.nn.Sequential):  # (logits, another level's logits)
        ...     def forward(self, images):
        ...         first, second = super().forward(images).chunk(2, dim=1)
        ...         return (first, second) if self.training else first
        >>> model = TwoScales(torch.nn.Conv2d(1, 2 * 3, kernel_size=1))
        >>> method = MedicalURPC(weak=lambda images: images.flip(-1))
        >>> views = method.prepare(model, Batch(torch.rand(2, 1, 8, 8)))
        >>> method.loss(model, views).backward()
    """

    def compare(self, outputs: tuple[Outputs, ...], views: Views) -> Tensor:
        """The disagreement of the scales.

        Raises:
            ValueError: as for `URPC.compare`.
        """
        log_p, log_c = _log_probabilities(only(outputs))
        p, c = log_p.exp(), log_c.exp()
        divergence = (c * (log_c - log_p)).sum(dim=2).flatten(1)
        weight = (-divergence).exp()  # of any size above 0
        distance = (p - c).square().mean(dim=2).flatten(1)
        return ((weight * distance).mean(dim=1) / (weight.mean(dim=1) + 1e-8) + divergence.mean(dim=1)).mean()


def _log_probabilities(outputs: Outputs) -> tuple[Tensor, Tensor]:
    """log p_s of all scales (S, B, K, *spatial), and log p_c (B, K, *spatial)."""
    scales = [at_least_float32(check_classes(logits)) for logits in with_auxiliary_logits(outputs)]
    log_p = torch.stack([logits.log_softmax(dim=1) for logits in scales])
    return log_p, log_p.logsumexp(dim=0) - math.log(len(log_p))
