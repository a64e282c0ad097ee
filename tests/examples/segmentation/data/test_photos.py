"""Photographs as they come: of cameras, of other programs, damaged."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from segmentation.data.photos import (
    load_unlabelled,
    mask_path,
    photo_path,
    read_both,
    read_mask,
    read_photo,
    write_photo,
)
from segmentation.errors import InputError
from segmentation.image_task import ImageTask

GREY = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)
COLOURS = np.stack([GREY, GREY // 2, 255 - GREY], axis=-1)


def _saved(path: Path, picture: Image.Image, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **options)
    return path


def _task(**changes: Any) -> ImageTask:
    fields: dict[str, Any] = dict.fromkeys(("training_patients", "validation_list", "write_phantom"))
    lists = {"training_list": "train", "test_list": "test"}
    return ImageTask(name="Polyps", classes=("polyp",), presets={}, published={}, **lists, **fields, **changes)


def test_grey_becomes_colours_and_colours_grey(tmp_path: Path) -> None:
    grey = _saved(tmp_path / "grey.png", Image.fromarray(GREY))
    colours = _saved(tmp_path / "colours.png", Image.fromarray(COLOURS))
    assert np.array_equal(read_photo(grey, 1), GREY[None] / np.float32(255))
    assert np.array_equal(read_photo(grey, 3), np.stack(3 * [GREY]) / np.float32(255))
    assert np.array_equal(read_photo(colours, 3), np.moveaxis(COLOURS, -1, 0) / np.float32(255))
    luma = COLOURS @ [0.299, 0.587, 0.114] / 255
    assert np.allclose(read_photo(colours, 1)[0], luma, atol=1 / 255)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_jpeg_is_nearly_the_png(tmp_path: Path, channels: int) -> None:
    pixels = GREY if channels == 1 else COLOURS
    smooth = Image.fromarray(pixels).resize((48, 32))
    png, jpeg = _saved(tmp_path / "a.png", smooth), _saved(tmp_path / "a.jpeg", smooth, quality=95)
    assert np.allclose(read_photo(jpeg, channels), read_photo(png, channels), atol=0.05)


def test_a_palette_is_looked_up(tmp_path: Path) -> None:
    pixels = np.repeat(np.array([[[255, 0, 0], [0, 128, 255]]], np.uint8), 3, axis=0)
    palette = Image.fromarray(pixels).convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
    path = _saved(tmp_path / "a.png", palette)
    assert Image.open(path).mode == "P"
    assert np.array_equal(read_photo(path, 3), np.moveaxis(pixels, -1, 0) / np.float32(255))


def test_photographs_of_several_sizes_are_one_pool(tmp_path: Path) -> None:
    for name, size in {"a": (6, 9), "b": (12, 5), "c": (8, 8)}.items():
        write_photo(tmp_path, name, np.full((3, *size), 51, np.uint8))
    pool = load_unlabelled(tmp_path, ["a", "b", "c"], (8, 8), 3)
    assert pool.images.shape == (3, 3, 8, 8)
    assert (pool.images == np.float32(0.2)).all()


@pytest.mark.parametrize(("dtype", "mode"), [(np.uint16, "I;16"), (np.int32, "I"), (np.float32, "F")])
@pytest.mark.parametrize("channels", [1, 3])
def test_more_than_8_bits_are_refused(tmp_path: Path, dtype: type, mode: str, channels: int) -> None:
    """Pillow clips them at 255: a photograph of 16 bits would be white."""
    path = tmp_path / "a.png"  # Pillow goes by the content
    Image.fromarray(100 * GREY.astype(dtype)).save(path, format="TIFF")
    with pytest.raises(InputError, match=rf"a\.png: grey of more than 8 bits \(.* mode {mode}\); save it as 8 bits"):
        read_photo(path, channels)


def test_a_png_of_16_bits_is_refused_as_a_photograph_and_read_as_a_mask(tmp_path: Path) -> None:
    labels = (GREY // 100).astype(np.uint16)
    path = _saved(tmp_path / "a.png", Image.fromarray(labels))
    with pytest.raises(InputError, match="more than 8 bits"):
        read_photo(path, 1)
    assert np.array_equal(read_mask(path, 3), labels)


def test_a_picture_with_too_many_pixels_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _saved(tmp_path / "huge.png", Image.fromarray(GREY))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Pillow warns from there on, and refuses the double
    for read in (read_photo, read_mask):
        with pytest.raises(InputError, match=r"huge\.png: has more pixels than Pillow will open; make it smaller"):
            read(path, 3)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".PNG", ".JPG", ".JPEG", ".Jpg"])
def test_a_suffix_may_be_in_capitals(tmp_path: Path, suffix: str) -> None:
    _saved(tmp_path / "images" / f"a{suffix}", Image.fromarray(COLOURS))
    assert read_photo(photo_path(tmp_path, "a"), 3).shape == (3, 4, 6)


def test_a_mask_s_suffix_too(tmp_path: Path) -> None:
    _saved(tmp_path / "masks" / "a.PNG", Image.fromarray(GREY // 100))
    assert read_mask(mask_path(tmp_path, "a"), 3).max() == 2


def test_a_missing_photograph_is_not_called_a_mask(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.png: no such file; each listed case needs a photograph") as caught:
        read_photo(photo_path(tmp_path, "a"), 3)
    assert "mask" not in str(caught.value)
    with pytest.raises(InputError, match=r"a\.png: no such file; unlabelled training cases alone need no mask"):
        read_mask(mask_path(tmp_path, "a"), 2)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_photograph_is_turned_as_it_is_shown(tmp_path: Path, suffix: str) -> None:
    """Its mask has the size of what is shown, and what it says of its own orientation does not count."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees, clockwise
    path = _saved(tmp_path / "images" / f"a{suffix}", Image.fromarray(GREY), exif=exif)
    shown = np.rot90(GREY, -1)
    mask = (shown > 100).astype(np.uint8)
    _saved(tmp_path / "masks" / "a.png", Image.fromarray(mask), exif=exif)
    image, label = read_both(tmp_path, "a", 1, 2)
    stored = np.array(Image.open(path)) / np.float32(255)
    assert np.array_equal(image, np.rot90(stored, -1)[None])
    assert np.array_equal(label, mask)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_pillow_s(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = _saved(tmp_path / "a.png", Image.fromarray(GREY), exif=exif)
    shown = np.array(ImageOps.exif_transpose(Image.open(path))) / np.float32(255)
    assert np.array_equal(read_photo(path, 1), shown[None])


WRONG_TAGS = {"width as text": (0x0100, 2, 4, 0x00323131), "resolution as text": (0x011A, 2, 3, 0x3237)}


@pytest.mark.parametrize("tag", WRONG_TAGS.values(), ids=WRONG_TAGS)
def test_a_tag_that_makes_no_sense_is_not_looked_at(tag: tuple[int, int, int, int], tmp_path: Path) -> None:
    """Writing all tags anew, as Pillow's own turning does, fails at it."""
    tags = [tag, (0x0112, 3, 1, 6)]
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", *t) for t in tags)
    path = _saved(tmp_path / "a.jpg", Image.fromarray(GREY), exif=exif + bytes(20))
    with pytest.raises((struct.error, TypeError)):
        ImageOps.exif_transpose(Image.open(path))
    assert read_photo(path, 1).shape == (1, 6, 4)


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_other_numbers_of_channels_are_refused(channels: int) -> None:
    with pytest.raises(InputError, match=rf"Polyps: channels must be 1 \(grey\) or 3 \(colours\), got {channels}"):
        _task(channels=channels)
    assert [_task(channels=good).channels for good in (1, 3)] == [1, 3]
