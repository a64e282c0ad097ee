"""Resizing by nearest neighbour in SciPy's own coordinates.

Bit for bit `scipy.ndimage.zoom(..., order=0)`, as SSL4MIS resizes images and labels alike. `zoom` goes along each axis
alone, so that what it makes of one axis of indices says all of a pair of sides. Where rounding leads it beyond the last
pixel, as from 256 to 216, it leaves a 0; so does this.
"""

from functools import lru_cache

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor


def resize_nearest(array: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(..., H, W) resized to (..., *shape), dtype kept."""
    for axis, side in zip((-2, -1), shape, strict=True):
        sources, outside = _sources(array.shape[axis], side)
        array = array.take(sources, axis)
        np.moveaxis(array, axis, -1)[..., outside] = 0
    return array


def resize_tensor(tensor: Tensor, shape: tuple[int, int]) -> Tensor:
    """The same on the tensor's device, which nothing waits for."""
    for dim, side in zip((-2, -1), shape, strict=True):
        sources, outside = _sources(tensor.shape[dim], side)
        indices = torch.from_numpy(sources).to(tensor.device, non_blocking=tensor.is_cuda)
        tensor = tensor.index_select(dim, indices)
        for position in outside:
            tensor.select(dim, position).zero_()
    return tensor


@lru_cache(maxsize=4096)
def _sources(side: int, target: int) -> tuple[np.ndarray, list[int]]:
    """Along an axis of `side` pixels that gets `target`: whose value each takes, int64, and which take none."""
    counted_from_one = ndimage.zoom(np.arange(1, side + 1), target / side, order=0)
    return np.maximum(counted_from_one - 1, 0), np.flatnonzero(counted_from_one == 0).tolist()
