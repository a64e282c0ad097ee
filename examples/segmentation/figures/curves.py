"""Curves of a run: losses, confidence, ||g1|| and validation over iterations."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter
from scipy.ndimage import uniform_filter1d

from presentation.palette import METHOD_COLOURS, method_styles
from segmentation.errors import InputError
from segmentation.figures.canvas import DPI, WIDTH, save


@dataclass(frozen=True)
class LogFiles:
    """The CSV files of one run.

    Attributes:
        training: columns `iteration` and any of `loss_labelled`, `loss_unlabelled`, `confident` (share in
            [0, 1]) and `grad_norm`; a missing column or an empty cell is left out of the picture.
        validation: columns `iteration` and `dice` (mean, percent); None where there was no validation.
    """

    training: Path
    validation: Path | None = None


def save_curves(path: Path | str, runs: Mapping[str, LogFiles]) -> None:
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
