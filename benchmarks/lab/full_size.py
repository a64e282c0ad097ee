"""Runs at full size on a GPU that were made beside the grid: read, tabulated and drawn."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.lab import curves
from benchmarks.lab.curves import Curve, Panel
from benchmarks.lab.grid import title
from benchmarks.lab.tables import Table

Study = dict[str, Any]
"""A file of them: `question`, `how`, where and when, and `runs`, name -> recipe, validations, scores."""

FILES = "acdc_*_full_size*_cuda.json"
PICTURE = "full_size_curves"
CAPTION = (
    "Validation Dice over iterations at full size, FixMatch against GapMatch, ACDC, one labelled patient: one run "
    "(seed 0) each, the number at its end is its last value."
)
HEADER = ("Run", "Validation %", "Iteration", "Dice %", "ASD", "Empty", "Dice % last", "ASD last", "Empty last")
TEXT = """\
ACDC, one labelled patient, 256 x 256, preset `paper` but for what is named. Of each run the iteration that validation
chose, and the last one: test Dice in percent, ASD in voxels, and how many of 120 predictions (40 volumes, three
classes) were empty. One run each: they show what can happen, not how often. What keeps runs up at 64 x 64, a lower
threshold and a Dice without absent classes ([acdc.md](acdc.md#why-runs-fall-and-what-keeps-them-up)), none of them had.
"""


def read(folder: Path) -> list[Study]:
    """The files in `folder`, the oldest first."""
    studies = [{"file": path.name, **json.loads(path.read_text(encoding="utf-8"))} for path in folder.glob(FILES)]
    return sorted(studies, key=lambda study: (study["date"], study["file"]))


def provenance(study: Study) -> str:
    """How its runs were made."""
    where = f"{study['device']}, torch {study['torch']}, commit {study['commit']}, {study['date']}"
    return f"- `benchmarks/results/{study['file']}` ({where}). {study['question'].rstrip('.?')}. {study['how']}."


def table(studies: Sequence[Study]) -> Table:
    """A row a run."""
    rows = [_row(run) for study in studies for run in study["runs"].values()]
    return Table("Chosen and last iterate", HEADER, rows)


def _row(run: dict[str, Any]) -> list[str]:
    scores = [text for test in ("test_best", "test_last") for text in _scores(run[test])]
    return [_name(run["recipe"]), f"{run['best_val']:.1f}", f"{run['best_it']:,} of {run['done']:,}", *scores]


def _scores(test: dict[str, Any]) -> list[str]:
    return [f"{test['dice']:.1f}", f"{test['asd']:.2f}", str(test["empty"])]


def _name(recipe: dict[str, Any]) -> str:
    eps = f", eps {recipe['eps']:g}" if recipe["gap"] else ""
    return f"{_label(recipe)}, weight {recipe['weight']:g}{eps}, seed {recipe['seed']}"


def _label(recipe: dict[str, Any]) -> str:
    return title((recipe["method"], recipe["gap"]))


def picture(studies: Sequence[Study]) -> Figure:
    """A panel a study."""
    return curves.draw({_heading(study): _panel(study) for study in studies})


def _heading(study: Study) -> str:
    recipes = [run["recipe"] for run in study["runs"].values()]
    weights, radii = sorted({r["weight"] for r in recipes}), sorted({r["eps"] for r in recipes if r["gap"]})
    return f"weight {_listed(weights)}; GapMatch with eps {_listed(radii)}"


def _listed(values: Sequence[float]) -> str:
    return " and ".join(f"{value:g}" for value in values)


def _panel(study: Study) -> Panel:
    panel: dict[str, list[Curve]] = {}
    for run in study["runs"].values():
        panel.setdefault(_label(run["recipe"]), []).append([(entry["it"], entry["val"]) for entry in run["log"]])
    return dict(sorted(panel.items()))
