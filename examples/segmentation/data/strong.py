"""The strong view, intensities alone: batched on the images' own device, each sample with its own random numbers.

Random numbers stay on the device, so nothing here waits for a GPU.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

BLUR_RADIUS = 6  # pixels: three times the greatest sigma
Adjustment = Callable[[Tensor, Tensor, Tensor], Tensor]


def blur(scale: float) -> tuple[float, float]:
    """Least and greatest width of UniMatch's blur in pixels, times `scale`, at most 1."""
    return 0.1 * scale, 2.0 * scale


class Strong:
    """Brightness and contrast jitter and Gaussian blur: the intensity part of UniMatch's strong view, in 2D or 3D.

    Args:
        p_jitter: probability of the jitter.
        jitter: greatest change of the brightness and contrast factors from 1.
        p_blur: probability of the blur.
        sigma: least and greatest width of the blur in pixels.
        adjust: what the two factors do: `adjust_unit` to images in [0, 1], `adjust_normalised` to those of zero mean
            and unit variance.
        generator: source of random numbers on the images' device; None for the default one.
    """

    def __init__(
        self,
        p_jitter: float = 0.8,
        jitter: float = 0.5,
        p_blur: float = 0.5,
        sigma: tuple[float, float] = blur(1.0),
        adjust: Adjustment | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.p_jitter, self.jitter, self.p_blur, self.sigma = p_jitter, jitter, p_blur, sigma
        self.adjust, self.generator = adjust or adjust_unit, generator

    def __call__(self, images: Tensor) -> Tensor:
        """`images` (B, C, *spatial), changed in intensity alone."""
        each = (len(images), *[1] * (images.ndim - 1))
        random = torch.rand(5, *each, device=images.device, generator=self.generator)
        jitters, brightness, contrast, blurs, width = random
        jittered = self.adjust(images, self._factor(brightness), self._factor(contrast))
        images = torch.where(jitters < self.p_jitter, jittered, images)
        least, greatest = self.sigma
        blurred = gaussian_blur(images, (least + (greatest - least) * width).flatten())
        return torch.where(blurs < self.p_blur, blurred, images)

    def _factor(self, uniform: Tensor) -> Tensor:
        return 1 + self.jitter * (2 * uniform - 1)


def adjust_unit(images: Tensor, brightness: Tensor, contrast: Tensor) -> Tensor:
    """Brightness, then contrast around each image's mean, clamped to [0, 1] after both, as torchvision defines them.

    Args:
        images: (B, C, *spatial) in [0, 1].
        brightness: factors (B, 1, ...).
        contrast: factors (B, 1, ...).
    """
    images = (images * brightness).clamp(0, 1)
    mean = images.mean(dim=_all_but_batch(images), keepdim=True)
    return (mean + (images - mean) * contrast).clamp(0, 1)


def adjust_normalised(images: Tensor, brightness: Tensor, contrast: Tensor) -> Tensor:
    """Contrast around each image's mean, and a shift by `brightness` - 1 of its standard deviations; no clamping.

    Args:
        images: (B, C, *spatial) of any range.
        brightness: (B, 1, ...).
        contrast: factors (B, 1, ...).
    """
    std, mean = torch.std_mean(images, dim=_all_but_batch(images), keepdim=True, correction=0)
    return images * contrast + (mean * (1 - contrast) + std * (brightness - 1))


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of every image by its own width, mirrored at the borders as often as a thin image needs it.

    torchvision's takes one width for the whole batch, and images in the plane alone.

    Args:
        images: (B, C, *spatial), in 2D or 3D.
        sigma: widths in pixels, (B,); at most a third of `BLUR_RADIUS`, where the kernel ends.
    """
    offsets = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=images.device, dtype=images.dtype)
    kernels = torch.softmax(-0.5 * (offsets / sigma[:, None]) ** 2, dim=1).repeat_interleave(images.shape[1], dim=0)
    convolve = F.conv2d if images.ndim == 4 else F.conv3d
    planes = images.flatten(0, 1)[None]
    for axis in range(2, images.ndim):
        along = [-1 if other == axis else 1 for other in range(2, images.ndim)]
        planes = planes.index_select(axis, _mirrored(planes.shape[axis], images.device))
        planes = convolve(planes, kernels.view(len(kernels), 1, *along), groups=len(kernels))
    return planes.view(images.shape)


def _mirrored(size: int, device: torch.device) -> Tensor:
    """Where each pixel of a padded axis comes from; F.pad refuses an axis that is no longer than the padding."""
    period = max(2 * (size - 1), 1)
    place = torch.arange(-BLUR_RADIUS, size + BLUR_RADIUS, device=device).remainder(period)
    return torch.minimum(place, period - place)


def _all_but_batch(images: Tensor) -> tuple[int, ...]:
    return tuple(range(1, images.ndim))
