"""A picture of four decision boundaries, and the film of how they came about."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from torch import Tensor

from presentation.palette import BLUE, ORANGE

from .margin import GRID, SURE, WINDOW, Score, grid
from .moons import Data

MOONS = {"upper moon": (BLUE, "o"), "lower moon": (ORANGE, "^")}  # colour and marker
COLOURS = 160  # of the film
FRAME_MS, LAST_MS = 150, 4_000  # how long a frame of the film is shown, and the last one


@dataclass(frozen=True)
class State:
    """A model at one moment."""

    probability: Tensor
    """Of the lower moon, over `WINDOW`, (rows, columns)."""
    score: Score


@dataclass(frozen=True)
class Film:
    """A model's training."""

    name: str
    iterations: list[int]
    states: list[State]
    """One for each of `iterations`."""


class Panel:
    """One variant's panel: points that stay, and a probability, a boundary and a margin that change."""

    def __init__(self, axes: Axes, data: Data, title: str) -> None:
        left, right, bottom, top = WINDOW
        extent = (left - GRID / 2, right + GRID / 2, bottom - GRID / 2, top + GRID / 2)
        # few colours make a small film
        colours = LinearSegmentedColormap.from_list("moons", [BLUE, "white", ORANGE], N=15)
        self.axes, self.lines = axes, list[ContourSet]()
        self.image = axes.imshow([[0.5]], cmap=colours, vmin=0, vmax=1, alpha=0.55, extent=extent, origin="lower")
        axes.set_title(title, loc="left", fontsize=13, weight="bold", pad=20)
        self.numbers = axes.text(0, 1.03, "", transform=axes.transAxes, fontsize=11)
        _draw_points(axes, data)
        axes.set(xticks=[], yticks=[], xlim=WINDOW[:2], ylim=WINDOW[2:])

    def show(self, state: State) -> None:
        """Draw `state` in place of the one before."""
        for line in self.lines:
            line.remove()
        x, y = grid()[0, :, 0], grid()[:, 0, 1]
        values = state.probability.numpy()
        self.image.set_data(values)
        score = state.score
        self.numbers.set_text(
            f"{score.accuracy:.1f} % right; margin {score.margin:.2f}, 5th percentile {score.margin_5:.2f}"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "No contour levels were found": an early model is sure of nothing
            margin = self.axes.contour(
                x, y, values, levels=(1 - SURE, SURE), colors="k", linewidths=1.1, linestyles="--"
            )
            self.lines = [margin, self.axes.contour(x, y, values, levels=[0.5], colors="k", linewidths=2.2)]


class Drawing:
    """The four panels, with their legends.

    Args:
        data: drawn in each panel.
        names: of the variants, in order.
    """

    def __init__(self, data: Data, names: Sequence[str]) -> None:
        self.figure = Figure(figsize=(9, 7.2))  # at 100 dots per inch as wide as a README
        axes = self.figure.subplots(2, 2)
        self.figure.subplots_adjust(left=0.015, right=0.9, bottom=0.075, top=0.9, wspace=0.04, hspace=0.24)
        titles = [f"({letter}) {name}" for letter, name in zip("abcd", names, strict=True)]
        self.panels = [Panel(panel, data, title) for panel, title in zip(axes.flat, titles, strict=True)]
        bar = self.figure.colorbar(self.panels[0].image, cax=self.figure.add_axes((0.915, 0.2, 0.02, 0.58)))
        bar.set_label("probability of the lower moon", fontsize=12)
        self.figure.legend(
            handles=_legend(), loc="lower center", ncols=5, fontsize=11, columnspacing=1.5, frameon=False
        )
        self.caption = self.figure.text(0.9, 0.985, "", fontsize=12, ha="right", va="top")

    def show(self, states: Sequence[State], iteration: int) -> None:
        """Draw one state in each panel."""
        for panel, state in zip(self.panels, states, strict=True):
            panel.show(state)
        self.caption.set_text(f"iteration {iteration}")


def _draw_points(axes: Axes, data: Data) -> None:
    unlabelled: dict[str, Any] = {"s": 16, "edgecolor": "white", "linewidth": 0.4, "zorder": 3}
    labelled: dict[str, Any] = {"s": 120, "edgecolor": "black", "linewidth": 1.8, "zorder": 4}
    for moon, (colour, marker) in enumerate(MOONS.values()):
        for points, style in (
            (data.points[data.classes == moon], unlabelled),
            (data.points[data.labelled[data.classes[data.labelled] == moon]], labelled),
        ):
            axes.scatter(points[:, 0], points[:, 1], color=colour, marker=marker, **style)


def _legend() -> list[Line2D]:
    edge: dict[str, Any] = {"markersize": 11, "markeredgecolor": "black", "markeredgewidth": 1.8}
    return [
        *(Line2D([], [], color=c, marker=m, ls="", markersize=5, label=name) for name, (c, m) in MOONS.items()),
        Line2D([], [], color="0.8", marker="o", linestyle="", label="labelled", **edge),
        Line2D([], [], color="black", linewidth=2.2, label="boundary"),
        Line2D([], [], color="black", linewidth=1.1, linestyle="--", label="probability 5 %, 95 %"),
    ]


def save_pictures(out: Path, data: Data, films: Sequence[Film]) -> None:
    """`boundary.gif`, all of `films`, and `boundary.png`, their last states. All films have the same iterations."""
    drawing = Drawing(data, [film.name for film in films])
    frames = []
    for index, iteration in enumerate(films[0].iterations):
        drawing.show([film.states[index] for film in films], iteration)
        frames.append(_rendered(drawing.figure))
    drawing.figure.savefig(out / "boundary.png", dpi=200)
    # One palette for all frames, and no dithering: what stays the same from frame to frame then costs nothing.
    palette = frames[-1].quantize(COLOURS, Image.Quantize.MAXCOVERAGE)
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [FRAME_MS] * len(others) + [LAST_MS]
    first.save(out / "boundary.gif", save_all=True, append_images=others, duration=durations, loop=0)


def _rendered(figure: Figure) -> Image.Image:
    """`figure` as an image, 100 pixels to the inch."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
