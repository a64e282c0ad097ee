"""How does the cost of GAP grow: with parameters, with tensors, with ranks?

    python benchmarks/scale.py --device cpu

Ranks beyond those of this machine are counted in bytes on the wire, not measured.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common import (
    FIGURES,
    RESULTS,
    device_kind,
    equal,
    grouped_bars,
    new_plot,
    plain_ticks,
    print_table,
    save_plot,
    write_results,
)
from benchmarks.overhead import TRANSFERS, measure
from benchmarks.peers import contestants
from gap_torch import GAPWrapper
from presentation.palette import COLOURS, MARKERS

QUESTION = "Cost of first_step + second_step over parameters, tensors and ranks; bytes on the wire"
GPUS = [8, 16, 32, 64, 128, 256, 512, 1024]


# ---------------------------------------------------------------- parameters and tensors


def over_parameters(largest: int, device: str, repetitions: int) -> list[dict[str, Any]]:
    sizes = [size for size in (10**6, 10**6 * 3, 10**7, 10**7 * 3, 10**8, 10**9) if size <= largest]
    return [_point(size, 10, device, repetitions) for size in sizes]


def over_tensors(total: int, device: str, repetitions: int) -> list[dict[str, Any]]:
    return [_point(total, tensors, device, repetitions) for tensors in (10, 100, 1000, 10_000) if tensors <= total]


def _point(parameters: int, tensors: int, device: str, repetitions: int) -> dict[str, Any]:
    chosen = contestants()
    seconds = measure(equal(parameters, tensors), device, torch.float32, repetitions, chosen)
    floor = TRANSFERS / 2 * seconds["copy"]["min"] * 1e3
    taken = {f"{method} ms": seconds[method]["min"] * 1e3 for method in chosen}
    return {"millions": parameters / 1e6, "tensors": tensors, "floor ms": floor, **taken}


def draw_points(rows: list[dict[str, Any]], x: str, label: str, path: Path) -> None:
    figure, axes = new_plot()
    names = [key.removesuffix(" ms") for key in rows[0] if key.endswith(" ms") and key != "floor ms"]
    for method, colour, marker in zip(names, COLOURS, MARKERS, strict=False):
        axes.loglog([r[x] for r in rows], [r[f"{method} ms"] for r in rows], color=colour, marker=marker, label=method)
    axes.loglog([r[x] for r in rows], [r["floor ms"] for r in rows], "k--", label="floor")
    for axis in (axes.xaxis, axes.yaxis):
        plain_ticks(axis)
    axes.set_xlabel(label)
    axes.set_ylabel("first_step + second_step (ms)")
    axes.legend(frameon=False)
    save_plot(figure, path)


# ---------------------------------------------------------------- ranks


def on_ranks(count: int, width: int, steps: int) -> list[dict[str, Any]]:
    """Milliseconds of a training step in `count` gloo processes of one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, args=(count, folder, width, steps), nprocs=count)
        return torch.load(f"{folder}/rows.pt", weights_only=True)


def _rank(rank: int, count: int, folder: str, width: int, steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    steppers = {(way, gap): _stepper(way, gap, width) for way in ("DDP", "FSDP2") for gap in (False, True)}
    seconds: dict[tuple[str, bool], list[float]] = {key: [] for key in steppers}
    for step in range(steps + 2):
        for key, run in steppers.items():
            dist.barrier()
            start = perf_counter()
            run()
            dist.barrier()
            if step >= 2:
                seconds[key].append(perf_counter() - start)
    if rank == 0:
        rows = []
        for way in ("DDP", "FSDP2"):
            plain, gap = (median(seconds[way, with_gap]) * 1e3 for with_gap in (False, True))
            rows.append({"way": way, "ranks": count, "without GAP ms": plain, "with GAP ms": gap, "ratio": gap / plain})
        torch.save(rows, f"{folder}/rows.pt")
    dist.destroy_process_group()


def _stepper(way: str, gap: bool, width: int) -> Callable[[], None]:
    """A step of two backward passes (unlabelled, labelled), or of three with GAP."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))
    if way == "FSDP2":
        for layer in model.children():
            fully_shard(layer)
        fully_shard(model)
    else:
        model = DistributedDataParallel(model)
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 1e-3))
    x = torch.randn(64, width)

    def backward() -> None:
        model(x).square().mean().backward()

    def step() -> None:
        backward()
        if gap:
            with optimizer.perturbed(model):
                backward()
        backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def draw_ranks(rows: list[dict[str, Any]], path: Path) -> None:
    figure, axes = new_plot(height=3.5)
    labels = [f"{row['way']}, {row['ranks']} rank{'s' * (row['ranks'] > 1)}" for row in rows]
    grouped_bars(axes, {name: [row[f"{name} ms"] for row in rows] for name in ("without GAP", "with GAP")}, "%.0f")
    axes.set_xticks(range(len(rows)), labels)
    axes.set_ylabel("time of a step (ms)")
    axes.legend(frameon=False)
    save_plot(figure, path)


# ---------------------------------------------------------------- bytes


def bytes_on_the_wire(gpus: int, size: int) -> dict[str, float]:
    """What one GPU sends in a step with parameters (and gradients) of `size` bytes, by ring collectives.

    A ring's all-gather or reduce-scatter sends (n - 1) / n of the whole, an all-reduce both. A pass is a forward and a
    backward: DDP all-reduces its gradients; FSDP2 gathers the weights in the forward and again in the backward, and
    scatters the gradients' sum. Plain methods have 2 passes with gradient (unlabelled, labelled), GAP has 3. GAP's own
    message is ||g1||², one number of 8 bytes, under FSDP2 alone. With DDP's no_sync only the last of the passes is
    synchronised (a perturbation for each rank).
    """
    ring = (gpus - 1) / gpus * size
    norm = 2 * (gpus - 1) / gpus * 8
    return {
        "DDP without GAP": 2 * 2 * ring,
        "DDP with GAP": 3 * 2 * ring,
        "DDP with GAP, no_sync": 2 * ring,
        "FSDP2 without GAP": 2 * 3 * ring,
        "FSDP2 with GAP": 3 * 3 * ring + norm,
    }


def draw_bytes(rows: list[dict[str, Any]], path: Path) -> None:
    figure, axes = new_plot()
    for index, name in enumerate(bytes_on_the_wire(2, 1)):
        style: dict[str, Any] = (
            {"ls": ":", "lw": 3.0, "ms": 4} if "without" in name else {"ls": "-", "lw": 1.5, "ms": 8}
        )
        values = [row[name] for row in rows]
        axes.plot(GPUS, values, color=COLOURS[index], marker=MARKERS[index], label=name, **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(GPUS, [str(n) for n in GPUS])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("GPUs")
    axes.set_ylabel("GB sent by a GPU in a step\n(100 M float32)")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    save_plot(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--largest", type=int, default=10**8, help="parameters; 1,000,000,000 needs 24 GB")
    parser.add_argument("--total", type=int, default=10**7, help="parameters to spread over tensors")
    parser.add_argument("--width", type=int, default=1024, help="of the four linear layers on ranks")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repetitions", type=int, default=11)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--figures", type=Path, default=FIGURES)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device, repetitions = arguments.device, arguments.repetitions
    results = {
        "parameters": over_parameters(arguments.largest, device, repetitions),
        "tensors": over_tensors(arguments.total, device, repetitions),
        "ranks": [row for count in (1, 2) for row in on_ranks(count, arguments.width, repetitions)],
        "gigabytes": [
            {"GPUs": n, **{name: sent / 1e9 for name, sent in bytes_on_the_wire(n, 4 * 10**8).items()}} for n in GPUS
        ],
    }
    for name, rows in results.items():
        print_table(name, rows)
    kind = device_kind(device)
    write_results(arguments.results / f"scale_{kind}.json", QUESTION, device, results)

    def figure(name: str) -> Path:
        return arguments.figures / f"scale_{name}_{kind}.png"

    draw_points(results["parameters"], "millions", "millions of parameters, in 10 tensors", figure("parameters"))
    draw_points(results["tensors"], "tensors", f"tensors, {arguments.total:,} parameters", figure("tensors"))
    draw_ranks(results["ranks"], figure("ranks"))
    draw_bytes(results["gigabytes"], figure("bytes"))


if __name__ == "__main__":
    main()
