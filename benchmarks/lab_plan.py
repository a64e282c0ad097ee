"""How long the open cells of the lab will take."""

from collections.abc import Mapping
from statistics import median
from typing import NamedTuple

from grid import Cell
from lab_records import Record

PASSES: dict[str, tuple[float, float]] = {
    "supervised": (0, 0),
    "em": (0, 1),
    "pseudo_label": (1 / 3, 1),
    "ict": (1 / 3, 1),
    "mixup": (1 / 3, 1),
    "cutmix": (1 / 3, 1),
    "vat": (1, 1),
    "fixmatch": (1 / 3, 1),
    "flexmatch": (1 / 3, 1),
    "freematch": (1 / 3, 1),
    "mean_teacher": (1 / 3, 1),
    "urpc": (0, 1.01),
    "cct": (1, 2.5),
}
"""What a method adds to an iteration: its targets, and its loss, which GAP takes a second time. In forward and backward
passes of one batch, of which a forward pass alone is a third. VAT's search has gradients of images alone, another
third; CCT's 1 is its targets, and its further decoders in the labelled pass."""

GUESSES: dict[tuple[str, str, str], float] = {
    ("ACDC", "study", "cpu"): 0.1,
    ("ACDC", "study", "cuda"): 0.01,
    ("ACDC", "paper", "cpu"): 1.5,
    ("ACDC", "paper", "cuda"): 0.03,
    ("LA", "paper", "cpu"): 20.0,
    ("LA", "paper", "cuda"): 0.1,
}
"""Seconds of such a pass while nothing is measured: data set, preset, kind of device."""


class Estimate(NamedTuple):
    """Seconds for the whole cell, and where they come from."""

    seconds: float
    source: str


def passes(cell: Cell) -> float:
    """Forward and backward passes of an iteration after the warm-up, the labelled one too."""
    targets, loss = PASSES[cell.method]
    return 1 + targets + loss * (1 + cell.gap)


def work(cell: Cell) -> float:
    """Forward and backward passes of the whole run. The warm-up has the labelled ones alone."""
    recipe = cell.recipe
    return recipe.warm_up + (recipe.iterations - recipe.warm_up) * passes(cell)


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
