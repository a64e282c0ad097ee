"""MixUp (Zhang et al., 2018) as a consistency method: the prediction on a mix is the mix of the predictions."""

import torch
from torch import Tensor, nn

from ..losses import SoftLoss, mean_squared
from .method import Augmentation, Batch, Method, Outputs, Views, logits_of, only, unlabelled_of
from .targets import Mode, check_mode, probabilities


class MixUp(Method):
    """Each image mixed with another of the batch, the target the same mix of the model's probabilities at theta.

    The paper mixes labels of annotated images. Here the model's predictions take their place: this is Interpolation
    Consistency Training (`ICT`) without its teacher. A batch of one image is mixed with itself, which leaves it as it
    is.

    Args:
        weak: weak augmentation of images (B, C, *spatial).
        beta: parameter of Beta(beta, beta), from which lambda is drawn, once a sample; the paper's alpha. Near 0 images
            hardly mix.
        loss: called with logits and target probabilities, both (B, K, *spatial).
        mode: the model's mode while it makes targets (`targets.Mode`).
        generator: source of random numbers, on the images' device; None for the default one.

    Raises:
        ValueError: `beta` is outside [1e-6, 1e6], or `mode` is unknown.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import Batch, MixUp
        >>> model = torch.nn.Conv2d(1, 3, kernel_size=1)
        >>> method = MixUp(weak=lambda images: images.flip(-1), beta=0.2)
        >>> views = method.prepare(model, Batch(torch.rand(2, 1, 8, 8)))
        >>> method.loss(model, views).backward()
    """

    def __init__(
        self,
        weak: Augmentation,
        beta: float = 0.2,
        loss: SoftLoss = mean_squared,
        mode: Mode = "eval",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_beta(beta)
        check_mode(mode)
        self.weak, self.beta, self.criterion, self.mode, self.generator = weak, beta, loss, mode, generator

    @torch.no_grad()
    def prepare(self, model: nn.Module, batch: Batch) -> Views:
        """Mixes of the weak view of the unlabelled images, and of its predictions."""
        weak = self.weak(unlabelled_of(batch))
        targets = probabilities(model, weak, self.mode)
        images, mixed_targets = mixed(self.beta, weak, targets, generator=self.generator)
        return Views((images,), mixed_targets)

    def compare(self, outputs: tuple[Outputs, ...], views: Views) -> Tensor:
        """The loss between the prediction on the mix and the mix of predictions."""
        return self.criterion(logits_of(only(outputs)), views.target)


def mixed(beta: float, *tensors: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
    """lambda x_i + (1 - lambda) x_(i-1) in each of `tensors`, with one lambda from Beta(beta, beta) a sample.

    The partner is the sample before, as in `CutMix`. lambda stays as drawn, from 0 to 1: MixMatch's max(lambda,
    1 - lambda) would only say which of the two counts as the first, and no loss here depends on that.

    Args:
        beta: from 1e-6 to 1e6 (`check_beta`).
        tensors: floating (B, *), of one batch and device (image, probabilities).
        generator: source of random numbers, on the tensors' device; None for the default one.
    """
    share = _symmetric_beta(beta, tensors[0].shape[0], tensors[0].device, generator)
    return tuple(t.roll(1, dims=0).lerp(t, share.view(-1, *[1] * (t.ndim - 1)).to(t.dtype)) for t in tensors)


def check_beta(beta: float) -> None:
    """Raise ValueError unless lambda can be drawn from Beta(beta, beta) in float32: far outside it would be nan.

    Between these bounds lambda goes all the way from 0 or 1, by the toss of a coin, to 1/2.
    """
    if not 1e-6 <= beta <= 1e6:
        raise ValueError(f"beta must be between 1e-6 and 1e6, got {beta}.")


def _symmetric_beta(beta: float, size: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Draws from Beta(beta, beta), (size,), float32.

    X / (X + Y) of two Gamma(beta) draws, by their logarithms: at beta = 0.01 two in five such X are below float32's
    range. Gamma(beta) is Gamma(beta + 1) U^(1 / beta), U uniform, so its logarithm has another -Exp(1) / beta.
    """
    # Not `torch.distributions`: it takes no generator, and looks at its arguments' values on the host.
    gamma = torch._standard_gamma(torch.full((2, size), beta + 1.0, device=device), generator=generator)
    exponential = torch.empty_like(gamma).exponential_(generator=generator)
    x, y = gamma.log() - exponential / beta
    return torch.sigmoid(x - y)
