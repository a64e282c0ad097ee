"""What is left of the runs: curves as CSV and picture, and the table."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from presentation.markdown_table import markdown_table
from presentation.palette import method_styles


@dataclass(frozen=True)
class Point:
    """Where a run was at one of its iterations."""

    iteration: int
    accuracy: float
    """On the test images, per cent."""
    loss: float
    """On the labelled images of the last batch."""
    confident: float
    """Share of the last unlabelled batch with a pseudo-label that counts, per cent; 0 without unlabelled images."""
    right: float
    """Share of those pseudo-labels that are right, per cent; NaN where there are none."""
    seconds: float
    """Of training, up to here."""


Runs = Mapping[str, Sequence[Point]]
"""Method to its points."""


def save_logs(folder: Path, runs: Runs) -> None:
    """A CSV file a method."""
    for name, points in runs.items():
        with (folder / f"{name.lower()}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Point)])
            writer.writeheader()
            writer.writerows(map(asdict, points))


def save_curves(path: Path, runs: Runs, title: str) -> None:
    """Accuracy, confident pseudo-labels and how many of those are right, over the iterations."""
    figure = Figure(figsize=(9, 3.6), dpi=200, layout="constrained")
    accuracy, confident, right = figure.subplots(1, 3)
    _draw(accuracy, runs, "accuracy", "test accuracy (%)")
    trained = {name: points for name, points in runs.items() if any(point.confident for point in points)}
    _draw(confident, trained, "confident", "confident pseudo-labels (%)")
    _draw(right, trained, "right", "of these right (%)")
    figure.suptitle(title, fontsize=11)
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside lower center", ncols=len(runs), frameon=False)
    figure.savefig(path)


def _draw(axes: Axes, runs: Runs, column: str, label: str) -> None:
    styles = method_styles(runs)
    for name, points in runs.items():
        x, y = zip(*((point.iteration, getattr(point, column)) for point in points), strict=True)
        axes.plot(x, y, **styles[name], markersize=4, label=name)
    axes.set(xlabel="iteration", ylabel=label, ylim=(0, 102))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def show_table(path: Path, runs: Runs, title: str) -> None:
    """Print the last points as a Markdown table, and write it to `path`."""
    header, rows = ("", "test accuracy %", "confident %", "right of these %", "ms / iteration"), []
    for name, points in runs.items():
        end = points[-1]
        pseudo_labels = (f"{end.confident:.1f}", f"{end.right:.1f}") if end.confident else ("-", "-")
        rows.append((name, f"{end.accuracy:.1f}", *pseudo_labels, f"{1e3 * end.seconds / end.iteration:.0f}"))
    text = f"{title}\n\n{markdown_table(header, rows)}"
    print(text)
    path.write_text(text + "\n")
