"""Functions of torch and of the wrapper's class that are replaced while a check runs.

On the classes, not on the objects: Lightning and Accelerate call them through objects of their own.
"""

from collections.abc import Callable
from typing import Any


class Patches:
    """Replaced attributes, to be put back."""

    def __init__(self) -> None:
        self._originals: list[tuple[Any, str, Any]] = []

    def replace(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """Let `owner.name(*args)` be `around(original, *args)`."""
        original = getattr(owner, name)

        def replacement(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs)

        self._originals.append((owner, name, original))
        setattr(owner, name, replacement)

    def undo(self) -> None:
        """Put back what was there."""
        while self._originals:
            setattr(*self._originals.pop())
