"""Interpolation Consistency Training (Verma et al., 2022) for segmentation."""

import torch
from torch import nn

from ..losses import SoftLoss, mean_squared
from .method import Augmentation, Batch, Views
from .mixup import MixUp
from .targets import Mode
from .teacher import Teacher


class ICT(MixUp):
    """The prediction for a mix of two images is to be the same mix of a teacher's predictions for them.

    f(lambda u_1 + (1 - lambda) u_2) ~ lambda f'(u_1) + (1 - lambda) f'(u_2), lambda ~ Beta(beta, beta), with f' the
    moving average of f. The smaller `beta`, the nearer most mixes are to one of the two images.

    Args:
        teacher: f', the moving average of the model to train.
        weak: weak augmentation of images (B, C, *spatial), before the mix.
        beta: parameter of the Beta distribution.
        loss: called with logits and mixed probabilities, both (B, K, *spatial).
        mode: the teacher's mode (`targets.Mode`).
        generator: source of random numbers, on the images' device; None for the default one.

    Raises:
        ValueError: `beta` is outside [1e-6, 1e6], or `mode` is unknown.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import Batch, ICT, Teacher
        >>> model = torch.nn.Conv2d(1, 3, kernel_size=1)
        >>> method = ICT(Teacher(model), weak=lambda images: images.flip(-1))
        >>> views = method.prepare(model, Batch(torch.rand(2, 1, 8, 8)))
        >>> method.loss(model, views).backward()
        >>> method.update(model, Batch(torch.rand(2, 1, 8, 8)))  # after the optimizer step
    """

    def __init__(
        self,
        teacher: Teacher,
        weak: Augmentation,
        beta: float = 0.1,
        loss: SoftLoss = mean_squared,
        mode: Mode = "eval",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(weak, beta, loss, mode, generator)
        self.teacher = teacher

    def prepare(self, model: nn.Module, batch: Batch) -> Views:
        """Mixes of the weak views of the unlabelled images, and of the teacher's probabilities for these views."""
        return super().prepare(self.teacher, batch)

    def update(self, model: nn.Module, batch: Batch) -> None:
        """The teacher follows `model`."""
        self.teacher.update(model)
