"""Prediction by a 2D network: of volumes, slice by slice, and of single images.

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
    (labels,) = _predicted(model, _slices(volume_image), size, device, batch, _labels)
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
    labels, entropy = _predicted(model, _slices(volume_image), size, device, batch, _labels_and_entropy)
    return labels, entropy


def segment_image(model: nn.Module, image: np.ndarray, size: tuple[int, int], device: torch.device | str) -> np.ndarray:
    """The labels of `predict_image` alone."""
    (labels,) = _predicted(model, image[None], size, device, 1, _labels)
    return labels[0]


def predict_image(
    model: nn.Module, image: np.ndarray, size: tuple[int, int], device: torch.device | str
) -> tuple[np.ndarray, np.ndarray]:
    """The same for one image (C, H, W) float32: labels (H, W) uint8 and entropy (H, W) float32."""
    labels, entropy = _predicted(model, image[None], size, device, 1, _labels_and_entropy)
    return labels[0], entropy[0]


def _labels(logits: Tensor) -> tuple[Tensor, ...]:
    return (labels_of(logits, 1),)


def _labels_and_entropy(logits: Tensor) -> tuple[Tensor, ...]:
    return labels_of(logits, 1), entropy_of(logits.float().softmax(1), 1)


def _slices(volume_image: np.ndarray) -> np.ndarray:
    """(D, H, W) as images (D, 1, H, W)."""
    if volume_image.ndim != 3 or volume_image.size == 0:
        raise InputError(f"image: expected (D, H, W) with at least one voxel, got {volume_image.shape}")
    return volume_image[:, None]


def _predicted(
    model: nn.Module,
    images: np.ndarray,
    size: tuple[int, int],
    device: torch.device | str,
    batch: int,
    read: Callable[[Tensor], tuple[Tensor, ...]],
) -> list[np.ndarray]:
    """What `read` makes of the logits of `images` (N, C, H, W), each (B, *size), as (N, H, W) in their own size."""
    resized = np.stack([_resize(image, size) for image in images])
    inputs = torch.from_numpy(resized).to(memory_format=torch.channels_last)
    with eval_mode(model), torch.inference_mode():
        parts = [read(model(chunk.to(device))) for chunk in inputs.split(batch)]
    height, width = images.shape[2:]
    return [_resize(torch.cat(part).cpu().numpy(), (height, width)) for part in zip(*parts, strict=True)]


def _resize(planes: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return np.stack([resize_nearest(plane, shape) for plane in planes])
