"""Further predictions that some methods need while training: what both networks put beside their own.

Modules of a network, made after all others, so that those of a seed are the same with and without them.
"""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from gap_torch.consistency import ChannelDropout, FeatureDrop, FeatureNoise
from gap_torch.consistency.method import Auxiliary


def further(
    auxiliary: Auxiliary | None,
    channels: Sequence[int],
    head: Callable[[int], nn.Module],
    decoder: Callable[[], nn.Module],
) -> nn.Module | None:
    """The module that makes a network's further logits; None where none are asked for.

    Args:
        auxiliary: which ones.
        channels: of the network's levels, the deepest last.
        head: makes one: features with so many channels -> logits.
        decoder: makes one: features of all levels of the encoder, the deepest last -> logits.

    Returns:
        Features of the encoder, the deepest last, and levels of the own decoder, the deepest first -> list of logits.
    """
    if auxiliary == "pyramid":
        return Pyramid(head(c) for c in channels[-2:0:-1])
    return PerturbedDecoders(decoder) if auxiliary == "decoders" else None


class Pyramid(nn.ModuleList):
    """A head behind each level of a decoder but the last, the deepest first, without activations in between.

    Those of URPC's own code are behind dropout and noise besides; here they see the features as they are.
    """

    def forward(self, features: Sequence[Tensor], levels: Sequence[Tensor]) -> list[Tensor]:
        """Logits of all `levels` but the last, interpolated linearly to its size."""
        size = levels[-1].shape[2:]
        mode = "bilinear" if len(size) == 2 else "trilinear"
        heads = zip(self, levels[:-1], strict=True)
        return [F.interpolate(head(level), size=size, mode=mode, align_corners=False) for head, level in heads]


class PerturbedDecoders(nn.Module):
    """A decoder behind each of CCT's feature perturbations.

    All levels of the encoder are perturbed, not the deepest alone as in CCT's own network, which has no skips: past
    those of a UNet or V-Net, clean features would tell a decoder all that the perturbation took away.

    Args:
        decoder: makes one: features (B, C, *spatial), the deepest last -> logits.
    """

    def __init__(self, decoder: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.perturbations = nn.ModuleList([FeatureNoise(), FeatureDrop(), ChannelDropout()])
        self.decoders = nn.ModuleList(decoder() for _ in self.perturbations)

    def forward(self, features: Sequence[Tensor], levels: Sequence[Tensor]) -> list[Tensor]:
        """Logits that each decoder makes of `features`."""
        pairs = zip(self.perturbations, self.decoders, strict=True)
        return [decoder([perturbation(level) for level in features]) for perturbation, decoder in pairs]
