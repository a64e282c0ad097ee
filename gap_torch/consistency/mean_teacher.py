"""Mean Teacher (Tarvainen and Valpola, 2017) for segmentation."""

import torch
from torch import Tensor, nn

from ..losses import SoftLoss, mean_squared
from .method import Augmentation, Batch, Method, Outputs, Views, logits_of, only, unlabelled_of
from .noise import check_noise, clipped_noise
from .targets import Mode, check_mode, probabilities
from .teacher import Teacher


class MeanTeacher(Method):
    """The student's prediction on a noisy image is to be the prediction of its moving average on the clean image.

    The noise is Gaussian and cut off at two standard deviations, as medical imaging has it since UA-MT. In UA-MT the
    teacher's image gets the noise. Here the student's image gets it, so that the trained network learns not to mind
    noise, and targets are as good as they can be.

    Args:
        teacher: the moving average of the model to train.
        weak: weak augmentation of images (B, C, *spatial), for student and teacher.
        noise: standard deviation of the noise, in units of the image's intensities.
        loss: called with logits and the teacher's probabilities, both (B, K, *spatial).
        mode: the teacher's mode (`targets.Mode`).

    Raises:
        ValueError: `noise` is negative or not finite, or `mode` is unknown.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import Batch, MeanTeacher, Teacher
        >>> model = torch.nn.Conv2d(1, 3, kernel_size=1)
        >>> method = MeanTeacher(Teacher(model), weak=lambda images: images.flip(-1))
        >>> views = method.prepare(model, Batch(torch.rand(2, 1, 8, 8)))
        >>> method.loss(model, views).backward()
        >>> method.update(model, Batch(torch.rand(2, 1, 8, 8)))  # after the optimizer step
    """

    def __init__(
        self,
        teacher: Teacher,
        weak: Augmentation,
        noise: float = 0.1,
        loss: SoftLoss = mean_squared,
        mode: Mode = "eval",
    ) -> None:
        super().__init__()
        check_mode(mode)
        check_noise(noise)
        self.teacher, self.weak, self.noise, self.criterion, self.mode = teacher, weak, noise, loss, mode

    @torch.no_grad()
    def prepare(self, model: nn.Module, batch: Batch) -> Views:
        """Noisy weak views of the unlabelled images, and the teacher's probabilities for the clean views."""
        weak = self.weak(unlabelled_of(batch))
        noisy = weak + clipped_noise(weak, self.noise)
        return Views((noisy,), probabilities(self.teacher, weak, self.mode))

    def compare(self, outputs: tuple[Outputs, ...], views: Views) -> Tensor:
        """`loss` between the student's prediction and the teacher's."""
        return self.criterion(logits_of(only(outputs)), views.target)

    def update(self, model: nn.Module, batch: Batch) -> None:
        """The teacher follows `model`."""
        self.teacher.update(model)
