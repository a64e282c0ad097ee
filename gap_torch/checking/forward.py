"""Eyes on the calls of a model: which samples go through it, in which state, and where gradients reach what it made."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from . import fingerprints, values
from .buffers import Buffers
from .loop import Loop
from .patches import Patches
from .places import here
from .update import Flow, Forward


class ForwardWatch:
    """Writes down the forward passes of an update."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.buffers = Buffers(loop.model)
        self.within_forward = False

    def hang_up(self, patches: Patches) -> None:
        """Patch the call of a module. Forward hooks would go along into deep copies and pickles of the model."""
        patches.replace(nn.Module, "__call__", self._forward)

    def _forward(self, original: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or module not in self.loop.parts:
            return original(module, *args, **kwargs)
        if self.within_forward or self.loop.elsewhere():  # a part of the model, or checkpointing's second forward
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
        self.loop.marks.outputs |= dict.fromkeys(_memory(output) - memory, forward)
        forward.training = frozenset(self._training(module))
        forward.batch_norm = any(isinstance(m, _BatchNorm) and m.training for m in module.modules())
        forward.moved = moved()
        if forward.tracked and not at_theta_star:
            self.buffers.look()
            self.loop.update.has_statistics = self.buffers.statistics()
        return output

    def _before_forward(self, module: nn.Module, inputs: Any) -> Forward:
        loop, with_grad = self.loop, torch.is_grad_enabled()
        loop.forget_what_is_gone()
        if with_grad:
            loop.copy_theta()
        samples = fingerprints.samples(inputs, self._is_data)
        tensors = fingerprints.tensors_in(inputs)
        for tensor, source in zip(tensors, map(self._source, tensors), strict=True):
            if source is not None:
                source.fed = True
                samples = samples or (source.samples if len(tensor) == len(source.samples) else [])
        adversarial = any(t.requires_grad and self._is_data(t) for t in tensors)
        by_hand = loop.moved_by_hand()
        forward = Forward(here(), loop.parts[module], loop.adds_to, by_hand, with_grad, samples, adversarial)
        loop.update.forwards.append(forward)
        return forward

    def _is_data(self, tensor: Tensor) -> bool:
        """Whether an input is no feature of a network, by way of autograd or detached."""
        return self._source(tensor) is None and not fingerprints.from_network(tensor, set(self.loop.params))

    def _source(self, tensor: Tensor) -> Forward | None:
        """The forward pass whose output this is, detached perhaps, or a view of it."""
        outputs = self.loop.marks.outputs
        return next((outputs[memory] for memory in _memory(tensor) if memory in outputs), None)

    def _training(self, module: nn.Module, name: str = "") -> Iterator[str]:
        """The names of modules in training mode; without parts that another optimizer trains, or none, as a teacher."""
        if module.training:
            yield name or type(module).__name__
        for child_name, child in module.named_children():
            if child in self.loop.parts or next(child.parameters(), None) is None:
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
        backward = self.loop.backward
        if backward is None:
            return  # torch.autograd.grad
        flow = Flow(backward.where)
        if gradient.ndim and gradient.numel() and len(gradient) == len(forward.samples):
            some, clear = values.with_gradient(gradient)
            flow.samples.update(compress(forward.samples, some))
            flow.clearly.update(compress(forward.samples, clear))
        elif gradient.any():
            flow.samples.update(forward.samples)
        backward.touched.append((forward, flow))


def _memory(inputs: Any) -> set[StorageWeakRef]:
    """Memory of the tensors among `inputs`. (As weak references, for a number might come to name other memory.)"""
    try:
        return {StorageWeakRef(t.untyped_storage()) for t in fingerprints.tensors_in(inputs)}
    except RuntimeError:  # tensors without memory of their own, as in torch.func's transforms
        return set()
