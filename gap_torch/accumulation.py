"""How g2 joins g1 in `.grad` between `first_step` and `second_step`.

Autograd adds g2 into the tensors that hold g1, so that no second copy of the gradients is needed; an alpha other than 1
is folded in as alpha * (g1 / alpha + g2). Where that can't be (`_can_accumulate`), g1 is kept apart.
"""

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .sharding import is_sharded, laid_out_as, local

SEPARATE = "use perturbed(model, separate=True) or first_step(separate=True), which keep g1 apart from it."
CREATE_GRAPH = "was computed with create_graph=True, whose gradients GAP can't accumulate: leave it out."


class Group(NamedTuple):
    """A parameter group as it was at `first_step`. (Lists: torch.compile is at odds with dicts of tensors.)"""

    eps: float | Tensor
    alpha: float
    params: list[Tensor]
    """With a gradient."""
    g1: list[Tensor]
    """Theirs."""
    others: list[Tensor]
    """Parameters without one."""

    @classmethod
    def snapshot(cls, group: dict[str, Any]) -> "Group":
        """Of one of an optimizer's `param_groups`."""
        params = list(dict.fromkeys(group["params"]))
        live = [p for p in params if p.requires_grad and p.grad is not None]
        others = [p for p in params if not p.requires_grad or p.grad is None]
        g1 = [p.grad for p in live if p.grad is not None]
        return cls(group["gap_eps"], group["gap_alpha"], live, g1, others)

    @property
    def moves(self) -> bool:
        """Whether its parameters are perturbed; the value of a tensor is the device's business."""
        return isinstance(self.eps, Tensor) or self.eps > 0


@dataclass
class _Sum:
    """Where a group's gradients are."""

    alpha: float
    collecting: list[Tensor]
    """Parameters whose `.grad` takes in g2: it holds g1 / alpha, or nothing, where there is no g1."""
    apart: list[Tensor] = field(default_factory=list)
    """Parameters whose g1 is kept apart, their `.grad` being None."""
    g1: list[Tensor] = field(default_factory=list)
    """Of the latter."""


class Accumulation:
    """Where g1 is while the perturbed pass computes g2.

    Args:
        groups: all parameters.
        kernels: `multi_tensor` or `single_tensor`.
        separate: keep all of g1 apart, so that `.grad` is g2 alone until `combine`.
    """

    def __init__(self, groups: list[Group], kernels: ModuleType, separate: bool) -> None:
        self.groups, self.kernels, self.separate = groups, kernels, separate
        self.sums: list[_Sum] = []
        self.in_place: list[tuple[Tensor, Tensor, int]] = []
        """Parameter, the tensor of g1 / alpha in its `.grad`, and that tensor's version."""
        self.hooks: list[Any] = []
        self.seen_backward = False

    def make_room_for_g2(self) -> None:
        """Arrange g1 so that the perturbed pass can add to it, and watch that it does."""
        in_place: list[tuple[Tensor, Tensor]] = []
        compiling = torch.compiler.is_compiling()
        for group in self.groups:
            total, here = _Sum(group.alpha, list(group.others)), []
            # a compiled step has no hooks: a zeroing would go unnoticed
            nowhere = self.separate or compiling or group.alpha == 0
            for p, g1 in zip(group.params, group.g1, strict=True):
                gradient = g1.clone() if _may_be_bucket_view(g1, compiling) else g1
                if nowhere or not _can_accumulate(p, gradient, group.alpha):
                    total.apart.append(p)
                    total.g1.append(gradient)
                    p.grad = None
                else:
                    total.collecting.append(p)
                    here.append(gradient)
                    if gradient is not g1:
                        p.grad = gradient
                    in_place.append((p, gradient))
            if here and group.alpha != 1:
                self.kernels.scale_(here, 1 / group.alpha)
            self.sums.append(total)
        if compiling:  # there all of g1 is apart, and there is nothing to put back
            return
        # versions only now that all are scaled: gradients of one storage share theirs
        self.in_place = [(p, gradient, gradient._version) for p, gradient in in_place]
        watched = [p for group in self.groups for p in group.params + group.others if p.requires_grad]
        self.hooks = [p.register_hook(self._before_accumulation) for p in watched]

    def combine(self) -> None:
        """`.grad` = g1 + alpha * g2 (Algorithm 1, line 9)."""
        apart = [p for total in self.sums for p in total.apart]
        # sharded and compiled gradients pass no hooks
        if not (self.seen_backward or any(p.grad is not None for p in apart)):
            raise RuntimeError(
                "no backward pass reached the parameters between first_step() and second_step(): run the same loss "
                "again, forward and backward, at the perturbed parameters. Where you put g2 into .grad by hand "
                f"(torch.func, gradient surgery), {SEPARATE}"
            )
        if any(
            p.grad is not None and p.grad.requires_grad for total in self.sums for p in total.collecting + total.apart
        ):
            raise RuntimeError(f"g2 {CREATE_GRAPH}")
        for p, g1, _ in self.in_place:
            # DDP may have taken the sum over into a bucket
            if p.grad is not g1 and not (p.grad is not None and p.grad._is_view() and _distributed()):
                raise RuntimeError(
                    "a .grad was replaced or dropped after g2 had been added to it (or create_graph=True did so): "
                    f"change gradients after second_step(). Where you put g2 into .grad by hand, {SEPARATE}"
                )
        held = {p for p, _, _ in self.in_place}
        for total in self.sums:
            if total.alpha != 1:
                live = [p for p in total.collecting if p.requires_grad or p in held]
                summed = [local(p.grad) for p in live if p.grad is not None]
                self.kernels.scale_(summed, total.alpha)
            for p, first in zip(total.apart, total.g1, strict=True):
                p.grad = _weighted_sum(p, first, p.grad, total.alpha)

    def stop_watching(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self.hooks:
            hook.remove()

    def _before_accumulation(self, _: Tensor) -> None:
        """Runs whenever g2 of a parameter is ready, before it is accumulated."""
        if self.seen_backward:
            return
        self.seen_backward = True
        for p, g1, version in self.in_place:
            if g1._version != version:
                raise RuntimeError(
                    "g1 was overwritten between first_step() and the perturbed backward, as "
                    "zero_grad(set_to_none=False) does. No zeroing is needed there: remove it, or let it set the "
                    "gradients to None."
                )
            p.grad = g1  # which model.zero_grad() has detached, or DDP, when it arranged its buckets anew


def _may_be_bucket_view(gradient: Tensor, compiling: bool) -> bool:
    """Whether this is somebody else's memory: DDP writes the next gradient into the same bucket."""
    if compiling:  # where tensors can't be asked
        return _distributed()
    return not is_sharded(gradient) and gradient._is_view()


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _can_accumulate(param: Tensor, g1: Tensor, alpha: float) -> bool:
    """Whether the perturbed pass may add g2 to g1 / alpha where g1 lies."""
    if is_sharded(param):  # FSDP2 accumulates past autograd's hooks: a zeroing would go unnoticed
        return False
    if alpha == 1:
        return True
    narrow = g1.dtype in (torch.float16, torch.bfloat16)
    return 1e-6 < alpha < 1e6 and not narrow  # else g1 / alpha may overflow


def _weighted_sum(param: Tensor, g1: Tensor, g2: Tensor | None, alpha: float) -> Tensor:
    if g2 is None or alpha == 0:
        return g1
    g2 = laid_out_as(param, g2)
    torch.add(local(g1), local(g2), alpha=alpha, out=local(g2))
    return g2
