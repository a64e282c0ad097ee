"""LA's h5 layout, and batches of random crops from volumes of differing size.

    root/train.list, root/test.list                      one case a line
    root/2018LA_Seg_Training Set/CASE/mri_norm2.h5       `image` (X, Y, Z), `label` (X, Y, Z)

A training case behind the labelled ones needs no `label`.

The layout is that in which UA-MT (https://github.com/yulequan/UA-MT) shares LA. There a scan was normalised to zero
mean and unit variance first and cut to the surroundings of the atrium afterwards, so that a file's own mean is between
0.05 and 1.9 and its standard deviation between 0.3 and 1.7.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from segmentation.data.files import BAD_LABEL, Image, Volume, read_case, read_image
from segmentation.data.parallel import in_parallel
from segmentation.errors import InputError

Size = tuple[int, int, int]
Cut = tuple[int, tuple[slice, ...]]
"""A volume's index, and a box in it."""

FOLDER = "2018LA_Seg_Training Set"
FILE = "mri_norm2.h5"
NORMALISED_STD = (0.1, 10.0)  # far outside of what LA's files have


class Crops:
    """Volumes of differing size, ready for training on random crops of one size.

    A volume smaller than the crop is padded, as much before as behind: images with 0, the mean of the scan, as in the
    field's code; labels with background. LA has none that is smaller than 112 x 112 x 80.

    Args:
        names: N names, for messages.
        images: N times (X, Y, Z) float32.
        labels: N times (X, Y, Z) uint8, one class index a voxel; None of unlabelled volumes.
        size: X, Y and Z of a crop.

    Raises:
        InputError: a volume does not fill half of the crop along an axis.
    """

    def __init__(
        self, names: Sequence[str], images: Sequence[Tensor], labels: Sequence[Tensor] | None, size: Size
    ) -> None:
        for name, image in zip(names, images, strict=True):
            _require_half(name, tuple(image.shape), size)
        self.names, self.size = list(names), size
        self.images = [_padded(image, size) for image in images]
        self.labels = None if labels is None else [_padded(label, size) for label in labels]

    @classmethod
    def of(cls, volumes: Sequence[Volume], size: Size) -> "Crops":
        """Crops of `volumes`, with which they share memory where nothing is padded."""
        images = [torch.from_numpy(volume.image) for volume in volumes]
        labels = [torch.from_numpy(volume.label) for volume in volumes]
        return cls([volume.name for volume in volumes], images, labels, size)

    def __len__(self) -> int:
        return len(self.names)

    def to(self, device: torch.device) -> "Crops":
        """The same volumes on `device`."""
        images = [image.to(device) for image in self.images]
        labels = None if self.labels is None else [label.to(device) for label in self.labels]
        return Crops(self.names, images, labels, self.size)

    def image_batch(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """The images (B, 1, X, Y, Z) of `batch`, cut at the places that it would cut at."""
        return _crops(self.images, self._cuts(indices, generator)).unsqueeze(1)

    def batch(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A random crop of each labelled volume in `indices`: images (B, 1, X, Y, Z) and labels (B, X, Y, Z).

        Args:
            indices: which volumes, int64 (B,); one may occur several times and is cropped anew each time.
            generator: of the CPU, so that nothing waits for a GPU; every place of a crop is equally likely.
        """
        assert self.labels is not None, "unlabelled volumes have an image_batch alone"
        cuts = self._cuts(indices, generator)
        return _crops(self.images, cuts).unsqueeze(1), _crops(self.labels, cuts)

    def _cuts(self, indices: Tensor, generator: torch.Generator) -> list[Cut]:
        return [(index, self._cut(index, generator)) for index in indices.tolist()]

    def _cut(self, index: int, generator: torch.Generator) -> tuple[slice, ...]:
        sides = zip(self.images[index].shape, self.size, strict=True)
        starts = [int(torch.randint(whole - side + 1, (), generator=generator)) for whole, side in sides]
        return tuple(slice(start, start + side) for start, side in zip(starts, self.size, strict=True))


def case_path(root: str | Path, name: str) -> Path:
    """Where LA's layout keeps a case."""
    return Path(root) / FOLDER / name / FILE


def load_cases(
    root: str | Path,
    names: Sequence[str],
    num_classes: int = 2,
    path_of: Callable[[Path, str], Path] = case_path,
) -> list[Volume]:
    """The named cases, each in its own size; `path_of(root, name)` is a case's file.

    Raises InputError as `read_case`, or if one is not 3D, has no foreground in its label, or an image that cannot
    come from normalisation to zero mean and unit variance.
    """

    def read(name: str) -> Volume:
        path = path_of(Path(root), name)
        image, label = read_case(path, num_classes)
        _require_volume(path, image)
        if not label.any():
            raise InputError(f"{path}: the label is empty, background alone; {BAD_LABEL}")
        return Volume(name, image, label)

    return list(in_parallel(read, names))


def load_images(
    root: str | Path, names: Sequence[str], path_of: Callable[[Path, str], Path] = case_path
) -> list[Image]:
    """The images of the named cases; labels are not read, and need not be there.

    Raises InputError as `read_image`, or if one is not 3D or cannot come from normalisation to zero mean and unit
    variance.
    """

    def read(name: str) -> Image:
        path = path_of(Path(root), name)
        image = read_image(path)
        _require_volume(path, image)
        return image

    return list(in_parallel(read, names))


def _crops(volumes: Sequence[Tensor], cuts: Sequence[Cut]) -> Tensor:
    return torch.stack([volumes[index][cut] for index, cut in cuts])


def _padded(volume: Tensor, size: Size) -> Tensor:
    lacking = [max(0, side - whole) for whole, side in zip(volume.shape, size, strict=True)]
    margins = [margin for lack in reversed(lacking) for margin in (lack // 2, lack - lack // 2)]
    return F.pad(volume, margins) if any(margins) else volume


def _require_half(name: str, shape: tuple[int, ...], size: Size) -> None:
    if any(2 * whole < side for whole, side in zip(shape, size, strict=True)):
        raise InputError(
            f"{name}: shape {shape} does not fill half of a {size} crop along every axis; "
            f"check the order of its axes, (X, Y, Z), or take smaller crops"
        )


def _require_volume(path: Path, image: Image) -> None:
    """Refuse other dimensions, raw intensities and those in [0, 1]; a finer sieve would refuse LA's own files."""
    if image.ndim != 3:
        raise InputError(
            f"{path}: shape {image.shape} where a volume (X, Y, Z) was expected; acdc_gapmatch.py trains on slices"
        )
    lowest, std = image.min(), image.std(dtype=np.float64)
    least, greatest = NORMALISED_STD
    if lowest >= 0 or not least <= std <= greatest:
        raise InputError(
            f"{path}: the image starts at {lowest:.3g} and has standard deviation {std:.3g}, "
            f"so it was not normalised to zero mean and unit variance; convert this case again"
        )
