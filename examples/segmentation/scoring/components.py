"""The largest connected component of each class, as some of the field keep it after predicting."""

import numpy as np
import torch
from scipy.ndimage import label as connected_components
from torch import Tensor

from segmentation.errors import InputError


def largest_component(labels: np.ndarray) -> np.ndarray:
    """Keep of each class the largest piece, and make the rest background.

    Voxels that share a face, an edge or a corner belong together; of two pieces of one size, the first in
    memory order stays. A class that is not there changes nothing.

    Args:
        labels: (X, Y, Z) or (H, W) integers, 0 the background.

    Returns:
        A new array of the same shape and type.

    Raises:
        InputError: when `labels` is no such array.
    """
    if labels.ndim not in (2, 3) or labels.dtype.kind not in "iu":
        raise InputError(f"labels: expected (X, Y, Z) or (H, W) integers, got {labels.dtype} {labels.shape}")
    kept = np.zeros_like(labels)
    for index in np.unique(labels[labels != 0]):
        pieces, _ = connected_components(labels == index, structure=np.ones((3,) * labels.ndim))
        sizes = np.bincount(pieces.ravel())
        sizes[0] = 0  # the rest of the volume
        kept[pieces == sizes.argmax()] = index
    return kept


def largest_components(labels: Tensor) -> Tensor:
    """The same of each sample of a batch (B, *spatial), on its device, for which the host waits.

    Raises:
        InputError: when `labels` is no such batch.
    """
    return torch.from_numpy(np.stack([largest_component(sample) for sample in labels.cpu().numpy()])).to(labels.device)
