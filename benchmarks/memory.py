"""How much memory does a perturbed pass need beside parameters and gradients, in copies of the parameters?

    python benchmarks/memory.py --device cpu

Counted is the peak over the parameters, g1 in `.grad` and g2, which a backward makes tensor by tensor (the largest of
them is there at a time). On the CPU torch's profiler reports every allocation and release; on CUDA it is
max_memory_allocated.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from common import COLOURS, ROOT, make, new_plot, numel, print_table, save_plot, write_json
from methods import METHODS
from overhead import SETS
from torch import nn
from torch.profiler import ProfilerActivity, profile

QUESTION = "Extra peak memory of first_step, a second backward and second_step, in copies of the parameters"


def one_step(method: Any, params: list[nn.Parameter]) -> None:
    method.first()
    for p in params:
        torch.autograd.backward([p], [torch.ones((), device=p.device, dtype=p.dtype).expand_as(p)])
    method.second()
    method.after()


def extra_bytes(method: type, params: list[nn.Parameter]) -> int:
    """Most that is allocated in the first step beyond what was there at its beginning."""
    device = params[0].device
    fresh = method(params)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        one_step(fresh, params)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        one_step(fresh, params)
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def measure(name: str, device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    rows = []
    shapes = SETS[name]()
    for label, method in METHODS.items():
        params = make(shapes, device, dtype)
        size = sum(p.numel() * p.element_size() for p in params)
        copies = extra_bytes(method, params) / size
        rows.append({"method": label, "parameters": name, "millions": numel(shapes) / 1e6, "extra copies": copies})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["UNet", "ResNet-50", "ViT-B/16"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs/figures")
    arguments = parser.parse_args()
    rows = [row for name in arguments.sets for row in measure(name, arguments.device, getattr(torch, arguments.dtype))]
    print_table(QUESTION, rows)
    kind = "cuda" if arguments.device.startswith("cuda") else "cpu"
    write_json(arguments.results / f"memory_{kind}.json", QUESTION, arguments.device, rows)
    draw(rows, arguments.figures / f"memory_{kind}.png")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    names = list(dict.fromkeys(row["parameters"] for row in rows))
    figure, axes = new_plot(height=3.5)
    width = 0.8 / len(METHODS)
    for index, (method, colour) in enumerate(zip(METHODS, COLOURS, strict=False)):
        heights = [row["extra copies"] for row in rows if row["method"] == method]
        places = [place + (index - (len(METHODS) - 1) / 2) * width for place in range(len(names))]
        axes.bar_label(axes.bar(places, heights, width, color=colour, label=method), fmt="%.2f", fontsize=9)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("extra copies of the parameters")
    axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    save_plot(figure, path)


if __name__ == "__main__":
    main()
