"""What the benchmarks share: parameter sets, peers, the environment's record, JSON, tables and plots."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
Shapes = list[tuple[int, ...]]


def environment(device: str) -> dict[str, Any]:
    """Where and when something was measured."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "gap_torch"]).returncode != 0
    cuda = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu ({os.cpu_count()} cores)",
        "torch": torch.__version__,
        "commit": commit + (" with changes" if changed else ""),
        "threads": torch.get_num_threads(),
        "load": [round(load, 1) for load in os.getloadavg()],
        "date": date.today().isoformat(),
    }


def write_json(path: Path, question: str, device: str, results: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"question": question, **environment(device), "results": results}
    path.write_text(json.dumps(record, indent=1) + "\n")


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """One row a mapping, all with the same keys; numbers with three digits."""
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)


def new_plot(width: float = 9.0, height: float = 4.0) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_plot(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


# ---------------------------------------------------------------- time


def interleaved(
    tasks: Mapping[str, Callable[[Callable[[], float]], float]], repetitions: int, device: str
) -> dict[str, dict[str, float]]:
    """Seconds of each task, all taking turns, so that a busy moment of the machine hits all: median and minimum.

    A task gets a clock, which waits for the device, and returns the seconds that it counts. A first round warms up.
    With one thread on the CPU the clock is that thread's own time, which other processes' turns do not enter.
    """
    now = time.thread_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter

    def clock() -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return now()

    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for repetition in range(repetitions + 1):
        for name, task in tasks.items():
            taken = task(clock)
            if repetition > 0:
                seconds[name].append(taken)
    return {name: {"median": median(taken), "min": min(taken)} for name, taken in seconds.items()}


# ---------------------------------------------------------------- parameters


def unet() -> Shapes:
    from segmentation.networks import UNet

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


def numel(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


def backward_like(params: Sequence[nn.Parameter], g2: Sequence[Tensor]) -> None:
    """What the second backward does to `.grad`, without a network: add, or set where there is nothing."""
    loss = sum((p * g).sum() for p, g in zip(params, g2, strict=True))
    assert isinstance(loss, Tensor)
    loss.backward()
