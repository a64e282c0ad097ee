"""Eyes on the optimizer: its steps, what zeroes its gradients, and the GradScaler that unscales them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..wrapper import GAPWrapper
from . import values
from .loop import Loop
from .patches import Patches
from .places import here
from .untouched import look_at_gradients


class StepWatch:
    """Writes down what is called between the passes of an update."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop

    def hang_up(self, patches: Patches) -> None:
        """Patch all but the step of the base optimizer, whose class is anybody's: `before_step` is its hook."""
        patches.replace(GAPWrapper, "first_step", self._first_step)
        patches.replace(GAPWrapper, "second_step", self._second_step)
        patches.replace(GAPWrapper, "set_aside", self._set_aside)
        patches.replace(Optimizer, "zero_grad", self._zero_grad)
        patches.replace(nn.Module, "zero_grad", self._zero_grad)
        patches.replace(torch.amp.GradScaler, "unscale_", self._unscale)
        patches.replace(torch.amp.GradScaler, "scale", self._scale)

    def _first_step(self, original: Callable[..., None], wrapper: GAPWrapper, *args: Any, **kwargs: Any) -> None:
        loop = self.loop
        if wrapper.base_optimizer is not loop.base or torch.compiler.is_compiling():
            return original(wrapper, *args, **kwargs)
        loop.wrapper = wrapper  # of which nothing is known where the check was given the base optimizer
        loop.forget_what_is_gone()
        if loop.update.where("second_step"):  # and there was no step()
            loop.finish_update()
        g1 = {p: g for p, g in values.gradients(loop.params).items() if p.requires_grad}
        theta = {p: values.copy_of(p) for p in loop.params}
        original(wrapper, *args, **kwargs)
        update, marks = loop.update, loop.marks
        update.call("first_step", here())
        marks.grad_norm, marks.separate = wrapper.grad_norm, bool(kwargs.get("separate"))
        marks.theta, marks.theta_star = theta, {p: values.copy_of(p) for p in theta}
        marks.last = marks.before_g2 = values.gradients(loop.params)
        update.grad_norm = float(wrapper.grad_norm)  # type: ignore[arg-type]
        if not values.sharded(loop.params):
            update.norms["g1"] = values.norm_of(g1)
            eps = {p: float(group["gap_eps"]) for group in loop.base.param_groups for p in group["params"]}
            update.move = values.measure(theta, marks.theta_star, g1, eps, wrapper.adaptive)
        loop.begun(update)

    def _second_step(self, original: Callable[..., None], wrapper: GAPWrapper) -> None:
        loop = self.loop
        if wrapper.base_optimizer is not loop.base or torch.compiler.is_compiling():
            return original(wrapper)
        update, marks, where = loop.update, loop.marks, here()
        if loop.perturbed:
            look_at_gradients(loop, where)
            update.overwritten = not values.unchanged(marks.theta_star)
            self._measure_g2(wrapper)
        original(wrapper)
        update.call("second_step", where)
        update.restored = values.unchanged(marks.theta)
        marks.theta_star, marks.last, marks.before_g2 = {}, {}, {}
        marks.before_g_l = values.gradients(loop.params)
        marks.gradients.filled = values.any_gradient(loop.params)

    def _measure_g2(self, wrapper: GAPWrapper) -> None:
        """Measure g2, before `.grad` becomes the sum."""
        update, marks = self.loop.update, self.loop.marks
        if values.sharded(self.loop.params):
            return
        update.norms["g2"] = values.norm_of(marks.last, less=marks.before_g2)
        marks.aside = {p: values.copy_of(g) for p, g in wrapper._aside.items()}
        if marks.aside:
            update.norms["g_l"] = values.norm_of(marks.aside)

    @contextmanager
    def _set_aside(self, original: Callable[..., Any], wrapper: GAPWrapper) -> Iterator[None]:
        loop = self.loop
        before = loop.within_aside
        with original(wrapper):
            loop.within_aside = before or wrapper.base_optimizer is loop.base  # another network's may be within ours
            try:
                yield
            finally:
                loop.within_aside = before

    def before_step(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hook before the base optimizer's step. A closure makes the gradients within the step."""
        if torch.compiler.is_compiling() or self.loop.perturbed:  # which the wrapper refuses
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            return self._step(here())

        def watched(*inputs: Any) -> Any:
            loss = closure(*inputs)
            self._step(where)
            return loss

        where = here()
        return args[:1], {**kwargs, "closure": watched}

    def _step(self, where: str) -> None:
        loop = self.loop
        loop.forget_what_is_gone()
        update, theta = loop.update, loop.marks.theta
        update.call("step", where)
        update.step_by_hand = bool(theta) and values.moved(theta)
        if loop.wrapper is not None:
            update.due = loop.wrapper.due
            update.hidden = not update.where("first_step") and loop.wrapper.grad_norm is not loop.marks.grad_norm
        loop.finish_update()

    def _zero_grad(self, original: Callable[..., None], owner: Any, *args: Any, **kwargs: Any) -> None:
        loop = self.loop
        original(owner, *args, **kwargs)
        if torch.compiler.is_compiling() or (owner is not loop.base and owner not in loop.parts):
            return
        loop.marks.zeroed_at = here()
        if loop.update.where("first_step"):
            loop.update.call("zero_grad", loop.marks.zeroed_at)

    def _unscale(self, original: Callable[..., None], scaler: torch.amp.GradScaler, optimizer: Optimizer) -> None:
        original(scaler, optimizer)
        if scaler.is_enabled() and optimizer.param_groups is self.loop.base.param_groups:
            self.loop.marks.gradients.unscaled_at = here()

    def _scale(self, original: Callable[..., Any], scaler: torch.amp.GradScaler, outputs: Any) -> Any:
        gradients = self.loop.marks.gradients
        gradients.scaled_again = bool(gradients.unscaled_at)
        return original(scaler, outputs)
