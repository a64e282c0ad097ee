"""Predictions of slices with their uncertainty, as in the paper's figures 3 and 4."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from segmentation.figures.canvas import DPI, WIDTH, save
from segmentation.figures.cases import check_cases, draw_labels, patches
from segmentation.task import Case

SIDE_BY_SIDE = 3  # methods whose predictions and entropy maps fit into one row


def middle_slice(case: Case) -> Case:
    """The slice with the most foreground of a (D, H, W) case: mid-ventricular in ACDC."""
    z = int(np.count_nonzero(case.reference, axis=(1, 2)).argmax())
    predictions = {name: (labels[z], entropy[z]) for name, (labels, entropy) in case.predictions.items()}
    return Case(case.image[z], case.reference[z], predictions, case.name)


def save_predictions(path: Path | str, cases: Sequence[Case], class_names: Sequence[str]) -> None:
    """Rows: cases. Columns: image, reference, each method's prediction, each method's entropy map.

    The entropy maps of more than three methods stand below their predictions. Every case is cropped to a square around
    the reference, with a margin.

    Args:
        path: image file; its suffix chooses the format.
        cases: at least one.
        class_names: one per foreground class, 1 upwards.

    Raises:
        InputError: when there is no case, the cases differ in their methods, an array's shape differs from
            its image's, a label has no name, there are over six classes, or `path` cannot be written.
    """
    check_cases(cases, class_names, 2)
    methods = [method.replace(" + ", "\n+ ") for method in cases[0].predictions]
    titles = ["Image", "Reference", *methods, *(f"{method}\nentropy" for method in methods)]
    lines = 1 if len(methods) <= SIDE_BY_SIDE else 2
    columns = 2 + len(methods) * 2 // lines
    cell = (WIDTH - 0.9) / columns
    figure = Figure(figsize=(WIDTH, cell * len(cases) * lines + 0.9), dpi=DPI, layout="compressed")
    grid = figure.subplots(len(cases) * lines, columns, squeeze=False).reshape(len(cases), -1)
    if lines == 2:
        below = slice(columns, columns + 2)  # image and reference have no entropy
        for axes in grid[:, below].flat:
            axes.remove()
        grid = np.delete(grid, below, axis=1)
    for row, case in zip(grid, cases, strict=True):
        _draw_case(row, case)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=9 if lines == 1 else 8)
    bar = figure.colorbar(grid[0, -1].images[0], ax=grid, fraction=0.02, pad=0.01)
    bar.set_label("entropy / log C", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    figure.legend(
        handles=patches(class_names), loc="outside lower center", ncols=len(class_names), fontsize=9, frameon=False
    )
    save(figure, path)


def _draw_case(row: np.ndarray, case: Case) -> None:
    """`row` holds one matplotlib Axes per column of `save_predictions`."""
    window = _window_around(case.reference)
    overlays = [case.reference, *(labels for labels, _ in case.predictions.values())]
    entropies = [entropy for _, entropy in case.predictions.values()]
    first_entropy = 1 + len(overlays)
    for axes in row[:first_entropy]:
        axes.imshow(case.image[window], cmap="gray", interpolation="bilinear")
    for axes, labels in zip(row[1:first_entropy], overlays, strict=True):
        draw_labels(axes, labels[window])
    for axes, entropy in zip(row[first_entropy:], entropies, strict=True):
        axes.imshow(entropy[window], cmap="magma", vmin=0, vmax=1)
    for axes in row:
        axes.set(xticks=[], yticks=[])
    row[0].set_ylabel(case.name, fontsize=8)


def _window_around(reference: np.ndarray, margin: float = 0.4) -> tuple[slice, slice]:
    """A square around the foreground, `margin` of its size wider on each side; all of an empty slice."""
    rows, columns = np.nonzero(reference)
    if rows.size == 0:
        return slice(None), slice(None)
    extent = max(np.ptp(rows), np.ptp(columns)) + 1
    side = max(48, round((1 + 2 * margin) * extent))
    return _interval(rows, side, reference.shape[0]), _interval(columns, side, reference.shape[1])


def _interval(positions: np.ndarray, side: int, limit: int) -> slice:
    """`side` pixels centred on `positions`, moved or cut to lie in 0 .. limit."""
    start = int(positions.min() + positions.max() + 1 - side) // 2
    start = max(0, min(start, limit - side))
    return slice(start, min(start + side, limit))
