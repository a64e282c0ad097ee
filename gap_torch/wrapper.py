"""GAPWrapper: Gradient-based Adversarial Perturbation around any torch optimizer.

    method.loss(model, views).backward()          # g1
    with optimizer.perturbed(model):              # theta -> theta + eps * g1 / ||g1||
        method.loss(model, views).backward()      # g2
    supervised(model(x), y).backward()            # g_l
    optimizer.step()                              # the base optimizer's update with g1 + alpha * g2 + g_l
    optimizer.zero_grad()

Algorithm 1 of Huang et al., "GapMatch", AAAI 2025.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from . import multi_tensor
from .batchnorm import frozen_running_stats
from .rng import RNGState, replayed

_CREATE_GRAPH = "was computed with create_graph=True, whose gradients GAP can't accumulate: leave it out."


class _OnBase:
    """An attribute that is set on, read from and deleted from the base optimizer."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, wrapper: "GAPWrapper | None", owner: type) -> Any:
        return self if wrapper is None else getattr(wrapper.base_optimizer, self.name)

    def __set__(self, wrapper: "GAPWrapper", value: Any) -> None:
        setattr(wrapper.base_optimizer, self.name, value)

    def __delete__(self, wrapper: "GAPWrapper") -> None:
        delattr(wrapper.base_optimizer, self.name)


class GAPWrapper(Optimizer):
    """A `torch.optim.Optimizer` that adds GAP's perturbed gradient to those of a base optimizer.

    It shares `param_groups`, `state`, `defaults` and the step hooks with the base, so that schedulers,
    `GradScaler` and checkpoints meet what they would meet there. Groups may override the two knobs under
    the keys `"gap_eps"` and `"gap_alpha"` (plain `eps` and `alpha` are taken by Adam and RMSprop), and those
    may be changed between steps, as a learning rate may.

    Between `first_step` and `second_step` the gradients of the perturbed pass accumulate into `.grad` on top of g1, so
    the extra memory is one copy of the parameters, kept from step to step. `zero_grad` is not needed there; the
    wrapper's own does nothing, `model.zero_grad()` is noticed and does no harm, and a zeroing in place
    (`set_to_none=False`) is an error.

    Args:
        base_optimizer: an instance of any `torch.optim.Optimizer` but LBFGS.
        eps: radius of the perturbation in the units of the parameters (>= 0, Algorithm 1, line 7). A group
            with 0 stays where it is, though its gradient still counts in ||g1||.
        alpha: weight of g2 (>= 0, line 9).
        foreach: multi-tensor operations (default) or, if False, one tensor after the other.

    Raises:
        TypeError: `base_optimizer` is a class, no optimizer, a GAPWrapper, or an LBFGS.
        ValueError: `eps` or `alpha` is negative or not finite.
    """

    def __init__(
        self, base_optimizer: Optimizer, eps: float = 0.1, alpha: float = 1.0, *, foreach: bool = True
    ) -> None:
        # Optimizer.__init__ is not called: everything that it would set up is the base optimizer's own.
        _check_base(base_optimizer)
        self.base_optimizer = base_optimizer
        self._eps = _check_knob("eps", eps)
        self._alpha = _check_knob("alpha", alpha)
        self.foreach = foreach
        self._pending: _Pending | None = None
        self._aside: dict[Tensor, Tensor] = {}
        self._copies: dict[Tensor, Tensor] = {}
        self.grad_norm: Tensor | None = None
        """||g1|| of the last `first_step` (0-dim, on the device; in a GradScaler's units if one is used)."""
        self._fill_in_knobs()

    # ------------------------------------------------------------------ the algorithm

    @torch.no_grad()
    def first_step(self) -> None:
        """theta -> theta* = theta + eps * g1 / ||g1|| (Algorithm 1, lines 6-7), with g1 in `.grad`.

        Where ||g1|| is zero or not finite the parameters stay as they are; the host does not wait to find
        out.

        Raises:
            RuntimeError: called twice, no parameter has a gradient, or a gradient is sparse or a graph of its
                own.
        """
        self._forbid_while_perturbed("first_step() a second time")
        self._fill_in_knobs()
        g1 = {p: p.grad for p in self._params() if p.requires_grad and p.grad is not None}
        _check_first_gradients(g1)
        self.grad_norm = multi_tensor.global_norm(list(g1.values()), self.foreach)
        self._pending = _Pending([_Group.snapshot(group) for group in self.param_groups], self.foreach)
        try:
            self._perturb(g1)
            self._pending.make_room_for_g2(g1)
        except BaseException:
            self._abandon()
            raise
        torch.clear_autocast_cache()  # a region around both passes would go on with its copies of theta

    @torch.no_grad()
    def second_step(self) -> None:
        """theta* -> theta, bit for bit, and `.grad` = g1 + alpha * g2 (Algorithm 1, lines 9-10).

        A gradient that was set aside (`set_aside`) is added.

        Raises:
            RuntimeError: no `first_step` before it, or no usable gradient at theta*. Then theta is restored
                all the same, and all gradients are dropped.
        """
        if self._pending is None:
            raise RuntimeError("second_step() without first_step(): call first_step() after the backward of g1.")
        try:
            self._pending.combine()
            self._return_aside()
            self._restore()
        except BaseException:
            self._abandon()
            raise

    @contextmanager
    def perturbed(self, model: nn.Module | None = None, *, rng: RNGState | None = None) -> Iterator[None]:
        """`first_step` on entry, `second_step` on exit; the pass of g2 belongs inside.

        If the pass raises, the parameters are restored, all gradients are dropped (they are half a sum), and
        the exception goes on its way.

        Args:
            model: hold its batch-norm running statistics still inside (see `frozen_running_stats`).
            rng: random state taken just before the pass of g1, so that the perturbed pass draws the same
                dropout masks. By default it draws its own, as any other pass does.
        """
        self._forbid_while_perturbed("perturbed() a second time")
        try:
            self.first_step()
            with (
                nullcontext() if model is None else frozen_running_stats(model),
                nullcontext() if rng is None else replayed(rng),
            ):
                yield
            self.second_step()
        except BaseException:
            self._abandon()
            raise

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Gradients computed inside stay out of g1; `second_step` adds them to the sum.

        For code whose labelled and unlabelled losses share one forward pass: the labelled backward has to
        come before the parameters move. Costs one copy of the gradients until `second_step`.

            with optimizer.set_aside():
                labelled_loss.backward(retain_graph=True)
            unlabelled_loss.backward()
            with optimizer.perturbed(model):
                ...
        """
        self._forbid_while_perturbed("set_aside()")
        params = [p for group in self.param_groups for p in group["params"]]
        # a view is DDP's memory, which the backward inside would write to
        before = {p: p.grad.clone() if p.grad is not None and p.grad._is_view() else p.grad for p in params}
        _drop_gradients(params)
        try:
            yield
            self._forbid_while_perturbed("leaving set_aside()")
            for p in params:
                if p.grad is not None:
                    # a copy: distributed wrappers may use the same memory for every gradient of p
                    self._aside[p] = self._aside[p].add_(p.grad) if p in self._aside else p.grad.clone()
        finally:
            for p in params:
                p.grad = before[p]

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """The base optimizer's update with whatever is in `.grad` (line 13).

        Raises:
            RuntimeError: the parameters are perturbed, or a set-aside gradient has not come back.
        """
        self._forbid_while_perturbed("step()")
        if self._aside:
            raise RuntimeError(
                "step() would lose the gradients that were set aside: they return at second_step(), so run "
                "the perturbed pass first, or leave set_aside() out of a step without GAP."
            )
        return self.base_optimizer.step(closure) if closure is not None else self.base_optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the base optimizer's, and what was set aside goes too. While perturbed it does nothing."""
        if self._pending is None:
            self._aside = {}
            self.base_optimizer.zero_grad(set_to_none)

    # ------------------------------------------------------------------ what makes it an Optimizer

    @property
    def eps(self) -> float:
        """Default radius of a group. To change it, write to `param_groups[i]["gap_eps"]`."""
        return self._eps

    @property
    def alpha(self) -> float:
        """Default weight of g2 of a group. To change it, write to `param_groups[i]["gap_alpha"]`."""
        return self._alpha

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's own list."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups
        self._fill_in_knobs()

    @property
    def state(self) -> Any:
        """The base optimizer's own state."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base_optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The base optimizer's own defaults."""
        return self.base_optimizer.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the base optimizer's; `gap_eps` and `gap_alpha` default to the wrapper's."""
        self._forbid_while_perturbed("add_param_group()")
        _check_knob("gap_eps", param_group.get("gap_eps", self.eps))
        _check_knob("gap_alpha", param_group.get("gap_alpha", self.alpha))
        self.base_optimizer.add_param_group(param_group)
        self._fill_in_knobs()

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state; its groups carry `gap_eps` and `gap_alpha`. A bare base can load it."""
        self._forbid_while_perturbed("state_dict()")
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, or a bare base optimizer's: then the groups keep their own knobs."""
        self._forbid_while_perturbed("load_state_dict()")
        knobs = [(group["gap_eps"], group["gap_alpha"]) for group in self.param_groups]
        self.base_optimizer.load_state_dict(state_dict)
        for group, (eps, alpha) in zip(self.param_groups, knobs, strict=True):
            group.setdefault("gap_eps", eps)
            group.setdefault("gap_alpha", alpha)
        self._aside = {}

    def __getattr__(self, name: str) -> Any:
        # hooks, and whatever else a base optimizer has beyond torch.optim.Optimizer
        if name == "base_optimizer":  # not there yet while unpickling
            raise AttributeError(name)
        try:
            return getattr(self.base_optimizer, name)
        except AttributeError:
            base = type(self.base_optimizer).__name__
            raise AttributeError(f"neither GAPWrapper nor its base optimizer, {base}, has {name!r}.") from None

    # What a GradScaler sets before `step` and deletes after it. The step of a fused base looks for it there.
    grad_scale = _OnBase()
    found_inf = _OnBase()

    def __getstate__(self) -> dict[str, Any]:
        self._forbid_while_perturbed("copying or pickling")
        if self._aside:
            raise RuntimeError(
                "copying or pickling would lose the gradients that were set aside: do it after the step."
            )
        return {key: getattr(self, key) for key in ("base_optimizer", "eps", "alpha", "foreach")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"GAPWrapper(eps={self.eps}, alpha={self.alpha}, base_optimizer={self.base_optimizer!r})"

    # ------------------------------------------------------------------ details

    def _params(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def _fill_in_knobs(self) -> None:
        for group in self.param_groups:
            _check_knob("gap_eps", group.setdefault("gap_eps", self.eps))
            _check_knob("gap_alpha", group.setdefault("gap_alpha", self.alpha))

    def _forbid_while_perturbed(self, action: str) -> None:
        if self._pending is not None:
            raise RuntimeError(
                f"{action} while the parameters are perturbed: call second_step() first "
                "(or leave the `with optimizer.perturbed()` block)."
            )

    def _perturb(self, g1: dict[Tensor, Tensor]) -> None:
        assert self.grad_norm is not None
        assert self._pending is not None
        moving = [(group.eps, [p for p in group.params if p in g1]) for group in self._pending.groups if group.eps > 0]
        self._back_up([p for _, params in moving for p in params])
        for eps, params in moving:
            multi_tensor.perturb(params, [g1[p] for p in params], self.grad_norm, eps, self.foreach)

    def _back_up(self, params: list[Tensor]) -> None:
        assert self._pending is not None
        for p in params:
            if p not in self._copies or not _alike(p, self._copies[p]):
                self._copies[p] = torch.empty_like(p)
        multi_tensor.backup(params, [self._copies[p] for p in params], self.foreach)
        self._pending.moved = params

    def _restore(self) -> None:
        assert self._pending is not None
        moved = self._pending.moved
        multi_tensor.restore(moved, [self._copies[p] for p in moved], self.foreach)
        torch.clear_autocast_cache()
        self._pending.stop_watching()
        self._pending = None

    def _return_aside(self) -> None:
        for p, gradient in self._aside.items():
            p.grad = gradient if p.grad is None else p.grad.add_(gradient)
        self._aside = {}

    @torch.no_grad()
    def _abandon(self) -> None:
        if self._pending is not None:
            self._restore()
        self._aside = {}
        _drop_gradients(self._params())


class _Group(NamedTuple):
    """A parameter group as it was at `first_step`."""

    params: list[Tensor]
    eps: float
    alpha: float

    @classmethod
    def snapshot(cls, group: dict[str, Any]) -> "_Group":
        return cls(list(dict.fromkeys(group["params"])), group["gap_eps"], group["gap_alpha"])


@dataclass
class _Pending:
    """What lies between `first_step` and `second_step`: where g1 is, and how g2 joins it.

    Autograd adds g2 into the tensors that hold g1, so that no second copy of the gradients is needed; an alpha
    other than 1 is folded in as alpha * (g1 / alpha + g2). Where that can't be (`_can_accumulate`), g1 is kept apart.
    """

    groups: list[_Group]
    foreach: bool
    moved: list[Tensor] = field(default_factory=list)
    """Parameters at theta*."""
    in_place: dict[Tensor, tuple[Tensor, int]] = field(default_factory=dict)
    """Parameter -> the tensor of g1 / alpha in its `.grad`, and that tensor's version."""
    apart: dict[Tensor, Tensor] = field(default_factory=dict)
    """Parameter -> g1, its `.grad` being None."""
    hooks: list[Any] = field(default_factory=list)
    seen_backward: bool = False

    def make_room_for_g2(self, g1: dict[Tensor, Tensor]) -> None:
        """Arrange g1 so that the perturbed pass can add to it, and watch that it does."""
        in_place: list[Tensor] = []
        for group in self.groups:
            here = [p for p in group.params if p in g1 and _can_accumulate(g1[p], group.alpha)]
            if here and group.alpha != 1:
                multi_tensor.scale_([g1[p] for p in here], 1 / group.alpha, self.foreach)
            in_place += here
        # versions only now that all are scaled: gradients of one storage share theirs
        self.in_place = {p: (g1[p], g1[p]._version) for p in in_place}
        for p, gradient in g1.items():
            if p not in self.in_place:
                # a view is somebody else's memory: DDP writes the next gradient into the same bucket
                self.apart[p] = gradient.clone() if gradient._is_view() else gradient
                p.grad = None
        self.hooks = [p.register_hook(self._before_accumulation) for p in g1]

    def combine(self) -> None:
        """`.grad` = g1 + alpha * g2 (Algorithm 1, line 9)."""
        if not self.seen_backward:
            raise RuntimeError(
                "no gradient was computed between first_step() and second_step(): run the same loss again, forward "
                "and backward, at the perturbed parameters."
            )
        if any(p.grad is not None and p.grad.requires_grad for group in self.groups for p in group.params):
            raise RuntimeError(f"g2 {_CREATE_GRAPH}")
        for p, (g1, _) in self.in_place.items():
            # DDP may have taken the sum over into a bucket
            if p.grad is not g1 and (p.grad is None or not p.grad._is_view()):
                raise RuntimeError(
                    "a .grad was replaced or dropped after g2 had been added to it (or create_graph=True did so): "
                    "change gradients after second_step()."
                )
        for group in self.groups:
            if group.alpha != 1:
                live = [p for p in group.params if p.requires_grad and p not in self.apart]
                summed = [p.grad for p in live if p.grad is not None]
                multi_tensor.scale_(summed, group.alpha, self.foreach)
            for p in group.params:
                if p in self.apart:
                    p.grad = _weighted_sum(self.apart[p], p.grad, group.alpha)

    def stop_watching(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _before_accumulation(self, _: Tensor) -> None:
        """Runs whenever g2 of a parameter is ready, before it is accumulated."""
        if self.seen_backward:
            return
        self.seen_backward = True
        for p, (g1, version) in self.in_place.items():
            if g1._version != version:
                raise RuntimeError(
                    "g1 was overwritten between first_step() and the perturbed backward, as "
                    "zero_grad(set_to_none=False) does. No zeroing is needed there: remove it, or let it set the "
                    "gradients to None."
                )
            p.grad = g1  # which model.zero_grad() has detached, or DDP, when it arranged its buckets anew


def _can_accumulate(g1: Tensor, alpha: float) -> bool:
    """Whether the perturbed pass may add g2 to g1 / alpha where g1 lies."""
    if g1._is_view() or alpha == 0:
        return False
    narrow = g1.dtype in (torch.float16, torch.bfloat16)
    return alpha == 1 or (1e-6 < alpha < 1e6 and not narrow)  # else g1 / alpha may overflow


def _weighted_sum(g1: Tensor, g2: Tensor | None, alpha: float) -> Tensor:
    return g1 if g2 is None or alpha == 0 else torch.add(g1, g2, alpha=alpha, out=g2)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype and a.device == b.device


def _drop_gradients(params: Iterable[Tensor]) -> None:
    for p in params:
        p.grad = None


def _check_first_gradients(g1: dict[Tensor, Tensor]) -> None:
    if not g1:
        raise RuntimeError(
            "first_step() found no gradient: call backward() on the consistency loss before it, on a model "
            "whose parameters this optimizer holds."
        )
    for p, gradient in g1.items():
        if gradient.layout != torch.strided:
            raise RuntimeError(f"first_step() can't take the sparse gradient of a parameter of shape {tuple(p.shape)}.")
        if gradient.requires_grad:
            raise RuntimeError(f"g1 {_CREATE_GRAPH}")


def _check_base(base: object) -> None:
    if isinstance(base, type):
        raise TypeError(f"base_optimizer must be an instance: GAPWrapper({base.__name__}(model.parameters(), ...)).")
    if not isinstance(base, Optimizer):
        raise TypeError(f"base_optimizer must be a torch.optim.Optimizer, not {type(base).__name__}.")
    if isinstance(base, GAPWrapper):
        raise TypeError("base_optimizer is a GAPWrapper already: wrap the optimizer inside it once.")
    if isinstance(base, LBFGS):
        raise TypeError(
            "LBFGS can't be wrapped: its step evaluates the loss at several points along a line and needs "
            "the plain gradient of that loss at each, not one sum g1 + alpha * g2 + g_l."
        )


def _check_knob(name: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and not negative, got {value}.")
    return value
