"""Notice of the first gradient of a backward pass, by hooks that stay on the parameters from step to step.

A hook that nobody waits for costs a pass much less than it costs to put it on and take it off again.
"""

from collections.abc import Callable
from operator import is_
from typing import Any

from torch import Tensor
from torch.utils.hooks import unserializable_hook


class Watch:
    """Calls back once, when the first gradient of any of some parameters is ready and not yet accumulated."""

    def __init__(self) -> None:
        self.params: list[Tensor] = []
        self.handles: list[Any] = []
        self.bell = _Bell()

    def start(self, params: list[Tensor], alarm: Callable[[], None]) -> None:
        """From now on watch `params`, all of which require gradients; `alarm` is what to call."""
        if not same(params, self.params):
            self._take_off()
            self.handles = [p.register_hook(self.bell.ring) for p in params]
            self.params = params
        self.bell.alarm = alarm

    def stop(self) -> None:
        """Call nothing any more."""
        self.bell.alarm = None

    def _take_off(self) -> None:
        for handle in self.handles:
            handle.remove()

    def __del__(self) -> None:  # a model outlives the wrappers that it is trained with
        self._take_off()


class _Bell:
    """What the hooks hold on to: were it the watch, parameters and hooks would keep each other alive."""

    alarm: Callable[[], None] | None = None

    @unserializable_hook  # torch need not warn that a copy of the parameter comes without it
    def ring(self, _: Tensor) -> None:
        if self.alarm is not None:
            alarm, self.alarm = self.alarm, None
            alarm()


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether these are the very same tensors, in the same order."""
    return len(a) == len(b) and all(map(is_, a, b))
