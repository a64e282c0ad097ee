"""Cross pseudo supervision (Chen et al., CVPR 2021), as in SSL4MIS."""

import torch
from torch import Tensor, nn

from ..batchnorm import frozen_running_stats
from ..losses import cross_entropy
from .method import Augmentation, Batch, Outputs, Views, only, unlabelled_of
from .twins import TwinMethod, disagreement, twins


class CPS(TwinMethod):
    """Two networks of different initial weights; each learns the classes that the other sees, at every pixel.

        loss = CE(f_1(u), argmax f_2(u)) + CE(f_2(u), argmax f_1(u))

    Two networks that agree still have a loss, between each prediction and its own hard labels. As in SSL4MIS the images
    are unlabelled, without strong augmentation; the authors' code for photographs takes labelled images too, CutMix,
    and a constant weight. There the classes come from the pass that is trained. Here they come from a pass before it,
    at theta, in the model's own mode: with dropout, other units are dropped.

    The model returns (logits of f_1, logits of f_2) in training mode, and f_1's alone in eval mode.

    Args:
        weak: weak augmentation of images (B, C, *spatial).

    Raises:
        ValueError: from `prepare` and `compare`, a model without a second network's logits, or logits of one class.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import Batch, CPS
        >>> class Twins(torch.nn.Sequential):  # (logits of f_1, logits of f_2)
        ...     def forward(self, images):
        ...         first, second = super().forward(images).chunk(2, dim=1)
        ...         return (first, second) if self.training else first
        >>> model = Twins(torch.nn.Conv2d(1, 2 * 3, kernel_size=1))
        >>> method = CPS(weak=lambda images: images.flip(-1))
        >>> views = method.prepare(model, Batch(torch.rand(2, 1, 8, 8)))
        >>> method.loss(model, views).backward()
    """

    def __init__(self, weak: Augmentation) -> None:
        super().__init__()
        self.weak = weak

    @torch.no_grad()
    def prepare(self, model: nn.Module, batch: Batch) -> Views:
        """Weak views of the unlabelled images; `fixed` are the classes that f_1 and f_2 see, each (B, *spatial)."""
        weak = self.weak(unlabelled_of(batch))
        with frozen_running_stats(model):
            classes = tuple(logits.argmax(dim=1) for logits in twins(model(weak)))
        self.disagreement = disagreement(*classes)
        torch.clear_autocast_cache()  # an autocast region around this and the loss would reuse casts without gradient
        return Views((weak,), fixed=classes)

    def compare(self, outputs: tuple[Outputs, ...], views: Views) -> Tensor:
        """Cross-entropy of each network with the other's classes, summed."""
        first, second = twins(only(outputs))
        of_first, of_second = views.fixed
        return cross_entropy(first, of_second) + cross_entropy(second, of_first)
