"""The 3D network of the field's recipe on LA."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from gap_torch.consistency import Outputs
from segmentation.networks.attachments import Attach, Parts
from segmentation.networks.dropout import Dropout3d


class VNet(nn.Module):
    """V-Net of five levels, about 9.4 M parameters at the default width.

    Blocks of one to three 3x3x3 convolutions with batch norm and ReLU, strided convolutions down, transposed ones up,
    skips that add: the V-Net of UA-MT, on which SS-Net and BCP build. Dropout takes whole channels, at the bottleneck
    and before the output.

    Args:
        in_channels: channels of the image.
        num_classes: channels of the logits.
        width: channels of the first level; they double at each of the four others.
        dropout: probability that a channel is dropped.
        attachment: what makes further outputs in training mode, behind the network's own logits (`attachments.py`).
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 2,
        width: int = 16,
        dropout: float = 0.5,
        attachment: Attach | None = None,
    ) -> None:
        super().__init__()
        channels = [width * 2**level for level in range(5)]
        inputs = [in_channels, *channels[1:]]
        self.encoder = nn.ModuleList(
            ConvBlock(i, o, n) for i, o, n in zip(inputs, channels, (1, 2, 3, 3, 3), strict=True)
        )
        self.down = nn.ModuleList(Down(c) for c in channels[:-1])
        own = Decoder(channels, num_classes, dropout, Up)
        self.up, self.decoder, self.dropout, self.head = own.up, own.decoder, own.dropout, own.head
        head, foreground_head = (partial(_head, count) for count in (num_classes, num_classes - 1))
        decoder, *others = (partial(Decoder, channels, num_classes, dropout, up) for up in (Up, LinearUp, NearestUp))
        twin = partial(VNet, in_channels, num_classes, width, dropout)
        parts = Parts(channels, head, foreground_head, decoder, others, twin)
        self.attachment = None if attachment is None else attachment(parts)

    def forward(self, image: Tensor) -> Outputs:
        """Logits (B, num_classes, X, Y, Z) of `image` (B, in_channels, X, Y, Z), whose sides are multiples of 16.

        With an attachment, in training mode, a tuple: those, and what it adds.
        """
        features = [self.encoder[0](image)]
        for down, block in zip(self.down, self.encoder[1:], strict=True):
            features.append(block(down(features[-1])))
        features[-1] = self.dropout(features[-1])
        if self.attachment is None or not self.attachment.training:
            return self._decode(features)[1]
        return self.attachment(image, features, self._decode)

    def _decode(self, features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        levels = decoded(features, self.up, self.decoder)
        levels[-1] = self.dropout(levels[-1])
        return levels, self.head(levels[-1])


class Decoder(nn.Module):
    """From the encoder's features to logits; `channels` are theirs, the deepest last, and `up` is as `Up`."""

    def __init__(
        self, channels: Sequence[int], num_classes: int, dropout: float, up: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.up = nn.ModuleList(up(c) for c in channels[:0:-1])
        self.decoder = nn.ModuleList(ConvBlock(c, c, n) for c, n in zip(channels[-2::-1], (3, 3, 2, 1), strict=True))
        self.dropout = Dropout3d(dropout)
        self.head = _head(num_classes, channels[0])

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.head(self.dropout(decoded(features, self.up, self.decoder)[-1]))


def decoded(features: Sequence[Tensor], up: nn.ModuleList, decoder: nn.ModuleList) -> list[Tensor]:
    """What each level of a decoder makes of the encoder's `features`, the deepest first."""
    levels = [features[-1]]
    for upsample, block, skip in zip(up, decoder, features[-2::-1], strict=True):
        levels.append(block(upsample(levels[-1]) + skip))
    return levels[1:]


def _head(num_classes: int, channels: int) -> nn.Conv3d:
    return nn.Conv3d(channels, num_classes, kernel_size=1)


class ConvBlock(nn.Sequential):
    """`depth` times convolution, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, depth: int) -> None:
        inputs = [in_channels] + [out_channels] * (depth - 1)
        convolutions = [nn.Conv3d(channels, out_channels, kernel_size=3, padding=1) for channels in inputs]
        super().__init__(*(layer for convolution in convolutions for layer in _normed(convolution)))


class Down(nn.Sequential):
    """Half of every side, with twice the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__(*_normed(nn.Conv3d(channels, 2 * channels, kernel_size=2, stride=2)))


class Up(nn.Sequential):
    """Twice every side, with half of the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__(*_normed(nn.ConvTranspose3d(channels, channels // 2, kernel_size=2, stride=2)))


class LinearUp(nn.Sequential):
    """The same by trilinear interpolation, and a convolution behind it."""

    def __init__(self, channels: int) -> None:
        interpolate = nn.Upsample(scale_factor=2, mode="trilinear", align_corners=True)
        super().__init__(interpolate, *_normed(nn.Conv3d(channels, channels // 2, kernel_size=3, padding=1)))


class NearestUp(nn.Sequential):
    """The same with each value repeated."""

    def __init__(self, channels: int) -> None:
        convolution = nn.Conv3d(channels, channels // 2, kernel_size=3, padding=1)
        super().__init__(nn.Upsample(scale_factor=2), *_normed(convolution))


def _normed(convolution: nn.Conv3d | nn.ConvTranspose3d) -> tuple[nn.Module, ...]:
    return convolution, nn.BatchNorm3d(convolution.out_channels), nn.ReLU(inplace=True)
