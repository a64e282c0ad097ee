"""The two figures of volumes: slices with the uncertainty, and surfaces (as the paper's figure 3).

Size and colours are those of `figures`. Voxels are drawn as cubes: the field's LA volumes have 0.625 mm along
each axis.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LightSource, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from mpl_toolkits.mplot3d import Axes3D
from mpl_toolkits.mplot3d.art3d import Poly3DCollection
from scipy.ndimage import center_of_mass, gaussian_filter
from skimage.measure import block_reduce, marching_cubes

from segmentation.figures.canvas import DPI, WIDTH, save
from segmentation.figures.cases import CLASS_COLOURS, check_cases, draw_labels, patches
from segmentation.scoring.metrics import score
from segmentation.task import Case

Box = tuple[slice, slice, slice]

PLANES = ("axial", "coronal", "sagittal")
EDGED = withStroke(linewidth=1.6, foreground="black")  # white lines show on white paper and on bright tissue
VIEW = (30.0, -65.0)  # degrees: from above, in front and a little from the patient's left
FINEST = 160  # voxels along the longest side of a surface; beyond, blocks of them are drawn as one


def save_volumes(path: Path | str, cases: Sequence[Case], class_names: Sequence[str]) -> None:
    """Rows: each case's methods. Columns: axial, coronal and sagittal slice, and the axial slice's entropy.

    The slices pass through the centre of mass of the reference and are cropped around it, with a margin, to one
    size and scale for all cases. Predictions are filled, the reference is a white line.

    Args:
        path: image file; its suffix chooses the format.
        cases: at least one, with at least one method.
        class_names: one per foreground class, 1 upwards.

    Raises:
        InputError: when there is no case or method, the cases differ in their methods, an array's shape differs
            from its image's, a label has no name, there are over six classes, or `path` cannot be written.
    """
    check_cases(cases, class_names, 3)
    methods = list(cases[0].predictions)
    rows = len(cases) * len(methods)
    sides = _sides(cases)
    widths = (sides[0], sides[0], sides[1], sides[0])
    cell = (WIDTH - 1.2) * sides[1] / sum(widths)
    figure = Figure(figsize=(WIDTH, (cell + 0.05) * rows + 0.75), dpi=DPI, layout="compressed")
    grid = figure.subplots(rows, 4, squeeze=False, width_ratios=widths)
    for index, case in enumerate(cases):
        block = grid[index * len(methods) : (index + 1) * len(methods)]
        for row, method in zip(block, methods, strict=True):
            _draw_slices(row, case, method, sides)
        name = block[0, 0].text(0.02, 0.03, case.name, transform=block[0, 0].transAxes, fontsize=8, color="white")
        name.set_path_effects([EDGED])
    for axes, title in zip(grid[0], [*PLANES, "entropy, axial"], strict=True):
        axes.set_title(title, fontsize=9)
    bar = figure.colorbar(grid[0, -1].images[0], ax=grid, fraction=0.02, pad=0.01, shrink=min(1, 3 / rows))
    bar.set_label("entropy / log C", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    line = Line2D([], [], color="white", linewidth=0.8, path_effects=[EDGED], label="reference")
    handles = [*patches(class_names), line]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)
    save(figure, path)


def save_surfaces(path: Path | str, cases: Sequence[Case], class_names: Sequence[str]) -> None:
    """Rows: cases. Columns: the surface of each method's prediction with its Dice beneath, and of the reference.

    All of a row is seen from the same side in the same scale. Surfaces are smoothed over about a voxel (more
    where over 160 voxels are to be shown), so that islands of a few voxels vanish; Dice counts them. It is the
    mean over the classes.

    Args:
        path: image file; its suffix chooses the format.
        cases: at least one, with at least one method.
        class_names: one per foreground class, 1 upwards.

    Raises:
        InputError: as `save_volumes`.
    """
    check_cases(cases, class_names, 3)
    titles = [*cases[0].predictions, "Reference"]
    width = (WIDTH - 0.3) / len(titles)  # inches of a cell
    views = [_view(case, width) for case in cases]
    below = 0.35 if len(class_names) > 1 else 0.0
    height = 0.35 + sum(view.height + 0.4 for view in views) + below
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    for column, title in enumerate(titles):
        _write(figure, 0.3 + (column + 0.5) * width, height - 0.15, title, fontsize=10)
    top = height - 0.35
    for case, view in zip(cases, views, strict=True):
        middle = top - view.height / 2
        _write(figure, 0.12, middle, case.name, fontsize=9, rotation=90)
        volumes = [*(labels for labels, _ in case.predictions.values()), case.reference]
        for column, labels in enumerate(volumes):
            centre = 0.3 + (column + 0.5) * width
            if labels.any():
                _draw_surface(figure, (centre, middle), labels, view)
            else:
                _write(figure, centre, middle, "empty", fontsize=10, color="gray")
            if column < len(case.predictions):
                dice = _dice(labels, case.reference, len(class_names) + 1)
                _write(figure, centre, top - view.height - 0.15, f"Dice {100 * dice:.1f} %", fontsize=9)
        top -= view.height + 0.4
    if below:
        figure.legend(handles=patches(class_names), loc="lower center", ncols=6, fontsize=9, frameon=False)
    save(figure, path)


def _draw_slices(row: np.ndarray, case: Case, method: str, sides: tuple[int, int, int]) -> None:
    """`row` holds one matplotlib Axes per column of `save_volumes`."""
    centre, box = _centre(case.reference), _window(case.reference, sides)
    labels, entropy = case.predictions[method]
    low, high = np.percentile(case.image[box], (1, 99.5))
    images, overlays, lines, entropies = (
        _planes(array, centre, box) for array in (case.image, labels, case.reference, entropy)
    )
    for axes, image, overlay, line in zip(row, images, overlays, lines, strict=False):
        axes.imshow(image, cmap="gray", vmin=low, vmax=high, interpolation="bilinear")
        draw_labels(axes, overlay)
        _draw_outline(axes, line)
    row[3].imshow(entropies[0], cmap="magma", vmin=0, vmax=1)
    for axes, width in zip(row, (sides[0], sides[0], sides[1], sides[0]), strict=True):
        _frame(axes, width, sides[1])
    row[0].set_ylabel(method, fontsize=9)


def _centre(reference: np.ndarray) -> tuple[int, int, int]:
    """The voxel in the middle of the foreground, or of a volume without any."""
    x, y, z = center_of_mass(reference > 0) if reference.any() else [(size - 1) / 2 for size in reference.shape]
    return round(x), round(y), round(z)


def _sides(cases: Sequence[Case], margin: float = 0.2) -> tuple[int, int, int]:
    """Voxels along each axis that take in each case's foreground, `margin` of its size wider on each side.

    No less than 48, nor more than the largest volume has. Along z, as many as along y: the coronal and sagittal
    slices stand beside the axial one.
    """
    extents = [[part.stop - part.start for part in _bounds(case.reference > 0)] for case in cases]
    x, y, z = (max(48, round((1 + 2 * margin) * extent)) for extent in np.max(extents, axis=0))
    most_x, most_y, most_z = np.max([case.image.shape for case in cases], axis=0).tolist()
    height = max(min(y, most_y), min(z, most_z))
    return min(x, most_x), height, height


def _window(reference: np.ndarray, sides: tuple[int, int, int]) -> Box:
    """`sides` voxels around the foreground, moved or cut to lie in the volume."""
    x, y, z = map(_interval, _bounds(reference > 0), sides, reference.shape)
    return x, y, z


def _interval(part: slice, side: int, size: int) -> slice:
    start = max(0, min((part.start + part.stop - side) // 2, size - side))
    return slice(start, min(start + side, size))


def _bounds(mask: np.ndarray) -> Box:
    """The smallest box around the true voxels; the whole volume where there are none."""
    if not mask.any():
        return slice(0, mask.shape[0]), slice(0, mask.shape[1]), slice(0, mask.shape[2])
    x, y, z = (slice(int(along.min()), int(along.max()) + 1) for along in np.nonzero(mask))
    return x, y, z


def _planes(volume: np.ndarray, centre: tuple[int, int, int], box: Box) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Axial, coronal and sagittal slice as (rows, columns): the patient's front, or head, is on top."""
    (x, y, z), (along_x, along_y, along_z) = centre, box
    axial = volume[along_x, along_y, z].T
    coronal = volume[along_x, y, along_z].T[::-1]
    sagittal = volume[x, along_y, along_z].T[::-1]
    return axial, coronal, sagittal


def _draw_outline(axes: Axes, labels: np.ndarray) -> None:
    for index in np.unique(labels[labels > 0]):
        mask = labels == index
        if not mask.all():
            contour = axes.contour(mask, levels=[0.5], colors=["white"], linewidths=0.8)
            contour.set_path_effects([EDGED])


def _frame(axes: Axes, width: int, height: int) -> None:
    """Show `width` x `height` voxels around the middle of the picture, black where it ends."""
    rows, columns = axes.images[0].get_size()
    axes.set_xlim((columns - 1 - width) / 2, (columns - 1 + width) / 2)
    axes.set_ylim((rows - 1 + height) / 2, (rows - 1 - height) / 2)
    axes.set(xticks=[], yticks=[], facecolor="black")


@dataclass(frozen=True)
class _View:
    """How a row of surfaces is drawn.

    Attributes:
        box: the voxels drawn.
        scale: inches per voxel.
        shift: from the middle of the box to the middle of what is seen, to the right and up, inches.
        height: of what is seen, inches; at least 1.
    """

    box: Box
    scale: float
    shift: tuple[float, float]
    height: float


def _view(case: Case, width: float) -> _View:
    """So that the reference and each prediction fit `width` inches, and as much in height."""
    drawn = np.logical_or.reduce([case.reference > 0, *(labels > 0 for labels, _ in case.predictions.values())])
    box = _bounds(drawn)
    elevation, azimuth = np.radians(VIEW)
    right = [-np.sin(azimuth), np.cos(azimuth), 0]
    up = [-np.sin(elevation) * np.cos(azimuth), -np.sin(elevation) * np.sin(azimuth), np.cos(elevation)]
    middle = np.array([(part.start + part.stop - 1) / 2 for part in box])
    seen = (np.argwhere(drawn if drawn.any() else ~drawn) - middle) @ np.transpose([right, up])
    low, high = seen.min(axis=0) - 3, seen.max(axis=0) + 3  # half a voxel's diagonal, and air
    scale = 0.97 * width / float((high - low).max())
    shift_right, shift_up = (scale * (low + high) / 2).tolist()
    return _View(box, scale, (shift_right, shift_up), max(1.0, scale * float((high - low)[1])))


def _write(figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
    """`x` and `y` in inches from the lower left."""
    width, height = figure.get_size_inches()
    figure.text(x / width, y / height, text, ha="center", va="center", **style)


def _draw_surface(figure: Figure, centre: tuple[float, float], labels: np.ndarray, view: _View) -> None:
    """Every class's surface, seen around `centre`, in inches from the lower left."""
    sizes = [size + 4 for size in labels[view.box].shape]  # a smoothed surface swells by a voxel or so
    side = view.scale * float(np.linalg.norm(sizes))  # inches; holds the box however it is turned
    left, bottom = (c - s - side / 2 for c, s in zip(centre, view.shift, strict=True))
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left / width, bottom / height, side / width, side / height), projection="3d")
    assert isinstance(axes, Axes3D)  # for mypy
    elevation, azimuth = VIEW
    axes.set_axis_off()
    axes.set_proj_type("ortho")
    axes.view_init(elev=elevation, azim=azimuth)
    x, y, z = ((-2.5, size - 2.5) for size in sizes)
    axes.set(xlim=x, ylim=y, zlim=z, facecolor="none")  # the next Axes may overlap this one
    axes.set_box_aspect(sizes, zoom=1 / 1.03)  # with zoom 1, a diagonal is 1.03 times as long as the Axes is wide
    surfaces = [
        _surface(labels[view.box] == index, colour)
        for index, colour in enumerate(CLASS_COLOURS, start=1)
        if (labels == index).any()
    ]
    triangles, colours = (np.concatenate(parts) for parts in zip(*surfaces, strict=True))
    axes.add_collection3d(Poly3DCollection(triangles, facecolors=colours, edgecolors=colours, linewidths=0.2))


def _surface(mask: np.ndarray, colour: str) -> tuple[np.ndarray, np.ndarray]:
    """Triangles (N, 3, 3) around the true voxels, in voxels, and their shaded colours (N, 3).

    Blocks of voxels are averaged first, then smoothed: drawing takes matplotlib a second per 40,000 triangles.
    """
    block = -(-max(mask.shape) // FINEST)
    blocks = block_reduce(mask.astype(np.float32), block, np.mean)
    smooth = gaussian_filter(np.pad(blocks, 3), sigma=1)
    level = min(0.5, smooth.max() / 2)  # a few voxels alone never reach 1/2
    points, faces, normals, _ = marching_cubes(smooth, level)
    light = LightSource(azdeg=240, altdeg=50).shade_normals(normals[faces].mean(axis=1))[:, None]
    base = np.array(to_rgb(colour))
    colours = base * (0.35 + 0.65 * light**1.5) + 0.3 * (1 - base) * light**6  # a gloss where it is brightest
    return ((points - 3 + 0.5) * block - 0.5)[faces], colours


def _dice(prediction: np.ndarray, reference: np.ndarray, num_classes: int) -> float:
    """Mean over the foreground classes, in [0, 1]."""
    return float(np.mean([s.dice for s in score(prediction, reference, num_classes, with_asd=False)]))
