"""The two figures of a run: predictions with their uncertainty (as the paper's figures 3 and 4), and curves.

Both use matplotlib without pyplot (no display, no global state), the colours of `palette`, and a size that stays
readable at the 900 pixels of a README.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter
from palette import GREEN, METHOD_COLOURS, ORANGE, PURPLE, SKY, VERMILION, YELLOW, method_styles
from scipy.ndimage import uniform_filter1d

from .errors import InputError

WIDTH = 9.0  # inches: at 100 dots per inch as wide as a README, so that font sizes hold
DPI = 200  # for dense screens
SIDE_BY_SIDE = 3  # methods whose predictions and entropy maps fit into one row
CLASS_COLOURS = (ORANGE, SKY, PURPLE, GREEN, YELLOW, VERMILION)


@dataclass(frozen=True)
class Case:
    """One slice or volume, and what each method makes of it.

    Attributes:
        image: float, 2D or 3D.
        reference: integer labels in the image's shape, 0 the background.
        predictions: method -> (labels, entropy in [0, 1]), both in that shape; the same methods in every case.
        name: printed beside the row.
    """

    image: np.ndarray
    reference: np.ndarray
    predictions: Mapping[str, tuple[np.ndarray, np.ndarray]]
    name: str = ""


@dataclass(frozen=True)
class RunLog:
    """The CSV files of one run.

    Attributes:
        training: columns `iteration` and any of `loss_labelled`, `loss_unlabelled`, `confident` (share in
            [0, 1]) and `grad_norm`; a missing column or an empty cell is left out of the picture.
        validation: columns `iteration` and `dice` (mean, percent); None where there was no validation.
    """

    training: Path
    validation: Path | None = None


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


def save_curves(path: Path | str, runs: Mapping[str, RunLog]) -> None:
    """Up to four panels over iterations: losses, share of confident pseudo-labels, ||g1||, validation Dice.

    Training curves are running means over 1/50 of their points. A panel that no run has data for is left out.

    Args:
        path: image file; its suffix chooses the format.
        runs: method -> its logs, at most seven.

    Raises:
        InputError: when there are no or too many runs, a log is missing, lacks `iteration` or holds a cell
            that is no number, or `path` cannot be written.
    """
    if not 0 < len(runs) <= len(METHOD_COLOURS):
        raise InputError(f"runs: {len(runs)} given, 1 .. {len(METHOD_COLOURS)} can be told apart")
    figure = Figure(figsize=(WIDTH, 5.6), dpi=DPI, layout="constrained")
    panels = figure.subplots(2, 2).ravel().tolist()
    losses, confident, norm, dice = panels
    styles = method_styles(runs)
    for name, run in runs.items():
        style = styles[name]
        training = _read_csv(run.training)
        _draw_mean(losses, training, "loss_labelled", style)
        _draw_mean(losses, training, "loss_unlabelled", {**style, "linestyle": "--"})
        _draw_mean(confident, training, "confident", style)
        _draw_mean(norm, training, "grad_norm", style)
        if run.validation is not None:
            iteration, values = _points(_read_csv(run.validation), "dice")
            if values.size:
                dice.plot(iteration, values, markersize=4, **style)
    _style(losses, "Loss (solid: labelled, dashed: unlabelled)", "loss", log=True)
    _style(confident, "Confident pseudo-labels", "share of all")
    _style(norm, "Gradient that gives the perturbation", r"norm $\|g_1\|$", log=True)
    _style(dice, "Validation", "mean Dice (%)")
    _keep_drawn(figure, panels)
    lines = [Line2D([], [], label=name, **style) for name, style in styles.items()]
    figure.legend(handles=lines, loc="outside upper center", ncols=len(lines), fontsize=9, frameon=False)
    save(figure, path)


def check_cases(cases: Sequence[Case], class_names: Sequence[str], dimensions: int) -> None:
    """Raise InputError, naming the culprit, for what could not be drawn."""
    if not cases:
        raise InputError("cases: nothing to draw")
    if not cases[0].predictions:
        raise InputError(f"case {cases[0].name!r}: no method to draw")
    if len(class_names) > len(CLASS_COLOURS):
        raise InputError(f"class_names: {len(class_names)} given, at most {len(CLASS_COLOURS)} can be told apart")
    for case in cases:
        if list(case.predictions) != list(cases[0].predictions):
            raise InputError(f"case {case.name!r}: its methods differ from those of the first case")
        shape = case.image.shape
        arrays = [case.reference, *(array for pair in case.predictions.values() for array in pair)]
        if len(shape) != dimensions or case.image.size == 0 or any(array.shape != shape for array in arrays):
            raise InputError(f"case {case.name!r}: image, labels and entropy must share one {dimensions}D shape")
        labels = [case.reference, *(labels for labels, _ in case.predictions.values())]
        if max(array.max() for array in labels) > len(class_names):
            raise InputError(f"case {case.name!r}: a label is above {len(class_names)}, the number of class names")


def patches(class_names: Sequence[str]) -> list[Patch]:
    """A legend's entries, in the colours of `draw_labels`."""
    return [
        Patch(facecolor=to_rgba(colour, 0.5), edgecolor=colour, label=name)
        for colour, name in zip(CLASS_COLOURS, class_names, strict=False)
    ]


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


def draw_labels(axes: Axes, labels: np.ndarray) -> None:
    """Each class as a translucent fill with a contour."""
    fills = np.array([(0.0, 0.0, 0.0, 0.0), *(to_rgba(colour, 0.4) for colour in CLASS_COLOURS)])
    axes.imshow(fills[labels], interpolation="nearest")
    for index, colour in enumerate(CLASS_COLOURS, start=1):
        mask = labels == index
        if mask.any() and not mask.all():  # matplotlib before 3.11 warns where there is no contour
            axes.contour(mask, levels=[0.5], colors=[colour], linewidths=1)


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


def _draw_mean(axes: Axes, table: Mapping[str, np.ndarray], column: str, style: Mapping[str, Any]) -> None:
    iteration, values = _points(table, column)
    if values.size:
        mean = uniform_filter1d(values, size=max(1, values.size // 50), mode="nearest")
        every = max(1, values.size // 8)  # a few markers tell the curves apart too
        axes.plot(iteration, mean, linewidth=1.2, markersize=4, markevery=every, **style)


def _keep_drawn(figure: Figure, panels: Sequence[Axes]) -> None:
    """Only panels with a line stay (the first in any case), two side by side; an odd last one has a row to itself."""
    drawn = [axes for axes in panels if axes.lines] or [panels[0]]
    for axes in set(panels).difference(drawn):
        axes.remove()
    rows = (len(drawn) + 1) // 2
    figure.set_figheight(0.4 + 2.6 * rows)
    grid = figure.add_gridspec(rows, 2)
    for index, axes in enumerate(drawn):
        alone = axes is drawn[-1] and index % 2 == 0
        axes.set_subplotspec(grid[index // 2, :] if alone else grid[index // 2, index % 2])


def _points(table: Mapping[str, np.ndarray], column: str) -> tuple[np.ndarray, np.ndarray]:
    """Iterations and values of a column's finite cells; nothing where the column is missing."""
    values = table.get(column, np.full_like(table["iteration"], np.nan))
    there = np.isfinite(values)
    return table["iteration"][there], values[there]


def _read_csv(path: Path) -> dict[str, np.ndarray]:
    """Columns as float64; an empty or missing cell (a run that was stopped mid-line) is NaN."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except OSError as error:
        raise InputError(f"{path}: cannot read ({error.strerror})") from None
    columns = reader.fieldnames or []
    if "iteration" not in columns:
        raise InputError(f"{path}: no column `iteration`")
    try:
        return {column: np.array([float(row[column] or "nan") for row in rows]) for column in columns}
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


def _style(axes: Axes, title: str, ylabel: str, *, log: bool = False) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("iteration", fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if not axes.lines:  # no run came to its first log line
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", va="center", color="gray")
    elif log and np.isfinite(axes.dataLim.minposy):  # else no value is positive
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # a curve may stay within one decade
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def save(figure: Figure, path: Path | str) -> None:
    """Write `figure`, making the folder. Raises InputError if it can't be written."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except (OSError, ValueError) as error:  # ValueError: a suffix that matplotlib does not know
        raise InputError(f"{path}: cannot write ({error})") from None
