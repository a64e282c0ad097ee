"""Entropy minimisation (Grandvalet and Bengio, 2005), normalised per pixel as in ADVENT (Vu et al., 2019)."""

import math

import torch
from torch import Tensor, nn

from ..losses import at_least_float32, check_classes
from .method import Augmentation, Batch, Method, Outputs, Views, logits_of, only, unlabelled_of


class EntropyMinimisation(Method):
    """The entropy of the prediction on a view is the loss; there is no target.

    Args:
        weak: weak augmentation of images (B, C, *spatial).

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import Batch, EntropyMinimisation
        >>> model = torch.nn.Conv2d(1, 3, kernel_size=1)
        >>> method = EntropyMinimisation(weak=lambda images: images.flip(-1))
        >>> views = method.prepare(model, Batch(torch.rand(2, 1, 8, 8)))
        >>> method.loss(model, views).backward()
    """

    def __init__(self, weak: Augmentation) -> None:
        super().__init__()
        self.weak = weak

    @torch.no_grad()
    def prepare(self, model: nn.Module, batch: Batch) -> Views:
        """The weak view of the unlabelled images."""
        return Views((self.weak(unlabelled_of(batch)),))

    def compare(self, outputs: tuple[Outputs, ...], views: Views) -> Tensor:
        """-sum p log p / log K, mean over pixels: from 0 where the model is certain to 1 where all K are as likely.

        Raises:
            ValueError: the logits are of one class, whose entropy is always 0.
        """
        logits = check_classes(logits_of(only(outputs)))
        log_p = at_least_float32(logits).log_softmax(dim=1)
        return -(log_p.exp() * log_p).sum(dim=1).mean() / math.log(logits.shape[1])
