"""What some methods need of a network beside its logits: modules that it owns, trained with it.

A network makes its attachment after all else, so that the parameters of a seed are the same with and without, and calls
it in training mode alone. Being part of the network it is trained, perturbed, averaged and saved as the rest is.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from gap_torch.consistency import ChannelDropout, FeatureDrop, FeatureNoise


@dataclass(frozen=True)
class Parts:
    """What an attachment may build on."""

    channels: Sequence[int]
    """Of the encoder's levels, the deepest last."""
    head: Callable[[int], nn.Module]
    """Makes one: features with so many channels -> logits."""
    decoder: Callable[[], nn.Module]
    """Makes one: features of all levels of the encoder, the deepest last -> logits."""


class Attachment(nn.Module, ABC):
    """Made of a network's `Parts`; what it returns comes behind the network's own logits.

    Each of its parameters must reach one of its outputs: for those that do not, DistributedDataParallel would wait in
    vain, and the gradients of several ranks would be wrong.
    """

    @abstractmethod
    def forward(self, image: Tensor, features: Sequence[Tensor], levels: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Tensors with the batch as their first dimension.

        Args:
            image: (B, C, *spatial).
            features: of the encoder, the deepest last.
            levels: of the network's own decoder, the deepest first.
        """


Attach = Callable[[Parts], Attachment]


class Pyramid(Attachment):
    """A head behind each level of a decoder but the last, the deepest first, without activations in between (URPC).

    Those of URPC's own code are behind dropout and noise besides; here they see the features as they are.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.heads = nn.ModuleList(parts.head(channels) for channels in parts.channels[-2:0:-1])

    def forward(self, image: Tensor, features: Sequence[Tensor], levels: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Logits of all `levels` but the last, interpolated linearly to its size."""
        size = levels[-1].shape[2:]
        mode = "bilinear" if len(size) == 2 else "trilinear"
        heads = zip(self.heads, levels[:-1], strict=True)
        return tuple(F.interpolate(head(level), size=size, mode=mode, align_corners=False) for head, level in heads)


class PerturbedDecoders(Attachment):
    """A decoder behind each of CCT's feature perturbations.

    All levels of the encoder are perturbed, not the deepest alone as in CCT's own network, which has no skips: past
    those of a UNet or V-Net, clean features would tell a decoder all that the perturbation took away.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.perturbations = nn.ModuleList([FeatureNoise(), FeatureDrop(), ChannelDropout()])
        self.decoders = nn.ModuleList(parts.decoder() for _ in self.perturbations)

    def forward(self, image: Tensor, features: Sequence[Tensor], levels: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Logits that each decoder makes of `features`."""
        pairs = zip(self.perturbations, self.decoders, strict=True)
        return tuple(decoder([perturbation(level) for level in features]) for perturbation, decoder in pairs)
