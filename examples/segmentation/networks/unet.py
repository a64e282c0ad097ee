"""The networks of the field's common recipe."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gap_torch.consistency import Outputs
from segmentation.networks.attachments import Attach, Parts
from segmentation.networks.dropout import Dropout


class UNet(nn.Module):
    """2D UNet of five levels, about 1.8 M parameters at the default width.

    Two 3x3 convolutions with batch norm and LeakyReLU a block and dropout between them in the encoder, max-pooling
    down, bilinear up: the UNet of SSL4MIS and UniMatch.

    Args:
        in_channels: channels of the image.
        num_classes: channels of the logits.
        width: channels of the first level; they double at each of the four others.
        dropout: probability by level.
        attachment: what makes further outputs in training mode, behind the network's own logits (`attachments.py`).
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 4,
        width: int = 16,
        dropout: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.5),
        attachment: Attach | None = None,
    ) -> None:
        super().__init__()
        channels = [width * 2**level for level in range(5)]
        inputs = [in_channels, *channels[:-1]]
        self.encoder = nn.ModuleList(ConvBlock(i, o, p) for i, o, p in zip(inputs, channels, dropout, strict=True))
        own = Decoder(channels, num_classes, Up)
        self.up, self.decoder, self.head = own.up, own.decoder, own.head
        head, foreground_head = (partial(_head, count) for count in (num_classes, num_classes - 1))
        decoder, *others = (partial(Decoder, channels, num_classes, up) for up in (Up, TransposedUp, NearestUp))
        twin = partial(UNet, in_channels, num_classes, width, dropout)
        parts = Parts(channels, head, foreground_head, decoder, others, twin)
        self.attachment = None if attachment is None else attachment(parts)

    def forward(self, image: Tensor) -> Outputs:
        """Logits (B, num_classes, H, W) of `image` (B, in_channels, H, W); H and W are multiples of 16.

        With an attachment, in training mode, a tuple: those, and what it adds.
        """
        features = [self.encoder[0](image)]
        for block in self.encoder[1:]:
            features.append(block(F.max_pool2d(features[-1], 2)))
        if self.attachment is None or not self.attachment.training:
            return self._decode(features)[1]
        return self.attachment(image, features, self._decode)

    def _decode(self, features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        levels = decoded(features, self.up, self.decoder)
        return levels, self.head(levels[-1])


class Decoder(nn.Module):
    """From the encoder's features to logits; `channels` are theirs, the deepest last, and `up` is as `Up`."""

    def __init__(self, channels: Sequence[int], num_classes: int, up: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        deep_to_shallow = list(zip(channels[:0:-1], channels[-2::-1], strict=True))
        self.up = nn.ModuleList(up(i, o) for i, o in deep_to_shallow)
        self.decoder = nn.ModuleList(ConvBlock(2 * o, o, 0.0) for _, o in deep_to_shallow)
        self.head = _head(num_classes, channels[0])

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.head(decoded(features, self.up, self.decoder)[-1])


def decoded(features: Sequence[Tensor], up: nn.ModuleList, decoder: nn.ModuleList) -> list[Tensor]:
    """What each level of a decoder makes of the encoder's `features`, the deepest first."""
    levels = [features[-1]]
    for upsample, block, skip in zip(up, decoder, features[-2::-1], strict=True):
        levels.append(block(torch.cat([skip, upsample(levels[-1])], dim=1)))
    return levels[1:]


def _head(num_classes: int, channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, num_classes, kernel_size=3, padding=1)


class Up(nn.Sequential):
    """Twice the height and width, with fewer channels; the 1x1 convolution comes first, where it costs least."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size=1),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
        )


class NearestUp(nn.Sequential):
    """The same with each value repeated."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(nn.Conv2d(in_channels, out_channels, kernel_size=1), nn.Upsample(scale_factor=2))


class TransposedUp(nn.ConvTranspose2d):
    """The same by a transposed convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=2, stride=2)


class ConvBlock(nn.Sequential):
    """Two times convolution, batch norm, LeakyReLU, with dropout between."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.LeakyReLU(0.01, inplace=True),
            Dropout(dropout),
            nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.LeakyReLU(0.01, inplace=True),
        )
