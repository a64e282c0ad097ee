"""Predict whole volumes with a network that takes windows, the way the field does on LA.

Protocol as in the public code of UA-MT: windows 18 x 18 x 4 voxels apart, the last of each axis moved back to end
with the volume; the softmax is averaged over the windows that cover a voxel, with equal weights, before the
arg-max. A volume smaller than the window is padded with zeros on both sides (the mean of the scan that it was
cropped from), half of them rounded down in front, and the prediction cropped back. MONAI's inferer does it all.
"""

from collections.abc import Sequence

import numpy as np
import torch
from monai.inferers.utils import sliding_window_inference
from torch import Tensor, nn

from segmentation.errors import InputError
from segmentation.scoring.predict import entropy_of, eval_mode, labels_of, on_device


def segment_volume(
    model: nn.Module,
    image: np.ndarray,
    window: Sequence[int],
    stride: Sequence[int],
    device: torch.device | str,
    *,
    batch: int = 4,
) -> Tensor:
    """The labels of `predict_volume` alone, on `device`."""
    return labels_of(_probabilities(model, image, window, stride, device, batch), 0)


def predict_volume(
    model: nn.Module,
    image: np.ndarray,
    window: Sequence[int],
    stride: Sequence[int],
    device: torch.device | str,
    *,
    batch: int = 4,
) -> tuple[np.ndarray, np.ndarray]:
    """Segment one volume window by window, in eval mode.

    The averages are kept on `device` in float32, (C + 1) x X x Y x Z of them: 23 MB for a large LA volume.

    Args:
        model: (B, 1, *window) float32 images -> (B, C, *window) logits. The training flag of each of its
            modules is put back afterwards.
        image: (X, Y, Z), as `data` reads it: the scan's mean is 0, its standard deviation 1.
        window: (X, Y, Z) voxels that the network takes.
        stride: voxels from one window to the next along each axis.
        device: where the model lives.
        batch: windows per forward pass.

    Returns:
        Labels (X, Y, Z) uint8, and the entropy of the averaged softmax (X, Y, Z) float32: in nats over
        log(C), so that 0 is certain and 1 uniform.

    Raises:
        InputError: when the image is not an (X, Y, Z) array with at least one voxel, the window or the
            stride not three numbers from 1 up, the stride larger than the window, or the batch below 1.
    """
    probabilities = _probabilities(model, image, window, stride, device, batch)
    return labels_of(probabilities, 0).cpu().numpy(), entropy_of(probabilities, 0).cpu().numpy()


def _probabilities(
    model: nn.Module,
    image: np.ndarray,
    window: Sequence[int],
    stride: Sequence[int],
    device: torch.device | str,
    batch: int,
) -> Tensor:
    """The averaged softmax, (C, X, Y, Z) float32 on `device`."""
    _check(image.shape, window, stride)
    if batch < 1:
        raise InputError(f"batch: {batch} windows per forward pass, at least 1 is needed")

    def softmax(crops: Tensor) -> Tensor:
        return model(crops).float().softmax(dim=1)  # float32 under autocast, too

    whole = on_device(image.astype(np.float32, copy=False), device)
    with eval_mode(model), torch.inference_mode():
        averaged = sliding_window_inference(
            whole[None, None], tuple(window), batch, softmax, overlap=_overlaps(window, stride), mode="constant"
        )
    assert isinstance(averaged, Tensor)  # for mypy: the predictor returns one tensor
    return averaged[0]


def _overlaps(window: Sequence[int], stride: Sequence[int]) -> tuple[float, ...]:
    """Overlaps that MONAI, which moves by int(window * (1 - overlap)), turns into just this stride.

    The half voxel keeps rounding from taking one off: int(10 * (1 - (1 - 0.7))) could be 6.
    """
    return tuple(max(0.0, 1 - (step + 0.5) / side) for side, step in zip(window, stride, strict=True))


def _check(shape: Sequence[int], window: Sequence[int], stride: Sequence[int]) -> None:
    if len(shape) != 3 or 0 in shape:
        raise InputError(f"image: expected (X, Y, Z) with at least one voxel, got {tuple(shape)}")
    if len(window) != 3 or min(window) < 1:
        raise InputError(f"window: expected three sides of at least one voxel, got {tuple(window)}")
    if len(stride) != 3 or min(stride) < 1:
        raise InputError(f"stride: expected three steps of at least one voxel, got {tuple(stride)}")
    if any(step > side for step, side in zip(stride, window, strict=True)):
        raise InputError(f"stride: {tuple(stride)} leaves gaps between windows of {tuple(window)}; take smaller steps")
