"""UA-MT, the uncertainty-aware mean teacher (Yu et al., MICCAI 2019), after its authors' code (yulequan/UA-MT)."""

import math

import torch
from torch import Tensor, nn

from ..losses import at_least_float32, check_classes
from .method import Augmentation, Batch, Method, Outputs, Views, logits_of, only, unlabelled_of
from .noise import check_noise, clipped_noise
from .targets import Mode, check_mode, probabilities
from .teacher import Teacher


class UAMT(Method):
    """The student is to predict what a teacher, its moving average, predicts on a noisy image where it is sure.

    p_s is the student's prediction on the weak view, p_t the teacher's on this view with noise. p is the mean of the
    teacher's predictions in T more noisy passes, which differ by dropout too; t is the progress of the run:

        U = -sum_k p log(p + 1e-6)                               uncertainty of each pixel, in nats
        H(t) = (3/4 + 1/4 exp(-5 (1 - t)^2)) bound
        m = 1 where U < H(t)
        loss = sum_v m ||p_s - p_t||^2 / (2 sum_v m + 1e-16)

    The 2 is the code's for any number of classes, and so is the bound ln 2, the greatest entropy of two classes. With
    four classes a pixel then counts from a confidence of about 0.87 at the start and 0.81 at the end. With ln K all
    pixels would count in the end, which would be another method. As in the code, labelled images are not compared.

    The T passes go two by two in one batch of 2B images, as in the code: batch norm sees both.

    Args:
        teacher: the moving average of the model to train.
        weak: weak augmentation of images (B, C, *spatial).
        noise: standard deviation of the noise (`noise.clipped_noise`), in units of the image's intensities.
        pairs: number of pairs of passes, T / 2.
        bound: value that H grows to, in nats.
        mode: the teacher's mode (`targets.Mode`); in "train", the code's, there is dropout in it.

    Raises:
        ValueError: `noise` is negative or not finite, `pairs` isn't an int of 1 or more, `bound` isn't above 0, or
            `mode` is unknown; from `compare`, logits of one class.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import Batch, Teacher, UAMT
        >>> model = torch.nn.Conv2d(1, 3, kernel_size=1)
        >>> method = UAMT(Teacher(model), weak=lambda images: images.flip(-1))
        >>> views = method.prepare(model, Batch(torch.rand(2, 1, 8, 8)))
        >>> method.loss(model, views).backward()
        >>> method.update(model, Batch(torch.rand(2, 1, 8, 8)))  # after the optimizer step
    """

    def __init__(
        self,
        teacher: Teacher,
        weak: Augmentation,
        noise: float = 0.1,
        pairs: int = 4,
        bound: float = math.log(2),
        mode: Mode = "train",
    ) -> None:
        super().__init__()
        check_mode(mode)
        check_noise(noise)
        if not (isinstance(pairs, int) and pairs >= 1):
            raise ValueError(f"pairs must be an int of 1 or more, got {pairs}.")
        if not bound > 0:
            raise ValueError(f"bound must be above 0, got {bound}.")
        self.teacher, self.weak, self.mode = teacher, weak, mode
        self.noise, self.pairs, self.bound = noise, pairs, bound

    @torch.no_grad()
    def prepare(self, model: nn.Module, batch: Batch) -> Views:
        """Weak views of the unlabelled images, the teacher's probabilities, and where it is sure."""
        weak = self.weak(unlabelled_of(batch))
        target = self._teachers(weak)
        mean = self._mean_prediction(weak)
        uncertainty = -(mean * (mean + 1e-6).log()).sum(dim=1)
        return Views((weak,), target, uncertainty < self.threshold(batch.progress))

    def threshold(self, progress: float | Tensor) -> float | Tensor:
        """H at a progress in [0, 1): a number, or 0-dim on the device of `progress`."""
        return (0.75 + 0.25 * math.e ** (-5 * (1 - progress) ** 2)) * self.bound

    def compare(self, outputs: tuple[Outputs, ...], views: Views) -> Tensor:
        """The squared difference of the predictions where the teacher is sure; 0 if it is sure nowhere."""
        assert views.target is not None
        assert views.mask is not None
        logits = at_least_float32(check_classes(logits_of(only(outputs))))  # 1e-16 would be 0 in half precision
        distance = (logits.softmax(dim=1) - views.target).square().sum(dim=1)
        return torch.where(views.mask, distance, 0.0).sum() / (2 * views.mask.sum() + 1e-16)

    def update(self, model: nn.Module, batch: Batch) -> None:
        """The teacher follows `model`."""
        self.teacher.update(model)

    def _teachers(self, images: Tensor) -> Tensor:
        return probabilities(self.teacher, images + clipped_noise(images, self.noise), self.mode)

    def _mean_prediction(self, weak: Tensor) -> Tensor:
        """Mean of the teacher's predictions over the T passes, of which the sum alone is kept."""
        twice = torch.cat([weak, weak])
        total = self._teachers(twice)
        for _ in range(self.pairs - 1):
            total += self._teachers(twice)
        first, second = total.chunk(2)
        return (first + second) / (2 * self.pairs)
