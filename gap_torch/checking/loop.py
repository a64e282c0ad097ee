"""A training loop as it is seen: its optimizer, the parts of its model, and the update that is under way."""

from collections.abc import Callable
from threading import get_ident

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..wrapper import GAPWrapper
from . import values
from .marks import Backward, Gradients, Marks
from .places import here
from .update import Pass, Update


class Loop:
    """The training loop that is watched.

    Args:
        optimizer: a GAPWrapper, or another optimizer, in whose updates no perturbed pass will be found.
        model: the model; forward passes of the whole and of any part with parameters are watched.
        done: called with each update after its step, or when another begins without one.
        begun: called when another update has begun: after its first backward, or its first_step() at the latest.
    """

    def __init__(
        self, optimizer: Optimizer, model: nn.Module, done: Callable[[Update], None], begun: Callable[[Update], None]
    ) -> None:
        self.wrapper = optimizer if isinstance(optimizer, GAPWrapper) else None
        self.base = optimizer.base_optimizer if isinstance(optimizer, GAPWrapper) else optimizer
        self.model, self.done, self.begun = model, done, begun
        # frozen parts and teachers may run at theta* as they like
        ours = {p for p in self.params if p.requires_grad}
        self.parts = {m: name for name, m in model.named_modules() if not ours.isdisjoint(m.parameters())}
        # DDP gives every rank the buffers of the first before it calls the model itself
        self.parts = {m: name for m, name in self.parts.items() if not isinstance(m, DistributedDataParallel)}
        self.thread = get_ident()
        self.within_aside = False
        self.backward: Backward | None = None
        """The backward call that is under way."""
        self.begin_update()

    @property
    def params(self) -> list[Tensor]:
        """All parameters that the optimizer holds (`load_state_dict`, for one, may have replaced them)."""
        held = [p for group in self.base.param_groups for p in group["params"]]
        return [p for p in held if p.is_floating_point() or p.is_complex()]

    # ------------------------------------------------------------------ where an update begins and ends

    def begin_update(self) -> None:
        """Forget all that belongs to the last update."""
        self.update, self.marks = Update(), Marks(self.wrapper.grad_norm if self.wrapper else None)

    def finish_update(self) -> None:
        """Hand on the record of the update that is over."""
        update = self.update
        self.begin_update()
        self.done(update)

    def forget_what_is_gone(self) -> None:
        """An update may come to nothing: its gradients are zeroed, or an exception has ended its perturbed pass."""
        if self.perturbed or self.within_aside:
            return
        update, marks = self.update, self.marks
        complete = bool(update.where("second_step"))
        if marks.gradients.filled and not values.any_gradient(self.params):
            update.dropped = marks.zeroed_at or here() if complete else update.dropped
        elif complete or not update.where("first_step"):
            return
        update.forget()
        marks.gradients = Gradients()

    # ------------------------------------------------------------------ where it stands

    @property
    def perturbed(self) -> bool:
        """Whether the wrapper has moved the parameters."""
        return self.wrapper is not None and self.wrapper._perturbed

    @property
    def adds_to(self) -> Pass:
        """The pass whose gradient a backward call would add to."""
        if self.within_aside:
            return "aside"
        if self.perturbed:
            return "g2"
        return "g_l" if self.update.where("second_step") else "g1"

    def copy_theta(self) -> None:
        """The parameters as they are, unless they were copied in this update before."""
        if not self.marks.theta:
            self.marks.theta = {p: values.copy_of(p) for p in self.params}

    def moved_by_hand(self) -> bool:
        """Whether something else than `first_step` has moved the parameters."""
        return bool(self.marks.theta) and not self.perturbed and values.moved(self.marks.theta)

    def elsewhere(self) -> bool:
        """Whether the code runs in another thread, or within a backward call."""
        return get_ident() != self.thread or torch._C._current_graph_task_id() != -1
