"""A data set for a 2D network: slices to learn from, volumes predicted slice by slice."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from segmentation.data import slices
from segmentation.data.files import Volume
from segmentation.data.slices import Slices
from segmentation.data.strong import Strong, adjust_normalised, blur
from segmentation.data.weak_slices import WeakSlices
from segmentation.figures.slices import middle_slice, save_predictions
from segmentation.networks.attachments import Attach
from segmentation.networks.unet import UNet
from segmentation.recipe import Recipe
from segmentation.scoring.slicewise import predict_volume, segment_volumes
from segmentation.task import Case, Task


@dataclass(frozen=True, kw_only=True)
class SliceTask(Task):
    """Slices of volumes for a UNet, in the layout of `data.slices`; in [0, 1] if the task doesn't say otherwise."""

    intensities: tuple[float, float] | None = slices.UNIT_RANGE

    def training_path(self, root: Path, name: str) -> Path:
        return slices.slice_path(root, name)

    def volume_path(self, root: Path, name: str) -> Path:
        return slices.volume_path(root, name)

    def read_labelled(self, root: Path, names: Sequence[str], recipe: Recipe) -> Slices:
        labelled = slices.load_slices(root, names, plane(recipe), self.num_classes, self.intensities)
        slices.require_foreground(root, labelled, self.patient)
        return labelled

    def read_unlabelled(self, root: Path, names: Sequence[str], recipe: Recipe) -> Slices:
        return slices.load_unlabelled(root, names, plane(recipe), self.intensities)

    def read_volumes(self, root: Path, names: Sequence[str]) -> list[Volume]:
        return slices.load_volumes(root, names, self.num_classes, self.intensities)

    def network(self, recipe: Recipe, attachment: Attach | None) -> nn.Module:
        return UNet(self.channels, self.num_classes, width=recipe.width, attachment=attachment)

    def weak(self) -> WeakSlices:
        return WeakSlices()

    def strong(self, recipe: Recipe) -> Strong:
        return Strong(
            sigma=blur(recipe.blur), adjust=None if self.intensities == slices.UNIT_RANGE else adjust_normalised
        )

    def segment_each(
        self,
        model: nn.Module,
        images: Iterable[np.ndarray],
        recipe: Recipe,
        stride: tuple[int, ...] | None,
        device: torch.device,
    ) -> Iterator[Tensor]:
        return segment_volumes(model, images, plane(recipe), device)

    def predict(
        self, model: nn.Module, image: np.ndarray, recipe: Recipe, stride: tuple[int, ...] | None, device: torch.device
    ) -> tuple[np.ndarray, np.ndarray]:
        return predict_volume(model, image, plane(recipe), device)

    def draw(self, folder: Path, cases: Sequence[Case]) -> None:
        save_predictions(folder / "predictions.png", [middle_slice(case) for case in cases], self.classes)


def plane(recipe: Recipe) -> tuple[int, int]:
    """Height and width of the network's input."""
    height, width = recipe.size
    return height, width
