"""Cross-Consistency Training (Ouali, Hudelot and Tami, 2020)."""

import torch
from torch import Tensor, nn

from ..losses import Criterion, SoftLoss, at_least_float32, check_classes, mean_squared
from .method import (
    Augmentation,
    Batch,
    Method,
    Outputs,
    Views,
    auxiliary_logits,
    only,
    unlabelled_of,
    with_auxiliary_logits,
)
from .targets import Mode, check_mode, probabilities


class CCT(Method):
    """Further decoders, behind perturbed features (`feature_perturbations`), are to say what the main decoder says.

    loss = (1 / K) sum_k d(g_k(z perturbed in k's way), softmax(g(z))), with z the encoder's features. The main decoder
    g learns from labels alone, the further decoders from g alone, the encoder from both.

    Args:
        weak: weak augmentation of images (B, C, *spatial).
        loss: d, called with logits and the main decoder's probabilities, both (B, K, *spatial).
        mode: the model's mode while its main decoder makes the targets (`targets.Mode`).

    Raises:
        ValueError: `mode` is unknown.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import Batch, CCT
        >>> class TwoDecoders(torch.nn.Sequential):  # (logits, auxiliary logits)
        ...     def forward(self, images):
        ...         first, second = super().forward(images).chunk(2, dim=1)
        ...         return (first, second) if self.training else first
        >>> model = TwoDecoders(torch.nn.Conv2d(1, 2 * 3, kernel_size=1))
        >>> method = CCT(weak=lambda images: images.flip(-1))
        >>> views = method.prepare(model, Batch(torch.rand(2, 1, 8, 8)))
        >>> method.loss(model, views).backward()
    """

    def __init__(self, weak: Augmentation, loss: SoftLoss = mean_squared, mode: Mode = "eval") -> None:
        super().__init__()
        check_mode(mode)
        self.weak, self.criterion, self.mode = weak, loss, mode

    @torch.no_grad()
    def prepare(self, model: nn.Module, batch: Batch) -> Views:
        """Weak views of the unlabelled images, and the main decoder's probabilities for these views."""
        weak = self.weak(unlabelled_of(batch))
        return Views((weak,), probabilities(model, weak, self.mode))

    def compare(self, outputs: tuple[Outputs, ...], views: Views) -> Tensor:
        """`loss` between each auxiliary prediction and the target, mean over the decoders.

        Raises:
            ValueError: `outputs` has no auxiliary logits.
        """
        return torch.stack([self.criterion(logits, views.target) for logits in auxiliary_logits(only(outputs))]).mean()


class MedicalCCT(CCT):
    """CCT as in SSL4MIS: all decoders learn from labels, and the main decoder and the further ones from each other.

    The target is the main decoder's prediction in the same pass, and carries a gradient.

    Args:
        weak: weak augmentation of images (B, C, *spatial).
        loss: as for `CCT`.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import Batch, MedicalCCT
        >>> class TwoDecoders(torch.nn.Sequential):  # (logits, auxiliary logits)
        ...     def forward(self, images):
        ...         first, second = super().forward(images).chunk(2, dim=1)
        ...         return (first, second) if self.training else first
        >>> model = TwoDecoders(torch.nn.Conv2d(1, 2 * 3, kernel_size=1))
        >>> method = MedicalCCT(weak=lambda images: images.flip(-1))
        >>> views = method.prepare(model, Batch(torch.rand(2, 1, 8, 8)))
        >>> method.loss(model, views).backward()
    """

    def __init__(self, weak: Augmentation, loss: SoftLoss = mean_squared) -> None:
        super().__init__(weak, loss)

    @torch.no_grad()
    def prepare(self, model: nn.Module, batch: Batch) -> Views:
        """Weak views of the unlabelled images; the targets come with the predictions."""
        return Views((self.weak(unlabelled_of(batch)),))

    def compare(self, outputs: tuple[Outputs, ...], views: Views) -> Tensor:
        """`loss` between each auxiliary prediction and the main prediction, mean over the decoders.

        Raises:
            ValueError: `outputs` has no auxiliary logits, or logits of one class.
        """
        main, *others = with_auxiliary_logits(only(outputs))
        target = at_least_float32(check_classes(main)).softmax(dim=1)
        return torch.stack([self.criterion(logits, target) for logits in others]).mean()

    def labelled_loss(
        self, criterion: Criterion, outputs: Outputs, target: Tensor, views: Views | None = None
    ) -> Tensor:
        """`criterion` of labelled images' logits, mean over the decoders.

        Raises:
            ValueError: `outputs` has no auxiliary logits.
        """
        return torch.stack([criterion(logits, target) for logits in with_auxiliary_logits(outputs)]).mean()
