"""A seeded phantom of short-axis cardiac MRI in ACDC's h5 layout, to try everything without the data.

Every patient has a heart of its own (place, orientation, size, shape, wall thickness) in a chest of its own,
seen by a scanner of its own (contrast, gamma, coil, noise), in two frames: end-diastole and end-systole.
Vessels as bright as blood and organs as grey as muscle keep the task from being a threshold, and patients
differ enough for one labelled patient not to stand for all. Shapes and ranges were chosen by eye beside
ACDC; nothing here is fitted to data, and a score on it says nothing about patients.

Lengths are in half image widths and the image spans [-1, 1]^2, so `size` changes the resolution alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from segmentation.data.files import Image, Label, write_case, write_list
from segmentation.data.slices import volume_path, write_slices
from segmentation.errors import InputError

RV, MYOCARDIUM, LV = 1, 2, 3
FRAMES = ("frame01", "frame02")  # end-diastole, end-systole

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


def write_phantom(
    root: str | Path,
    train_patients: int = 12,
    val_patients: int = 4,
    test_patients: int = 4,
    slices: int = 6,
    size: int = 96,
    seed: int = 0,
) -> None:
    """Write patient001, patient002, ...: training patients as slices, the others as volumes, and the lists.

    slices: per frame, from base to apex. size: height and width in pixels.
    The same arguments give the same arrays bit for bit; a patient depends on `seed` and its number alone.
    Raises InputError for a count below 1 or a size below 32.
    """
    if min(train_patients, val_patients, test_patients, slices) < 1 or size < 32 or seed < 0:
        raise InputError("a phantom needs a patient in each split, a slice, a size of 32 and a seed of 0 or more")
    root = Path(root)
    splits = ["train"] * train_patients + ["val"] * val_patients + ["test"] * test_patients
    lists: dict[str, list[str]] = {"train": [], "val": [], "test": [], "train_slices": []}
    for patient, split in enumerate(splits, start=1):
        for frame, phase in enumerate(FRAMES):
            case = f"patient{patient:03d}_{phase}"
            image, label = phantom_frame(seed, patient, frame, slices, size)
            lists[split].append(case)
            if split == "train":
                lists["train_slices"] += write_slices(root, case, image, label)
            else:
                write_case(volume_path(root, case), image, label)
    for name, names in lists.items():
        write_list(root / f"{name}.list", names)


def phantom_frame(seed: int, patient: int, frame: int, slices: int, size: int) -> tuple[Image, Label]:
    """Frame 0 (end-diastole) or 1 (end-systole): image (D, S, S) float32 in [0, 1], label (D, S, S) uint8."""
    rng = np.random.default_rng([seed, patient])  # the same draws in both frames, so the same patient
    noise = np.random.default_rng([seed, patient, frame])
    grid = _grid(slices, size)
    tissue = _tissue(rng)
    centre = rng.uniform(-0.15, 0.15, 2)
    image, inside = _torso(rng, grid, tissue)
    _paint_organs(rng, grid, tissue, centre, image, inside)
    heart = _heart(rng, grid, centre, contraction=float(frame))
    _paint_heart(rng, heart, tissue, image)
    return _scan(rng, noise, grid, image), heart.label


@dataclass(frozen=True)
class _Grid:
    """Pixel coordinates x (1, 1, S), y (1, S, 1); level (D, 1, 1): 0 at the heart's base, 1 at its apex."""

    x: Array
    y: Array
    level: Array


@dataclass(frozen=True)
class _Tissue:
    """The brightness of each tissue in one patient, before coil and gamma."""

    muscle: float
    blood: float
    lung: float
    liver: float
    fat: float


@dataclass(frozen=True)
class _Heart:
    """Where the walls of both ventricles run, as distances (D, S, S) or radii (D, 1, 1) or (D, S, S)."""

    along: Array  # coordinates around the left ventricle's centre: towards the right one, and across
    across: Array
    radius: Array  # the distance from that centre; the muscle lies from inner to outer
    inner: Array
    outer: Array
    right: Array  # the distance from the right ventricle's centre, in its own radii; its wall ends at free_wall
    free_wall: Array

    @property
    def label(self) -> Label:
        label = np.zeros(self.radius.shape, np.uint8)
        label[(self.right < 1) & (self.radius >= self.outer)] = RV
        label[self.radius < self.outer] = MYOCARDIUM
        label[self.radius < self.inner] = LV
        return label


def _grid(slices: int, size: int) -> _Grid:
    axis = (np.arange(size) + 0.5) * 2 / size - 1
    return _Grid(axis.reshape(1, 1, -1), axis.reshape(1, -1, 1), np.linspace(0, 1, slices).reshape(-1, 1, 1))


def _tissue(rng: np.random.Generator) -> _Tissue:
    muscle = rng.uniform(0.20, 0.38)
    return _Tissue(
        muscle=muscle,
        blood=muscle + rng.uniform(0.30, 0.55),  # blood is the brighter, by a margin of each patient's own
        lung=rng.uniform(0.02, 0.10),
        liver=muscle * rng.uniform(0.7, 1.2),
        fat=rng.uniform(0.4, 0.8),
    )


def _torso(rng: np.random.Generator, grid: _Grid, tissue: _Tissue) -> tuple[Array, Mask]:
    """Air, skin fat, chest wall and lung (D, S, S), and where the organs may lie."""
    middle, width, height = rng.uniform(-0.08, 0.08, 2), rng.uniform(0.95, 1.40), rng.uniform(0.95, 1.25)
    depth = 1 - np.hypot((grid.x - middle[0]) / width, (grid.y - middle[1]) / height) + 0 * grid.level
    depth += 0.04 * np.sin(rng.integers(2, 5) * np.arctan2(grid.y, grid.x) + rng.uniform(0, 6))
    fat = rng.uniform(0.04, 0.10)
    image = np.full(depth.shape, 0.01)
    image[depth > 0] = tissue.fat
    image[depth > fat] = tissue.muscle
    image[depth > fat + rng.uniform(0.04, 0.10)] = tissue.lung
    return image, depth > fat


def _paint_organs(
    rng: np.random.Generator, grid: _Grid, tissue: _Tissue, centre: Array, image: Array, inside: Mask
) -> None:
    for _ in range(3):  # the mediastinum: grey tissue around the heart
        blob = _ellipse(rng, grid, centre + rng.normal(0, 0.25, 2), rng.uniform(0.2, 0.45)) < 1
        image[blob & inside] = tissue.muscle * rng.uniform(0.5, 1.1)

    dome = rng.uniform(0.1, 0.5) * (grid.x - rng.uniform(-0.8, 0.8)) ** 2
    top = centre[1] + rng.uniform(0.40, 0.65) - 0.12 * grid.level  # the liver rises towards the apex
    image[(grid.y > top + dome) & inside] = tissue.liver

    for _ in range(rng.integers(3, 6)):  # vessels and gut: as bright as blood, as round as a ventricle
        place = rng.uniform(-0.85, 0.85, 2)
        blob = _ellipse(rng, grid, place, rng.uniform(0.05, 0.11), drift=rng.normal(0, 0.08, 2)) < 1
        image[blob & inside] = tissue.blood * rng.uniform(0.6, 1.15)
    for _ in range(rng.integers(10, 30)):  # the small vessels of the lung
        spot = _ellipse(rng, grid, rng.uniform(-0.85, 0.85, 2), rng.uniform(0.012, 0.03)) < 1
        image[spot & inside] = tissue.blood * rng.uniform(0.3, 0.9)


def _heart(rng: np.random.Generator, grid: _Grid, centre: Array, contraction: float) -> _Heart:
    """Both ventricles, tapering to the apex; `contraction` is 0 in end-diastole and 1 in end-systole."""
    septum = rng.normal(np.pi, 0.5)  # the direction from the left ventricle to the right one
    tilt = rng.normal(0, 0.05, 2)
    x, y = grid.x - centre[0] - tilt[0] * grid.level, grid.y - centre[1] - tilt[1] * grid.level
    along, across = _turned(x, y, septum)
    angle = np.arctan2(across, along)

    outer = rng.uniform(0.34, 0.44) * np.sqrt(1 - rng.uniform(0.50, 0.75) * grid.level**2)
    outer = outer * (1 - 0.08 * contraction)
    radius = np.hypot(along, across * rng.uniform(0.85, 1.15)) / _wobble(rng, angle, 0.03)
    wall = rng.uniform(0.26, 0.36) * (1 + rng.uniform(0.3, 0.6) * contraction)  # a share of the outer radius
    inner = outer * (1 - wall * _wobble(rng, angle, 0.12))

    # The right ventricle: an ellipse behind the left one, so that a crescent of it is seen.
    reach, skew = rng.uniform(0.70, 0.95) * outer, rng.uniform(-0.25, 0.25) * outer
    thick = rng.uniform(0.80, 1.15) * outer * np.sqrt(np.clip(1 - grid.level / rng.uniform(0.8, 1.1), 0, 1))
    thick = np.maximum(thick * (1 - rng.uniform(0.1, 0.3) * contraction), 1e-6)  # nothing is left at the apex
    tall = rng.uniform(1.1, 1.5) * thick
    right = np.hypot((along - reach) / thick, (across - skew) / tall) / _wobble(rng, angle, 0.05)
    free_wall = np.where(thick > 0.03, 1 + rng.uniform(0.02, 0.035) / thick, 0)
    return _Heart(along, across, radius, inner, outer, right, free_wall)


def _paint_heart(rng: np.random.Generator, heart: _Heart, tissue: _Tissue, image: Array) -> None:
    label = heart.label
    facing = np.cos(np.arctan2(heart.across, heart.along) - rng.uniform(0, 6)) > 0.3
    image[facing & (heart.radius < heart.outer * rng.uniform(1.08, 1.2))] = tissue.fat * rng.uniform(0.5, 0.9)
    image[heart.right < heart.free_wall] = tissue.muscle
    image[label == RV] = tissue.blood * rng.uniform(0.85, 1.0)
    image[label == MYOCARDIUM] = tissue.muscle
    image[label == LV] = tissue.blood
    for side in rng.normal((1.2, -1.8), 0.3):  # the papillary muscles: grey, but labelled cavity as in ACDC
        along = heart.along - 0.75 * heart.inner * np.cos(side)
        across = heart.across - 0.75 * heart.inner * np.sin(side)
        papillary = np.hypot(along, across) < rng.uniform(0.10, 0.26) * heart.inner
        image[papillary & (label == LV)] = tissue.muscle


def _scan(rng: np.random.Generator, noise: np.random.Generator, grid: _Grid, image: Array) -> Image:
    """What the scanner makes of the tissue: texture, blur, coil, gamma, Rician noise, scaled to [0, 1]."""
    size = image.shape[-1]
    texture = ndimage.gaussian_filter(noise.normal(size=image.shape), (0, size / 60, size / 60))
    image = image * (1 + 0.08 * texture / texture.std())
    image = ndimage.gaussian_filter(image, (0, *(size * rng.uniform(0.003, 0.007, 2))))
    coil = rng.uniform(-1.1, 1.1, 2)
    distance = (grid.x - coil[0]) ** 2 + (grid.y - coil[1]) ** 2
    image = image * (1 + rng.uniform(0.2, 1.0) * np.exp(-distance / rng.uniform(0.4, 1.2)))
    image = image ** rng.uniform(0.7, 1.2)
    image = image / np.quantile(image, 0.99)
    real, imaginary = rng.uniform(0.01, 0.04) * noise.normal(size=(2, *image.shape))
    image = np.hypot(image + real, imaginary)
    return ((image - image.min()) / (image.max() - image.min())).astype(np.float32)


def _ellipse(
    rng: np.random.Generator,
    grid: _Grid,
    place: Array,
    radius: float,
    drift: Sequence[float] | Array = (0.0, 0.0),
) -> Array:
    """The distance from `place` in radii of a randomly turned and stretched ellipse: below 1 is inside.

    drift: how far `place` moves from base to apex.
    """
    x, y = grid.x - place[0] - drift[0] * grid.level, grid.y - place[1] - drift[1] * grid.level
    along, across = _turned(x, y, rng.uniform(0, np.pi))
    return np.hypot(along / rng.uniform(1.0, 1.6), across) / radius


def _turned(x: Array, y: Array, angle: float) -> tuple[Array, Array]:
    """Coordinates along a direction, and across it."""
    return np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x


def _wobble(rng: np.random.Generator, angle: Array, amount: float) -> Array:
    """A smooth factor around 1 that turns a circle into an organ."""
    waves = (rng.normal(0, amount / order) * np.cos(order * angle + rng.uniform(0, 6)) for order in (1, 2, 3))
    return 1 + np.clip(sum(waves), -0.5, 0.5)
