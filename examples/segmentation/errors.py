"""The exceptions that the examples turn into a single line and a non-zero exit."""


class UserError(Exception):
    """Something that the user can mend: its message names the culprit and what to do."""


class InputError(UserError, ValueError):
    """Bad input from outside: a file, an argument or a tensor."""


class OldRunError(InputError):
    """A checkpoint that another run can't go on from. Its arguments: what is wrong with it, and what to do."""

    def __str__(self) -> str:
        return "; ".join(self.args) + "."


class CaptureError(UserError, RuntimeError):
    """A CUDA graph could not be captured. torch may be in disorder after it: this process can't go on."""


class RunError(UserError, RuntimeError):
    """A run that came to nothing, though its input was good."""
