"""Eyes on a training loop: what writes down what happens in an update."""

from collections.abc import Callable

from torch import nn
from torch.optim import Optimizer

from ..wrapper import GAPWrapper
from .backward import BackwardWatch
from .forward import ForwardWatch
from .loop import Loop
from .patches import Patches
from .steps import StepWatch
from .update import Update


class Watch:
    """Writes down update after update of a `Loop`, whose arguments it takes."""

    def __init__(
        self, optimizer: Optimizer, model: nn.Module, done: Callable[[Update], None], begun: Callable[[Update], None]
    ) -> None:
        self.loop = Loop(optimizer, model, done, begun)
        self.patches = Patches()

    @property
    def wrapper(self) -> GAPWrapper | None:
        """The loop's GAPWrapper, if it has one."""
        return self.loop.wrapper

    @property
    def update(self) -> Update:
        """The record of the update that is under way."""
        return self.loop.update

    def start(self) -> None:
        """Hang up the hook and the patches."""
        steps = StepWatch(self.loop)
        self.hook = self.loop.base.register_step_pre_hook(steps.before_step)
        for watch in (ForwardWatch(self.loop), BackwardWatch(self.loop), steps):
            watch.hang_up(self.patches)

    def stop(self) -> None:
        """Take hook and patches off again: nothing of the check is left."""
        self.patches.undo()
        self.hook.remove()
        self.loop.begin_update()
