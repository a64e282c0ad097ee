"""The records of the lab: a JSON file a cell, written when the cell is over, for better or worse."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.lab.grid import Cell, idle
from segmentation.errors import InputError
from segmentation.figures.tables import write_json
from segmentation.recipe import BEFORE, Recipe

Record = dict[str, Any]
State = Literal["done", "failed", "stale", "open"]


@dataclass(frozen=True)
class Records:
    """All of them, in one folder."""

    folder: Path

    def path(self, cell: Cell) -> Path:
        return self.folder / f"{cell.name}.json"

    def read(self, cell: Cell) -> Record | None:
        """None where there is none yet. Raises InputError for a damaged one."""
        path = self.path(cell)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:  # not JSON, or not even text
            record = None
        if not isinstance(record, dict) or not {"state", "recipe"} <= record.keys():
            raise InputError(f"{path}: not a readable record; restore it, or delete it to run its cell anew.")
        return record

    def write(self, cell: Cell, record: Record) -> None:
        """Atomically."""
        write_json(self.path(cell), record)

    def state(self, cell: Cell) -> State:
        """ "stale": recorded with another recipe than the cell has today; it counts for nothing until it is deleted."""
        record = self.read(cell)
        if record is None:
            return "open"
        return "stale" if changed(cell, record) else record["state"]

    def of(self, cells: Iterable[Cell]) -> dict[Cell, Record]:
        """Those that are over, done or failed."""
        return {cell: record for cell in cells if (record := self.read(cell)) and not changed(cell, record)}


def changed(cell: Cell, record: Record) -> list[str]:
    """Recipe fields that count and had another value when the record was made.

    A field that it lacks is newer than it; BEFORE, or else its default, is what there was.
    """
    plain = Recipe(method=cell.method, gap=cell.gap)
    now, defaults = (json.loads(json.dumps(recipe.to_dict())) for recipe in (cell.recipe, plain))
    then = {**defaults, **BEFORE, **record["recipe"]}
    then["options"] = {**defaults["options"], **then["options"]}
    return [name for name in now if name not in idle((cell.method, cell.gap)) and then[name] != now[name]]
