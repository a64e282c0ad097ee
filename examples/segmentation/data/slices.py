"""2D slices to learn from and volumes to score, in the h5 layout in which the community shares ACDC.

    root/data/slices/NAME.h5                a 2D slice: `image` (H, W), and where it counts as labelled `label` (H, W)
    root/data/NAME.h5                       a volume:   `image` (D, H, W), `label` (D, H, W)

Slices that were resized once are kept in root/.cache (`cache.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from segmentation.data.cache import read_samples
from segmentation.data.files import (
    BAD_LABEL,
    Image,
    Label,
    Volume,
    patient_of,
    read_case,
    read_image,
    require_dimensions,
    write_case,
)
from segmentation.data.parallel import in_parallel
from segmentation.data.resize import resize_nearest
from segmentation.errors import InputError

UNIT_RANGE = (0.0, 1.0)  # ACDC's intensities, and what the strong augmentation is made for
RANGE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Slices:
    """Equally sized 2D slices, ready for training.

    names: N names. images: (N, C, H, W) float32. labels: (N, H, W) uint8, one class index a pixel; None of
    unlabelled slices.
    """

    names: list[str]
    images: torch.Tensor
    labels: torch.Tensor | None

    def __len__(self) -> int:
        return len(self.names)

    def to(self, device: torch.device) -> "Slices":
        """The same slices on `device`."""
        labels = None if self.labels is None else self.labels.to(device)
        return Slices(self.names, self.images.to(device), labels)

    def image_batch(self, indices: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Images (B, C, H, W) of the slices at `indices`; nothing is random."""
        return self.images[self._moved(indices)]

    def batch(
        self, indices: torch.Tensor, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, C, H, W) and labels (B, H, W) of the labelled slices at `indices`; nothing is random."""
        assert self.labels is not None, "unlabelled slices have an image_batch alone"
        indices = self._moved(indices)
        return self.images[indices], self.labels[indices]

    def _moved(self, indices: torch.Tensor) -> torch.Tensor:
        # CUDA takes pageable memory over before it returns, others may not
        return indices.to(self.images.device, non_blocking=self.images.is_cuda)


def load_slices(
    root: str | Path,
    names: Sequence[str],
    size: tuple[int, int],
    num_classes: int = 4,
    intensities: tuple[float, float] | None = UNIT_RANGE,
) -> Slices:
    """The named slices and their labels, resized to `size`.

    Raises InputError as `read_case`, or if one is not 2D or leaves the range of `intensities` (None: any).
    """
    images = np.empty((len(names), 1, *size), np.float32)
    labels = np.empty((len(names), *size), np.uint8)

    def read(name: str) -> tuple[Image, Label]:
        path = slice_path(root, name)
        image, label = read_case(path, num_classes)
        return _prepared(path, image, size, intensities), resize_nearest(label, size)

    conditions = num_classes, intensities
    read_samples(root, "labelled", names, partial(_files, root), read, conditions, [images, labels])
    return Slices(list(names), torch.from_numpy(images), torch.from_numpy(labels))


def load_unlabelled(
    root: str | Path,
    names: Sequence[str],
    size: tuple[int, int],
    intensities: tuple[float, float] | None = UNIT_RANGE,
) -> Slices:
    """The named slices' images, resized to `size`; labels are not read, and need not be there.

    Raises InputError as `read_image`, or if one is not 2D or leaves the range of `intensities` (None: any).
    """
    images = np.empty((len(names), 1, *size), np.float32)

    def read(name: str) -> tuple[Image]:
        path = slice_path(root, name)
        return (_prepared(path, read_image(path), size, intensities),)

    read_samples(root, "unlabelled", names, partial(_files, root), read, intensities, [images])
    return Slices(list(names), torch.from_numpy(images), None)


def require_foreground(root: str | Path, labelled: Slices, patient: Callable[[str], str] = patient_of) -> None:
    """Raise InputError for the first patient all of whose labelled slices are background alone.

    patient: whose a slice is, by its name.
    """
    assert labelled.labels is not None
    found: dict[str, bool] = {}
    for name, label in zip(labelled.names, labelled.labels, strict=True):
        found[patient(name)] = found.get(patient(name), False) or bool(label.any())
    for whose, foreground in found.items():
        if not foreground:
            raise InputError(f"{root}: the labels of {whose} are empty, background alone; {BAD_LABEL}")


def load_volumes(
    root: str | Path,
    names: Sequence[str],
    num_classes: int = 4,
    intensities: tuple[float, float] | None = UNIT_RANGE,
) -> list[Volume]:
    """The named volumes, each in its own size.

    Raises InputError as `read_case`, or if one is not 3D or leaves the range of `intensities` (None: any).
    """

    def read(name: str) -> Volume:
        path = volume_path(root, name)
        image, label = read_case(path, num_classes)
        require_dimensions(path, image, "(D, H, W)")
        _require_intensities(path, image, intensities)
        return Volume(name, image, label)

    return list(in_parallel(read, names))


def write_slices(root: str | Path, case: str, image: Image, label: Label | None) -> list[str]:
    """Write a volume (D, H, W) slice by slice; returns the slices' names, numbered from 1."""
    names = [f"{case}_slice_{number}" for number in range(1, len(image) + 1)]
    labels = [None] * len(image) if label is None else label
    for name, image_slice, label_slice in zip(names, image, labels, strict=True):
        write_case(slice_path(root, name), image_slice, label_slice)
    return names


def slice_path(root: str | Path, name: str) -> Path:
    """Where the layout keeps a 2D slice."""
    return Path(root) / "data" / "slices" / f"{name}.h5"


def volume_path(root: str | Path, name: str) -> Path:
    """Where the layout keeps a volume."""
    return Path(root) / "data" / f"{name}.h5"


def _files(root: str | Path, name: str) -> list[Path]:
    return [slice_path(root, name)]


def _prepared(path: Path, image: Image, size: tuple[int, int], intensities: tuple[float, float] | None) -> Image:
    """A slice's image to learn from, once it has been checked."""
    require_dimensions(path, image, "(H, W)")
    _require_intensities(path, image, intensities)
    return resize_nearest(image, size)


def _require_intensities(path: Path, image: Image, intensities: tuple[float, float] | None) -> None:
    if intensities is None:
        return
    low, high = intensities
    if image.min() < low - RANGE_TOLERANCE or image.max() > high + RANGE_TOLERANCE:
        raise InputError(
            f"{path}: the image runs from {image.min():g} to {image.max():g}, outside [{low:g}, {high:g}]; "
            f"convert this case again"
        )
