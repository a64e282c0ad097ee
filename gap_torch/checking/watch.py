"""Eyes on a training loop: what writes down what happens in an update."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import compress
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from ..wrapper import GAPWrapper
from . import fingerprints, values
from .buffers import Buffers
from .patches import Patches
from .places import here
from .report import Finding
from .update import Flow, Forward, Pass, Update


class Watch:
    """Writes down update after update of `optimizer`.

    Args:
        optimizer: a GAPWrapper, or another optimizer, in whose updates no perturbed pass will be found.
        model: where forward passes are watched, of the whole or of any part with parameters.
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
        self.within_forward, self.within_aside, self.separate = False, False, False
        self.touched: list[tuple[Forward, Flow]] = []
        """What the backward call that is under way has come to."""
        self.backward_at = ""
        """Its line."""
        self.zeroed_at = ""
        """The last zero_grad() since the last backward."""
        self.unscaled_at, self.scaled_again = "", False
        """A GradScaler's unscale_() in this update, and whether a loss has been scaled since."""
        self.grad_norm: Tensor | None = None
        """The last that is accounted for."""
        self.buffers = Buffers(model)
        self.outputs: dict[StorageWeakRef, Forward] = {}
        """What the forward passes of this update have made, by its memory."""
        self.thread = get_ident()
        self.patches = Patches()
        self._begin_update()

    @property
    def params(self) -> list[Tensor]:
        """All that the optimizer holds (which may have been replaced since the beginning, as by `load_state_dict`)."""
        held = [p for group in self.base.param_groups for p in group["params"]]
        return [p for p in held if p.is_floating_point() or p.is_complex()]

    @property
    def perturbed(self) -> bool:
        """Whether the wrapper has moved the parameters."""
        return self.wrapper is not None and self.wrapper._perturbed

    def start(self) -> None:
        """Hang up the hook and the patches."""
        self.hook = self.base.register_step_pre_hook(self._before_step)
        # no forward hooks, which would go along into deep copies and pickles of the model
        self.patches.replace(nn.Module, "__call__", self._forward)
        self.patches.replace(torch.autograd, "backward", self._backward)
        self.patches.replace(nn.Module, "zero_grad", self._zero_grad)
        self.patches.replace(Optimizer, "zero_grad", self._zero_grad)
        self.patches.replace(torch.amp.GradScaler, "unscale_", self._unscale)
        self.patches.replace(torch.amp.GradScaler, "scale", self._scale)
        self.patches.replace(GAPWrapper, "first_step", self._first_step)
        self.patches.replace(GAPWrapper, "second_step", self._second_step)
        self.patches.replace(GAPWrapper, "set_aside", self._set_aside)

    def stop(self) -> None:
        """Take them off again: nothing of the check is left."""
        self.patches.undo()
        self.hook.remove()
        self._begin_update()

    # ------------------------------------------------------------------ where an update begins and ends

    def _begin_update(self) -> None:
        self.update, self.filled = Update(), False
        self.unscaled_at, self.scaled_again = "", False
        self.outputs = {}
        self.grad_norm = self.wrapper.grad_norm if self.wrapper else None

    def _finish_update(self) -> None:
        update = self.update
        self._begin_update()
        self.done(update)

    def _forget_what_is_gone(self) -> None:
        """An update may come to nothing: its gradients are zeroed, or an exception has ended its perturbed pass."""
        if self.perturbed or self.within_aside:
            return
        update = self.update
        complete = bool(update.where("second_step"))
        if self.filled and not values.any_gradient(self.params):
            update.dropped = self.zeroed_at or here() if complete else update.dropped
        elif complete or not update.where("first_step"):
            return
        update.forget()
        self.filled, self.unscaled_at, self.scaled_again = False, "", False

    def _copy_theta(self) -> None:
        self.update.theta = {p: values.copy_of(p) for p in self.params}

    def _moved_by_hand(self) -> bool:
        return bool(self.update.theta) and not self.perturbed and values.moved(self.update.theta)

    # ------------------------------------------------------------------ forward

    def _forward(self, original: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or module not in self.parts:
            return original(module, *args, **kwargs)
        if self.within_forward or self._elsewhere():  # a part of the model, or checkpointing's second forward
            return original(module, *args, **kwargs)
        forward, memory = self._before_forward(module, (args, kwargs)), _memory((args, kwargs))
        at_theta_star = forward.at == "g2" or forward.by_hand
        moved = self.buffers.moved_since() if at_theta_star else list
        self.within_forward = True
        try:
            output = original(module, *args, **kwargs)
        finally:
            self.within_forward = False
        self._listen(forward, output)
        self.outputs |= dict.fromkeys(_memory(output) - memory, forward)
        forward.training = frozenset(self._training(module))
        forward.batch_norm = any(isinstance(m, _BatchNorm) and m.training for m in module.modules())
        forward.moved = moved()
        if forward.tracked and not at_theta_star:
            self.buffers.look()
            self.update.has_statistics = self.buffers.statistics()
        return output

    def _before_forward(self, module: nn.Module, inputs: Any) -> Forward:
        self._forget_what_is_gone()
        update, with_grad = self.update, torch.is_grad_enabled()
        if with_grad and not update.theta:
            self._copy_theta()
        samples = fingerprints.samples(inputs, self._is_data)
        tensors = fingerprints.tensors_in(inputs)
        for tensor, source in zip(tensors, map(self._source, tensors), strict=True):
            if source is not None:
                source.fed = True
                samples = samples or (source.samples if len(tensor) == len(source.samples) else [])
        adversarial = any(t.requires_grad and self._is_data(t) for t in tensors)
        by_hand = self._moved_by_hand()
        forward = Forward(here(), self.parts[module], self._adds_to(), by_hand, with_grad, samples, adversarial)
        update.forwards.append(forward)
        return forward

    def _is_data(self, tensor: Tensor) -> bool:
        """Whether an input is no feature of a network, by way of autograd or detached."""
        return self._source(tensor) is None and not fingerprints.from_network(tensor, set(self.params))

    def _source(self, tensor: Tensor) -> Forward | None:
        """The forward pass whose output this is, detached perhaps, or a view of it."""
        return next((self.outputs[memory] for memory in _memory(tensor) if memory in self.outputs), None)

    def _training(self, module: nn.Module, name: str = "") -> Iterator[str]:
        """The names of modules in training mode; without parts that another optimizer trains, or none, as a teacher."""
        if module.training:
            yield name or type(module).__name__
        for child_name, child in module.named_children():
            if child in self.parts or next(child.parameters(), None) is None:
                yield from self._training(child, f"{name}.{child_name}" if name else child_name)

    def _listen(self, forward: Forward, output: Any) -> None:
        """Hear of the gradients that come to what the model has made (a leaf was there before, and will be after)."""
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                forward.tracked = True
                tensor.register_hook(partial(self._reached, forward))

    def _reached(self, forward: Forward, gradient: Tensor | None) -> None:
        """A backward call has come to what the model returned."""
        if gradient is None:  # of an output that the loss does not use, beside one that it does
            return
        forward.reached = True
        if not self.backward_at:
            return  # torch.autograd.grad
        flow = Flow(self.backward_at)
        if gradient.ndim and gradient.numel() and len(gradient) == len(forward.samples):
            some, clear = values.with_gradient(gradient)
            flow.samples.update(compress(forward.samples, some))
            flow.clearly.update(compress(forward.samples, clear))
        elif gradient.any():
            flow.samples.update(forward.samples)
        self.touched.append((forward, flow))

    # ------------------------------------------------------------------ backward

    def _adds_to(self) -> Pass:
        if self.within_aside:
            return "aside"
        if self.perturbed:
            return "g2"
        return "g_l" if self.update.where("second_step") else "g1"

    def _backward(self, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        if torch.compiler.is_compiling() or self._elsewhere():
            return original(*args, **kwargs)
        self._forget_what_is_gone()
        where, before, by_hand = here(), self._versions(), self._moved_by_hand()
        leftover = values.any_gradient(self.params)
        if not self.update.theta:
            self._copy_theta()
        if self.perturbed:
            self._look_at_gradients(where)
        self.touched, self.backward_at = [], where
        try:
            original(*args, **kwargs)
        finally:
            self.backward_at = ""
        # else it was another model's, or one for inputs alone, as of a search with the parameters frozen
        if before != self._versions() or (self.touched and values.sharded(self.params)):
            self._after_backward(where, leftover, by_hand, values.loss_of(*args, **kwargs))
        self.touched = []

    def _after_backward(self, where: str, leftover: bool, by_hand: bool, loss: float | None) -> None:
        update, adds_to = self.update, self._adds_to()
        first = adds_to == "g1" and not update.where("g1")
        update.call(adds_to, where)
        update.add_loss(adds_to, loss)
        self._take_up_flows(adds_to, by_hand)
        self.zeroed_at = ""
        if adds_to == "g2":
            update.last = values.gradients(self.params)
        if adds_to == "g_l" and not values.sharded(self.params):
            now = values.gradients(self.params)
            update.norms["g_l"] = values.norm_of(now, less=update.before_g_l, more=update.aside)
        if adds_to != "aside":
            self.filled = values.any_gradient(self.params)
        if self.scaled_again:
            update.seen.append(_unscaled(self.unscaled_at))
            self.unscaled_at, self.scaled_again = "", False
        if first and leftover:
            update.seen.append(_leftover(where))
        elif first:  # else it may still be zeroed, as after VAT's search for its direction
            self.begun(update)

    def _take_up_flows(self, adds_to: Pass, by_hand: bool) -> None:
        for forward, new in self.touched:
            flow = forward.flows.setdefault(adds_to, Flow(new.where))
            flow.samples |= new.samples
            flow.clearly |= new.clearly
            flow.by_hand.setdefault(by_hand, new.where)

    def _versions(self) -> list[tuple[int, int]]:
        """Something that changes when anything is added to a `.grad`."""
        return [(id(p.grad), p.grad._version) for p in self.params if p.grad is not None]

    def _look_at_gradients(self, where: str) -> None:
        """Whether `.grad` is still as the perturbed pass left it."""
        update, now = self.update, values.gradients(self.params)
        changed = [p for p, g in update.last.items() if p not in now or not values.same_bits(g, now[p])]
        if not update.where("g2"):  # before it, the wrapper puts back what is None
            changed = [p for p in changed if p in now]
        if all(p not in now or not now[p].any() for p in changed):
            if changed:
                update.seen.append(_zeroed(self.zeroed_at or where, "while the parameters were perturbed"))
        elif not self.separate:
            update.seen.append(_changed(where))
        update.last = now

    # ------------------------------------------------------------------ the optimizer

    def _first_step(self, original: Callable[..., None], wrapper: GAPWrapper, *args: Any, **kwargs: Any) -> None:
        if wrapper.base_optimizer is not self.base or torch.compiler.is_compiling():
            return original(wrapper, *args, **kwargs)
        self.wrapper = wrapper  # of which nothing is known where the check was given the base optimizer
        self._forget_what_is_gone()
        if self.update.where("second_step"):  # and there was no step()
            self._finish_update()
        g1 = {p: g for p, g in values.gradients(self.params).items() if p.requires_grad}
        theta = {p: values.copy_of(p) for p in self.params}
        original(wrapper, *args, **kwargs)
        update, self.separate = self.update, bool(kwargs.get("separate"))
        update.call("first_step", here())
        self.grad_norm = wrapper.grad_norm
        update.theta, update.theta_star = theta, {p: values.copy_of(p) for p in theta}
        update.last = update.before_g2 = values.gradients(self.params)
        update.grad_norm = float(wrapper.grad_norm)  # type: ignore[arg-type]
        if not values.sharded(self.params):
            update.norms["g1"] = values.norm_of(g1)
            eps = {p: float(group["gap_eps"]) for group in self.base.param_groups for p in group["params"]}
            update.move = values.measure(theta, update.theta_star, g1, eps, wrapper.adaptive)
        self.begun(update)

    def _second_step(self, original: Callable[..., None], wrapper: GAPWrapper) -> None:
        if wrapper.base_optimizer is not self.base or torch.compiler.is_compiling():
            return original(wrapper)
        update, where = self.update, here()
        if self.perturbed:
            self._look_at_gradients(where)
            update.overwritten = not values.unchanged(update.theta_star)
            self._measure_g2(wrapper)
        original(wrapper)
        update.call("second_step", where)
        update.restored = values.unchanged(update.theta)
        update.theta_star, update.last, update.before_g2 = {}, {}, {}
        update.before_g_l = values.gradients(self.params)
        self.filled = values.any_gradient(self.params)

    def _measure_g2(self, wrapper: GAPWrapper) -> None:
        """Before .grad becomes the sum."""
        update = self.update
        if values.sharded(self.params):
            return
        update.norms["g2"] = values.norm_of(update.last, less=update.before_g2)
        update.aside = {p: values.copy_of(g) for p, g in wrapper._aside.items()}
        if update.aside:
            update.norms["g_l"] = values.norm_of(update.aside)

    @contextmanager
    def _set_aside(self, original: Callable[..., Any], wrapper: GAPWrapper) -> Iterator[None]:
        before = self.within_aside
        with original(wrapper):
            self.within_aside = before or wrapper.base_optimizer is self.base  # another network's may be within ours
            try:
                yield
            finally:
                self.within_aside = before

    def _before_step(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs before a step of the base optimizer. A closure makes the gradients within it."""
        if torch.compiler.is_compiling() or self.perturbed:  # which the wrapper refuses
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
        self._forget_what_is_gone()
        update = self.update
        update.call("step", where)
        update.step_by_hand = bool(update.theta) and values.moved(update.theta)
        if self.wrapper is not None:
            update.due = self.wrapper.due
            update.hidden = not update.where("first_step") and self.wrapper.grad_norm is not self.grad_norm
        self._finish_update()

    def _zero_grad(self, original: Callable[..., None], owner: Any, *args: Any, **kwargs: Any) -> None:
        original(owner, *args, **kwargs)
        if torch.compiler.is_compiling() or (owner is not self.base and owner not in self.parts):
            return
        self.zeroed_at = here()
        if self.update.where("first_step"):
            self.update.call("zero_grad", self.zeroed_at)

    def _unscale(self, original: Callable[..., None], scaler: torch.amp.GradScaler, optimizer: Optimizer) -> None:
        original(scaler, optimizer)
        if scaler.is_enabled() and optimizer.param_groups is self.base.param_groups:
            self.unscaled_at = here()

    def _scale(self, original: Callable[..., Any], scaler: torch.amp.GradScaler, outputs: Any) -> Any:
        self.scaled_again = bool(self.unscaled_at)
        return original(scaler, outputs)

    def _elsewhere(self) -> bool:
        """In another thread, or within a backward call."""
        return get_ident() != self.thread or torch._C._current_graph_task_id() != -1


def _memory(inputs: Any) -> set[StorageWeakRef]:
    """Of the tensors among `inputs`. (As a weak reference, for a number might come to name other memory.)"""
    try:
        return {StorageWeakRef(t.untyped_storage()) for t in fingerprints.tensors_in(inputs)}
    except RuntimeError:  # tensors without memory of their own, as in torch.func's transforms
        return set()


def _leftover(where: str) -> Finding:
    what = "when the first backward of this update began, .grad held the gradients of an earlier one: g1 contains them."
    return Finding("leftover", where, what, "call optimizer.zero_grad() after step().")


def _zeroed(where: str, when: str) -> Finding:
    what = f"gradients were zeroed {when}: what had been computed by then is lost."
    return Finding("zeroed", where, what, "zero gradients only between step() and the next update's first backward.")


def _unscaled(where: str) -> Finding:
    what = "gradients were unscaled while losses of this update were still to come, which the GradScaler has scaled."
    fix = "call scaler.unscale_(optimizer) once, after the last backward; to clip g1 before, scale max_norm."
    return Finding("unscaled", where, what, fix)


def _changed(where: str) -> Finding:
    what = "gradients were changed between first_step() and second_step(), where g1 and g2 are one sum."
    fix = "clip before first_step() or after second_step(), or use perturbed(model, separate=True) to clip g2 alone."
    return Finding("changed", where, what, fix)
