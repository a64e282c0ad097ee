"""Warnings name the line of the user's code that is at work, not a line of this library."""

import contextlib
import os
import sys
import warnings
from pathlib import Path

import torch

# what may stand between: this library, torch's decorators, and `with`
_BETWEEN = (f"{Path(__file__).parent}{os.sep}", f"{Path(torch.__file__).parent}{os.sep}", contextlib.__file__)


def warn(message: str) -> None:
    """A UserWarning at the innermost line outside of the library."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_BETWEEN):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
