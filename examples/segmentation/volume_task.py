"""A data set for a 3D network: crops to learn from, volumes predicted by a sliding window."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from segmentation.data import crops
from segmentation.data.crops import Crops
from segmentation.data.files import Volume
from segmentation.data.strong import Strong, adjust_normalised, blur
from segmentation.data.weak_volumes import WeakVolumes
from segmentation.figures.volumes import save_surfaces, save_volumes
from segmentation.networks.attachments import Attach
from segmentation.networks.vnet import VNet
from segmentation.recipe import Recipe
from segmentation.scoring import sliding
from segmentation.task import Case, Task


@dataclass(frozen=True, kw_only=True)
class VolumeTask(Task):
    """Volumes for a V-Net.

    Attributes:
        stride: of the sliding window in voxels, if the user does not say; validation takes it in any case.
        path: where a case lies under the root.
    """

    stride: tuple[int, ...]
    path: Callable[[Path, str], Path] = crops.case_path

    def training_path(self, root: Path, name: str) -> Path:
        return self.path(root, name)

    def volume_path(self, root: Path, name: str) -> Path:
        return self.path(root, name)

    def read_labelled(self, root: Path, names: Sequence[str], recipe: Recipe) -> Crops:
        return Crops.of(self.read_volumes(root, names), _box(recipe))

    def read_unlabelled(self, root: Path, names: Sequence[str], recipe: Recipe) -> Crops:
        images = crops.load_images(root, names, self.path)
        return Crops(names, [torch.from_numpy(image) for image in images], None, _box(recipe))

    def read_volumes(self, root: Path, names: Sequence[str]) -> list[Volume]:
        return crops.load_cases(root, names, self.num_classes, self.path)

    def network(self, recipe: Recipe, attachment: Attach | None) -> nn.Module:
        return VNet(self.channels, self.num_classes, width=recipe.width, attachment=attachment)

    def weak(self) -> WeakVolumes:
        return WeakVolumes()

    def strong(self, recipe: Recipe) -> Strong:
        return Strong(sigma=blur(recipe.blur), adjust=adjust_normalised)

    def segment_each(
        self,
        model: nn.Module,
        images: Iterable[np.ndarray],
        recipe: Recipe,
        stride: tuple[int, ...] | None,
        device: torch.device,
    ) -> Iterator[Tensor]:
        step = self._step(recipe, stride)
        return (sliding.segment_volume(model, image, recipe.size, step, device) for image in images)

    def predict(
        self, model: nn.Module, image: np.ndarray, recipe: Recipe, stride: tuple[int, ...] | None, device: torch.device
    ) -> tuple[np.ndarray, np.ndarray]:
        return sliding.predict_volume(model, image, recipe.size, self._step(recipe, stride), device)

    def _step(self, recipe: Recipe, stride: tuple[int, ...] | None) -> tuple[int, ...]:
        """No longer than the window."""
        return tuple(map(min, stride or self.stride, recipe.size))

    def draw(self, folder: Path, cases: Sequence[Case]) -> None:
        save_volumes(folder / "predictions.png", cases, self.classes)
        save_surfaces(folder / "surfaces.png", cases, self.classes)


def _box(recipe: Recipe) -> tuple[int, int, int]:
    x, y, z = recipe.size
    return x, y, z
