"""What a data set is to everything else here: all that an example for a new one has to say.

`slice_task.SliceTask` is a task for a 2D network, `volume_task.VolumeTask` one for a 3D network, `image_task.ImageTask`
one for photographs. A data set is an object of one of them (see `acdc.py` and `la.py`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from segmentation.data.files import Volume, patient_of
from segmentation.networks.attachments import Attach
from segmentation.recipe import Recipe

Scores = tuple[float, float]
"""Dice in percent, ASD in voxels."""


class Pool(Protocol):
    """Training samples, from which batches of one shape are taken."""

    def __len__(self) -> int: ...

    def to(self, device: torch.device) -> "Pool":
        """The same samples on `device`."""

    def image_batch(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """Images (B, C, *size) float32 of the samples at `indices`, on their device.

        Args:
            indices: int64 (B,), on the CPU.
            generator: of the CPU, for what is chosen at random (where to crop).
        """

    def batch(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The same images and their labels (B, *size); of labelled samples alone."""


class WeakAugmentation(Protocol):
    """A weak view: geometry."""

    def __call__(self, images: Tensor) -> Tensor:
        """`images` (B, C, *size), moved."""

    def with_labels(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """`images` and `labels` (B, *size) under the same motions."""


@dataclass(frozen=True)
class Case:
    """One slice or volume, and what each method makes of it.

    Attributes:
        image: float, 2D or 3D; a colour image (H, W, 3) in [0, 1].
        reference: integer labels in the image's shape, without its colours, 0 the background.
        predictions: method -> (labels, entropy in [0, 1]), both in that shape; the same methods in every case.
        name: printed beside the row.
    """

    image: np.ndarray
    reference: np.ndarray
    predictions: Mapping[str, tuple[np.ndarray, np.ndarray]]
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A data set and how it is read, learnt from, predicted and drawn.

    Attributes:
        name: of the data set.
        classes: names of the foreground classes 1, 2, ...
        presets: the fields in which each preset differs from `Recipe`'s defaults; among them `paper` and `cpu`.
        training_list: name of the list file of training samples, without `.list`.
        validation_list: of the volumes to choose an iteration on; None where the field takes the last one.
        test_list: of the volumes that are scored in the end.
        training_patients: how many there are, for labelled shares in percent.
        published: scores of the paper: labelled share in percent -> method -> scores.
        write_phantom: writes a small data set in the same layout, to try everything without data, with the preset
            `phantom`.
        patient: whose a case or slice is, by its name. A patient is in one list alone, and the labelled share is one of
            patients.
        channels: of an image; more than one are photographs' (`image_task.ImageTask`).
        intensities: least and greatest value of an image, or None for any.
        stride: of the sliding window by which volumes are predicted, in voxels; None where there is no window.
    """

    name: str
    classes: tuple[str, ...]
    presets: Mapping[str, Mapping[str, Any]]
    training_list: str
    validation_list: str | None
    test_list: str
    training_patients: int
    published: Mapping[int, Mapping[str, Scores]]
    write_phantom: Callable[[Path], None] | None = None
    patient: Callable[[str], str] = patient_of
    channels: int = 1
    intensities: tuple[float, float] | None = None
    stride: tuple[int, ...] | None = None

    @property
    def has_phantom(self) -> bool:
        """Whether there is something to run without data."""
        return self.write_phantom is not None and "phantom" in self.presets

    @property
    def num_classes(self) -> int:
        """Background included."""
        return len(self.classes) + 1

    @property
    def lists(self) -> tuple[str, ...]:
        """Names of all list files."""
        validation = () if self.validation_list is None else (self.validation_list,)
        return (self.training_list, *validation, self.test_list)

    @abstractmethod
    def training_path(self, root: Path, name: str) -> Path:
        """Where the layout keeps a training sample."""

    @abstractmethod
    def volume_path(self, root: Path, name: str) -> Path:
        """Where the layout keeps a volume."""

    @abstractmethod
    def read_labelled(self, root: Path, names: Sequence[str], recipe: Recipe) -> Pool:
        """The named training samples and their labels. Raises InputError for a bad file, and where nothing but
        background is labelled.
        """

    @abstractmethod
    def read_unlabelled(self, root: Path, names: Sequence[str], recipe: Recipe) -> Pool:
        """The named training samples' images; labels are not read. Raises InputError for a bad file."""

    @abstractmethod
    def read_volumes(self, root: Path, names: Sequence[str]) -> list[Volume]:
        """The named volumes and their labels, to be scored. Raises InputError for a bad file."""

    @abstractmethod
    def network(self, recipe: Recipe, attachment: Attach | None) -> nn.Module:
        """A fresh one: (B, channels, *size) images -> (B, num_classes, *size) logits.

        In training mode followed, in a tuple, by what its attachment returns; its other parameters are then those that
        a seed gives without.
        """

    @abstractmethod
    def weak(self) -> WeakAugmentation:
        """The weak augmentation."""

    @abstractmethod
    def strong(self, recipe: Recipe) -> Callable[[Tensor], Tensor]:
        """What makes a weak view strong, intensities alone."""

    @abstractmethod
    def segment_each(
        self,
        model: nn.Module,
        images: Iterable[np.ndarray],
        recipe: Recipe,
        stride: tuple[int, ...] | None,
        device: torch.device,
    ) -> Iterator[Tensor]:
        """Labels, uint8 on `device`, of the images of whole volumes, each in its shape; nothing waits for them."""

    def segment(
        self, model: nn.Module, image: np.ndarray, recipe: Recipe, stride: tuple[int, ...] | None, device: torch.device
    ) -> np.ndarray:
        """The same of one volume, on the host."""
        (labels,) = self.segment_each(model, [image], recipe, stride, device)
        return labels.cpu().numpy()

    @abstractmethod
    def predict(
        self, model: nn.Module, image: np.ndarray, recipe: Recipe, stride: tuple[int, ...] | None, device: torch.device
    ) -> tuple[np.ndarray, np.ndarray]:
        """The same labels, and the entropy of the softmax over its greatest value, float32 in [0, 1]."""

    @abstractmethod
    def draw(self, folder: Path, cases: Sequence[Case]) -> None:
        """Pictures of whole volumes and what each method makes of them, into `folder`."""
