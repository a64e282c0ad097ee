"""A picture of validation Dice over iterations: a thin line a run, a strong one for the mean."""

from collections.abc import Mapping, Sequence
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.common import new_panels
from presentation.palette import method_styles

Curve = Sequence[tuple[int, float]]
"""Iteration and Dice in percent of every validation."""
Panel = Mapping[str, Sequence[Curve]]
"""Method -> its runs."""

APART = 6  # Dice, percentage points: of numbers that can be told apart


def draw(panels: Mapping[str, Panel]) -> Figure:
    """A panel beside the next, by title; the same methods have the same colours in all."""
    names = dict.fromkeys(name for panel in panels.values() for name in panel)
    styles = {name: style["color"] for name, style in method_styles(names).items()}
    figure, places = new_panels(len(panels), width=9.0, height=3.8, sharey=True)
    for axes, (title, panel) in zip(places, panels.items(), strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("iteration")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(alpha=0.3)
        for name, runs in panel.items():
            _draw_runs(axes, runs, styles[name])
        _name_ends(axes, {styles[name]: mean_curve(runs)[-1] for name, runs in panel.items()})
    places[0].set_ylabel("validation Dice (%)")
    places[0].set_ylim(0, 100)
    lines = [Line2D([], [], color=colour, linewidth=2.2, label=name) for name, colour in styles.items()]
    figure.legend(handles=lines, loc="outside upper center", ncols=len(lines), frameon=False)
    return figure


def _draw_runs(axes: Axes, runs: Sequence[Curve], colour: str) -> None:
    for run in runs:
        axes.plot(*zip(*run, strict=True), color=colour, linewidth=0.7, alpha=0.5)
    average = mean_curve(runs)
    axes.plot(*zip(*average, strict=True), color=colour, linewidth=2.2)
    axes.plot(*average[-1], "o", color=colour, markersize=4)


def _name_ends(axes: Axes, ends: Mapping[str, tuple[int, float]]) -> None:
    """Colour -> where its line ends: the Dice there, each above the last."""
    place = float(-APART)
    for colour, (iteration, dice) in sorted(ends.items(), key=lambda end: end[1][1]):
        place = max(dice, place + APART)
        axes.text(iteration, place, f"  {dice:.0f}", color=colour, va="center")


def mean_curve(runs: Sequence[Curve]) -> Curve:
    """Over the iterations that all runs have."""
    values = [dict(run) for run in runs]
    shared = set(values[0]).intersection(*values[1:])
    return [(iteration, mean(value[iteration] for value in values)) for iteration in sorted(shared)]
