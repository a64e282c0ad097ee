"""What CPS and deep co-training of two networks share: a second network, which learns from labels as the first does."""

from abc import ABC

from torch import Tensor

from ..losses import Criterion
from .method import Method, Outputs, Views, auxiliary_logits, logits_of


class TwinMethod(Method, ABC):
    """A method whose model returns (logits of f_1, logits of f_2) in training mode, and f_1's alone in eval mode."""

    def labelled_loss(
        self, criterion: Criterion, outputs: Outputs, target: Tensor, views: Views | None = None
    ) -> Tensor:
        """`criterion` of both networks' logits, summed.

        Raises:
            ValueError: `outputs` has no logits of a second network.
        """
        first, second = twins(outputs)
        return criterion(first, target) + criterion(second, target)


def twins(outputs: Outputs) -> tuple[Tensor, Tensor]:
    """The model's own logits and a second network's logits behind them. Raises as `auxiliary_logits`."""
    return logits_of(outputs), auxiliary_logits(outputs)[0]
