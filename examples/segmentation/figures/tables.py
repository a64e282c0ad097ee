"""Results for people and machines: one table, printed with rich or written as Markdown, and JSON."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from presentation.markdown_table import markdown_table
from segmentation.errors import InputError
from segmentation.scoring.evaluate import Evaluation
from segmentation.task import Scores


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        method: its label.
        evaluation: an `Evaluation`, or its `to_dict()` as read back from JSON.
        seconds: training time per iteration, seconds.
        iteration: the iteration that validation chose.
        note: anything else worth a few words.
        last: as `evaluation`, of the last iteration.
    """

    method: str
    evaluation: Evaluation | Mapping[str, Any]
    seconds: float | None = None
    iteration: int | None = None
    note: str = ""
    last: Evaluation | Mapping[str, Any] | None = None


def print_table(
    rows: Sequence[Row],
    title: str,
    class_names: Sequence[str],
    published: Mapping[str, Scores] | None = None,
) -> None:
    """Print the results to stdout: coloured in a terminal, plain text that fits a log elsewhere.

    Args:
        rows: one per method.
        title: printed above.
        class_names: one per foreground class; their columns hold its Dice.
        published: scores of the paper that go below, by method.

    Raises:
        InputError: when a row lacks a score, has another number of classes.
    """
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    header, *body = _cells(rows, class_names, published or {})
    for name in header:
        text = name in ("Method", "Note")
        table.add_column(name, justify="left" if text else "right", no_wrap=not text, overflow="fold")
    for line in body:
        table.add_row(*line)
    # A log has no width of its own, and rich would squeeze the columns into 80 characters.
    width = None if sys.stdout.isatty() else 200
    Console(width=width, markup=False, highlight=False).print(table)


def write_markdown(
    path: Path | str,
    rows: Sequence[Row],
    title: str,
    class_names: Sequence[str],
    published: Mapping[str, Scores] | None = None,
) -> str:
    """Write the table of `print_table` as Markdown, atomically, and return it.

    Raises:
        InputError: as `print_table`, or when `path` cannot be written.
    """
    header, *body = _cells(rows, class_names, published or {})
    text = f"**{title}**\n\n{markdown_table(header, body, text=['Note'])}\n"
    _write_atomically(Path(path), text)
    return text


def write_json(path: Path | str, obj: Any) -> None:
    """Write `obj` as indented JSON, atomically: a reader finds the old file or the whole new one.

    Parent folders are made. NaN and infinity, which JSON lacks, become null.

    Raises:
        InputError: when `obj` holds what JSON cannot, or `path` cannot be written.
    """
    try:
        text = json.dumps(_finite(obj), indent=2, allow_nan=False) + "\n"
    except TypeError as error:
        raise InputError(f"{path}: {error}") from None
    _write_atomically(Path(path), text)


def _cells(rows: Sequence[Row], class_names: Sequence[str], published: Mapping[str, Scores]) -> list[list[str]]:
    """The table as text, header first. Columns that no row fills are left out."""
    header = [
        "Method",
        "Dice %",
        "ASD voxel",
        "Dice % last",
        "ASD last",
        *(f"{name} %" for name in class_names),
        "Empty",
        "s/iteration",
        "Iteration",
        "Note",
    ]
    body = [_line(Row(*row), class_names) for row in rows]
    for method, (dice, asd) in published.items():
        body.append([f"{method} (paper)", f"{dice:g}", f"{asd:g}"] + [""] * (len(header) - 3))
    used = [i for i in range(len(header)) if any(line[i] for line in body)]
    return [[line[i] for i in used] for line in (header, *body)]


def _line(row: Row, class_names: Sequence[str]) -> list[str]:
    scores = _plain(row.evaluation)
    missing = {"dice", "asd", "class_dice", "empty"} - scores.keys()
    if missing:
        raise InputError(f"row {row.method!r}: no {', '.join(sorted(missing))} in its evaluation")
    if len(scores["class_dice"]) != len(class_names):
        raise InputError(f"row {row.method!r}: {len(scores['class_dice'])} classes, expected {len(class_names)}")
    return [
        row.method,
        *_means(scores),
        *(("", "") if row.last is None else _means(_plain(row.last))),
        *(f"{dice:.1f}" for dice in scores["class_dice"]),
        str(scores["empty"]),
        "" if row.seconds is None else f"{row.seconds:#.3g}",
        "" if row.iteration is None else f"{row.iteration:,}",
        row.note,
    ]


def _plain(evaluation: Evaluation | Mapping[str, Any]) -> Mapping[str, Any]:
    return evaluation.to_dict() if isinstance(evaluation, Evaluation) else evaluation


def _means(scores: Mapping[str, Any]) -> tuple[str, str]:
    return f"{scores['dice']:.1f}", "-" if scores["asd"] is None else f"{scores['asd']:.2f}"


def _finite(obj: Any) -> Any:
    if isinstance(obj, Mapping):
        return {key: _finite(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_finite(value) for value in obj]
    return None if isinstance(obj, float) and not math.isfinite(obj) else obj


def _write_atomically(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise InputError(f"{path}: cannot write ({error.strerror})") from None
