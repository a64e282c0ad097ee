"""The weak view of slices, batched on their own device, each sample with its own random numbers.

Random numbers stay on the device, so nothing here waits for a GPU.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


class WeakSlices:
    """A quarter turn with or without a flip, a small rotation, or nothing: the weak view of SSL4MIS and UniMatch.

    Args:
        p_turn: probability of one of the eight rotations by 90 degrees and flips.
        p_rotate: probability of a rotation by up to `degrees` instead.
        degrees: greatest angle of the small rotation.
        generator: source of random numbers on the images' device; None for the default one.
    """

    def __init__(
        self,
        p_turn: float = 0.5,
        p_rotate: float = 0.25,
        degrees: float = 20.0,
        generator: torch.Generator | None = None,
    ) -> None:
        self.p_turn, self.p_rotate, self.degrees, self.generator = p_turn, p_rotate, degrees, generator

    def __call__(self, images: Tensor) -> Tensor:
        """`images` (B, C, S, S) moved, zeros coming in from outside."""
        return _sample(images, self._grid(images))

    def with_labels(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """`images` (B, C, S, S) and `labels` (B, S, S), integer, under the same motions; background from outside."""
        grid = self._grid(images)
        moved = _sample(labels.unsqueeze(1).to(images.dtype), grid)
        return _sample(images, grid), moved.squeeze(1).to(labels.dtype)

    def motions(self, batch: int, device: torch.device) -> Tensor:
        """Random matrices (batch, 2, 3) from output to input coordinates."""
        kind, angle, quarter, flip = torch.rand(4, batch, device=device, generator=self.generator)
        turns = kind < self.p_turn
        rotates = ~turns & (kind < self.p_turn + self.p_rotate)
        quarter_turn = (4 * quarter).floor() * (math.pi / 2)
        small_angle = (2 * angle - 1) * math.radians(self.degrees)
        radians = quarter_turn * turns + small_angle * rotates
        mirror = 1 - 2.0 * (turns & (flip < 0.5))
        cos, sin = radians.cos(), radians.sin()
        rotation = torch.stack([torch.stack([mirror * cos, -sin], 1), torch.stack([mirror * sin, cos], 1)], 1)
        return F.pad(rotation, (0, 1))

    def _grid(self, images: Tensor) -> Tensor:
        motions = self.motions(len(images), images.device).to(images.dtype)
        return F.affine_grid(motions, list(images.shape), align_corners=False)


def _sample(images: Tensor, grid: Tensor) -> Tensor:
    # nearest, as the field's code does: labels stay labels, and images keep their grain
    return F.grid_sample(images, grid, mode="nearest", padding_mode="zeros", align_corners=False)
