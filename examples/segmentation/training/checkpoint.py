"""Checkpoints: written whole or not at all, and loaded without running code from them."""

import os
from pathlib import Path
from typing import Any

import torch

from segmentation.errors import InputError


def save(path: Path, content: dict[str, Any]) -> None:
    """Write `content` to `path` so that, whenever the process dies, `path` holds the old file or the new one."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def load(path: Path, device: torch.device) -> dict[str, Any]:
    """Read what `save` wrote, with `weights_only=True`.

    Raises:
        InputError: no such file, or not a checkpoint.
    """
    if path.is_dir():
        raise InputError(f"{path}: is a folder, not a checkpoint.")
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint.")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # damage can make torch.load raise almost anything, in pages of text
        raise InputError(f"{path}: not a readable checkpoint; it is damaged or not from this example.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a checkpoint of this example (a {type(content).__name__} inside).")
    return content
