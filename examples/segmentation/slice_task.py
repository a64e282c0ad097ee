"""A data set for a 2D network: slices to learn from, volumes predicted slice by slice."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from segmentation.data import slices
from segmentation.data.augment import Strong, Weak
from segmentation.data.files import Volume
from segmentation.data.slices import Slices
from segmentation.figures.cases import Case
from segmentation.figures.slices import middle_slice, save_predictions
from segmentation.networks.attachments import Attach
from segmentation.networks.unet import UNet
from segmentation.recipe import Recipe
from segmentation.scoring.slicewise import predict_volume, segment_volume
from segmentation.task import Task


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
