"""Which pseudo-labels count: those whose confidence reaches a threshold."""

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Threshold(nn.Module, ABC):
    """Says which pseudo-labels count. Called once an iteration, with the probabilities that they are made of.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import Threshold
        >>> class AboveMean(Threshold):
        ...     def forward(self, probabilities):
        ...         confidence = probabilities.amax(dim=1)
        ...         return confidence >= confidence.mean()
        >>> AboveMean()(torch.tensor([[[0.9, 0.6], [0.1, 0.4]]]))  # of (1, 2, 2)
        tensor([[ True, False]])
    """

    @abstractmethod
    def forward(self, probabilities: Tensor) -> Tensor:
        """Where the highest of `probabilities` (B, K, *spatial) is high enough, (B, *spatial), bool."""


class FixedThreshold(Threshold):
    """FixMatch's threshold: a confidence of at least `tau` (equation 5).

    Args:
        tau: least confidence of a pseudo-label that counts.

    Raises:
        ValueError: `tau` is outside [0, 1].

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import FixedThreshold
        >>> FixedThreshold(0.8)(torch.tensor([[[0.9, 0.6], [0.1, 0.4]]]))  # of (1, 2, 2)
        tensor([[ True, False]])
    """

    def __init__(self, tau: float = 0.95) -> None:
        super().__init__()
        if not 0 <= tau <= 1:
            raise ValueError(f"tau must be between 0 and 1, got {tau}.")
        self.tau = tau

    def forward(self, probabilities: Tensor) -> Tensor:
        return probabilities.amax(dim=1) >= self.tau


def as_threshold(tau: float | Threshold) -> Threshold:
    """`tau` as a threshold: a number becomes a `FixedThreshold`."""
    return tau if isinstance(tau, Threshold) else FixedThreshold(tau)


def check_num_classes(num_classes: int) -> None:
    """Raise ValueError unless there is more than one class to tell apart."""
    if num_classes < 2:
        raise ValueError(f"num_classes must be 2 or more, got {num_classes}.")


def check_momentum(momentum: float) -> None:
    """Raise ValueError for a momentum with which an average would never move."""
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be at least 0 and below 1, got {momentum}.")


def check_probabilities(probabilities: Tensor, num_classes: int) -> None:
    """Raise ValueError unless `probabilities` are of `num_classes` classes."""
    if probabilities.shape[1] != num_classes:
        raise ValueError(f"probabilities must be of {num_classes} classes, got shape {(*probabilities.shape,)}.")
