"""Functions of torch and of the wrapper's class that are replaced while a check runs.

On the classes, not on the objects: Lightning and Accelerate call them through objects of their own.
"""

from collections.abc import Callable
from typing import Any


class Patches:
    """Replaced attributes, to be put back."""

    def __init__(self) -> None:
        self._replaced: list[tuple[Any, str, Any, Any]] = []
        self._on = True

    def replace(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """Let `owner.name(*args)` be `around(original, *args)`."""
        original = getattr(owner, name)

        def replacement(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs) if self._on else original(*args, **kwargs)

        self._replaced.append((owner, name, original, replacement))
        setattr(owner, name, replacement)

    def undo(self) -> None:
        """Put back what was there. What others have put on top meanwhile stays, and ours below it does nothing."""
        self._on = False
        for owner, name, original, replacement in self._replaced:
            if getattr(owner, name) is replacement:
                setattr(owner, name, original)
        self._replaced.clear()
