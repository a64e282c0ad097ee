"""Prediction by a 2D network: of volumes, slice by slice, and of single images.

Protocol as in the public code of SSL4MIS and UniMatch: each slice is resized to the network's input size (nearest),
predicted, arg-maxed and resized back (nearest). All on the network's device, the slices of several volumes together.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from segmentation.data.resize import resize_tensor
from segmentation.errors import InputError
from segmentation.scoring.predict import entropy_of, eval_mode, labels_of, on_device

PIXELS = {"cpu": 2**18}
"""Of a batch, by kind of device. More are slower on a CPU: the system hands out their memory anew at each layer."""
MOST_PIXELS = 2**21
"""Where nothing else is said."""
BATCHES = 16
"""Held at once, so that all but the last of them are of one size."""
HELD = 2**27
"""Pixels of labels that are held at once, in the images' own sizes: photographs may be large."""

Read = Callable[[Tensor], tuple[Tensor, ...]]


def segment_volumes(
    model: nn.Module,
    images: Iterable[np.ndarray],
    size: tuple[int, int],
    device: torch.device | str,
    *,
    batch: int | None = None,
) -> Iterator[Tensor]:
    """The labels of `predict_volume` alone, of several volumes: tensors on `device`, which nothing has waited for."""
    for (labels,) in _predicted(model, map(_slices, images), size, device, batch, _labels):
        yield labels


def predict_volume(
    model: nn.Module,
    volume_image: np.ndarray,
    size: tuple[int, int],
    device: torch.device | str,
    *,
    batch: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Segment one volume slice by slice, in eval mode.

    Args:
        model: (B, 1, *size) float32 images -> (B, C, *size) logits. The training flag of each
            of its modules is put back afterwards.
        volume_image: (D, H, W) float32.
        size: height and width of the network's input, pixels.
        device: where the model lives.
        batch: slices per forward pass; None for what suits the device.

    Returns:
        Labels (D, H, W) uint8, and the entropy of the softmax (D, H, W) float32: in nats over log(C), so that
        0 is certain and 1 uniform.

    Raises:
        InputError: when the image is not a (D, H, W) array with at least one voxel.
    """
    return _labels_and_entropy_of(model, _slices(volume_image), size, device, batch)


def segment_images(
    model: nn.Module, images: Iterable[np.ndarray], size: tuple[int, int], device: torch.device | str
) -> Iterator[Tensor]:
    """The same as `segment_volumes` for images (C, H, W)."""
    for (labels,) in _predicted(model, (image[None] for image in images), size, device, None, _labels):
        yield labels[0]


def predict_image(
    model: nn.Module, image: np.ndarray, size: tuple[int, int], device: torch.device | str
) -> tuple[np.ndarray, np.ndarray]:
    """The same as `predict_volume` for one image (C, H, W) float32: labels (H, W) uint8 and entropy (H, W) float32."""
    labels, entropy = _labels_and_entropy_of(model, image[None], size, device, None)
    return labels[0], entropy[0]


def batch_size(size: tuple[int, int], device: torch.device | str) -> int:
    """How many images of `size` a forward pass takes."""
    return max(1, PIXELS.get(torch.device(device).type, MOST_PIXELS) // (size[0] * size[1]))


def _labels(logits: Tensor) -> tuple[Tensor, ...]:
    return (labels_of(logits, 1),)


def _labels_and_entropy(logits: Tensor) -> tuple[Tensor, ...]:
    return labels_of(logits, 1), entropy_of(logits.float().softmax(1), 1)


def _labels_and_entropy_of(
    model: nn.Module, images: np.ndarray, size: tuple[int, int], device: torch.device | str, batch: int | None
) -> tuple[np.ndarray, np.ndarray]:
    ((labels, entropy),) = _predicted(model, [images], size, device, batch, _labels_and_entropy)
    return labels.cpu().numpy(), entropy.cpu().numpy()


def _slices(volume_image: np.ndarray) -> np.ndarray:
    """(D, H, W) as images (D, 1, H, W)."""
    if volume_image.ndim != 3 or volume_image.size == 0:
        raise InputError(f"image: expected (D, H, W) with at least one voxel, got {volume_image.shape}")
    return volume_image[:, None]


def _predicted(
    model: nn.Module,
    images: Iterable[np.ndarray],
    size: tuple[int, int],
    device: torch.device | str,
    batch: int | None,
    read: Read,
) -> Iterator[tuple[Tensor, ...]]:
    """What `read` makes of the logits (B, C, *size), for each of `images` (N, C, H, W): (N, H, W) in its own size."""
    batch = batch or batch_size(size, device)
    for group in _groups(images, BATCHES * batch):
        with eval_mode(model), torch.inference_mode():
            inputs = torch.cat([resize_tensor(on_device(image, device), size) for image in group])
            parts = [read(model(chunk)) for chunk in inputs.split(batch)]
            planes = [torch.cat(part).split([*map(len, group)]) for part in zip(*parts, strict=True)]
            results = [
                tuple(resize_tensor(part, image.shape[2:]) for part in of_image)
                for image, *of_image in zip(group, *planes, strict=True)
            ]
        yield from results


def _groups(images: Iterable[np.ndarray], slices: int) -> Iterator[list[np.ndarray]]:
    """`images` in lists of at least so many slices, or of HELD pixels, but the last."""
    group: list[np.ndarray] = []
    for image in images:
        group.append(image)
        if sum(map(len, group)) >= slices or sum(image[:, 0].size for image in group) >= HELD:
            yield group
            group = []
    if group:
        yield group
