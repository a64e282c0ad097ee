"""Eyes on a training loop: what writes down what happens in an update."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from ..wrapper import GAPWrapper
from . import values
from .patches import Patches
from .places import here
from .report import Finding
from .update import Backward, Flow, Forward, Move, Pass, Update


class Watch:
    """Writes down update after update of `optimizer`.

    Args:
        optimizer: a GAPWrapper, or another optimizer, in whose updates no perturbed pass will be found.
        model: where forward passes are watched, of the whole or of any part with parameters.
        done: called with each update after its step, or when another begins without one.
        begun: called when the first backward of an update begins.
    """

    def __init__(
        self, optimizer: Optimizer, model: nn.Module, done: Callable[[Update], None], begun: Callable[[Update], None]
    ) -> None:
        self.wrapper = optimizer if isinstance(optimizer, GAPWrapper) else None
        self.base = optimizer.base_optimizer if isinstance(optimizer, GAPWrapper) else optimizer
        self.model, self.done, self.begun = model, done, begun
        self.within_forward, self.within_aside, self.separate = False, False, False
        self.backward_at = ""
        """The backward call that is under way."""
        self.touched = False
        """Whether it has come to something of ours."""
        self.grad_norm: Tensor | None = None
        self.buffers: dict[str, list[Tensor]] = {}
        """Running statistics of each layer."""
        self.parts: set[nn.Module] = set()
        """Of the model, itself included: those with parameters of the optimizer."""
        self.update = Update()
        self.patches = Patches()

    @property
    def params(self) -> list[Tensor]:
        """All that the optimizer holds (which may have been replaced since the beginning, as by `load_state_dict`)."""
        return [p for group in self.base.param_groups for p in group["params"]]

    @property
    def perturbed(self) -> bool:
        """Whether the wrapper has moved the parameters."""
        return self.wrapper is not None and self.wrapper._perturbed

    def start(self) -> None:
        """Hang up the hook and the patches."""
        self._begin_update()
        # frozen parts and teachers may run at theta* as they like
        self.parts = {module for module in self.model.modules() if self._concerns(module)}
        self.hook = self.base.register_step_pre_hook(self._step)
        # no forward hooks, which would go along into deep copies and pickles of the model
        self.patches.replace(nn.Module, "__call__", self._forward)
        self.patches.replace(torch.autograd, "backward", self._backward)
        self.patches.replace(nn.Module, "zero_grad", self._zero_grad)
        self.patches.replace(Optimizer, "zero_grad", self._zero_grad)
        self.patches.replace(GAPWrapper, "first_step", self._first_step)
        self.patches.replace(GAPWrapper, "second_step", self._second_step)
        self.patches.replace(GAPWrapper, "set_aside", self._set_aside)

    def stop(self) -> None:
        """Take them off again: nothing of the check is left."""
        self.patches.undo()
        self.hook.remove()
        self.update = Update()

    def _begin_update(self) -> None:
        self.update = Update()
        self.grad_norm = self.wrapper.grad_norm if self.wrapper else None

    def _finish_update(self) -> None:
        update = self.update
        self._begin_update()
        self.done(update)

    # ------------------------------------------------------------------ forward

    def _forward(self, original: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or module not in self.parts:
            return original(module, *args, **kwargs)
        if self.within_forward or _in_backward():  # a part of the model, or checkpointing's second forward
            return original(module, *args, **kwargs)
        forward, statistics = self._before_forward()
        self.within_forward = True
        try:
            output = original(module, *args, **kwargs)
        finally:
            self.within_forward = False
        forward.samples = values.samples((args, kwargs))
        self._after_forward(forward, output, statistics)
        return output

    def _before_forward(self) -> tuple[Forward, dict[str, list[Tensor]]]:
        """A record of it, and the running statistics if it must not move them."""
        update, with_grad = self.update, torch.is_grad_enabled()
        if with_grad and not update.theta:
            self._copy_theta()
        by_hand = bool(update.theta) and not self.perturbed and values.moved(update.theta)
        random_state = values.random_state(self.params[0].device)
        forward = Forward(here(), self.perturbed, by_hand, with_grad, random_state)
        update.forwards.append(forward)
        if self.perturbed and not update.dropout:
            layers = [n for n, m in self.model.named_modules() if isinstance(m, _DropoutNd) and m.training and m.p > 0]
            update.dropout = (layers or [""])[0]
        return forward, self._statistics() if self.perturbed or by_hand else {}

    def _after_forward(self, forward: Forward, output: Any, before: dict[str, list[Tensor]]) -> None:
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                forward.tracked = True
                tensor.register_hook(partial(self._reached, forward))
        now = self._statistics() if before else {}
        held = {name: all(map(values.same_bits, old, now[name])) for name, old in before.items()}
        forward.statistics = [name for name in held if not held[name]]

    def _reached(self, forward: Forward, gradient: Tensor | None) -> None:
        """A backward call has come to what the model returned."""
        if gradient is None:  # of an output that the loss does not use, beside one that it does
            return
        forward.reached = True
        if not self.backward_at:
            return  # torch.autograd.grad
        self.touched = True
        forward.stale |= forward.perturbed != self.perturbed
        flow = forward.flows.setdefault(self._adds_to(), Flow(self.backward_at))
        if gradient.ndim and len(gradient) == len(forward.samples):
            counts = gradient.reshape(len(gradient), -1).ne(0).any(1).tolist()
            flow.samples.update(sample for sample, counted in zip(forward.samples, counts, strict=True) if counted)
        elif gradient.any():
            flow.samples.update(forward.samples)

    def _running_statistics(self) -> dict[str, list[Tensor]]:
        """The buffers of layers that track any. While they are frozen, some layers have others."""
        layers = {name: layer for name, layer in self.model.named_modules() if isinstance(layer, _NormBase)}
        return {name: [*layer.buffers(recurse=False)] for name, layer in layers.items() if layer.track_running_stats}

    def _statistics(self) -> dict[str, list[Tensor]]:
        return {name: [values.copy_of(b) for b in buffers] for name, buffers in self.buffers.items()}

    def _copy_theta(self) -> None:
        self.buffers = self._running_statistics()
        self.update.layers = len(self.buffers)
        self.update.theta = {p: values.copy_of(p) for p in self.params}

    # ------------------------------------------------------------------ backward

    def _adds_to(self) -> Pass:
        if self.within_aside:
            return "aside"
        if self.perturbed:
            return "g2"
        return "g_l" if self.update.second else "g1"

    def _backward(self, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        if torch.compiler.is_compiling() or _in_backward():
            return original(*args, **kwargs)
        where, adds_to = here(), self._adds_to()
        leftover = adds_to == "g1" and not self.update.has("g1") and values.any_gradient(self.params)
        if not self.update.theta:
            self._copy_theta()
        if adds_to == "g2":
            self._look_at_gradients(where)
        elif adds_to == "g_l":
            self._look_for_the_sum(where)
        versions, self.touched, self.backward_at = self._versions(), False, where
        try:
            original(*args, **kwargs)
        finally:
            self.backward_at = ""
        if self.touched or versions != self._versions():  # else it was another model's
            self._after_backward(Backward(where, adds_to), leftover)

    def _after_backward(self, backward: Backward, leftover: bool) -> None:
        update = self.update
        first = not update.has("g1")
        update.backwards.append(backward)
        update.call(backward.adds_to, backward.where)
        if backward.adds_to == "g1" and first:
            if leftover:
                update.seen.append(_leftover(backward.where))
            self.begun(update)
        elif backward.adds_to == "g2":
            now = values.gradients(self.params)
            values.add_difference(update.g2, now, update.last or {})
            update.last = now

    def _versions(self) -> list[tuple[int, int]]:
        """Something that changes when anything is added to a `.grad`."""
        return [(id(p.grad), p.grad._version) for p in self.params if p.grad is not None]

    def _look_at_gradients(self, where: str) -> None:
        """Whether `.grad` is still as the perturbed pass left it."""
        update, now = self.update, values.gradients(self.params)
        if update.last is None or values.sharded(self.params):
            return
        changed = [p for p, g in update.last.items() if p not in now or not values.same_bits(g, now[p])]
        if not changed:
            return
        gone = all(p not in now or not now[p].any() for p in changed)
        if gone and not now and not update.has("g2"):
            update.notes.append(_harmless((update.zeroings or [where])[-1]))
        elif gone:
            update.seen.append(_zeroed((update.zeroings or [where])[-1], "while the parameters were perturbed"))
        elif not self.separate:
            update.seen.append(_changed(where))
        if now or update.has("g2"):
            update.last = now

    def _look_for_the_sum(self, where: str) -> None:
        """Whether what `second_step` left is still there."""
        update = self.update
        if update.last is not None and any(g.any() for g in update.last.values()):
            if not values.any_gradient(self.params):
                update.seen.append(_zeroed((update.zeroings or [where])[-1], "after second_step()"))
            update.last = None

    # ------------------------------------------------------------------ the optimizer

    def _first_step(self, original: Callable[..., None], wrapper: GAPWrapper, *args: Any, **kwargs: Any) -> None:
        if wrapper.base_optimizer is not self.base or torch.compiler.is_compiling():
            return original(wrapper, *args, **kwargs)
        if self.update.second:  # and there was no step()
            self._finish_update()
        elif self.update.first and not self.perturbed:  # an exception has ended that one
            self._begin_update()
        g1 = {p: g for p, g in values.gradients(self.params).items() if p.requires_grad}
        theta = {p: values.copy_of(p) for p in self.params}
        original(wrapper, *args, **kwargs)
        update = self.update
        update.first, update.theta, update.g1, update.zeroings = here(), theta, g1, []
        update.call("first_step", update.first)
        update.last = values.gradients(self.params)
        self.separate = bool(kwargs.get("separate"))
        if not values.sharded(self.params):
            update.move = self._measure(theta, g1, wrapper.adaptive)

    def _measure(self, theta: values.Copies, g1: values.Copies, adaptive: bool) -> Move:
        radii = {p: float(group["gap_eps"]) for group in self.base.param_groups for p in group["params"]}
        wanted = values.displacement(theta, g1, radii, adaptive)
        now = {p: values.copy_of(p) for p in theta}
        moved = {p: values.wide(now[p]) - values.wide(theta[p]) for p in theta}
        eps = [float(group["gap_eps"]) for group in self.base.param_groups]
        as_wanted = values.moved_as(wanted, theta, now)
        return Move(values.length(moved), values.length(wanted), as_wanted, eps)

    def _second_step(self, original: Callable[..., None], wrapper: GAPWrapper) -> None:
        if wrapper.base_optimizer is not self.base or torch.compiler.is_compiling():
            return original(wrapper)
        update, where = self.update, here()
        if self.perturbed:
            self._look_at_gradients(where)
        if self.separate:  # it may have been clipped
            update.g2 = values.gradients(self.params)
        original(wrapper)
        update.second, update.zeroings = where, []
        update.call("second_step", where)
        update.restored = values.unchanged(update.theta)
        update.last = values.gradients(self.params)
        if update.g2 and not values.sharded(self.params):
            update.sum_holds = all(map(self._sum_holds, self.base.param_groups))
        update.g1, update.g2, update.aside = {}, {}, {}

    def _sum_holds(self, group: dict[str, Any]) -> bool:
        """Whether `.grad` of the group is g1 + alpha * g2, and what was set aside."""
        update, params = self.update, set(group["params"])
        parts = [(1.0, update.g1), (group["gap_alpha"], update.g2), (1.0, update.aside)]
        total = {p: g for p, g in (update.last or {}).items() if p in params}
        return values.equals_sum(total, [(w, {p: g for p, g in part.items() if p in params}) for w, part in parts])

    @contextmanager
    def _set_aside(self, original: Callable[..., Any], wrapper: GAPWrapper) -> Iterator[None]:
        if wrapper.base_optimizer is not self.base:
            with original(wrapper):
                yield
            return
        with original(wrapper):
            self.within_aside = True
            try:
                yield
                values.add_difference(self.update.aside, values.gradients(self.params), {})
            finally:
                self.within_aside = False

    def _step(self, *_: Any) -> None:
        """Runs before a step of the base optimizer."""
        if torch.compiler.is_compiling() or self.perturbed:  # which the wrapper refuses
            return
        update = self.update
        update.step = here()
        update.call("step", update.step)
        self._look_for_the_sum(update.step)
        update.step_by_hand = bool(update.theta) and values.moved(update.theta)
        if self.wrapper is not None:
            update.due = self.wrapper.due
            update.hidden = not update.first and self.wrapper.grad_norm is not self.grad_norm
        self._finish_update()

    def _zero_grad(self, original: Callable[..., None], owner: Any, *args: Any, **kwargs: Any) -> None:
        if torch.compiler.is_compiling() or not self._concerns(owner):
            return original(owner, *args, **kwargs)
        update = self.update
        overflow = bool(update.second) and not self.perturbed and not values.all_finite(self.params)
        original(owner, *args, **kwargs)
        if overflow:  # a GradScaler has skipped the step
            self._begin_update()
        elif update.first or update.forwards:
            update.zeroings.append(here())
            update.call("zero_grad", update.zeroings[-1])

    def _concerns(self, owner: Any) -> bool:
        if isinstance(owner, nn.Module):
            ours = set(self.params)
            return any(p in ours and p.requires_grad for p in owner.parameters())
        return owner is self.base


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _leftover(where: str) -> Finding:
    what = "when the first backward of this update began, .grad held the gradients of an earlier one: g1 contains them."
    return Finding("leftover", where, what, "call optimizer.zero_grad() after step().")


def _zeroed(where: str, when: str) -> Finding:
    what = f"gradients were zeroed {when}: what had been computed by then is lost."
    return Finding("zeroed", where, what, "zero gradients only between step() and the next update's first backward.")


def _harmless(where: str) -> Finding:
    return Finding("zeroing", where, "zeroing between first_step() and the perturbed backward does nothing here.")


def _changed(where: str) -> Finding:
    what = "gradients were changed between first_step() and second_step(), where g1 and g2 are one sum."
    fix = "clip before first_step() or after second_step(), or use perturbed(model, separate=True) to clip g2 alone."
    return Finding("changed", where, what, fix)
