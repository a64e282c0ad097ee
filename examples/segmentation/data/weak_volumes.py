"""The weak view of volumes, batched on their own device, each sample with its own random numbers.

The strong one is `strong.Strong`. Random numbers stay on the device, so nothing here waits for a GPU.
"""

import torch
from torch import Tensor


class WeakVolumes:
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
    """`volumes` (B, ..., X, Y, Z) of any type, turned as `WeakVolumes.draw` says; transposed only where X = Y."""
    transposes, flips_x, flips_y = turns.view(3, -1, *[1] * (volumes.ndim - 1))
    if volumes.shape[-3] == volumes.shape[-2]:
        volumes = torch.where(transposes, volumes.transpose(-3, -2), volumes)
    volumes = torch.where(flips_x, volumes.flip(-3), volumes)
    return torch.where(flips_y, volumes.flip(-2), volumes)
