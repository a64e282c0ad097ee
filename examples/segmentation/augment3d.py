"""Batched augmentation of volumes on their own device, each sample with its own random numbers.

Random numbers stay on the device, so nothing here waits for a GPU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .augment import BLUR_RADIUS


class Turns:
    """Quarter turns and flips in the plane of X and Y, all eight equally often: the weak view.

    Where X and Y differ a quarter turn would change the shape; half a turn and the two flips remain. No voxel is
    interpolated, and none leaves the crop.

    Args:
        generator: source of random numbers on the images' device; None for the default one.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator

    def __call__(self, images: Tensor) -> Tensor:
        """`images` (B, C, X, Y, Z) turned."""
        return turn(images, self.draw(len(images), images.device))

    def with_labels(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """`images` (B, C, X, Y, Z) and `labels` (B, X, Y, Z) under the same turns."""
        turns = self.draw(len(images), images.device)
        return turn(images, turns), turn(labels, turns)

    def draw(self, batch: int, device: torch.device) -> Tensor:
        """(3, batch), bool: whether a sample is transposed, then flipped along X, then along Y."""
        return torch.rand(3, batch, device=device, generator=self.generator) < 0.5


def turn(volumes: Tensor, turns: Tensor) -> Tensor:
    """`volumes` (B, ..., X, Y, Z) of any type, turned as `Turns.draw` says; transposed only where X = Y."""
    transposes, flips_x, flips_y = turns.view(3, -1, *[1] * (volumes.ndim - 1))
    if volumes.shape[-3] == volumes.shape[-2]:
        volumes = torch.where(transposes, volumes.transpose(-3, -2), volumes)
    volumes = torch.where(flips_x, volumes.flip(-3), volumes)
    return torch.where(flips_y, volumes.flip(-2), volumes)


class Intensities:
    """Brightness and contrast jitter and Gaussian blur: the strong view, for images of any range.

    UniMatch's strong view multiplies images in [0, 1]. LA's have zero mean and unit variance, so that here contrast
    changes around a sample's mean, brightness in units of its standard deviation, and nothing is clamped.

    Args:
        p_jitter: probability of the jitter.
        jitter: greatest change of the contrast factor from 1, and greatest shift in standard deviations.
        p_blur: probability of the blur.
        sigma: least and greatest width of the blur in voxels.
        generator: source of random numbers on the images' device; None for the default one.
    """

    def __init__(
        self,
        p_jitter: float = 0.8,
        jitter: float = 0.5,
        p_blur: float = 0.5,
        sigma: tuple[float, float] = (0.1, 2.0),
        generator: torch.Generator | None = None,
    ) -> None:
        self.p_jitter, self.jitter, self.p_blur, self.sigma = p_jitter, jitter, p_blur, sigma
        self.generator = generator

    def __call__(self, images: Tensor) -> Tensor:
        """`images` (B, C, X, Y, Z), changed in intensity alone."""
        random = torch.rand(5, len(images), 1, 1, 1, 1, device=images.device, generator=self.generator)
        jitters, brightness, contrast, blurs, width = random
        jittered = adjust(images, self._change(brightness), 1 + self._change(contrast))
        images = torch.where(jitters < self.p_jitter, jittered, images)
        least, greatest = self.sigma
        blurred = gaussian_blur(images, (least + (greatest - least) * width).flatten())
        return torch.where(blurs < self.p_blur, blurred, images)

    def _change(self, uniform: Tensor) -> Tensor:
        return self.jitter * (2 * uniform - 1)


def adjust(images: Tensor, brightness: Tensor, contrast: Tensor) -> Tensor:
    """Contrast around each image's mean, and a shift in units of its standard deviation.

    Args:
        images: (B, C, X, Y, Z).
        brightness: shifts (B, 1, 1, 1, 1) in standard deviations of the image as it came.
        contrast: factors (B, 1, 1, 1, 1).
    """
    std, mean = torch.std_mean(images, dim=(1, 2, 3, 4), keepdim=True, correction=0)
    return images * contrast + (mean * (1 - contrast) + std * brightness)


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of every image by its own width, mirrored at the borders as often as a thin crop needs it.

    Args:
        images: (B, C, X, Y, Z).
        sigma: widths in voxels, (B,); at most a third of BLUR_RADIUS, where the kernel ends.
    """
    offsets = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=images.device, dtype=images.dtype)
    kernels = torch.softmax(-0.5 * (offsets / sigma[:, None]) ** 2, dim=1).repeat_interleave(images.shape[1], dim=0)
    volumes = images.flatten(0, 1)[None]
    for axis in (2, 3, 4):
        along = [-1 if other == axis else 1 for other in (2, 3, 4)]
        volumes = volumes.index_select(axis, _mirrored(volumes.shape[axis], images.device))
        volumes = F.conv3d(volumes, kernels.view(len(kernels), 1, *along), groups=len(kernels))
    return volumes.view(images.shape)


def _mirrored(size: int, device: torch.device) -> Tensor:
    """Where each voxel of a padded axis comes from; F.pad refuses an axis that is no longer than the padding."""
    period = max(2 * (size - 1), 1)
    place = torch.arange(-BLUR_RADIUS, size + BLUR_RADIUS, device=device).remainder(period)
    return torch.minimum(place, period - place)
