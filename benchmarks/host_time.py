"""How long is the host busy with first_step + second_step, against the bare calls that they can't do without?

    python benchmarks/host_time.py --device cpu

Tensors of 16 elements, so that all of it is Python, checks and launches. The bare calls are those of an optimizer that
trusts everybody: ||g1|| (`_foreach_norm`, stacked), theta copied (`_foreach_copy_`) and moved (the kernel that the
wrapper uses), and after g2 copied back. Both have tensors of their own and take turns, with fresh gradients in every
round. The clock waits for the device before it starts, and not before it stops: on CUDA this is the time in which the
host can't prepare other work.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter, thread_time
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import (
    RESULTS,
    Timed,
    device_kind,
    equal,
    interleaved,
    make,
    print_table,
    second_gradient,
    write_results,
)
from benchmarks.peers import EPS, Ours

QUESTION = "Microseconds of the host for first_step + second_step, and over the bare calls"
ELEMENTS = 16
COUNTS = [82, 1000]


class Bare:
    """Norm, copy, move and restoration, and no question asked."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.params: list[Tensor] = [*params]
        self.copies = [torch.empty_like(p) for p in params]
        self.ones = [torch.ones(())] * len(params)

    @torch.no_grad()
    def first(self) -> None:
        g1 = [p.grad for p in self.params if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(g1)))
        torch._foreach_copy_(self.copies, self.params)
        if norm.is_cuda:
            _ascend(self.params, g1, EPS / norm)
        else:
            torch._foreach_addcmul_(self.params, g1, self.ones, value=EPS / norm.item())

    @torch.no_grad()
    def second(self) -> None:
        torch._foreach_copy_(self.params, self.copies)

    def after(self) -> None:
        pass


def _ascend(params: list[Tensor], gradients: list[Tensor], rate: Tensor) -> None:
    plain: dict[str, Any] = dict.fromkeys(["weight_decay", "momentum", "dampening"], 0.0)
    torch._fused_sgd_(params, gradients, [], lr=rate, nesterov=False, maximize=True, is_first_step=False, **plain)


def task(method: Any, params: list[nn.Parameter]) -> Timed:
    """Both steps, with a backward before each that is not timed."""
    # other processes' turns do not enter a thread's time, but neither does a wait for the GPU
    now = perf_counter if params[0].is_cuda else thread_time

    def run(wait: Callable[[], float]) -> float:
        total = 0.0
        for p in params:
            p.grad = None
        for step in (method.first, method.second):
            second_gradient(params)
            wait()
            start = now()
            step()
            total += now() - start
        method.after()
        return total

    return run


def measure(count: int, device: str, rounds: int) -> dict[str, Any]:
    """Medians for `count` tensors."""
    params = {method: make(equal(ELEMENTS * count, count), device, torch.float32) for method in (Ours, Bare)}
    tasks = {method.__name__: task(method(own), own) for method, own in params.items()}
    taken = {name: median(seconds) * 1e6 for name, seconds in interleaved(tasks, device, rounds, warm_up=3).items()}
    return {"tensors": count, "us": taken["Ours"], "bare us": taken["Bare"], "ratio": taken["Ours"] / taken["Bare"]}


def run(device: str, rounds: int, results: Path) -> None:
    """All counts: a table, and a file in `results`."""
    rows = [measure(count, device, rounds) for count in COUNTS]
    print_table(QUESTION, rows)
    write_results(results / f"host_time_{device_kind(device)}.json", QUESTION, device, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    run(arguments.device, arguments.rounds, arguments.results)


if __name__ == "__main__":
    main()
