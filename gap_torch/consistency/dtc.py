"""Dual-task consistency (Luo et al., AAAI 2021)."""

import math

import torch
from torch import Tensor, nn

from .distance_head import DistanceMethod, logits_and_distances
from .method import Augmentation, Batch, Outputs, Views, all_in_one_view, only


class DTC(DistanceMethod):
    """A second head learns signed distances z; turned into a mask, they are to agree with the prediction p.

    loss = mean (sigmoid(-k z) - p)^2 over all images, also labelled ones, all pixels, and all classes but the
    background.

    The gradient goes to both heads; it reaches z in a narrow band around the surface alone. Labels train as
    `DistanceMethod` says.

    As in the authors' code (LA, one class behind a sigmoid): with two classes p is the probability of the foreground.
    For more classes there is no public code; the author says that each class has a map of its own. As in the code, this
    loss takes labelled and unlabelled images in one batch; the labelled loss may take its outputs from there too, as in
    the code (`Views.labelled_first`), or have a pass of its own.

    Args:
        weak: weak augmentation of images (B, C, *spatial).
        k: steepness of the sigmoid, as large as the arithmetic allows: 1,500 in code and paper.
        distance_weight: weight of the squared difference of the distances in the labelled loss.

    Raises:
        ValueError: `k` isn't above 0 and finite, or `distance_weight` is negative or not finite; from `compare`,
            outputs without signed distances.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import Batch, DTC
        >>> class TwoHeads(torch.nn.Sequential):  # (logits, signed distances)
        ...     def forward(self, images):
        ...         logits, z = super().forward(images).split([2, 1], dim=1)
        ...         return (logits, z.tanh()) if self.training else logits
        >>> model = TwoHeads(torch.nn.Conv2d(1, 2 + 1, kernel_size=1))
        >>> method = DTC(weak=lambda images: images.flip(-1))
        >>> views = method.prepare(model, Batch(torch.rand(2, 1, 8, 8)))
        >>> method.loss(model, views).backward()
    """

    def __init__(self, weak: Augmentation, k: float = 1500.0, distance_weight: float = 0.3) -> None:
        super().__init__(weak, distance_weight)
        if not 0 < k < math.inf:
            raise ValueError(f"k must be above 0 and finite, got {k}.")
        self.k = k

    @torch.no_grad()
    def prepare(self, model: nn.Module, batch: Batch) -> Views:
        """The labelled images, if there are any, and weak views of the unlabelled ones, in one batch."""
        return all_in_one_view(batch, self.weak)

    def compare(self, outputs: tuple[Outputs, ...], views: Views) -> Tensor:
        """The disagreement of the two tasks."""
        logits, z = logits_and_distances(only(outputs))
        return ((-self.k * z).sigmoid() - logits.softmax(dim=1)[:, 1:]).square().mean()
