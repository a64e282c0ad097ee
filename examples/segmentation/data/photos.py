"""Photographs and their masks, an image file each.

root/images/NAME.png (or .jpg, .jpeg)    a photograph, in colours or grey, of 8 bits; turned as its EXIF says
root/masks/NAME.png                      where it counts as labelled: a class index a pixel; where there are two
                                         classes 255 is taken for 1
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Picture

from segmentation.data.cache import read_samples
from segmentation.data.files import BAD_LABEL, Image, Label, Volume, class_indices
from segmentation.data.parallel import in_parallel
from segmentation.data.resize import resize_nearest
from segmentation.data.slices import Slices
from segmentation.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg")
MODES = {1: "L", 3: "RGB"}  # channels -> mode of Pillow
ORIENTATION = 0x0112  # EXIF's tag
TURNS = {
    2: Picture.Transpose.FLIP_LEFT_RIGHT,
    3: Picture.Transpose.ROTATE_180,
    4: Picture.Transpose.FLIP_TOP_BOTTOM,
    5: Picture.Transpose.TRANSPOSE,
    6: Picture.Transpose.ROTATE_270,
    7: Picture.Transpose.TRANSVERSE,
    8: Picture.Transpose.ROTATE_90,
}
"""Orientation -> what makes the picture upright."""


def photo_path(root: str | Path, name: str) -> Path:
    """Where a photograph lies, by the first suffix that there is."""
    return _first(Path(root) / "images", name, SUFFIXES)


def mask_path(root: str | Path, name: str) -> Path:
    """Where its mask lies."""
    return _first(Path(root) / "masks", name, SUFFIXES[:1])


def _first(folder: Path, name: str, suffixes: Sequence[str]) -> Path:
    """The first file that there is, cameras' .JPG included; where there is none, the one that was looked for first."""
    paths = [folder / f"{name}{case(suffix)}" for case in (str.lower, str.upper, str.title) for suffix in suffixes]
    return next((path for path in paths if path.is_file()), paths[0])


def read_photo(path: Path, channels: int) -> Image:
    """A photograph (channels, H, W), float32 in [0, 1]; colours become grey, or grey colours, as `channels` (1, 3) say.

    Raises InputError where the file is missing, damaged, too large, or of more than 8 bits.
    """
    missing = f"each listed case needs a photograph, as {', '.join(SUFFIXES)}"
    displayed = _decoded(path, missing, lambda picture: _displayed(path, picture, MODES[channels]))
    pixels = displayed.astype(np.float32) / np.float32(255)
    return pixels[None] if channels == 1 else np.moveaxis(pixels, -1, 0)


def read_mask(path: Path, num_classes: int) -> Label:
    """A mask (H, W), uint8, one class index a pixel.

    Raises InputError where the file is missing, damaged or too large, or holds other numbers.
    """
    mask = _decoded(path, "unlabelled training cases alone need no mask")
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
    images = np.empty((len(names), channels, *size), np.float32)
    labels = np.empty((len(names), *size), np.uint8)

    def read(name: str) -> tuple[Image, Label]:
        image, label = read_both(root, name, channels, num_classes)
        return resize_nearest(image, size), resize_nearest(label, size)

    def files(name: str) -> list[Path]:
        return [photo_path(root, name), mask_path(root, name)]

    read_samples(root, "labelled", names, files, read, num_classes, [images, labels])
    return Slices(list(names), torch.from_numpy(images), torch.from_numpy(labels))


def load_unlabelled(root: str | Path, names: Sequence[str], size: tuple[int, int], channels: int) -> Slices:
    """The named photographs, resized to `size`; masks are not read, and need not be there."""
    images = np.empty((len(names), channels, *size), np.float32)

    def read(name: str) -> tuple[Image]:
        return (resize_nearest(read_photo(photo_path(root, name), channels), size),)

    read_samples(root, "unlabelled", names, lambda name: [photo_path(root, name)], read, None, [images])
    return Slices(list(names), torch.from_numpy(images), None)


def load_volumes(root: str | Path, names: Sequence[str], channels: int, num_classes: int) -> list[Volume]:
    """The named photographs and masks, each in its own size. Raises InputError as `read_both`."""
    return list(in_parallel(lambda name: Volume(name, *read_both(root, name, channels, num_classes)), names))


def write_photo(root: str | Path, name: str, image: np.ndarray, mask: np.ndarray | None = None) -> None:
    """Write what `read_photo` and `read_mask` read: `image` (3, H, W) or (1, H, W) and `mask` (H, W), both uint8."""
    pixels = image[0] if len(image) == 1 else np.moveaxis(image, 0, -1)
    for path, picture in ((photo_path(root, name), pixels), (mask_path(root, name), mask)):
        if picture is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            Picture.fromarray(np.ascontiguousarray(picture)).save(path)


def _displayed(path: Path, picture: Picture.Image, mode: str) -> Picture.Image:
    """A photograph as viewers show it, in Pillow's `mode`."""
    if picture.mode.startswith(("I", "F")):  # of 16 or 32 bits, which `convert` would clip at 255
        raise InputError(f"{path}: grey of more than 8 bits (Pillow's mode {picture.mode}); save it as 8 bits")
    # A camera held upright stores its photograph lying, with a note how to turn it. Masks are drawn on what is shown,
    # and saved as it is: they are not turned.
    turn = TURNS.get(_orientation(picture))
    return (picture if turn is None else picture.transpose(turn)).convert(mode)


def _orientation(picture: Picture.Image) -> Any:
    """By EXIF, of which no other tag is looked at: many cameras and programs write some that cannot be read."""
    try:
        return picture.getexif().get(ORIENTATION)
    except (OSError, SyntaxError, ValueError):  # damaged; the pixels need not be
        return None


def _decoded(
    path: Path, missing: str, change: Callable[[Picture.Image], Picture.Image] = lambda picture: picture
) -> np.ndarray:
    """(H, W) or (H, W, C), of what `change` makes of the picture; `missing` says what to do where there is no file."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; {missing}")
    try:
        with Picture.open(path) as picture:
            return np.array(change(picture))
    except InputError:  # a ValueError too
        raise
    except Picture.DecompressionBombError:
        raise InputError(f"{path}: has more pixels than Pillow will open; make it smaller") from None
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damage, by its place
        raise InputError(f"{path}: not a readable image ({type(error).__name__}); save it again") from None
