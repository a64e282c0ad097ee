"""What some methods need of a network beside its logits: modules that it owns, trained with it.

A network makes its attachment after all else, so that the parameters of a seed are the same with and without, and calls
it in training mode alone, but for passes within `without_attachment`. Being part of the network it is trained,
perturbed, averaged and saved as the rest is.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gap_torch.consistency import ChannelDropout, FeatureDrop, FeatureNoise
from gap_torch.losses import at_least_float32
from segmentation.networks.dropout import Dropout


@dataclass(frozen=True)
class Parts:
    """What an attachment may build on."""

    channels: Sequence[int]
    """Of the encoder's levels, the deepest last."""
    head: Callable[[int], nn.Module]
    """Makes one: features with so many channels -> logits."""
    foreground_head: Callable[[int], nn.Module]
    """Makes one: features with so many channels -> a channel for each class but the background."""
    decoder: Callable[[], nn.Module]
    """Makes one: features of all levels of the encoder, the deepest last -> logits."""
    others: Sequence[Callable[[], nn.Module]]
    """Each makes a decoder that upsamples in another way, the nearest voxel's value last."""
    network: Callable[[], nn.Module]
    """Makes another network like the one that the attachment is for, without an attachment: image -> logits."""


Decode = Callable[[Sequence[Tensor]], tuple[list[Tensor], Tensor]]
"""The network's own decoder: features of all levels of the encoder, the deepest last -> what each of its levels makes
of them, the deepest first and the last as the head sees it, and logits."""


class Attachment(nn.Module, ABC):
    """Made of a network's `Parts`; has the network decode, and adds its own outputs to the network's logits.

    Each of its parameters must reach one of its outputs: for those that do not, DistributedDataParallel would wait in
    vain, and the gradients of several ranks would be wrong.
    """

    @abstractmethod
    def forward(self, image: Tensor, features: Sequence[Tensor], decode: Decode) -> tuple[Tensor, ...]:
        """The network's logits and other tensors behind them, all with the batch as their first dimension.

        Args:
            image: (B, C, *spatial).
            features: of the encoder, the deepest last.
            decode: called once: each call moves the running statistics of the decoder.
        """


Attach = Callable[[Parts], Attachment]


@contextmanager
def without_attachment(model: nn.Module) -> Iterator[None]:
    """Within the context the network in `model` returns its logits alone, as in eval mode, and is otherwise as it was.

    Args:
        model: a network, or whatever wraps one (autocast, DistributedDataParallel, `torch.compile`).
    """
    attachments = [module for module in model.modules() if isinstance(module, Attachment) and module.training]
    for attachment in attachments:
        attachment.training = False
    try:
        yield
    finally:
        for attachment in attachments:
            attachment.training = True


class Pyramid(Attachment):
    """A head behind each level of a decoder but the last, the deepest first, without activations in between (URPC).

    Here they see the features as they are; in URPC's own code not (`PerturbedPyramid`).
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.heads = nn.ModuleList(parts.head(channels) for channels in parts.channels[-2:0:-1])

    def forward(self, image: Tensor, features: Sequence[Tensor], decode: Decode) -> tuple[Tensor, ...]:
        """Behind the network's logits those of all its levels but the last, interpolated linearly to its size."""
        levels, logits = decode(features)
        size = levels[-1].shape[2:]
        mode = "bilinear" if len(size) == 2 else "trilinear"
        heads = zip(self.heads, levels[:-1], strict=True)
        others = (F.interpolate(head(level), size=size, mode=mode, align_corners=False) for head, level in heads)
        return logits, *others


class PerturbedPyramid(Pyramid):
    """The same behind dropout of values, feature drop and feature noise, the deepest first, as in URPC's own code."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.perturbations = nn.ModuleList([Dropout(0.5), FeatureDrop(), FeatureNoise()])

    def forward(self, image: Tensor, features: Sequence[Tensor], decode: Decode) -> tuple[Tensor, ...]:
        """Behind the network's logits those of all its levels but the last, each value repeated to its size."""
        levels, logits = decode(features)
        size = levels[-1].shape[2:]
        perturbed = zip(self.heads, self.perturbations, levels[:-1], strict=True)
        return logits, *(F.interpolate(head(perturb(level)), size=size) for head, perturb, level in perturbed)


class PerturbedDecoders(Attachment):
    """A decoder behind each of CCT's feature perturbations.

    All levels of the encoder are perturbed, not the deepest alone as in CCT's own network, which has no skips: past
    those of a UNet or V-Net, clean features would tell a decoder all that the perturbation took away.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.perturbations = nn.ModuleList([FeatureNoise(), FeatureDrop(), ChannelDropout()])
        self.decoders = nn.ModuleList(parts.decoder() for _ in self.perturbations)

    def forward(self, image: Tensor, features: Sequence[Tensor], decode: Decode) -> tuple[Tensor, ...]:
        """Behind the network's logits those that each decoder makes of `features`."""
        _, logits = decode(features)
        pairs = zip(self.perturbations, self.decoders, strict=True)
        others = (decoder([perturbation(level) for level in features]) for perturbation, decoder in pairs)
        return logits, *others


class MedicalDecoders(PerturbedDecoders):
    """The same with dropout of values in place of whole channels, as in SSL4MIS."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.perturbations[2] = Dropout(0.3)


class Upsampled(Attachment):
    """A decoder that upsamples in another way than the network's own (MC-Net)."""

    count = 1

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.decoders = nn.ModuleList(make() for make in parts.others[: self.count])

    def forward(self, image: Tensor, features: Sequence[Tensor], decode: Decode) -> tuple[Tensor, ...]:
        """Behind the network's logits those that each decoder makes of `features`."""
        _, logits = decode(features)
        return logits, *(decoder(features) for decoder in self.decoders)


class TwiceUpsampled(Upsampled):
    """Two decoders that do, each in its way (MC-Net+)."""

    count = 2


class Twin(Attachment):
    """A second network, which learns beside the first and has nothing in common with it but the image (CPS).

    Its initial weights are drawn after the first one's, in the same way.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.network = parts.network()

    def forward(self, image: Tensor, features: Sequence[Tensor], decode: Decode) -> tuple[Tensor, ...]:
        """Behind the network's logits the twin's."""
        _, logits = decode(features)
        return logits, self.network(image)


class PerturbedFeatures(Attachment):
    """Features of which half of the channels are dropped, at every level, for the network's own decoder (UniMatch).

    The decoder has the clean and the perturbed features in one batch, so that its batch norm sees both. No parameters.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.perturbation = ChannelDropout(0.5)

    def forward(self, image: Tensor, features: Sequence[Tensor], decode: Decode) -> tuple[Tensor, ...]:
        """The network's logits of the features as they are, and of the perturbed ones."""
        _, logits = decode([_alternating(level, self.perturbation(level)) for level in features])
        return logits.unflatten(0, (-1, 2)).unbind(1)


class SignedDistances(Attachment):
    """A second head beside the network's own, on the same features, for signed distances (DTC, SASSNet)."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.head = parts.foreground_head(parts.channels[0])

    def forward(self, image: Tensor, features: Sequence[Tensor], decode: Decode) -> tuple[Tensor, ...]:
        """The network's logits, and a map in [-1, 1] for each class but the background, float32 at least."""
        levels, logits = decode(features)
        return logits, at_least_float32(self.head(levels[-1])).tanh()


def _alternating(clean: Tensor, perturbed: Tensor) -> Tensor:
    """Both (B, C, *spatial) in one batch (2B, C, *spatial), sample by sample: the order of one process, and of several
    that share the samples out, so that dropout masks are the same."""
    pairs = torch.cat([clean, perturbed], dim=2)  # in the memory format of both, which `stack` would not keep
    return pairs.unflatten(2, (2, -1)).movedim(2, 1).flatten(0, 1)
