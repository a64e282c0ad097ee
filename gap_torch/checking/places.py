"""Which line of the user's own code is at work."""

import contextlib
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

import torch

_LIBRARY = str(Path(__file__).parents[1]) + os.sep
_MACHINERY = (_LIBRARY, str(Path(torch.__file__).parent) + os.sep, contextlib.__file__, "<frozen", "<eval_with_key>")
_INSTALLED = tuple({sysconfig.get_paths()[name] + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def here() -> str:
    """The innermost line of the call stack that is the user's, as "file:line".

    Installed packages (a training framework) are passed over, unless there is nothing else.
    """
    return _users(_stack())


def raised(trace: TracebackType | None) -> str:
    """The innermost line of an exception's traceback that is the user's, as "file:line"."""
    lines = [(frame.f_code.co_filename, number) for frame, number in traceback.walk_tb(trace)]
    return _users(reversed(lines))


def from_library(trace: TracebackType | None) -> bool:
    """Whether it was gap_torch that raised."""
    return any(frame.f_code.co_filename.startswith(_LIBRARY) for frame, _ in list(traceback.walk_tb(trace))[-1:])


def _stack() -> Iterator[tuple[str, int]]:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]


def _users(lines: Iterable[tuple[str, int]]) -> str:
    outside = [(file, number) for file, number in lines if not file.startswith(_MACHINERY)]
    own = [(file, number) for file, number in outside if not file.startswith(_INSTALLED)]
    for file, number in (own + outside)[:1]:
        inside = file.startswith(os.getcwd() + os.sep)
        return f"{os.path.relpath(file) if inside else file}:{number}"
    return "?"
