"""Mutual consistency, MC-Net (Wu et al., MICCAI 2021) and MC-Net+ (2022), after their authors' code."""

import torch
from torch import Tensor, nn

from ..losses import Criterion, at_least_float32, check_classes, dice_loss
from .method import (
    Augmentation,
    Batch,
    Method,
    Outputs,
    Views,
    all_in_one_view,
    only,
    with_auxiliary_logits,
)


class MCNet(Method):
    """Decoders of one encoder, which upsample differently, are to agree with each other's sharpened predictions.

    With p_i the prediction of decoder i (two of them in MC-Net, three in MC-Net+) and s the sharpening (`sharpen`):

        loss = sum_{i != j} mean (p_i - s(p_j))^2               over batch, classes and pixels
        labelled loss = 1/2 sum_i Dice(p_i, y)

    `loss` is over labelled and unlabelled images, if the batch has labelled ones. As in the code, s(p_j) carries a
    gradient, so that decoder j is pulled too; nothing is held fixed. The code's labelled loss is a Dice of half this
    project's gradient, with slightly other denominators. The code computes a cross-entropy and does not use it; here
    the criterion is not used either.

    The model returns the logits of its other decoders behind its own.

    Args:
        weak: weak augmentation of images (B, C, *spatial).
        temperature: T of the sharpening, from 0.01 to 1.

    Raises:
        ValueError: `temperature` is below 0.01 or above 1; from `compare`, a model of one decoder, or logits of one
            class.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import Batch, MCNet
        >>> class TwoDecoders(torch.nn.Sequential):  # (logits, the other decoder's logits)
        ...     def forward(self, images):
        ...         first, second = super().forward(images).chunk(2, dim=1)
        ...         return (first, second) if self.training else first
        >>> model = TwoDecoders(torch.nn.Conv2d(1, 2 * 3, kernel_size=1))
        >>> method = MCNet(weak=lambda images: images.flip(-1))
        >>> views = method.prepare(model, Batch(torch.rand(2, 1, 8, 8)))
        >>> method.loss(model, views).backward()
    """

    def __init__(self, weak: Augmentation, temperature: float = 0.1) -> None:
        super().__init__()
        if not 0.01 <= temperature <= 1:  # below, powers underflow; above, certainty has an infinite gradient
            raise ValueError(f"temperature must be from 0.01 to 1, got {temperature}.")
        self.weak, self.temperature = weak, temperature

    @torch.no_grad()
    def prepare(self, model: nn.Module, batch: Batch) -> Views:
        """The labelled images, and behind them weak views of the unlabelled ones."""
        return all_in_one_view(batch, self.weak)

    def compare(self, outputs: tuple[Outputs, ...], views: Views) -> Tensor:
        """Squared difference of each prediction from each other, sharpened: mean over pixels, sum over pairs."""
        p = [at_least_float32(check_classes(logits)).softmax(dim=1) for logits in with_auxiliary_logits(only(outputs))]
        sharp = [sharpen(each, self.temperature) for each in p]
        pairs = [(i, j) for i in range(len(p)) for j in range(len(p)) if i != j]
        return torch.stack([(p[i] - sharp[j]).square().mean() for i, j in pairs]).sum()

    def labelled_loss(
        self, criterion: Criterion, outputs: Outputs, target: Tensor, views: Views | None = None
    ) -> Tensor:
        """Half of the Dice loss of each decoder's logits, summed; `criterion` is not called.

        Raises:
            ValueError: `outputs` is of one decoder alone.
        """
        return torch.stack([dice_loss(logits, target) for logits in with_auxiliary_logits(outputs)]).sum() / 2


def sharpen(probabilities: Tensor, temperature: float) -> Tensor:
    """p^(1/T) / (p^(1/T) + (1 - p)^(1/T)): each class by itself, against all other classes.

    With two classes the result sums to 1. With more classes it need not: where no class has half of the probability,
    all classes go towards 0. The method has it so; it pulls an unsure pixel towards no class.

    Args:
        probabilities: of any shape, in float32 at least: powers of 1 / T underflow in 16 bits.
        temperature: T, from 0.01 to 1, which changes nothing.
    """
    power, rest = probabilities ** (1 / temperature), (1 - probabilities) ** (1 / temperature)
    return power / (power + rest)
