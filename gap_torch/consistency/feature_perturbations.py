"""What CCT (Ouali, Hudelot and Tami, 2020) does to features before its auxiliary decoders.

Three of its seven perturbations: feature noise, feature drop and spatial dropout, without the three that a prediction
guides and the adversarial one.

Each multiplies features (B, C, *spatial), of any number of dimensions, by a random factor in training mode, and passes
them on as they are in eval mode. All randomness comes from the default generator of the features' device, so that
`RNGState` replays it.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class FeaturePerturbation(nn.Module, ABC):
    """Features times a random factor, to which no gradient goes.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import FeaturePerturbation
        >>> class RandomSize(FeaturePerturbation):
        ...     def factor(self, features):
        ...         return 1 + self.rand(features, *[1] * (features.ndim - 1))
        >>> RandomSize()(torch.ones(2, 4, 8, 8)).shape
        torch.Size([2, 4, 8, 8])
    """

    def forward(self, features: Tensor) -> Tensor:
        """`features` (B, C, *spatial), perturbed in training mode; of the same shape and dtype."""
        if not self.training:
            return features
        with torch.no_grad():
            factor = self.factor(features)
        return features * factor.to(features.dtype)

    @abstractmethod
    def factor(self, features: Tensor) -> Tensor:
        """The factor to multiply with, of a shape that broadcasts to the shape of `features`."""

    def rand(self, features: Tensor, *size: int) -> Tensor:
        """Random numbers (B, *size) from [0, 1): all that a perturbation draws, a row for each sample."""
        return torch.rand(len(features), *size, device=features.device)


class FeatureNoise(FeaturePerturbation):
    """z -> z n + z, n uniform in [-bound, bound], drawn for every value.

    Args:
        bound: greatest size of n.

    Raises:
        ValueError: `bound` is negative or not finite.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import FeatureNoise
        >>> noisy = FeatureNoise(bound=0.3)(torch.ones(2, 4, 8, 8))
        >>> 0.69 < noisy.min() and noisy.max() < 1.31
        tensor(True)
    """

    def __init__(self, bound: float = 0.3) -> None:
        super().__init__()
        if not 0 <= bound < math.inf:
            raise ValueError(f"bound must be at least 0 and finite, got {bound}.")
        self.bound = bound

    def factor(self, features: Tensor) -> Tensor:
        return 1 + self.bound * (2 * self.rand(features, *features.shape[1:]) - 1)


class FeatureDrop(FeaturePerturbation):
    """Sets features to zero where a sample is most active.

    A position is dropped, in all channels, where the mean over the channels reaches gamma times the highest such mean
    of the sample, gamma ~ U(low, high). At the default these are the positions within 10 to 30 % of the highest mean.
    The authors' code has U(0.7, 0.9); the paper, as we recall it, has U(0.6, 0.9).

    Args:
        low: least gamma.
        high: greatest gamma.

    Raises:
        ValueError: not 0 <= low <= high <= 1.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import FeatureDrop
        >>> FeatureDrop()(torch.tensor([[[1.0, 2.0, 10.0]]]))  # (B, C, *spatial)
        tensor([[[1., 2., 0.]]])
    """

    def __init__(self, low: float = 0.7, high: float = 0.9) -> None:
        super().__init__()
        if not 0 <= low <= high <= 1:
            raise ValueError(f"FeatureDrop needs 0 <= low <= high <= 1, got low={low}, high={high}.")
        self.low, self.high = low, high

    def factor(self, features: Tensor) -> Tensor:
        attention = features.mean(dim=1, keepdim=True)
        highest = attention.amax(dim=tuple(range(1, features.ndim)), keepdim=True)
        gamma = self.low + (self.high - self.low) * self.rand(features, *[1] * (features.ndim - 1))
        return attention < gamma * highest


class ChannelDropout(FeaturePerturbation):
    """Drops whole channels with probability `p` and scales the others by 1 / (1 - p): spatial dropout.

    Args:
        p: probability of dropping a channel.

    Raises:
        ValueError: `p` is outside [0, 1).

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import ChannelDropout
        >>> features = torch.ones(8, 16, 8, 8)
        >>> ChannelDropout(p=0.5)(features).unique()  # whole channels
        tensor([0., 2.])
        >>> torch.equal(ChannelDropout(p=0.5).eval()(features), features)
        True
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"p must be at least 0 and below 1, got {p}.")
        self.p = p

    def factor(self, features: Tensor) -> Tensor:
        kept = self.rand(features, features.shape[1], *[1] * (features.ndim - 2)) >= self.p
        return kept / (1 - self.p)
