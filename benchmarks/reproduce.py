"""Does GAP improve whatever it is added to? The grid of `lab/grid.py`, run cell by cell.

    python benchmarks/reproduce.py --plan                       what is done, what is open, and how long it would take
    python benchmarks/reproduce.py --run --data-acdc data/ACDC --budget 60         an hour of it
    python benchmarks/reproduce.py --report                     docs/results.md and its figures

`--run` goes on where the last one stopped, in the middle of a cell too. Several may run at once, with the same --work:
none makes a cell that another one has or makes. Records, a few kB each, go to benchmarks/results/cells/, checkpoints
and logs to runs/reproduce/. The exit status is 2 for bad input, and 1 where a process of --jobs died.
A cell that failed (a loss was not finite) is recorded as such; delete its record and its work folder to try it again.

`--jobs` share a GPU too. Kernels of several processes take turns there, unless NVIDIA's MPS lets them run side by side:
start it before (`nvidia-cuda-mps-control -d`). What that gains was not measured yet.
"""

import argparse
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.common import FIGURES, RESULTS, ROOT, show
from benchmarks.lab import grid, page
from benchmarks.lab.grid import Cell
from benchmarks.lab.plan import estimate
from benchmarks.lab.records import Records, changed
from benchmarks.lab.runs import Lab, interrupted_after, work
from segmentation.errors import InputError, UserError
from segmentation.ranks import usable_device


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--plan", action="store_true", help="list the cells and their time")
    what.add_argument("--run", action="store_true", help="run the open ones")
    what.add_argument("--report", action="store_true", help="write the report of all of them")
    parser.add_argument("--group", nargs="+", choices=grid.GROUPS, default=grid.GROUPS, help="(default: all)")
    parser.add_argument(
        "--preset",
        nargs="+",
        choices=grid.PRESETS,
        help="(default of --plan: all; of --run: paper on a GPU, the others else)",
    )
    parser.add_argument("--data-acdc", type=Path, help="ACDC in the h5 layout; without it its cells are not run")
    parser.add_argument("--data-la", type=Path, help="LA in the h5 layout; without it its cells are not run")
    parser.add_argument(
        "--budget",
        type=seconds,
        default="60",
        metavar="TIME",
        help="for --run, from now on: minutes, or seconds as 780s (default: 60)",
    )
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    parser.add_argument("--jobs", type=int, default=1, help="cells at once, each in a process of its own")
    parser.add_argument("--threads", type=int, help="of each process (default: torch's own number over --jobs)")
    parser.add_argument("--records", type=Path, default=RESULTS / "cells", help="folder of the cells' JSON files")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "reproduce", help="folder for checkpoints")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md", help="what --report writes")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="where --report draws")
    return parser.parse_args(argv)


def seconds(text: str) -> float:
    """Of a number of minutes, or of seconds with an s behind it."""
    return float(text.removesuffix("s")) * (1 if text.endswith("s") else 60)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    until = time.time() + arguments.budget
    try:
        if arguments.report:
            page.write(Records(arguments.records), arguments.page, arguments.figures)
            return 0
        _refuse_bad_numbers(arguments)
        lab = _lab(arguments)
        lists = {data_set: lab.lists(data_set) for data_set in lab.data}  # bad data is one error, not one a cell
        presets = arguments.preset or _default_presets(arguments)
        cells = grid.cells(arguments.group, presets)
        if arguments.plan:
            plan(lab, cells, lists)
            return 0
        return run(lab, cells, until, arguments.jobs, arguments.threads)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def plan(lab: Lab, cells: Sequence[Cell], lists: Mapping[str, Mapping[str, str]] | None = None) -> None:
    """Print every cell with its state, and how long the open ones would take on the lab's device, one after another.

    With `lists`, those of each data set (`Lab.lists`), also which records were made with others.
    """
    records = lab.records.of({*grid.cells(), *cells})  # cells of other groups have taken their time too
    rows, totals = [], dict.fromkeys(("done", "failed", "stale", "begun", "open"), 0)
    seconds_left = 0.0
    for cell in cells:
        state, note = _state(lab, cell, (lists or {}).get(cell.data_set))
        duration, source = "", ""
        if state in ("open", "begun"):
            seconds, source = estimate(cell, records, lab.device.type)
            seconds = max(0.0, seconds - lab.spent(cell))
            seconds_left += seconds
            duration = _duration(seconds)
        elif state == "done":
            duration = _duration(records[cell]["wall_seconds"])
        totals[state] += 1
        rows.append((cell.name, state, duration, source, note))
    show(f"Plan for {lab.device.type}", ("Cell", "State", "Time", "Estimated by", "Note"), rows)
    counts = ", ".join(f"{count} {state}" for state, count in totals.items() if count)
    print(f"{len(cells)} cells: {counts}. The open ones would take about {_duration(seconds_left)}, one at a time.")


def run(lab: Lab, cells: Sequence[Cell], until: float, jobs: int = 1, threads: int | None = None) -> int:
    """Work through the open cells that there is data for, up to the time `until`; with several jobs, in as many
    processes, whose start counts too.

    Returns the exit status.
    """
    for data_set in dict.fromkeys(cell.data_set for cell in cells):
        if data_set not in lab.data:
            print(f"without --data-{data_set.lower()} the cells of {data_set} are left out")
    cells = [cell for cell in cells if cell.data_set in lab.data and lab.records.read(cell) is None]
    print(f"{len(cells)} cells are open, and {_duration(until - time.time())} to run them", flush=True)
    threads = threads or max(1, torch.get_num_threads() // jobs)
    if jobs == 1:
        torch.set_num_threads(threads)
        work(lab, cells, until - time.time())
        return 0
    workers = [_worker(lab, cells, until, threads) for _ in range(jobs)]
    try:
        with interrupted_after():
            for worker in workers:
                worker.join()
    except KeyboardInterrupt:
        for worker in workers:
            worker.terminate()  # once each: a second one would not wait for the checkpoint
        for worker in workers:
            worker.join()
    ended_well = (0, -signal.SIGTERM)  # the latter if stopped before it had begun
    died = [worker.exitcode for worker in workers if worker.exitcode not in ended_well]
    if died:
        print(f"{len(died)} of {jobs} processes died, with exit status {', '.join(map(str, died))}", file=sys.stderr)
    return 1 if died else 0


def _worker(lab: Lab, cells: Sequence[Cell], until: float, threads: int) -> multiprocessing.process.BaseProcess:
    worker = multiprocessing.get_context("spawn").Process(target=_work_apart, args=(lab, cells, until, threads))
    worker.start()
    return worker


def _work_apart(lab: Lab, cells: Sequence[Cell], until: float, threads: int) -> None:
    os.setsid()  # a terminal's Ctrl-C goes to the first process alone, which passes it on
    torch.set_num_threads(threads)
    work(lab, cells, until - time.time())


def _refuse_bad_numbers(arguments: argparse.Namespace) -> None:
    if not (math.isfinite(arguments.budget) and arguments.budget > 0):
        raise InputError(f"--budget must be finite and above 0, not {arguments.budget:g} seconds.")
    for option in ("jobs", "threads"):
        number = getattr(arguments, option)
        if number is not None and number < 1:
            raise InputError(f"--{option} must be at least 1, not {number}.")


def _lab(arguments: argparse.Namespace) -> Lab:
    data = {"ACDC": arguments.data_acdc, "LA": arguments.data_la}
    return Lab(
        data={data_set: root for data_set, root in data.items() if root is not None},
        records=Records(arguments.records),
        work=arguments.work,
        device=usable_device(arguments.device),
    )


def _default_presets(arguments: argparse.Namespace) -> Sequence[str]:
    if arguments.plan:
        return grid.PRESETS
    reduced = usable_device(arguments.device).type == "cpu"
    return [preset for preset in grid.PRESETS if (preset != grid.FULL_SCALE) == reduced]


def _state(lab: Lab, cell: Cell, lists: Mapping[str, str] | None) -> tuple[str, str]:
    """A word, and what there is to say of it."""
    state, record = lab.records.state(cell), lab.records.read(cell)
    if record is None:
        return ("begun" if lab.begun(cell) else "open"), ""
    if state == "stale":
        return state, f"made with another {', '.join(changed(cell, record))}; delete it to run it anew"
    other_lists = lists is not None and record.get("lists", lists) != lists  # older records do not say
    return state, record.get("reason", "made with other lists than those of the data" * other_lists)


def _duration(seconds: float) -> str:
    if seconds < 5_400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3_600:.1f} h"


if __name__ == "__main__":
    sys.exit(main())
