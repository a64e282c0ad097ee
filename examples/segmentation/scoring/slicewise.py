"""A data set for a 2D network: volumes are predicted slice by slice.

Protocol as in the public code of SSL4MIS and UniMatch: each slice is resized to the network's input size (nearest),
predicted, arg-maxed and resized back (nearest).
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from segmentation.data.slices import resize_nearest
from segmentation.errors import InputError
from segmentation.scoring.predict import entropy_of, eval_mode, labels_of


def segment_volume(
    model: nn.Module, volume_image: np.ndarray, size: tuple[int, int], device: torch.device | str, *, batch: int = 32
) -> np.ndarray:
    """The labels of `predict_volume` alone, which saves the softmax and half the resizing."""
    (labels,) = _predicted(model, volume_image, size, device, batch, lambda logits: (labels_of(logits, 1),))
    return labels


def predict_volume(
    model: nn.Module,
    volume_image: np.ndarray,
    size: tuple[int, int],
    device: torch.device | str,
    *,
    batch: int = 32,
) -> tuple[np.ndarray, np.ndarray]:
    """Segment one volume slice by slice, in eval mode.

    Args:
        model: (B, 1, *size) float32 images -> (B, C, *size) logits. The training flag of each
            of its modules is put back afterwards.
        volume_image: (D, H, W) float32.
        size: height and width of the network's input, pixels.
        device: where the model lives.
        batch: slices per forward pass.

    Returns:
        Labels (D, H, W) uint8, and the entropy of the softmax (D, H, W) float32: in nats over log(C), so that
        0 is certain and 1 uniform.

    Raises:
        InputError: when the image is not a (D, H, W) array with at least one voxel.
    """
    labels, entropy = _predicted(
        model,
        volume_image,
        size,
        device,
        batch,
        lambda logits: (labels_of(logits, 1), entropy_of(logits.float().softmax(1), 1)),
    )
    return labels, entropy


def _predicted(
    model: nn.Module,
    volume_image: np.ndarray,
    size: tuple[int, int],
    device: torch.device | str,
    batch: int,
    read: Callable[[Tensor], tuple[Tensor, ...]],
) -> list[np.ndarray]:
    """What `read` makes of the logits, each (B, *size), as (D, H, W) in the volume's own size."""
    if volume_image.ndim != 3 or volume_image.size == 0:
        raise InputError(f"image: expected (D, H, W) with at least one voxel, got {volume_image.shape}")
    resized = torch.from_numpy(_resize(volume_image, size))
    slices = resized.unsqueeze(1).to(memory_format=torch.channels_last)
    with eval_mode(model), torch.inference_mode():
        parts = [read(model(chunk.to(device))) for chunk in slices.split(batch)]
    height, width = volume_image.shape[1:]
    return [_resize(torch.cat(part).cpu().numpy(), (height, width)) for part in zip(*parts, strict=True)]


def _resize(volume: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return np.stack([resize_nearest(image, shape) for image in volume])
