"""Which buffers of a model a forward pass moves: running statistics, and whatever else it keeps there."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..batchnorm import is_running_stat
from . import values


class Buffers:
    """The buffers of `model`, by name."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.own: dict[str, Tensor] = {}
        """The buffers as they were at theta. While statistics are held still, some layers have other tensors in their
        place."""

    def look(self) -> None:
        """Note the buffers; to be called at theta."""
        self.own = {name: b for name, b in self.model.named_buffers() if not is_lazy(b) and not b.is_meta and b.numel()}

    def statistics(self) -> bool:
        """Whether there are running statistics among the buffers."""
        return any(map(is_running_stat, self.own))

    def moved_since(self) -> Callable[[], list[str]]:
        """A function that tells which buffers have moved between this call and its own."""
        copies = {name: values.copy_of(buffer) for name, buffer in self.own.items()}
        now = dict(self.model.named_buffers())
        free = {name for name, buffer in self.own.items() if now.get(name) is buffer}

        def moved() -> list[str]:
            after = dict(self.model.named_buffers())

            def differs(name: str, old: Tensor) -> bool:
                # a layer may put a new tensor there; what is held still comes back
                found = [self.own[name], after[name]] if name in free and name in after else [self.own[name]]
                return not all(values.same_bits(old, values.copy_of(buffer)) for buffer in found)

            return [name for name, old in copies.items() if differs(name, old)]

        return moved
