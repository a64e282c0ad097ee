"""A discriminator, and how it is played against: DAN's and SASSNet's (public code: SSL4MIS and SASSNet)."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tensors import norm_dtype

LEAST_SIDE = 16  # it halves the image four times
LABELLED = 1
"""The discriminator's class for maps that look like maps of labelled images; class 0 is for all other maps."""


class Discriminator(nn.Module):
    """Tells maps of labelled images from maps of unlabelled ones, by map (a prediction, signed distances) and image.

    It has convolutions of kernel 4 and stride 2 without normalisation: one for the map and one for the image, whose
    outputs are added, then three more, and an average over space: over each of 2 x 2 parts in 2D, over the whole volume
    in 3D. In 3D the sum goes through LeakyReLU and dropout as well. At 256 x 256 the public code averages two windows
    of 7 of 16 rows and columns; here every row counts, at any size.

    Args:
        map_channels: channels of the map.
        image_channels: channels of the image.
        dimensions: dimensions of space, 2 or 3.

    Raises:
        ValueError: `dimensions` is neither 2 nor 3; when called, a side is below 16.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import Discriminator
        >>> discriminator = Discriminator(map_channels=3)
        >>> discriminator(torch.rand(2, 3, 16, 16), torch.rand(2, 1, 16, 16)).shape
        torch.Size([2, 2])
    """

    def __init__(self, map_channels: int, image_channels: int = 1, dimensions: int = 2) -> None:
        super().__init__()
        if dimensions not in (2, 3):
            raise ValueError(f"dimensions must be 2 or 3, got {dimensions}.")
        self.of_map = _halving(dimensions, map_channels, 64)
        self.of_image = _halving(dimensions, image_channels, 64)
        parts = 2 if dimensions == 2 else 1
        self.judge = nn.Sequential(
            *(() if dimensions == 2 else _activated(3)),
            _halving(dimensions, 64, 128),
            *_activated(dimensions),
            _halving(dimensions, 128, 256),
            *_activated(dimensions),
            _halving(dimensions, 256, 512),
            nn.LeakyReLU(0.2),
            nn.AdaptiveAvgPool2d(parts) if dimensions == 2 else nn.AdaptiveAvgPool3d(parts),
            nn.Flatten(),
            nn.Linear(512 * parts**dimensions, 2),
        )

    def forward(self, maps: Tensor, images: Tensor) -> Tensor:
        """Logits (B, 2) of `maps` (B, map_channels, *spatial) of `images` (B, image_channels, *spatial)."""
        if min(maps.shape[2:]) < LEAST_SIDE:
            raise ValueError(f"maps must have sides of at least {LEAST_SIDE}, got {(*maps.shape[2:],)}.")
        return self.judge(self.of_map(maps) + self.of_image(images))


def _halving(dimensions: int, in_channels: int, out_channels: int) -> nn.Module:
    convolution = nn.Conv2d if dimensions == 2 else nn.Conv3d
    return convolution(in_channels, out_channels, kernel_size=4, stride=2, padding=1)


def _activated(dimensions: int) -> tuple[nn.Module, ...]:
    return nn.LeakyReLU(0.2), nn.Dropout2d(0.5) if dimensions == 2 else nn.Dropout3d(0.5)


class Adversary(nn.Module):
    """A discriminator that a method trains against, with an Adam of its own. The run's optimizer does not hold it.

    In `forward` and `loss` the discriminator is frozen and in eval mode; it learns in `step` alone. Weights, Adam's
    averages and the last accuracy are in the `state_dict`. Autocast is switched off inside, and no `GradScaler` is
    needed.

    Args:
        discriminator: maps (B, ...) and images (B, ...) to logits (B, 2), as `Discriminator`.
        lr: learning rate of Adam, constant.
        betas: decay rates of Adam's averages. There is no weight decay.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import Adversary, Discriminator
        >>> adversary = Adversary(Discriminator(map_channels=3))
        >>> maps, images = torch.rand(4, 3, 16, 16).softmax(dim=1), torch.rand(4, 1, 16, 16)
        >>> adversary.step(maps, images, labelled=2)  # the discriminator learns
        >>> adversary.loss(maps, images).shape  # what the network that made the maps learns from
        torch.Size([])
    """

    mean: Tensor
    """Adam's average of the gradients, of all parameters in one vector."""
    square: Tensor
    """Adam's average of the squared gradients."""
    steps: Tensor
    """Number of steps; on the device, so that a captured CUDA graph counts its steps too."""
    accuracy: Tensor
    """Share of right verdicts in the last step: the mean of the shares on labelled and on unlabelled images, 0.5 for a
    guess. It is taken with dropout, before the discriminator learns from these images."""

    def __init__(self, discriminator: nn.Module, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__()
        self.discriminator = discriminator.requires_grad_(False)
        self.lr, self.betas = lr, betas
        flat = torch.cat([p.flatten() for p in discriminator.parameters()])
        self.register_buffer("mean", torch.zeros_like(flat))
        self.register_buffer("square", torch.zeros_like(flat))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=flat.device))
        self.register_buffer("accuracy", torch.full((), 0.5, device=flat.device))
        self.eval()

    def train(self, mode: bool = True) -> "Adversary":
        """Do nothing: outside of `step` the discriminator stays in eval mode."""
        return super().train(False)

    def forward(self, maps: Tensor, images: Tensor) -> Tensor:
        """Logits (B, 2); gradient goes to `maps` (B, C, *spatial) and `images`, not to the discriminator."""
        dtype = self.mean.dtype
        with _no_autocast(maps.device):
            return self.discriminator(maps.to(dtype), images.to(dtype))

    def loss(self, maps: Tensor, images: Tensor) -> Tensor:
        """Cross-entropy between verdicts and the class "labelled", mean over samples, 0-dim: small where it is
        fooled."""
        verdicts = self(maps, images)
        return F.cross_entropy(verdicts, torch.full_like(verdicts[:, 0], LABELLED, dtype=torch.int64))

    def step(self, maps: Tensor, images: Tensor, labelled: int) -> None:
        """One step of the discriminator, on samples of which the first `labelled` are labelled.

        Args:
            maps: (B, C, *spatial), what the model makes of `images`; no gradient goes there.
            images: (B, C', *spatial).
            labelled: number of labelled samples.

        Raises:
            ValueError: all samples are labelled, or none.
        """
        if not 0 < labelled < len(maps):
            raise ValueError(
                f"the discriminator learns from labelled images and from others, but {labelled} of {len(maps)} are "
                "labelled; write Batch(unlabelled, labelled)."
            )
        is_labelled = torch.arange(len(maps), device=maps.device) < labelled
        parameters = list(self.discriminator.parameters())
        with _learning(self.discriminator):
            verdicts = self(maps.detach(), images.detach())
            loss = F.cross_entropy(verdicts, torch.where(is_labelled, LABELLED, 1 - LABELLED))
            gradients = torch.autograd.grad(loss, parameters)
        self._descend(parameters, gradients)
        right = ((verdicts.argmax(dim=1) == LABELLED) == is_labelled).to(self.accuracy.dtype)
        self.accuracy.copy_((right[:labelled].mean() + right[labelled:].mean()) / 2)

    @torch.no_grad()
    def _descend(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """One step of Adam (Kingma and Ba, 2015). torch's own can't move to another device with its method."""
        gradient = torch.cat([g.flatten() for g in gradients])
        self.steps += 1
        self.mean.lerp_(gradient, 1 - self.betas[0])
        self.square.lerp_(gradient.square(), 1 - self.betas[1])
        steps = self.steps.to(norm_dtype(self.steps.device))
        mean, square = (a / (1 - b**steps) for a, b in zip((self.mean, self.square), self.betas, strict=True))
        way = self.lr * mean / (square.sqrt() + 1e-8)
        for p, part in zip(parameters, way.split([p.numel() for p in parameters]), strict=True):
            p.sub_(part.view_as(p))


@contextmanager
def _learning(discriminator: nn.Module) -> Iterator[None]:
    discriminator.train().requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        discriminator.eval().requires_grad_(False)


def _no_autocast(device: torch.device) -> AbstractContextManager[object]:
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()
