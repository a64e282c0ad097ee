"""Ctrl-C that waits for a good moment."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from segmentation import ranks


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Within the context a first Ctrl-C only makes the yielded function return True; a second one raises.

    One on any rank counts for all, so that they stop at the same place. All must call the function alike.
    """
    presses: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        if presses:
            raise KeyboardInterrupt
        presses.append(signum)

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # not in the main thread: whoever is there decides
        yield lambda: False
        return
    try:
        yield lambda: ranks.any_rank(bool(presses))
    finally:
        signal.signal(signal.SIGINT, before)
