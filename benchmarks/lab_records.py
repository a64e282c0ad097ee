"""The records of the lab: a JSON file a cell, written when the cell is over, for better or worse."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grid import Cell
from segmentation.recipe import GAP_FIELDS, METHOD_FIELDS
from segmentation.report import write_json

Record = dict[str, Any]
State = Literal["done", "failed", "stale", "open"]


@dataclass(frozen=True)
class Records:
    """All of them, in one folder."""

    folder: Path

    def path(self, cell: Cell) -> Path:
        return self.folder / f"{cell.name}.json"

    def read(self, cell: Cell) -> Record | None:
        """None where there is none yet."""
        try:
            return json.loads(self.path(cell).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

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
    """Recipe fields that count and had another value when the record was made. One that it lacks is newer than it."""
    then, now = record["recipe"], json.loads(json.dumps(cell.recipe.to_dict()))
    idle = {*GAP_FIELDS * (not cell.gap), *METHOD_FIELDS * (cell.method == "supervised")}
    counts = [name for name in now if name in then and name not in idle]
    return [name for name in counts if then[name] != now[name]]
