"""Photographs and their masks, an image file each.

root/images/NAME.png (or .jpg, .jpeg)    a photograph, in colours or grey
root/masks/NAME.png                      where it counts as labelled: a class index a pixel; where there are two
                                         classes 255 is taken for 1
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image as Picture

from segmentation.data.files import BAD_LABEL, Image, Label, class_indices
from segmentation.data.slices import Slices, resize_nearest
from segmentation.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg")
_MODES = {1: "L", 3: "RGB"}  # of Pillow


def photo_path(root: str | Path, name: str) -> Path:
    """Where a photograph lies, by the first suffix that there is."""
    paths = [Path(root) / "images" / f"{name}{suffix}" for suffix in SUFFIXES]
    return next((path for path in paths if path.is_file()), paths[0])


def mask_path(root: str | Path, name: str) -> Path:
    """Where its mask lies."""
    return Path(root) / "masks" / f"{name}.png"


def read_photo(path: Path, channels: int) -> Image:
    """A photograph (channels, H, W), float32 in [0, 1]; colours become grey, or grey colours, as `channels` (1, 3) say.

    Raises InputError where the file is missing or damaged.
    """
    pixels = _decoded(path, _MODES[channels]).astype(np.float32) / np.float32(255)
    return pixels[None] if channels == 1 else np.moveaxis(pixels, -1, 0)


def read_mask(path: Path, num_classes: int) -> Label:
    """A mask (H, W), uint8, one class index a pixel.

    Raises InputError where the file is missing or damaged, or holds other numbers.
    """
    mask = _decoded(path)
    if mask.ndim != 2:
        raise InputError(
            f"{path}: has {mask.shape[2]} channels where one class index a pixel was expected; {BAD_LABEL}"
        )
    if num_classes == 2:
        mask = np.where(mask == 255, 1, mask)
    return class_indices(path, mask, range(num_classes), BAD_LABEL)


def read_both(root: str | Path, name: str, channels: int, num_classes: int) -> tuple[Image, Label]:
    """A photograph and its mask. Raises InputError as those, or if they differ in size."""
    image, label = read_photo(photo_path(root, name), channels), read_mask(mask_path(root, name), num_classes)
    if image.shape[1:] != label.shape:
        raise InputError(
            f"{mask_path(root, name)}: {label.shape} where the photograph is {image.shape[1:]}; {BAD_LABEL}"
        )
    return image, label


def load_labelled(
    root: str | Path, names: Sequence[str], size: tuple[int, int], channels: int, num_classes: int
) -> Slices:
    """The named photographs and masks, resized to `size`. Raises InputError as `read_both`."""
    pairs = [read_both(root, name, channels, num_classes) for name in names]
    labels = np.stack([resize_nearest(label, size) for _, label in pairs])
    return Slices(list(names), _resized([image for image, _ in pairs], size), torch.from_numpy(labels))


def load_unlabelled(root: str | Path, names: Sequence[str], size: tuple[int, int], channels: int) -> Slices:
    """The named photographs, resized to `size`; masks are not read, and need not be there."""
    return Slices(list(names), _resized([read_photo(photo_path(root, name), channels) for name in names], size), None)


def write_photo(root: str | Path, name: str, image: np.ndarray, mask: np.ndarray | None = None) -> None:
    """Write what `read_photo` and `read_mask` read: `image` (3, H, W) or (1, H, W) and `mask` (H, W), both uint8."""
    pixels = image[0] if len(image) == 1 else np.moveaxis(image, 0, -1)
    for path, picture in ((photo_path(root, name), pixels), (mask_path(root, name), mask)):
        if picture is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            Picture.fromarray(np.ascontiguousarray(picture)).save(path)


def _resized(images: Sequence[Image], size: tuple[int, int]) -> torch.Tensor:
    return torch.from_numpy(np.stack([[resize_nearest(channel, size) for channel in image] for image in images]))


def _decoded(path: Path, mode: str | None = None) -> np.ndarray:
    """(H, W) or (H, W, C), in Pillow's `mode` or the file's own."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; unlabelled training cases alone need no mask")
    try:
        with Picture.open(path) as picture:
            return np.array(picture if mode is None else picture.convert(mode))
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damage, by its place
        raise InputError(f"{path}: not a readable image ({type(error).__name__}); save it again") from None
