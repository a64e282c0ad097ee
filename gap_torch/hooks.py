"""One hook on many parameters at once.

`Tensor.register_hook` and the removal of what it returns take as long as a small tensor's norm, and hooks that stayed
for good would be called in every ordinary pass. So they are put where torch looks for them, which is private to it
(tested with 2.6, 2.14 and 2.15).
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor


class Hooks:
    """`hook` is called with every gradient of `params`, which all require a gradient, before it is accumulated."""

    def __init__(self, params: list[Tensor], hook: Callable[[Tensor], None]) -> None:
        places: list[dict[Any, Any] | None] = [p._backward_hooks for p in params]
        self.places = [_place(p) if place is None else place for p, place in zip(params, places, strict=True)]
        for place in self.places:
            place[self] = hook

    def remove(self) -> None:
        """Take the hook off all parameters."""
        for place in self.places:
            place.pop(self, None)


def _place(param: Tensor) -> dict[Any, Any]:
    """Where a parameter's hooks are, which torch makes with the first of them."""
    param.register_hook(lambda _: None).remove()
    assert param._backward_hooks is not None
    return param._backward_hooks
