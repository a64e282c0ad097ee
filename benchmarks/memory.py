"""How much memory does a perturbed pass need beside parameters and gradients, in copies of the parameters?

    python benchmarks/memory.py --device cpu

Counted is the peak of two steps over what is there when the first begins: the parameters, and g1 in `.grad`. (Some
memory is kept from step to step, and some is wanted before that is there.) Whoever drops g1 gets room for g2 by that.
The stand-in for the second backward needs no memory but for g2. On the CPU torch's profiler reports every allocation
and release; on CUDA it is max_memory_allocated.
"""

import argparse
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.common import (
    FIGURES,
    RESULTS,
    Shapes,
    device_kind,
    grouped_bars,
    make,
    new_plot,
    numel,
    print_table,
    save_plot,
    shrunk,
    write_results,
)
from benchmarks.overhead import SETS
from benchmarks.peers import contestants

MARK = "the steps"
QUESTION = "Extra peak memory of two times first_step, a backward and second_step, in copies of the parameters"


def two_steps(method: Any, params: list[nn.Parameter]) -> None:
    for _ in range(2):
        method.first()
        for p in params:
            torch.autograd.backward([p], [torch.ones((), device=p.device, dtype=p.dtype).expand_as(p)])
        method.second()
        method.after()


def extra_bytes(method: Any, shapes: Shapes, device: str, dtype: torch.dtype) -> tuple[int, int]:
    """Most that is allocated in two steps beyond what was there before them; and the parameters' size."""
    if device.startswith("cuda"):
        params = make(shapes, device, dtype)
        fresh = method(params)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        two_steps(fresh, params)
        return torch.cuda.max_memory_allocated(device) - before, _size(params)
    # The profiler does not report the release of what was allocated before it: parameters and g1 are made under it.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        params = make(shapes, device, dtype)
        fresh = method(params)
        with record_function(MARK):
            two_steps(fresh, params)
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    (start,) = [e.start_ns() for e in events if e.name() == MARK]
    allocations = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = accumulate(size for when, size in allocations if when >= start)
    return max(held, default=0), _size(params)


def _size(params: list[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in params)


def measure(name: str, device: str, dtype: str, shrink: int) -> list[dict[str, Any]]:
    rows = []
    shapes = shrunk(SETS[name](), shrink)
    for label, method in contestants().items():
        extra, size = extra_bytes(method, shapes, device, getattr(torch, dtype))
        row = {"method": label, "parameters": name, "dtype": dtype, "millions": numel(shapes) / 1e6}
        rows.append({**row, "extra copies": extra / size})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["UNet", "ResNet-50", "ViT-B/16"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--shrink", type=int, default=1, help="divide every tensor's first dimension (for a trial)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--figures", type=Path, default=FIGURES)
    arguments = parser.parse_args()
    rows = [
        row
        for dtype in arguments.dtypes
        for name in arguments.sets
        for row in measure(name, arguments.device, dtype, arguments.shrink)
    ]
    print_table(QUESTION, rows)
    kind = device_kind(arguments.device)
    write_results(arguments.results / f"memory_{kind}.json", QUESTION, arguments.device, rows)
    draw(rows, arguments.figures / f"memory_{kind}.png")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    names = list(dict.fromkeys(f"{row['parameters']}\n{row['dtype']}" for row in rows))
    shown = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes = new_plot()
    grouped_bars(axes, {m: [row["extra copies"] for row in rows if row["method"] == m] for m in shown}, "%.2f")
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("extra copies of the parameters")
    axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    save_plot(figure, path)


if __name__ == "__main__":
    main()
