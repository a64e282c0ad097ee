"""A seeded phantom of left-atrial late-gadolinium MRI in LA's h5 layout, to try everything without the data.

    ROOT/2018LA_Seg_Training Set/case001/mri_norm2.h5    `image` and `label` (X, Y, Z)
    ROOT/train.list, test.list                           one case a line

The label is the left atrium: a body with its pulmonary veins, which an annotator cut short, and its appendage.
Around it lie the other chambers and the great vessels, filled with the same bright blood; at the mitral valve
nothing but a plane ends the label. Patients differ in shape, in the number and course of the veins, in the
places of the neighbours and in the scanner, so that one labelled patient does not stand for all. Shapes and
ranges were chosen by eye beside LA; nothing here is fitted to data, and a score on it says nothing about patients.

Axes as in LA: x to the patient's left, y to the back, z to the head. Lengths are in half the volume's width in
x, of about 60 mm, and voxels are cubes: `size` sets the resolution (X) and the field of view (Y / X, Z / X).
Shapes are functions of space: the distance outside them, negative inside.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from segmentation.data.crops import case_path
from segmentation.data.files import Image, Label, write_case, write_list
from segmentation.errors import InputError

# The difficulty: each patient draws from these ranges.
SIZE_SPREAD = 0.10  # of a volume's axes
SHIFT, TURN = 0.05, 0.12  # of the heart: a standard deviation per axis, in lengths and in radians
SCALE = (0.85, 1.08)  # of the heart
SPREAD = 0.05  # of the neighbours' places: a standard deviation per axis
WOBBLE = 0.035  # of the surface of the atrium: a standard deviation
MUSCLE, LUNG = (0.25, 0.50), (0.06, 0.18)  # brightness where the atrium's blood has 1
CHAMBERS = (0.85, 1.12)  # the brightness of every other cavity and vessel
SCAR = 0.8  # enhanced wall, as bright as blood: the higher, the rarer (in standard deviations of a random field)
COIL = 0.35  # the bias field's standard deviation, of its logarithm
GAMMA = (0.6, 1.5)
NOISE = (0.05, 0.12)  # a Rician standard deviation where blood has 1
BLUR = (0.008, 0.016)  # a Gaussian's standard deviation, in lengths

Array = npt.NDArray[np.floating]  # single precision over the volume: half the time of double
Mask = npt.NDArray[np.bool_]
Point = Sequence[float] | Array


def write_atrium(
    root: str | Path, cases: tuple[int, int] = (26, 6), size: tuple[int, int, int] = (64, 64, 40), seed: int = 0
) -> None:
    """Write case001, case002, ...: `cases` = (train, test) of them, and the two lists.

    size: voxels in X, Y and Z; each case's own axes differ from it by up to SIZE_SPREAD.
    The same arguments give the same arrays bit for bit; a case depends on `seed`, its number and `size` alone.
    Raises InputError for a count below 1, an axis below 16 or a negative seed.
    """
    if min(cases) < 1 or min(size) < 16 or seed < 0:
        raise InputError("a phantom needs a case in each split, axes of 16 voxels and a seed of 0 or more")
    names = [f"case{number:03d}" for number in range(1, sum(cases) + 1)]
    for number, name in enumerate(names, start=1):
        write_case(case_path(root, name), *atrium_case(seed, number, size))
    write_list(Path(root) / "train.list", names[: cases[0]])
    write_list(Path(root) / "test.list", names[cases[0] :])


def atrium_case(seed: int, number: int, size: tuple[int, int, int]) -> tuple[Image, Label]:
    """One patient: image (X, Y, Z) float32 of zero mean and unit variance, label (X, Y, Z) uint8 in {0, 1}."""
    rng = np.random.default_rng([seed, number])
    grid = _grid(rng, size)
    tissue = _tissue(rng)
    atrium = _atrium(rng, grid)
    label = _largest(atrium.outside < 0)
    image = _chest(rng, grid, tissue)
    _paint_neighbours(rng, grid, tissue, image)
    _paint_atrium(rng, grid, tissue, atrium, label, image)
    return _scan(rng, grid, image), label.astype(np.uint8)


@dataclass(frozen=True)
class _Grid:
    """Voxel coordinates (X, Y, Z) in the heart's own frame, in which every patient's atrium is at the origin."""

    x: Array
    y: Array
    z: Array
    step: float  # a voxel's edge


@dataclass(frozen=True)
class _Tissue:
    """The brightness of each tissue in one patient, before coil and gamma; the atrium's blood has 1."""

    muscle: float
    lung: float
    fat: float
    bone: float
    liver: float


@dataclass(frozen=True)
class _Atrium:
    """outside (X, Y, Z): the distance from the labelled atrium. valve: its way out into the left ventricle."""

    outside: Array
    stumps: Array  # the distance from the veins beyond the annotator's cut
    valve: Mask


def _grid(rng: np.random.Generator, size: tuple[int, int, int]) -> _Grid:
    shape = np.round(np.array(size) * rng.uniform(1 - SIZE_SPREAD, 1 + SIZE_SPREAD, 3)).astype(int)
    step = 2 / size[0]
    axes = [
        (np.arange(n) - (n - 1) / 2) * step - shift for n, shift in zip(shape, rng.normal(0, SHIFT, 3), strict=True)
    ]
    x, y, z = np.meshgrid(*(axis.astype(np.float32) for axis in axes), indexing="ij")
    x, y = _turned(x, y, rng.normal(0, TURN))
    x, z = _turned(x, z, rng.normal(0, TURN))
    y, z = _turned(y, z, rng.normal(0, TURN))
    scale = rng.uniform(*SCALE)
    return _Grid(x / scale, y / scale, z / scale, step / scale)


def _tissue(rng: np.random.Generator) -> _Tissue:
    muscle = rng.uniform(*MUSCLE)
    return _Tissue(
        muscle=muscle,
        lung=rng.uniform(*LUNG),
        fat=muscle * rng.uniform(0.4, 1.0),  # suppressed in this sequence, seldom well
        bone=muscle * rng.uniform(0.4, 0.8),
        liver=rng.uniform(muscle, 0.9),
    )


def _atrium(rng: np.random.Generator, grid: _Grid) -> _Atrium:
    """The body, the appendage and three to five veins, melted together and cut at the mitral valve."""
    radii = rng.uniform((0.42, 0.27, 0.25), (0.58, 0.39, 0.36))
    body = _ellipsoid(grid, (0, 0, 0), radii) + WOBBLE * _waves(rng, grid, 5)
    towards = _unit(rng.normal((0.4, -0.7, -0.6), 0.1))  # the left ventricle: left, in front and below
    beyond = _along(grid, towards) - rng.uniform(0.70, 0.85) * float(np.linalg.norm(radii * towards))
    body = np.maximum(body, beyond)
    valve = (np.abs(beyond) < 0.12) & (_ellipsoid(grid, 0.25 * towards, np.full(3, rng.uniform(0.20, 0.28))) < 0)

    outside = _melted(body, _appendage(rng, grid, radii))
    stumps = np.full_like(body, np.inf)
    for ostium, direction in _veins(rng, radii):
        path = _curve(rng, ostium, direction, rng.uniform(0.25, 0.45))
        width = rng.uniform(0.09, 0.14)
        end = width * rng.uniform(0.5, 0.8)
        outside = _melted(outside, _tube(grid, path, width, end))
        onward = path[-1] + 0.5 * _unit(path[-1] - path[-2]) + rng.normal(0, 0.1, 3)
        stumps = np.minimum(stumps, _tube(grid, [path[-1], onward], 0.9 * end, 0.3 * end))
    return _Atrium(outside, stumps, valve)


def _veins(rng: np.random.Generator, radii: Array) -> list[tuple[Array, Array]]:
    """Where each vein leaves the body (a point within it) and its direction."""
    right = [((-0.75, 0.1, 0.5), (-1, -0.1, 0.5)), ((-0.75, 0.3, -0.4), (-1, 0.5, -0.3))]
    left = [((0.75, 0.1, 0.5), (1, 0.0, 0.6)), ((0.75, 0.4, -0.3), (1, 0.6, -0.2))]
    if rng.random() < 0.25:  # a common trunk of both left veins
        left = [((0.75, 0.25, 0.1), (1, 0.3, 0.2))]
    if rng.random() < 0.25:  # a middle vein besides the two right ones
        right.append(((-0.8, 0.2, 0.05), (-1, 0.2, 0.1)))
    return [(radii * rng.normal(o, 0.1), _unit(rng.normal(d, 0.2))) for o, d in right + left]


def _appendage(rng: np.random.Generator, grid: _Grid, radii: Array) -> Array:
    """A tapering finger that leaves to the left and bends forwards, its surface lobed."""
    path = _curve(rng, radii * (0.65, -0.4, 0.4), _unit(rng.normal((0.8, -0.5, 0.4), 0.2)), rng.uniform(0.35, 0.55))
    path[-1] += rng.normal((-0.05, -0.15, 0.05), 0.05)
    width = rng.uniform(0.10, 0.15)
    return _tube(grid, path, width, 0.6 * width) + 0.4 * WOBBLE * _waves(rng, grid, 14)


def _chest(rng: np.random.Generator, grid: _Grid, tissue: _Tissue) -> Array:
    """Lungs with their vessels, the mediastinum between them, liver, spine and the muscles of the back."""
    image = np.full_like(grid.x, tissue.lung)
    speckle = _smooth_noise(rng, grid, 0.03)
    image += 0.7 * np.clip(speckle - rng.uniform(1.0, 1.6), 0, 1)

    between = _ellipsoid(grid, rng.normal((0.05, -0.15, 0), SPREAD), rng.uniform((0.75, 0.6, 1.0), (1.0, 0.8, 1.4)))
    image[between + 0.06 * _waves(rng, grid, 4) < 0] = tissue.fat
    dome = _ellipsoid(grid, rng.normal((-0.6, -0.1, -1.2), SPREAD), rng.uniform((0.7, 0.7, 0.6), (1.0, 1.0, 0.8)))
    image[dome < 0] = tissue.liver
    image[grid.y + 0.1 * _waves(rng, grid, 3) > rng.uniform(0.85, 1.05)] = tissue.muscle
    axis = rng.normal((-0.12, 0.88), SPREAD)
    spine = _tube(grid, [(*axis, -2), (*axis, 2)], 0.26, 0.26)
    image[spine < 0.04] = tissue.muscle
    image[spine < 0] = tissue.bone
    return image


def _paint_neighbours(rng: np.random.Generator, grid: _Grid, tissue: _Tissue, image: Array) -> None:
    """The other chambers and the great vessels, which open into one another, and the oesophagus."""
    cavities = [*_chambers(rng, grid), *_vessels(rng, grid)]
    for outside, wall in cavities:
        image[outside < wall] = tissue.muscle
    for outside, _ in cavities:
        image[outside < 0] = rng.uniform(*CHAMBERS)
    place = rng.normal((0.06, 0.46), SPREAD)
    oesophagus = _tube(grid, [(*place, -1.5), (*place, 1.5)], 0.07, 0.07)
    image[oesophagus < 0] = tissue.muscle * rng.uniform(0.8, 1.5)


def _chambers(rng: np.random.Generator, grid: _Grid) -> Iterator[tuple[Array, float]]:
    """The right ventricle, the right atrium and the left ventricle, each with the thickness of its wall."""
    for place, radii, wall in (
        ((0.05, -0.95, -0.35), (0.60, 0.35, 0.50), 0.05),
        ((-0.55, -0.52, -0.25), (0.36, 0.38, 0.45), 0.025),
        ((0.48, -0.72, -0.50), (0.40, 0.42, 0.45), 0.12),
    ):
        outside = _ellipsoid(grid, rng.normal(place, SPREAD), radii * rng.uniform(0.85, 1.15, 3))
        yield outside + 0.03 * _waves(rng, grid, 5), wall


def _vessels(rng: np.random.Generator, grid: _Grid) -> Iterator[tuple[Array, float]]:
    """The superior vena cava, the ascending and the descending aorta, the pulmonary artery and its left branch."""
    for path, radius in (
        ([(-0.48, -0.32, -0.2), (-0.50, -0.28, 1.5)], 0.14),
        ([(0.10, -0.58, -0.3), (-0.05, -0.60, 0.2), (-0.08, -0.52, 1.5)], 0.22),
        ([(0.28, 0.64, -1.5), (0.26, 0.64, 1.5)], 0.18),
        ([(0.35, -0.85, 0.0), (0.32, -0.6, 0.35), (0.18, -0.2, 0.58), (-0.7, 0.0, 0.56)], 0.17),
        ([(0.18, -0.2, 0.58), (0.75, 0.15, 0.60)], 0.13),
    ):
        radius *= rng.uniform(0.85, 1.15)
        yield _tube(grid, np.array(path) + rng.normal(0, SPREAD, 3), radius, radius), 0.03


def _paint_atrium(
    rng: np.random.Generator, grid: _Grid, tissue: _Tissue, atrium: _Atrium, label: Mask, image: Array
) -> None:
    image[atrium.stumps < 0.025] = tissue.muscle
    image[atrium.stumps < 0] = rng.uniform(0.8, 1.0)
    wall = (atrium.outside < rng.uniform(0.025, 0.05)) & ~atrium.valve & (atrium.stumps > 0)
    image[wall] = tissue.muscle
    image[wall & (_waves(rng, grid, 7) > SCAR)] = rng.uniform(0.9, 1.4)
    image[atrium.valve & (atrium.outside < 0.15)] = 1  # no wall between the blood of atrium and ventricle
    image[label] = 1


def _scan(rng: np.random.Generator, grid: _Grid, image: Array) -> Image:
    """What the scanner makes of the tissue: texture, blur, coil, gamma, Rician noise, zero mean, unit variance."""
    image = image * (1 + 0.06 * _smooth_noise(rng, grid, 0.03))
    image = ndimage.gaussian_filter(image, rng.uniform(*BLUR, 3) / grid.step)
    image = image * np.exp(COIL * _waves(rng, grid, 1.2))
    image = np.clip(image, 0, None) ** rng.uniform(*GAMMA)
    real, imaginary = rng.uniform(*NOISE) * rng.standard_normal((2, *image.shape), dtype=np.float32)
    image = np.hypot(image + real, imaginary)
    return ((image - image.mean(dtype=np.float64)) / image.std(dtype=np.float64)).astype(np.float32)


def _ellipsoid(grid: _Grid, place: Point, radii: Point) -> Array:
    """The distance outside an ellipsoid, exact on its surface and in proportion elsewhere."""
    (x, y, z), (rx, ry, rz) = _from(grid, place), map(float, radii)
    return (np.sqrt((x / rx) ** 2 + (y / ry) ** 2 + (z / rz) ** 2) - 1) * float(np.mean(radii))


def _tube(grid: _Grid, path: Sequence[Point] | Array, start: float, end: float) -> Array:
    """The distance outside a rounded tube along `path`, whose radius runs from `start` to `end`."""
    points = np.asarray(path, float)
    widening = (end - start) / (len(points) - 1)
    outside = np.full_like(grid.x, np.inf)
    for number, (point, step) in enumerate(zip(points, np.diff(points, axis=0), strict=False)):
        (x, y, z), (dx, dy, dz) = _from(grid, point), map(float, step)
        share = np.clip((x * dx + y * dy + z * dz) * (1 / (dx * dx + dy * dy + dz * dz)), 0, 1)
        distance = np.sqrt((x - share * dx) ** 2 + (y - share * dy) ** 2 + (z - share * dz) ** 2)
        outside = np.minimum(outside, distance - start - widening * (number + share))
    return outside


def _curve(rng: np.random.Generator, start: Array, direction: Array, length: float) -> Array:
    """Five points (5, 3) of a parabola that leaves `start` in `direction` and bends to any side."""
    share = np.linspace(0, 1, 5)[:, None]
    return start + length * (share * direction + share**2 * rng.normal(0, 0.2, 3))


def _melted(a: Array, b: Array) -> Array:
    """The union of two shapes, rounded where they meet."""
    roundness = 0.025
    return -roundness * np.logaddexp(-a / roundness, -b / roundness)


def _waves(rng: np.random.Generator, grid: _Grid, frequency: float) -> Array:
    """A smooth random field of mean 0 and variance 1: plane waves of about `frequency` radians a length."""
    waves = np.zeros_like(grid.x)
    for _ in range(6):
        direction = frequency * rng.uniform(0.6, 1.4) * _unit(rng.normal(size=3))
        waves += np.cos(_along(grid, direction) + rng.uniform(0, 2 * np.pi))
    return waves / 3**0.5


def _smooth_noise(rng: np.random.Generator, grid: _Grid, length: float) -> Array:
    """A random field of variance 1, smooth over `length`."""
    noise = rng.standard_normal(grid.x.shape, dtype=np.float32)
    field = ndimage.gaussian_filter(noise, length / grid.step)
    return field / field.std()


def _along(grid: _Grid, direction: Array) -> Array:
    x, y, z = map(float, direction)  # a NumPy scalar would make the volume double
    return x * grid.x + y * grid.y + z * grid.z


def _from(grid: _Grid, place: Point) -> tuple[Array, Array, Array]:
    x, y, z = map(float, place)
    return grid.x - x, grid.y - y, grid.z - z


def _turned(x: Array, y: Array, angle: float) -> tuple[Array, Array]:
    """Coordinates along a direction, and across it."""
    cos, sin = math.cos(angle), math.sin(angle)
    return cos * x + sin * y, cos * y - sin * x


def _unit(vector: Array) -> Array:
    return vector / np.linalg.norm(vector)


def _largest(mask: Mask) -> Mask:
    """The largest of the pieces into which coarse voxels may cut a thin vein."""
    pieces, _ = ndimage.label(mask)
    return pieces == 1 + np.argmax(np.bincount(pieces.ravel())[1:])
