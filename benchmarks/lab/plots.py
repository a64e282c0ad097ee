"""The lab's results as pictures; each is made only where cells of it have run."""

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.common import new_panels, save_plot
from benchmarks.lab import curves, grid, power
from benchmarks.lab import scores as lab_scores
from benchmarks.lab.grid import FIXMATCH, FULL_SCALE, GAPMATCH, POWER_CHANGES, SHARES, SUPERVISED, SWEEPS, title
from benchmarks.lab.published import PUBLISHED
from benchmarks.lab.scores import Found
from presentation.palette import COLOURS, MARKERS, METHOD_COLOURS
from segmentation.recipe import Run

GAINING = ("fixmatch", "flexmatch", "freematch", *grid.INSTANCE_PERTURBATIONS)
SHOWN: tuple[Run, ...] = (SUPERVISED, FIXMATCH, GAPMATCH)
CAPTIONS = {
    "gain_by_method": "What GAP adds to the test Dice on ACDC, by method and labelled share: a dot a seed, a line for "
    "their mean, the paper's gain as a diamond; † and ‡ as in the tables.",
    "dice_over_share": "Test Dice over the labelled share: a dot a seed, solid lines through their means, the paper's "
    "dashed.",
    "eps_alpha": "GapMatch's validation Dice over eps for each alpha, ACDC, 1 % of the labels: a dot a seed, lines "
    "through their means.",
    "power_curves": "Validation Dice over iterations, FixMatch against GapMatch in pairs of one seed and one draw of "
    "the labelled patient, ACDC at 1 %: a thin line a run, a thick one for the mean, the number at its end its last "
    "value.",
}


def draw(found: Found, folder: Path) -> list[Path]:
    """All pictures that there are results for. Returns their files."""
    pictures: dict[str, Callable[[Found], Figure | None]] = {
        "gain_by_method": gain_by_method,
        "dice_over_share": dice_over_share,
        "eps_alpha": eps_alpha,
        "power_curves": power_curves,
    }
    files = []
    for name, picture in pictures.items():
        figure = picture(found)
        if figure is not None:
            files.append(folder / f"{name}.png")
            save_plot(figure, files[-1])
    return files


def gain_by_method(found: Found) -> Figure | None:
    """A panel a share, a place a method; each preset in its own colour."""
    gains = {
        (preset, method, share): _dice_gains(found, preset, method, share)
        for preset in grid.PRESETS
        for method in GAINING
        for share in SHARES
    }
    presets = [preset for preset in grid.PRESETS if any(values for key, values in gains.items() if key[0] == preset)]
    if not presets:
        return None
    figure, panels = _panels([f"{share} % labelled" for share in SHARES], height=3.6)
    for axes, share in zip(panels, SHARES, strict=True):
        for place, method in enumerate(GAINING):
            *places, beside = (place + 0.24 * (index - len(presets) / 2) for index in range(len(presets) + 1))
            for x, preset in zip(places, presets, strict=True):
                _dots(axes, x, gains[preset, method, share], preset)
            if published := lab_scores.published_gain("ACDC", method, share):
                axes.plot(beside, published[0], "D", color="black", fillstyle="none", markersize=5)
        axes.axhline(0, color="grey", linewidth=0.8)
        names = [title((method, False)) + _marks(found, presets, method, share) for method in GAINING]
        axes.set_xticks(range(len(GAINING)), names, rotation=40, ha="right")
    panels[0].set_ylabel("gain in Dice by GAP\n(percentage points)")
    handles = [
        Line2D([], [], color=COLOURS[_index(p)], marker=MARKERS[_index(p)], label=f"ours, {_scale(p)}") for p in presets
    ]
    paper = Line2D([], [], color="black", marker="D", fillstyle="none", linestyle="", label="paper")
    figure.legend(handles=[*handles, paper], loc="outside upper center", ncols=3, frameon=False)
    return figure


def _dice_gains(found: Found, preset: str, method: str, share: int) -> list[float]:
    pairs = lab_scores.pairs(found, "ACDC", preset, method, share)
    return [dice for dice, _ in lab_scores.gains(pairs).values()]


def _marks(found: Found, presets: Iterable[str], method: str, share: int) -> str:
    pairs = (lab_scores.pairs(found, "ACDC", preset, method, share).values() for preset in presets)
    return lab_scores.marks(chain.from_iterable(chain.from_iterable(pairs)))


def dice_over_share(found: Found) -> Figure | None:
    """A panel a data set and preset."""
    wanted = dict.fromkeys((batch.data_set, batch.preset) for batch in grid.BLOCKS if batch.group == "table 1")
    scores = {key: {method: _dice_by_share(found, *key, method) for method in SHOWN} for key in wanted}
    shown = [key for key, methods in scores.items() if any(dice for of in methods.values() for dice in of.values())]
    if not shown:
        return None
    figure, panels = _panels([f"{data_set}, {_scale(preset)}" for data_set, preset in shown], height=4.0)
    for axes, key in zip(panels, shown, strict=True):
        for method, colour, marker in zip(SHOWN, METHOD_COLOURS, MARKERS, strict=False):
            _line(axes, scores[key][method], colour, marker, title(method))
            if published := PUBLISHED[key[0]].get(method):
                axes.plot([*published], [dice for dice, _ in published.values()], "--", color=colour, linewidth=1)
        _ticks(axes, SHARES, "labelled share (% of the training patients)")
        axes.set_ylim(0, 100)
    panels[0].set_ylabel("test Dice (%)")
    paper = Line2D([], [], color="grey", linestyle="--", label="paper")
    figure.legend(handles=[*_handles(panels[0]), paper], loc="outside upper center", ncols=4, frameon=False)
    return figure


def _dice_by_share(found: Found, data_set: str, preset: str, method: Run) -> dict[int, list[float]]:
    tests = {share: lab_scores.tests(found, data_set, preset, method, share) for share in SHARES}
    return {share: [test["dice"] for test in by_repeat.values()] for share, by_repeat in tests.items()}


def eps_alpha(found: Found) -> Figure | None:
    """A panel a preset, a line an alpha."""
    presets = dict.fromkeys(batch.preset for batch in grid.BLOCKS if batch.group == "hyper-parameters")
    dice = {preset: _dice_by_alpha_and_eps(found, preset) for preset in presets}
    shown = [preset for preset in presets if any(any(by_eps.values()) for by_eps in dice[preset].values())]
    if not shown:
        return None
    figure, panels = _panels([_scale(preset) for preset in shown], height=4.0, width=6.5)
    for axes, preset in zip(panels, shown, strict=True):
        for index, (alpha, by_eps) in enumerate(dice[preset].items()):
            shift = 1.05 ** (index - 1)  # so that dots of one eps stand side by side
            shifted = {eps * shift: values for eps, values in by_eps.items()}
            _line(axes, shifted, COLOURS[index], MARKERS[index], f"alpha {alpha:g}")
        _ticks(axes, grid.EPS, "eps (log scale)")
    panels[0].set_ylabel("validation Dice (%)")
    figure.legend(handles=_handles(panels[0]), loc="outside upper center", ncols=len(dice[shown[0]]), frameon=False)
    return figure


def _dice_by_alpha_and_eps(found: Found, preset: str) -> dict[float, dict[float, list[float]]]:
    sweep = [(changes["alpha"], changes["eps"]) for changes in SWEEPS["eps and alpha"]]
    all_alpha, all_eps = (sorted(set(values)) for values in zip(*sweep, strict=True))
    return {
        alpha: {eps: [*lab_scores.validations(found, preset, {"eps": eps, "alpha": alpha}).values()] for eps in all_eps}
        for alpha in all_alpha
    }


def power_curves(found: Found) -> Figure | None:
    """A panel an eps of GapMatch."""
    pairs = {changes["eps"]: [*power.runs(found, changes).values()] for changes in POWER_CHANGES}
    panels = {
        f"GapMatch with eps {eps:g}, {len(runs)} pair{'s' * (len(runs) > 1)}": {
            title(method): [pair[index]["validation_curve"] for pair in runs]
            for index, method in enumerate((FIXMATCH, GAPMATCH))
        }
        for eps, runs in pairs.items()
        if runs
    }
    return curves.draw(panels) if panels else None


def _panels(titles: list[str], height: float, width: float = 9.0) -> tuple[Figure, list[Axes]]:
    figure, panels = new_panels(len(titles), width, height, sharey=True)
    for axes, text in zip(panels, titles, strict=True):
        axes.set_title(text, fontsize=10)
    return figure, panels


def _dots(axes: Axes, place: float, values: list[float], preset: str) -> None:
    """Every seed, and a bar at their mean."""
    colour, marker = COLOURS[_index(preset)], MARKERS[_index(preset)]
    axes.plot([place] * len(values), values, marker, color=colour, markersize=4, alpha=0.7)
    if values:
        axes.hlines(mean(values), place - 0.12, place + 0.12, color=colour, linewidth=2)


def _line(
    axes: Axes, values: Mapping[int, list[float]] | Mapping[float, list[float]], colour: str, marker: str, name: str
) -> None:
    """Every seed, and a line through the means."""
    known = {x: ys for x, ys in values.items() if ys}
    axes.plot([*known], [mean(ys) for ys in known.values()], color=colour)
    axes.plot([], [], color=colour, marker=marker, markersize=4, label=name)  # for the legend
    for x, ys in known.items():
        axes.plot([x] * len(ys), ys, marker, color=colour, markersize=4, alpha=0.7)


def _ticks(axes: Axes, values: Iterable[float], title: str) -> None:
    """A logarithmic axis that names just `values`."""
    axes.set_xscale("log")
    axes.set_xticks([*values], [f"{value:g}" for value in values])
    axes.minorticks_off()
    axes.set_xlabel(title)


def _handles(axes: Axes) -> list[Line2D]:
    return [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]


def _index(preset: str) -> int:
    """Of its colour and marker."""
    return grid.PRESETS.index(preset) % len(COLOURS)


def _scale(preset: str) -> str:
    return "full scale" if preset == FULL_SCALE else f"reduced scale ({preset})"
