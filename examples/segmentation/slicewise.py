"""A data set for a 2D network: volumes are predicted slice by slice.

Protocol as in the public code of SSL4MIS and UniMatch: each slice is resized to the network's input size (nearest),
predicted, arg-maxed and resized back (nearest).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from . import slices
from .attachments import Attach
from .augment import Strong, Weak
from .data import Volume
from .errors import InputError
from .figures import Case, middle_slice, save_predictions
from .networks import UNet
from .predict import entropy_of, eval_mode, labels_of
from .recipe import Recipe
from .slices import Slices, resize_nearest
from .task import Task


@dataclass(frozen=True, kw_only=True)
class SliceTask(Task):
    """Slices of volumes for a UNet."""

    def training_path(self, root: Path, name: str) -> Path:
        return slices.slice_path(root, name)

    def volume_path(self, root: Path, name: str) -> Path:
        return slices.volume_path(root, name)

    def read_labelled(self, root: Path, names: Sequence[str], recipe: Recipe) -> Slices:
        labelled = slices.load_slices(root, names, _plane(recipe), self.num_classes)
        slices.require_foreground(root, labelled, self.patient)
        return labelled

    def read_unlabelled(self, root: Path, names: Sequence[str], recipe: Recipe) -> Slices:
        return slices.load_unlabelled(root, names, _plane(recipe))

    def read_volumes(self, root: Path, names: Sequence[str]) -> list[Volume]:
        return slices.load_volumes(root, names, self.num_classes)

    def network(self, recipe: Recipe, attachment: Attach | None) -> nn.Module:
        return UNet(num_classes=self.num_classes, width=recipe.width, attachment=attachment)

    def weak(self) -> Weak:
        return Weak()

    def strong(self) -> Strong:
        return Strong()

    def segment(
        self, model: nn.Module, image: np.ndarray, recipe: Recipe, stride: tuple[int, ...] | None, device: torch.device
    ) -> np.ndarray:
        return segment_volume(model, image, _plane(recipe), device)

    def predict(
        self, model: nn.Module, image: np.ndarray, recipe: Recipe, stride: tuple[int, ...] | None, device: torch.device
    ) -> tuple[np.ndarray, np.ndarray]:
        return predict_volume(model, image, _plane(recipe), device)

    def draw(self, folder: Path, cases: Sequence[Case]) -> None:
        save_predictions(folder / "predictions.png", [middle_slice(case) for case in cases], self.classes)


def _plane(recipe: Recipe) -> tuple[int, int]:
    height, width = recipe.size
    return height, width


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
