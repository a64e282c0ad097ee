"""How long the open cells of the lab will take."""

from collections.abc import Mapping
from statistics import median
from typing import NamedTuple

from benchmarks.lab.grid import Cell
from benchmarks.lab.records import Record
from segmentation.methods import ENTRIES, TABLE

GUESSES: dict[tuple[str, str, str], float] = {
    ("ACDC", "study", "cpu"): 0.1,
    ("ACDC", "study", "cuda"): 0.01,
    ("ACDC", "medium", "cpu"): 0.15,
    ("ACDC", "medium", "cuda"): 0.01,
    ("ACDC", "short", "cpu"): 0.15,
    ("ACDC", "short", "cuda"): 0.01,
    ("ACDC", "paper", "cpu"): 1.5,
    ("ACDC", "paper", "cuda"): 0.03,
    ("LA", "paper", "cpu"): 20.0,
    ("LA", "paper", "cuda"): 0.1,
}
"""Seconds of such a pass while nothing is measured: data set, preset, kind of device."""


JOINT_GAP = 7 / 3
"""Passes that GAP adds where labelled images share a batch with the first view: they go through the perturbed pass too,
and the two backward passes at theta each go through both halves of the batch."""
MIXED_GAP = 2 / 3
"""The same where labelled images are the views: another backward pass at theta."""


class Estimate(NamedTuple):
    """Seconds for the whole cell, and where they come from."""

    seconds: float
    source: str


def passes(cell: Cell) -> float:
    """Forward and backward passes of an iteration after the warm-up, the labelled one too."""
    entry, joint = TABLE[cell.method], cell.recipe.own.joint
    targets, loss = entry.passes
    apart = 1 + targets + loss * (1 + cell.gap)
    if joint and entry.mixed:
        return apart - 1 + MIXED_GAP * cell.gap
    return apart + JOINT_GAP * (cell.gap and joint)


def work(cell: Cell) -> float:
    """Forward and backward passes of the whole run, and of those that it starts from.

    The warm-up has the labelled ones alone.
    """
    recipe = cell.recipe
    phases = sum(phase.iterations * (1 + sum(ENTRIES[phase.method].passes)) for phase in recipe.stages[:-1])
    warm_up = recipe.own_warm_up
    return phases + warm_up + (recipe.iterations - warm_up) * passes(cell)


def estimate(cell: Cell, records: Mapping[Cell, Record], kind: str) -> Estimate:
    """From done cells of the same data set, preset and kind of device ("cpu", "cuda"): of the same method if there are
    any, else of all, scaled by their passes. The time counts everything: reading, validation and scoring too."""
    alike = {
        other: record["wall_seconds"] / work(other)
        for other, record in records.items()
        if record["state"] == "done"
        and (other.data_set, other.preset, record["kind"]) == (cell.data_set, cell.preset, kind)
    }
    same = [seconds for other, seconds in alike.items() if (other.method, other.gap) == (cell.method, cell.gap)]
    if same:
        return Estimate(work(cell) * median(same), "measured")
    if alike:
        return Estimate(work(cell) * median(alike.values()), "scaled")
    return Estimate(work(cell) * GUESSES.get((cell.data_set, cell.preset, kind), 1.0), "guess")
