"""Eyes on backward calls: what each adds to, which forward passes it goes through, and what it finds in `.grad`."""

from collections.abc import Callable
from typing import Any

import torch

from . import values
from .loop import Loop
from .marks import Backward, Gradients
from .patches import Patches
from .places import here
from .report import Finding
from .untouched import look_at_gradients
from .update import Flow


class BackwardWatch:
    """Writes down the backward calls of an update."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop

    def hang_up(self, patches: Patches) -> None:
        """Patch `torch.autograd.backward`, which `Tensor.backward` calls."""
        patches.replace(torch.autograd, "backward", self._backward)

    def _backward(self, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        loop = self.loop
        if torch.compiler.is_compiling() or loop.elsewhere():
            return original(*args, **kwargs)
        loop.forget_what_is_gone()
        call, before, by_hand = Backward(here()), self._versions(), loop.moved_by_hand()
        leftover = values.any_gradient(loop.params)
        loop.copy_theta()
        if loop.perturbed:
            look_at_gradients(loop, call.where)
        loop.backward = call
        try:
            original(*args, **kwargs)
        finally:
            loop.backward = None
        # else it was another model's, or one for inputs alone, as of a search with the parameters frozen
        if before != self._versions() or (call.touched and values.sharded(loop.params)):
            self._after_backward(call, leftover, by_hand, values.loss_of(*args, **kwargs))

    def _after_backward(self, call: Backward, leftover: bool, by_hand: bool, loss: float | None) -> None:
        loop, update, marks, adds_to = self.loop, self.loop.update, self.loop.marks, self.loop.adds_to
        first = adds_to == "g1" and not update.where("g1")
        update.call(adds_to, call.where)
        update.add_loss(adds_to, loss)
        for forward, flow in call.touched:
            forward.flows.setdefault(adds_to, Flow(flow.where)).take_up(flow, by_hand)
        marks.zeroed_at = ""
        if adds_to == "g2":
            marks.last = values.gradients(loop.params)
        if adds_to == "g_l" and not values.sharded(loop.params):
            now = values.gradients(loop.params)
            update.norms["g_l"] = values.norm_of(now, less=marks.before_g_l, more=marks.aside)
        if adds_to != "aside":
            marks.gradients.filled = values.any_gradient(loop.params)
        if marks.gradients.scaled_again:
            update.seen.append(_unscaled(marks.gradients.unscaled_at))
            marks.gradients = Gradients(marks.gradients.filled)
        if first and leftover:
            update.seen.append(_leftover(call.where))
        elif first:  # else it may still be zeroed, as after VAT's search for its direction
            loop.begun(update)

    def _versions(self) -> list[tuple[int, int]]:
        """Something that changes when anything is added to a `.grad`."""
        return [(id(p.grad), p.grad._version) for p in self.loop.params if p.grad is not None]


def _leftover(where: str) -> Finding:
    what = "when the first backward of this update began, .grad held the gradients of an earlier one: g1 contains them."
    return Finding("leftover", where, what, "call optimizer.zero_grad() after step().")


def _unscaled(where: str) -> Finding:
    what = "gradients were unscaled while losses of this update were still to come, which the GradScaler has scaled."
    fix = "call scaler.unscale_(optimizer) once, after the last backward; to clip g1 before, scale max_norm."
    return Finding("unscaled", where, what, fix)
