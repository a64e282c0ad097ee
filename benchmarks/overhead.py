"""How long does the wrapper's own work take, against the least that memory allows?

    python benchmarks/overhead.py --device cpu

The floor is 7 transfers of the parameters' size: the norm reads g1; the perturbation reads theta and g1 and writes the
copy and theta*; the restoration reads the copy and writes theta. A transfer costs half of a `copy_` between buffers of
that size, measured in the same turns (on CUDA of many in a row, lest a launch be counted as bandwidth). g2's
accumulation is autograd's own work and is not timed; where a method asks for a sum of two gradients of its own making
(naive Algorithm 1), that is.

On CUDA the clock counts the host as well as the device, whichever takes longer. So each is also measured alone: the
device with both steps replayed as CUDA graphs (`device_time_cuda.json`), the host over tiny tensors (`host_time.py`).
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import host_time
from benchmarks.common import (
    FIGURES,
    RESULTS,
    Shapes,
    Timed,
    device_kind,
    equal,
    grouped_bars,
    interleaved,
    make,
    new_plot,
    numel,
    plain_ticks,
    print_table,
    resnet50,
    save_plot,
    second_gradient,
    shrunk,
    unet,
    vit_b16,
    vnet,
    write_results,
)
from benchmarks.peers import Ours, contestants

QUESTION = "Seconds of first_step + second_step, and over the floor of 7 parameter-sized transfers"
DEVICE_QUESTION = "Seconds of the device alone for first_step + second_step, and over the same floor"
TRANSFERS = 7
COPIES = {"cpu": 1, "cuda": 20}
# Some peers put other memory under the parameters, and tables of addresses would be made anew in every turn: each
# method has parameters and gradients of its own, unless those take more bytes than this.
OWN = {"cpu": 8e9, "cuda": 32e9}
SETS: dict[str, Callable[[], Shapes]] = {
    "UNet": unet,
    "V-Net": vnet,
    "ResNet-50": resnet50,
    "ViT-B/16": vit_b16,
    "100 M in 10 tensors": lambda: equal(100_000_000, 10),
    "10 M in 1,000 tensors": lambda: equal(10_000_000, 1000),
    "1 B in 20 tensors": lambda: equal(1_000_000_000, 20),
}
OPT_IN = "1 B in 20 tensors"


def measure(
    shapes: Shapes, device: str, dtype: torch.dtype, repetitions: int, chosen: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Median and least seconds by method, of a copy under "copy", and on CUDA of the device alone under "device"."""
    owned = 2 * len(chosen) * numel(shapes) * dtype.itemsize <= OWN[device_kind(device)]
    shared = [] if owned else make(shapes, device, dtype)
    flat = torch.randn(numel(shapes), device=device).to(dtype)
    other = torch.empty_like(flat)

    def task(make_method: Any) -> Timed:
        params = shared or make(shapes, device, dtype)
        method = make_method(params)
        theta = [p.detach()[:1].clone() for p in params]

        def run(clock: Callable[[], float]) -> float:
            for p in params:
                assert p.grad is not None
                p.grad.normal_()
            start = clock()
            method.first()
            between = clock()
            second_gradient(params)
            resume = clock()
            method.second()
            end = clock()
            method.after()
            check_restored(params, theta)
            return between - start + end - resume

        return run

    def copy(clock: Callable[[], float]) -> float:
        count = COPIES[device_kind(device)]
        start = clock()
        for _ in range(count):
            other.copy_(flat)
        return (clock() - start) / count

    tasks = {name: task(make_method) for name, make_method in chosen.items()}
    if device_kind(device) == "cuda":
        tasks["device"] = replayed(shared or make(shapes, device, dtype))
    taken = interleaved({"copy": copy, **tasks}, device, repetitions)
    return {name: {"median": median(seconds), "min": min(seconds)} for name, seconds in taken.items()}


def replayed(params: list[torch.nn.Parameter]) -> Timed:
    """Both steps as CUDA graphs, replayed many times in a row, so that the host is done before the device.

    g2 comes between the two captures, because the second step is refused without it, and is in neither.
    """
    method, theta = Ours(params), [p.detach()[:1].clone() for p in params]
    for _ in range(2):  # memory for the copy is there when the capture begins
        method.first()
        second_gradient(params)
        method.second()
        method.after()
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    with torch.cuda.graph(graphs[0]):
        method.first()
    second_gradient(params)
    with torch.cuda.graph(graphs[1]):
        method.second()

    def run(clock: Callable[[], float]) -> float:
        count = COPIES["cuda"]
        start = clock()
        for _ in range(count):
            for graph in graphs:
                graph.replay()
        taken = clock() - start
        check_restored(params, theta)
        return taken / count

    return run


@torch.no_grad()
def check_restored(params: list[torch.nn.Parameter], theta: list[torch.Tensor]) -> None:
    """The cheapest look at whether a method came back to `theta`, the first row of each."""
    if not all(torch.equal(p[:1], t) for p, t in zip(params, theta, strict=True)):
        raise RuntimeError("a method did not come back to theta.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=[name for name in SETS if name != OPT_IN])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--shrink", type=int, default=1, help="divide every tensor's first dimension (for a trial)")
    parser.add_argument("--compiled", action="store_true", help="a row for the two steps under torch.compile")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--figures", type=Path, default=FIGURES)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    chosen = contestants(arguments.compiled)
    rows: list[dict[str, Any]] = []
    device_rows: list[dict[str, Any]] = []
    for dtype in arguments.dtypes:
        for name in arguments.sets:
            shapes = shrunk(SETS[name](), arguments.shrink)
            seconds = measure(shapes, arguments.device, getattr(torch, dtype), arguments.repetitions, chosen)
            for method in chosen:
                taken = {
                    f"{kind} / floor": seconds[method][kind] / (TRANSFERS / 2 * seconds["copy"][kind])
                    for kind in ("median", "min")
                }
                rows.append(
                    {
                        "parameters": name,
                        "dtype": dtype,
                        "method": method,
                        "millions": numel(shapes) / 1e6,
                        "tensors": len(shapes),
                        "ms": seconds[method]["median"] * 1e3,
                        "copy ms": seconds["copy"]["median"] * 1e3,
                        **taken,
                        "times ours": seconds[method]["median"] / seconds["gap-torch"]["median"],
                    }
                )
            if "device" in seconds:
                alone, floor = seconds["device"]["median"], TRANSFERS / 2 * seconds["copy"]["median"]
                row = {"parameters": name, "dtype": dtype, "device ms": alone * 1e3, "device / floor": alone / floor}
                device_rows.append(row)
            shown = [{k: v for k, v in row.items() if k not in ("parameters", "dtype")} for row in rows[-len(chosen) :]]
            print_table(f"{name}, {dtype}", shown)
    kind = device_kind(arguments.device)
    write_results(arguments.results / f"overhead_{kind}.json", QUESTION, arguments.device, rows)
    draw(rows, arguments.figures / f"overhead_{kind}.png")
    if device_rows:
        print_table(DEVICE_QUESTION, device_rows)
        write_results(arguments.results / f"device_time_{kind}.json", DEVICE_QUESTION, arguments.device, device_rows)
    host_time.run(arguments.device, 5 * arguments.repetitions, arguments.results)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Time over floor, a group of bars a set, float32."""
    shown = [row for row in rows if row["dtype"] == rows[0]["dtype"]]
    names = list(dict.fromkeys(row["parameters"] for row in shown))
    shown_methods = list(dict.fromkeys(row["method"] for row in shown))
    figure, axes = new_plot()
    grouped_bars(
        axes, {m: [row["median / floor"] for row in shown if row["method"] == m] for m in shown_methods}, "%.1f"
    )
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_yscale("log")
    plain_ticks(axes.yaxis)
    axes.set_xticks(range(len(names)), [name.replace(" in ", "\nin ") for name in names], fontsize=9)
    axes.set_ylabel(f"time / floor ({shown[0]['dtype']})")
    axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    save_plot(figure, path)


if __name__ == "__main__":
    main()
