"""What the benchmarks share: where they ran, JSON, tables and plots, a clock, parameter sets."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
RESULTS, FIGURES = ROOT / "benchmarks" / "results", ROOT / "docs" / "figures"
Shapes = list[tuple[int, ...]]


def environment(device: str) -> dict[str, Any]:
    """Where and when something was measured."""
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu_name(),
        "torch": torch.__version__,
        "commit": _commit(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": [round(load, 1) for load in os.getloadavg()],
        "date": date.today().isoformat(),
    }


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """`record` as JSON; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def write_results(path: Path, question: str, device: str, results: Any) -> None:
    """`results`, and where they come from, as JSON."""
    write_json(path, {"question": question, **environment(device), "results": results})


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """One row a mapping, all with the same keys; numbers with three digits."""
    show(title, [*rows[0]], [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows])


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, its numbers to the right."""
    table = Table(title=title, title_justify="left")
    for column, cells in zip(columns, zip(*rows, strict=True), strict=True):
        table.add_column(column, justify="right" if all(map(_is_number, cells)) else "left")
    for row in rows:
        table.add_row(*row)
    # A log has no width of its own, and rich would squeeze the columns into 80 characters.
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _commit() -> str:
    """Short hash, with a mark if what ran was not quite it."""
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "gap_torch", "examples", "benchmarks/*.py"])
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + (" with changes" if changed.returncode else "")


def _cpu_name() -> str:
    """The processor's own name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "cpu"
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "cpu")


def new_plot(width: float = 9.0, height: float = 4.0) -> tuple[Figure, Axes]:
    figure, (axes,) = new_panels(1, width, height)
    return figure, axes


def new_panels(count: int, width: float = 9.0, height: float = 4.0, **layout: Any) -> tuple[Figure, list[Axes]]:
    """Side by side; `layout` is for `Figure.subplots`. 9 inches fill a README, where 10 points are its text."""
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = [*figure.subplots(1, count, squeeze=False, **layout)[0]]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def grouped_bars(axes: Axes, heights: Mapping[str, Sequence[float]], number: str) -> None:
    """A bar a name in each group, with its height on top in the format `number`; `heights` holds a value a group."""
    from presentation.palette import COLOURS, HATCHES

    width = 0.8 / len(heights)
    for index, (name, values) in enumerate(heights.items()):
        places = [group + (index - (len(heights) - 1) / 2) * width for group in range(len(values))]
        style: dict[str, Any] = {"color": COLOURS[index], "hatch": HATCHES[index], "edgecolor": "white", "linewidth": 0}
        axes.bar_label(axes.bar(places, values, width, label=name, **style), fmt=number, fontsize=7)


def plain_ticks(axis: Axis) -> None:
    """1, 2, 5, 10, ... along a logarithmic axis, written out."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:,g}")
    axis.set_minor_formatter(NullFormatter())


def save_plot(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


# ---------------------------------------------------------------- time


Timed = Callable[[Callable[[], float]], float]
"""Gets a clock, and returns the seconds that it counts."""


def interleaved(tasks: Mapping[str, Timed], device: str, rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each task in each round. All take turns, so that a busy moment of the machine hits all alike."""
    clock = _clock(device)
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(warm_up + rounds):
        for name, task in tasks.items():
            taken = task(clock)
            if turn >= warm_up:
                seconds[name].append(taken)
    return seconds


def whole(call: Callable[[], object]) -> Timed:
    """`call` as a task that counts all of it."""

    def task(clock: Callable[[], float]) -> float:
        start = clock()
        call()
        return clock() - start

    return task


def seconds(call: Callable[[], object], device: str) -> float:
    """How long one `call` takes."""
    return whole(call)(_clock(device))


def medians(taken: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of every list."""
    return {name: median(values) for name, values in taken.items()}


def _clock(device: str) -> Callable[[], float]:
    """Waits for the device. With one thread on the CPU it is this process's time, which others' turns do not enter."""
    now = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter

    def clock() -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return now()

    return clock


# ---------------------------------------------------------------- parameters


def unet() -> Shapes:
    from segmentation.networks.unet import UNet

    return shapes_of(UNet)


def resnet50() -> Shapes:
    from torchvision.models import resnet50

    return shapes_of(resnet50)


def vit_b16() -> Shapes:
    from torchvision.models import vit_b_16

    return shapes_of(vit_b_16)


def vnet() -> Shapes:
    """Such as the field's V-Net has: 3D convolutions, one to three a level, with bias and batch norm."""

    def convolution(inputs: int, outputs: int, size: int) -> Shapes:
        return [(outputs, inputs, size, size, size), (outputs,), (outputs,), (outputs,)]

    widths, depths = [16, 32, 64, 128, 256], [1, 2, 3, 3, 3]
    shapes: Shapes = []
    for level, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        shapes += convolution(1 if level == 0 else width, width, 3)
        shapes += [shape for _ in range(depth - 1) for shape in convolution(width, width, 3)]
        if level < 4:
            shapes += convolution(width, 2 * width, 2)
    for width, depth in zip(widths[-2::-1], depths[-2::-1], strict=True):
        shapes += convolution(2 * width, width, 2)
        shapes += [shape for _ in range(depth) for shape in convolution(width, width, 3)]
    return [*shapes, (2, 16, 1, 1, 1), (2,)]


def shapes_of(model: Callable[[], nn.Module]) -> Shapes:
    with torch.device("meta"):
        return [tuple(p.shape) for p in model().parameters()]


def equal(parameters: int, tensors: int) -> Shapes:
    return [(parameters // tensors,)] * tensors


def make(shapes: Shapes, device: str, dtype: torch.dtype) -> list[nn.Parameter]:
    """Random parameters with random gradients."""
    params = [nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def second_gradient(params: list[nn.Parameter]) -> None:
    """A backward that gives every parameter a g2 of ones."""
    torch.autograd.backward(list(params), [torch.ones_like(p) for p in params])


def shrunk(shapes: Shapes, factor: int) -> Shapes:
    """With the first dimension divided."""
    return [(-(-shape[0] // factor), *shape[1:]) for shape in shapes]


def device_kind(device: str) -> str:
    """For the names of files."""
    return "cuda" if device.startswith("cuda") else "cpu"


def numel(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


def backward_like(params: Sequence[nn.Parameter], g2: Sequence[Tensor]) -> None:
    """What the second backward does to `.grad`, without a network: add, or set where there is nothing."""
    loss = sum((p * g).sum() for p, g in zip(params, g2, strict=True))
    assert isinstance(loss, Tensor)
    loss.backward()
