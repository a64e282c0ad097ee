"""Printing where standard output can't take every character, as a log file of a machine without a locale."""

import io
import sys


def show_every_character() -> None:
    """Have `print` write a character that standard output lacks as its code, such as \\xe4, instead of failing."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
