"""A count of what is done, while it takes long."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PAUSE = 10.0
"""Least seconds between two lines in a log file."""


@contextmanager
def counting(title: str, total: int, console: Console | None = None) -> Iterator[Callable[[], None]]:
    """A live count of `total` things; what it gives is called once for each. In a log file a line now and then."""
    console = console or Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task, last = progress.add_task(title, total=total), -PAUSE

        def count() -> None:
            nonlocal last
            progress.advance(task)
            done = progress.tasks[0].completed
            if not console.is_terminal and (done == total or time.monotonic() - last > PAUSE):
                last = time.monotonic()
                console.print(f"{title} {done:.0f}/{total}", highlight=False)

        yield count
