"""Tiny scans in nnU-Net's raw format: a noisy ball in each."""

import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk

SHAPE, SPACING = (6, 32, 32), (5.0, 1.0, 1.0)  # slices, rows, columns; mm


def write_dataset(
    raw: Path, name: str, labelled: int = 5, unlabelled: int = 3, channels: int = 1, regions: bool = False
) -> Path:
    """The dataset's folder in `raw`: case0, case1, ... with labels, scan0, scan1, ... without."""
    rng = np.random.default_rng(0)
    folder = raw / name
    for sub in ("imagesTr", "labelsTr", "imagesUn"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    for i in range(labelled):
        image, label = _ball(rng)
        _write_channels(folder / "imagesTr", f"case{i}", image, channels)
        write(folder / "labelsTr" / f"case{i}.nii.gz", label.astype(np.uint8))
    for i in range(unlabelled):
        _write_channels(folder / "imagesUn", f"scan{i}", _ball(rng)[0], channels)
    write_description(folder, labelled, channels, regions)
    return folder


def write_description(folder: Path, labelled: int, channels: int = 1, regions: bool = False) -> None:
    labels = {"background": 0, "whole": [1, 2], "core": 2} if regions else {"background": 0, "ball": 1, "core": 2}
    described = {
        "channel_names": {str(c): "MRI" for c in range(channels)},
        "labels": labels,
        "numTraining": labelled,
        "file_ending": ".nii.gz",
    }
    order = {"regions_class_order": [1, 2]} if regions else {}
    (folder / "dataset.json").write_text(json.dumps({**described, **order}))


def write(path: Path, array: np.ndarray, spacing: tuple[float, ...] = SPACING) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    sitk.WriteImage(image, str(path))


def _write_channels(folder: Path, case: str, image: np.ndarray, channels: int) -> None:
    for c in range(channels):
        write(folder / f"{case}_{c:04d}.nii.gz", (image + c).astype(np.float32))


def _ball(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image, and a label: 1 in a ball, 2 in its core."""
    centre = np.array([SHAPE[0] / 2, *rng.uniform(12, 20, 2)])
    place = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1) + 0.5
    distance = np.linalg.norm((place - centre) * SPACING, axis=-1)
    label = (distance < 11).astype(int) + (distance < 5)
    return 100 + 80 * label + rng.normal(0, 15, SHAPE), label
