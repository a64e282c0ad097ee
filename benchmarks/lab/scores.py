"""Scores out of the lab's records, seed by seed: what tables and plots are made of."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from benchmarks.lab import grid
from benchmarks.lab.grid import GAPMATCH, Cell, cell
from benchmarks.lab.published import PUBLISHED, Scores
from benchmarks.lab.records import Record
from segmentation.recipe import Run

Found = Mapping[Cell, Record]


def seeds(data_set: str, preset: str, method: Run, share: int) -> list[Cell]:
    """The grid's cells of the plain preset that differ in nothing but their seed."""
    wanted = cell(data_set, preset, method, share, 0)
    return [c for c in grid.cells(presets=[preset]) if replace(c, seed=0) == wanted]


def done(found: Found, cells: list[Cell]) -> dict[int, Record]:
    """Seed -> record of those that came to a result."""
    return {c.seed: found[c] for c in cells if c in found and found[c]["state"] == "done"}


def tests(found: Found, data_set: str, preset: str, method: Run, share: int) -> dict[int, Record]:
    """Seed -> scores on the test volumes."""
    records = done(found, seeds(data_set, preset, method, share))
    return {seed: record["test"] for seed, record in records.items()}


def gains(found: Found, data_set: str, preset: str, method: str, share: int) -> dict[int, Scores]:
    """Seed -> Dice and ASD with GAP less those without, where both have run."""
    plain, with_gap = (tests(found, data_set, preset, (method, gap), share) for gap in (False, True))
    return {
        seed: (with_gap[seed]["dice"] - plain[seed]["dice"], with_gap[seed]["asd"] - plain[seed]["asd"])
        for seed in with_gap
        if seed in plain
    }


def compared_by_gain(found: Found, data_set: str, preset: str, method: str, share: int) -> list[Record]:
    """The runs that `gains` are made of."""
    plain, with_gap = (done(found, seeds(data_set, preset, (method, gap), share)) for gap in (False, True))
    return [records[seed] for records in (plain, with_gap) for seed in with_gap if seed in plain]


def marks(records: Iterable[Record]) -> str:
    """† if one predicted next to nothing, ‡ if one was at its best before its method began."""
    records = list(records)
    empty = any(record["test"]["empty"] > record["test"]["predictions"] / 2 for record in records)
    return "†" * empty + "‡" * any(map(_early, records))


def _early(record: Record) -> bool:
    recipe = record["recipe"]
    return recipe["method"] != "supervised" and record["chosen_iteration"] <= recipe.get("warm_up", 0)


def published_gain(data_set: str, method: str, share: int) -> Scores | None:
    """The same from the paper's rows; the gains that it prints differ from them in the last digit here and there."""
    scores = [PUBLISHED[data_set].get((method, gap), {}).get(share) for gap in (False, True)]
    if scores[0] is None or scores[1] is None:
        return None
    return scores[1][0] - scores[0][0], scores[1][1] - scores[0][1]


def compared(preset: str, changes: Mapping[str, Any], method: Run = GAPMATCH) -> list[Cell]:
    """Cells of the hyper-parameter study that differ in nothing but their seed; the default has no more than others."""
    wanted = cell("ACDC", preset, method, 1, 0, changes)
    return [c for c in grid.cells(["hyper-parameters"], [preset]) if replace(c, seed=0) == wanted]


def validations(found: Found, preset: str, changes: Mapping[str, Any], method: Run = GAPMATCH) -> dict[int, float]:
    """Seed -> validation Dice in percent of `method` with `changes` on ACDC, 1 % of the labels."""
    records = done(found, compared(preset, changes, method))
    return {seed: record["validation_dice"] for seed, record in records.items()}
