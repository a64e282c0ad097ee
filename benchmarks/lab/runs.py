"""Cells of the lab are run here: one after the other, each by one process, within a time budget, and resumed."""

import csv
import fcntl
import json
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from benchmarks.common import environment
from benchmarks.lab import grid
from benchmarks.lab.grid import TASKS, Cell
from benchmarks.lab.records import Record, Records
from segmentation.data.files import patients_for_share, split_by_patients
from segmentation.errors import CaptureError, InputError, OldRunError, RunError, UserError
from segmentation.figures.tables import write_json
from segmentation.job import Job
from segmentation.run import read_lists, run
from segmentation.training.captured import obstacle
from segmentation.training.identity import digests

CLOCK, CHECKPOINTS = "seconds", "*/last.pt"
"""In a cell's folder: wall time that the checkpoint has taken, and what is resumed."""


@dataclass(frozen=True)
class Lab:
    """Where the cells are run.

    Attributes:
        data: data set -> root of its files.
        records: where the results go.
        work: a folder for one folder a cell, with its checkpoints and logs.
        device: where to train.
        amp: autocast dtype, or None for float32; presets in `grid.FLOAT32` have none.
    """

    data: Mapping[str, Path]
    records: Records
    work: Path
    device: torch.device
    amp: torch.dtype | None = torch.bfloat16

    def folder(self, cell: Cell) -> Path:
        return self.work / cell.name

    def begun(self, cell: Cell) -> bool:
        """Whether an earlier attempt has left a checkpoint to go on from."""
        return any(self.folder(cell).glob(CHECKPOINTS))

    def spent(self, cell: Cell) -> float:
        """Seconds that its checkpoint has taken."""
        return spent(self.folder(cell))

    def lists(self, data_set: str) -> dict[str, str]:
        """What tells the data set's lists from others (`identity.digests`). Raises InputError for bad ones."""
        return digests(read_lists(TASKS[data_set], self.data[data_set]))

    def attempt(self, cell: Cell) -> bool:
        """Run `cell` and record it, unless it is recorded or another process is at it. Returns whether it was run.

        A run that fails is recorded too. One that is interrupted leaves a checkpoint, and goes on from it.
        Raises InputError for bad data, and for a checkpoint of another recipe.
        """
        with claimed(self.folder(cell)) as mine:
            if not mine or self.records.read(cell):
                return False
            print(f"\n{cell.name}", flush=True)
            with stopwatch(self.folder(cell)) as seconds:
                outcome = self._outcome(cell)
            self.records.write(cell, {**outcome, "wall_seconds": seconds()})
            for checkpoint in self.folder(cell).glob(CHECKPOINTS):
                checkpoint.unlink()  # several times the weights, and never resumed again
            (self.folder(cell) / CLOCK).unlink(missing_ok=True)
            return True

    def _outcome(self, cell: Cell) -> Record:
        job = self._job(cell)
        names = read_lists(job.task, job.data)
        record = {
            "state": "done",
            "cell": {"name": cell.name, **asdict(cell), "changes": dict(cell.changes)},
            "kind": self.device.type,
            **environment(str(self.device)),
            "labelled_names": _labelled_patients(job, names[job.task.training_list]),
            "lists": digests(names),
            "recipe": cell.recipe.to_dict(),
        }
        try:
            run(job)
        except RunError as error:
            return {**record, "state": "failed", "reason": str(error)}
        except OldRunError as error:
            raise InputError(f"{error.args[0]}; delete {self.folder(cell)} to start anew.") from None
        return {**_result(job.folder(cell.recipe)), **record}

    def _job(self, cell: Cell) -> Job:
        task = TASKS[cell.data_set]
        return Job(
            task=task,
            data=self.data[cell.data_set],
            patients=patients_for_share(cell.share, task.training_patients),
            patients_seed=cell.draw,
            recipes=[cell.recipe],
            device=self.device,
            amp=None if cell.preset in grid.FLOAT32 else self.amp,
            out=self.folder(cell),
            old_runs="resume",
            title=cell.name,
            log_name=cell.name,  # with --jobs, lines of several cells are mixed
            stride=task.stride,
            goal="scores" if cell.tested else "training",
            graph=obstacle(self.device, cell.recipe) is None,
        )


def work(lab: Lab, cells: Sequence[Cell], seconds: float) -> None:
    """Attempt `cells` in their order until `seconds` are over or all are done; the next call goes on from there.

    What a user can mend, and errors in the code, leave a cell open and do not stop the others.

    Raises:
        CaptureError: after which this process can't go on.
    """
    try:
        with interrupted_after(seconds):
            for cell in cells:
                try:
                    lab.attempt(cell)
                except CaptureError:
                    raise
                except UserError as error:
                    print(f"{cell.name} stays open: {error}", flush=True)
                except Exception:  # hours of other cells are not to be lost to a slip in one method
                    print(f"{cell.name} stays open:\n{traceback.format_exc()}", flush=True)
    except KeyboardInterrupt:
        print("stopped; the next --run goes on from here", flush=True)


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Whether this process alone may work in `folder`, until the context ends. A process that dies lets go of it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


@contextmanager
def stopwatch(folder: Path) -> Iterator[Callable[[], float]]:
    """A clock that goes on from `spent(folder)`; what it comes to is kept if a new checkpoint has come of it."""
    before, started = _written(folder), time.perf_counter() - spent(folder)
    try:
        yield lambda: time.perf_counter() - started
    finally:
        if _written(folder) != before:
            write_json(folder / CLOCK, time.perf_counter() - started)


def spent(folder: Path) -> float:
    """Seconds that the checkpoint in a cell's folder has taken; 0 where there is none, or nobody knows."""
    try:
        return float((folder / CLOCK).read_text()) if _written(folder) else 0.0
    except (OSError, ValueError):  # the process was killed before it could say
        return 0.0


def _written(folder: Path) -> list[int]:
    """When the checkpoints were."""
    return [path.stat().st_mtime_ns for path in folder.glob(CHECKPOINTS)]


@contextmanager
def interrupted_after(seconds: float | None = None) -> Iterator[None]:
    """Within the context, what Ctrl-C does also happens after `seconds` (None: never), and on SIGTERM."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        on_ctrl_c = signal.getsignal(signal.SIGINT)  # a job in the background has none
        (on_ctrl_c if callable(on_ctrl_c) else signal.default_int_handler)(signal.SIGINT, frame)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGALRM, signal.SIGTERM)}
    if seconds is not None:
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))  # 0 would mean never
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _labelled_patients(job: Job, names: Sequence[str]) -> list[str]:
    labelled, _ = split_by_patients(names, job.patients, job.task.patient, job.patients_seed)
    return list(dict.fromkeys(map(job.task.patient, labelled)))


def _result(folder: Path) -> dict[str, Any]:
    """What `run` wrote into `folder`, but for the scores of single volumes; and the validation curve."""
    result = json.loads((folder / "result.json").read_text())
    for test in filter(None, (result["test"], result["test_last"])):
        test["predictions"] = sum(len(volume["dice"]) for volume in test.pop("volumes").values())
    with (folder / "validation.csv").open() as file:
        curve = [[int(row["iteration"]), float(row["dice"])] for row in csv.DictReader(file)]
    return {**result, "validation_curve": curve}
