"""What CPS and deep co-training of two networks share: a second network, which learns from labels as the first does."""

from abc import ABC

from torch import Tensor

from ..losses import Criterion
from .method import Method, Outputs, Views, auxiliary_logits, logits_of


class TwinMethod(Method, ABC):
    """A method whose model returns (logits of f_1, logits of f_2) in training mode, and f_1's alone in eval mode.

    Networks that never disagree teach each other nothing: the log says how often they do.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import CPS, TwinMethod
        >>> from gap_torch.losses import cross_entropy
        >>> method = CPS(weak=lambda images: images.flip(-1))
        >>> logits, target = torch.zeros(1, 2, 4), torch.zeros(1, 4, dtype=torch.int64)
        >>> isinstance(method, TwinMethod)
        True
        >>> method.labelled_loss(cross_entropy, (logits, logits), target)  # 2 ln 2
        tensor(1.3863)
    """

    disagreement: Tensor | None = None
    """Share of the unlabelled images' pixels to which the networks gave different classes in the last `prepare`, 0-dim;
    None before the first."""

    def labelled_loss(
        self, criterion: Criterion, outputs: Outputs, target: Tensor, views: Views | None = None
    ) -> Tensor:
        """`criterion` of both networks' logits, summed.

        Raises:
            ValueError: `outputs` has no logits of a second network.
        """
        first, second = twins(outputs)
        return criterion(first, target) + criterion(second, target)

    def logged(self) -> dict[str, Tensor]:
        """The disagreement of the networks; nothing before the first `prepare`."""
        return {} if self.disagreement is None else {"disagreement": self.disagreement}


def disagreement(classes: Tensor, others: Tensor) -> Tensor:
    """Share of pixels at which `classes` and `others` (B, *spatial) differ, 0-dim."""
    return (classes != others).float().mean()


def twins(outputs: Outputs) -> tuple[Tensor, Tensor]:
    """The model's own logits and a second network's logits behind them. Raises as `auxiliary_logits`."""
    return logits_of(outputs), auxiliary_logits(outputs)[0]
