"""Scores out of the lab's records, repeat by repeat: what tables and plots are made of.

A repeat is a seed and a draw of the labelled patients (`grid.Repeat`); an iterate is one of a run's two sets of weights
that were tested.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from benchmarks.lab import grid
from benchmarks.lab.grid import GAPMATCH, Cell, Repeat, cell
from benchmarks.lab.published import PUBLISHED, Scores
from benchmarks.lab.records import Record
from segmentation.recipe import Run

Found = Mapping[Cell, Record]
Changes = Mapping[str, Any]
Iterate = Literal["test", "test_last"]
"""Key of a record: scores of the iteration that validation chose, and of the last one, which old records lack."""
CHOSEN: Iterate = "test"
LAST: Iterate = "test_last"


def repeats(data_set: str, preset: str, method: Run, share: int, changes: Changes | None = None) -> list[Cell]:
    """The grid's cells of the preset with `changes` that differ in nothing but their seed and draw."""
    return grid.repeats(cell(data_set, preset, method, share, 0, changes))


def done(found: Found, cells: Iterable[Cell]) -> dict[Repeat, Record]:
    """Those that came to a result."""
    return {c.repeat: found[c] for c in cells if c in found and found[c]["state"] == "done"}


def tests(found: Found, data_set: str, preset: str, method: Run, share: int) -> dict[Repeat, Record]:
    """Scores on the test volumes."""
    records = done(found, repeats(data_set, preset, method, share))
    return {repeat: record[CHOSEN] for repeat, record in records.items()}


def pairs(
    found: Found,
    data_set: str,
    preset: str,
    method: str,
    share: int,
    iterate: Iterate = CHOSEN,
    changes: Changes | None = None,
) -> dict[Repeat, tuple[Record, Record]]:
    """The runs without and with GAP, where both have scores."""
    plain, with_gap = (done(found, repeats(data_set, preset, (method, gap), share, changes)) for gap in (False, True))
    both = {repeat: (plain[repeat], record) for repeat, record in with_gap.items() if repeat in plain}
    return {repeat: pair for repeat, pair in both.items() if all(record.get(iterate) for record in pair)}


def gains(runs: Mapping[Repeat, tuple[Record, Record]], iterate: Iterate = CHOSEN) -> dict[Repeat, Scores]:
    """Dice and ASD with GAP less those without, of `pairs`."""
    scored = {repeat: (plain[iterate], with_gap[iterate]) for repeat, (plain, with_gap) in runs.items()}
    return {
        repeat: (with_gap["dice"] - plain["dice"], with_gap["asd"] - plain["asd"])
        for repeat, (plain, with_gap) in scored.items()
    }


def by_draw(values: Mapping[Repeat, float]) -> list[list[float]]:
    """The values of each draw, as `intervals.interval` takes them."""
    draws = dict.fromkeys(draw for _, draw in values)
    return [[value for (_, other), value in values.items() if other == draw] for draw in draws]


def marks(records: Iterable[Record], iterate: Iterate = CHOSEN) -> str:
    """† if one predicted next to nothing, ‡ if one was chosen before its method began."""
    records = list(records)
    empty = any(record[iterate]["empty"] > record[iterate]["predictions"] / 2 for record in records)
    return "†" * empty + "‡" * (iterate == CHOSEN and any(map(_early, records)))


def _early(record: Record) -> bool:
    recipe = record["recipe"]
    return recipe["method"] != "supervised" and record["chosen_iteration"] <= recipe.get("warm_up", 0)


def published_gain(data_set: str, method: str, share: int) -> Scores | None:
    """The same from the paper's rows; the gains that it prints differ from them in the last digit here and there."""
    scores = [PUBLISHED[data_set].get((method, gap), {}).get(share) for gap in (False, True)]
    if scores[0] is None or scores[1] is None:
        return None
    return scores[1][0] - scores[0][0], scores[1][1] - scores[0][1]


def compared(preset: str, changes: Changes, method: Run = GAPMATCH) -> list[Cell]:
    """The repeats within the hyper-parameter study; the default has no more than others."""
    return grid.repeats(cell("ACDC", preset, method, 1, 0, changes), ["hyper-parameters"])


def validations(
    found: Found, preset: str, changes: Changes, method: Run = GAPMATCH, iterate: Iterate = CHOSEN
) -> dict[Repeat, float]:
    """Validation Dice in percent of `method` with `changes` on ACDC, 1 % of the labels."""
    records = done(found, compared(preset, changes, method))
    return {
        repeat: record["validation_dice"] if iterate == CHOSEN else record["validation_curve"][-1][1]
        for repeat, record in records.items()
    }
