"""A data set of photographs: each image is a case, in colours, with a mask beside it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from segmentation.data import photos
from segmentation.data.files import Volume
from segmentation.data.slices import Slices, require_foreground
from segmentation.errors import InputError
from segmentation.figures.slices import save_predictions
from segmentation.recipe import Recipe
from segmentation.scoring.slicewise import predict_image, segment_images
from segmentation.slice_task import SliceTask, plane
from segmentation.task import Case


@dataclass(frozen=True, kw_only=True)
class ImageTask(SliceTask):
    """Photographs for a UNet, in the layout of `data.photos`. Every image is a case of its own (`patient`)."""

    channels: int = 3
    patient: Callable[[str], str] = str

    def __post_init__(self) -> None:
        if self.channels not in photos.MODES:
            raise InputError(f"{self.name}: channels must be 1 (grey) or 3 (colours), got {self.channels}")

    def training_path(self, root: Path, name: str) -> Path:
        return photos.photo_path(root, name)

    def volume_path(self, root: Path, name: str) -> Path:
        return photos.photo_path(root, name)

    def read_labelled(self, root: Path, names: Sequence[str], recipe: Recipe) -> Slices:
        labelled = photos.load_labelled(root, names, plane(recipe), self.channels, self.num_classes)
        require_foreground(root, labelled, lambda _: "all labelled images")  # some of them may well be without
        return labelled

    def read_unlabelled(self, root: Path, names: Sequence[str], recipe: Recipe) -> Slices:
        return photos.load_unlabelled(root, names, plane(recipe), self.channels)

    def read_volumes(self, root: Path, names: Sequence[str]) -> list[Volume]:
        return photos.load_volumes(root, names, self.channels, self.num_classes)

    def segment_each(
        self,
        model: nn.Module,
        images: Iterable[np.ndarray],
        recipe: Recipe,
        stride: tuple[int, ...] | None,
        device: torch.device,
    ) -> Iterator[Tensor]:
        return segment_images(model, images, plane(recipe), device)

    def predict(
        self, model: nn.Module, image: np.ndarray, recipe: Recipe, stride: tuple[int, ...] | None, device: torch.device
    ) -> tuple[np.ndarray, np.ndarray]:
        return predict_image(model, image, plane(recipe), device)

    def draw(self, folder: Path, cases: Sequence[Case]) -> None:
        shown = [replace(case, image=np.moveaxis(case.image, 0, -1)) for case in cases]
        save_predictions(folder / "predictions.png", shown, self.classes)
