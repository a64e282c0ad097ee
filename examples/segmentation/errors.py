"""The one exception that the examples turn into a single line and a non-zero exit."""


class InputError(ValueError):
    """Bad input from outside: its message names the culprit (file, argument or tensor) and what to do."""
