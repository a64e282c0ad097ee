"""How g2 joins g1 in `.grad` between `first_step` and `second_step`.

Autograd adds g2 into the tensors that hold g1, so that no second copy of the gradients is needed; an alpha other than 1
is folded in as alpha * (g1 / alpha + g2). Where that can't be (`_can_accumulate`), g1 is kept apart.

All of this runs in every step for every parameter, and on a GPU the host is what costs: what is asked is asked of whole
lists, and tensors are gone through one by one only where one of them is out of the ordinary.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import is_
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .hooks import Hooks
from .sharding import any_sharded, is_sharded, laid_out_as, local

SEPARATE = "use perturbed(model, separate=True) or first_step(separate=True), which keep g1 apart from it."
CREATE_GRAPH = "was computed with create_graph=True, whose gradients GAP can't accumulate: leave it out."


class Group(NamedTuple):
    """A parameter group as it was at `first_step`. (Lists: torch.compile is at odds with dicts of tensors.)"""

    eps: float | Tensor
    alpha: float
    params: list[Tensor]
    """Parameters with a gradient."""
    g1: list[Tensor]
    """Gradients of `params`."""
    others: list[Tensor]
    """Parameters without a gradient."""

    @classmethod
    def snapshot(cls, group: dict[str, Any]) -> "Group":
        """Snapshot of a group of an optimizer's `param_groups`."""
        every = list(dict.fromkeys(group["params"]))
        gradients = [p.grad if p.requires_grad else None for p in every]
        g1 = [g1 for g1 in gradients if g1 is not None]
        if len(g1) == len(every):
            return cls(group["gap_eps"], group["gap_alpha"], every, g1, [])
        params = [p for p, g1 in zip(every, gradients, strict=True) if g1 is not None]
        others = [p for p, g1 in zip(every, gradients, strict=True) if g1 is None]
        return cls(group["gap_eps"], group["gap_alpha"], params, g1, others)

    @property
    def moves(self) -> bool:
        """Whether the group's parameters are perturbed. (A tensor's value is not read: it may be on the device.)"""
        return isinstance(self.eps, Tensor) or self.eps > 0


@dataclass
class _Sum:
    """The sum of a group's gradients on its way."""

    group: Group
    g1: list[Tensor]
    in_place: bool
    """Whether `.grad` holds g1 / alpha and takes in g2. Else `.grad` starts from None."""
    versions: list[int] = field(default_factory=list)
    """Versions of the tensors in `g1`, if in place."""


class Accumulation:
    """Where g1 is while the perturbed pass computes g2.

    Args:
        groups: the groups of all parameters.
        kernels: `multi_tensor` or `single_tensor`.
        separate: keep all of g1 apart, so that `.grad` is g2 alone until `combine`.
    """

    def __init__(self, groups: list[Group], kernels: ModuleType, separate: bool) -> None:
        self.groups, self.kernels, self.separate = groups, kernels, separate
        self.sums: list[_Sum] = []
        self.hooks: list[Any] = []
        self.seen_backward = False

    def make_room_for_g2(self) -> None:
        """Arrange g1 so that the perturbed pass can add to it, and watch that it does."""
        compiling = torch.compiler.is_compiling()
        for group in self.groups:
            # a compiled step has no hooks: a zeroing would go unnoticed
            in_place = not (self.separate or compiling) and _can_accumulate(group)
            g1 = _own(group.g1, compiling)
            if not in_place:
                _set_gradients(group.params, [None] * len(group.params))
            elif g1 is not group.g1:
                _set_gradients(group.params, g1)
            if in_place and group.alpha != 1:
                self.kernels.scale_(g1, 1 / group.alpha)
            self.sums.append(_Sum(group, g1, in_place))
        if compiling:  # there all of g1 is apart, and there is nothing to put back
            return
        for total in self._in_place():  # only now that all are scaled: gradients of one storage share their version
            total.versions = [g1._version for g1 in total.g1]
        watched = [p for group in self.groups for p in group.params]
        watched += [p for group in self.groups for p in group.others if p.requires_grad]
        self.hooks.append(Hooks(watched, self._before_accumulation))

    def combine(self) -> None:
        """`.grad` = g1 + alpha * g2 (Algorithm 1, line 9)."""
        found = [[p.grad for p in total.group.params] for total in self.sums]
        self._check(found)
        for total, g2 in zip(self.sums, found, strict=True):
            group = total.group
            if not total.in_place:
                weighted = zip(group.params, total.g1, g2, strict=True)
                _set_gradients(group.params, [_weighted_sum(p, a, b, group.alpha) for p, a, b in weighted])
            if group.alpha != 1:
                summed = [*(g2 if total.in_place else []), *(p.grad for p in group.others if p.requires_grad)]
                self.kernels.scale_([local(g) for g in summed if g is not None], group.alpha)

    def stop_watching(self) -> None:
        """Take the hooks off the parameters and the base optimizer."""
        for hook in self.hooks:
            hook.remove()

    def _check(self, found: list[list[Tensor | None]]) -> None:
        """Raise RuntimeError unless `found`, each sum's gradients, are what a backward pass leaves."""
        # sharded and compiled gradients pass no hooks
        apart = (g for total, g2 in zip(self.sums, found, strict=True) if not total.in_place for g in g2)
        if not (self.seen_backward or any(g is not None for g in apart)):
            raise RuntimeError(
                "no backward pass reached the parameters between first_step() and second_step(): run the same loss "
                "again, forward and backward, at the perturbed parameters. Where you put g2 into .grad by hand "
                f"(torch.func, gradient surgery), {SEPARATE}"
            )
        for total, g2 in zip(self.sums, found, strict=True):
            added = total.in_place and all(map(is_, g2, total.g1))
            new = [*([] if added else g2), *(p.grad for p in total.group.others)]
            if any(g is not None and g.requires_grad for g in new):
                raise RuntimeError(f"g2 {CREATE_GRAPH}")
            if total.in_place and not added and not all(map(_is_or_may_be_bucket, g2, total.g1)):
                raise RuntimeError(
                    "a .grad was replaced or dropped after g2 had been added to it (or create_graph=True did so): "
                    f"change gradients after second_step(). Where you put g2 into .grad by hand, {SEPARATE}"
                )

    def _before_accumulation(self, _: Tensor) -> None:
        """Runs whenever g2 of a parameter is ready, before it is accumulated."""
        if self.seen_backward:
            return
        self.seen_backward = True
        for total in self._in_place():
            if [g1._version for g1 in total.g1] != total.versions:
                raise RuntimeError(
                    "g1 was overwritten between first_step() and the perturbed backward, as "
                    "zero_grad(set_to_none=False) does. No zeroing is needed there: remove it, or let it set the "
                    "gradients to None."
                )
        for total in self._in_place():
            # which model.zero_grad() has detached, or DDP, when it arranged its buckets anew
            _set_gradients(total.group.params, total.g1)

    def _in_place(self) -> Iterable[_Sum]:
        return (total for total in self.sums if total.in_place)


def _set_gradients(params: list[Tensor], gradients: list[Any]) -> None:
    for p, gradient in zip(params, gradients, strict=True):
        if p.grad is not gradient:
            p.grad = gradient


def _own(gradients: list[Tensor], compiling: bool) -> list[Tensor]:
    """`gradients`, with copies of views of other memory: DDP writes the next gradient into the same bucket."""
    if compiling:  # where tensors can't be asked
        return [g.clone() for g in gradients] if _distributed() else gradients
    if not any(map(Tensor._is_view, gradients)):
        return gradients
    return [g.clone() if g._is_view() and not is_sharded(g) else g for g in gradients]


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _is_or_may_be_bucket(gradient: Tensor | None, g1: Tensor) -> bool:
    """DDP may have taken the sum over into a bucket."""
    return gradient is g1 or (gradient is not None and gradient._is_view() and _distributed())


def _can_accumulate(group: Group) -> bool:
    """Whether the perturbed pass may add g2 to g1 / alpha where g1 lies."""
    if any_sharded(group.params):  # FSDP2 accumulates past autograd's hooks: a zeroing would go unnoticed
        return False
    if group.alpha == 1:
        return True
    narrow = any(g1.dtype in (torch.float16, torch.bfloat16) for g1 in group.g1)
    return 1e-6 < group.alpha < 1e6 and not narrow  # else g1 / alpha may overflow


def _weighted_sum(param: Tensor, g1: Tensor, g2: Tensor | None, alpha: float) -> Tensor:
    if g2 is None or alpha == 0:
        return g1
    g2 = laid_out_as(param, g2)
    torch.add(local(g1), local(g2), alpha=alpha, out=local(g2))
    return g2
