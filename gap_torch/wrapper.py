"""GAPWrapper: Gradient-based Adversarial Perturbation around any torch optimizer.

    method.loss(model, views).backward()          # g1
    with optimizer.perturbed(model):              # theta -> theta + eps * g1 / ||g1||
        method.loss(model, views).backward()      # g2
    supervised(model(x), y).backward()            # g_l
    optimizer.step()                              # the base optimizer's update with g1 + alpha * g2 + g_l
    optimizer.zero_grad()

Algorithm 1 of Huang et al., "GapMatch", AAAI 2025.
"""

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import LBFGS, Optimizer

from . import ranks
from .accumulation import CREATE_GRAPH, Group
from .batchnorm import frozen_running_stats
from .knobs import Eps, Knobs, check_alpha, check_eps
from .perturbation import Perturbation
from .rng import RNGState, replayed
from .sharding import is_sharded, local, reshard
from .warning import warn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


# what a pickle holds of the wrapper itself
_ARGUMENTS = ("base_optimizer", "eps", "alpha", "foreach", "adaptive", "interval")
_DEFAULTS = {"adaptive": False, "interval": 1}


# methods that schedule-free optimizers have, to go from the weights of training to those of evaluation and back
_MOVES_THETA = ("train", "eval")


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

    It shares `param_groups`, `state`, `defaults` and the step hooks with the base, so that schedulers, `GradScaler` and
    checkpoints work on the wrapper as on the base. Groups may override the two knobs under the keys `"gap_eps"` and
    `"gap_alpha"` (plain `eps` and `alpha` are taken by Adam and RMSprop). Both values may be changed between steps, as
    a learning rate may.

    Between `first_step` and `second_step` the gradients of the perturbed pass accumulate into `.grad` on top of g1, so
    the extra memory is one copy of the parameters, kept from step to step. There `zero_grad` is not needed: the
    wrapper's `zero_grad` does nothing, `model.zero_grad()` is noticed and does no harm, and a zeroing in place
    (`set_to_none=False`) is an error.

    Args:
        base_optimizer: an instance of any `torch.optim.Optimizer` but LBFGS.
        eps: radius of the perturbation in the units of the parameters (>= 0, Algorithm 1, line 7). A group
            with 0 stays where it is, though its gradient still counts in ||g1||. May be a 0-dim tensor, whose value is
            read on the device, or a schedule: a function from the number of updates so far to the radius.
        alpha: weight of g2 (>= 0, line 9).
        foreach: multi-tensor operations (default) or, if False, one tensor after the other.
        adaptive: ASAM's radius, in units of each weight's own size (Kwon et al., ICML 2021): theta moves by
            eps * |theta|^2 g1 / || |theta| g1 ||, element by element.
        interval: GAP runs in every `interval`-th update; `due` tells whether it runs in the present one.
        process_group: ranks that call every `first_step` together. If given, the ranks compare notes there first, so
            that a mistake of one rank is an error on all ranks and not a hang. Not part of a pickle.

    Raises:
        TypeError: `base_optimizer` is a class, no optimizer, a GAPWrapper, an LBFGS, or somebody else's proxy of an
            optimizer (what Accelerate's `prepare` returns).
        ValueError: `eps` or `alpha` is negative or not finite, or `interval` is less than 1.

    Examples:
        >>> import torch
        >>> from gap_torch import GAPWrapper
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), lr=0.1), eps=0.05)
        >>> unlabelled, labelled = torch.rand(4, 2), torch.rand(4, 2)
        >>> model(unlabelled).square().mean().backward()  # g1
        >>> with optimizer.perturbed(model):
        ...     model(unlabelled).square().mean().backward()  # g2, at theta*
        >>> model(labelled).square().mean().backward()  # g_l
        >>> optimizer.step()
        >>> optimizer.zero_grad()
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        eps: Eps = 0.1,
        alpha: float = 1.0,
        *,
        foreach: bool = True,
        adaptive: bool = False,
        interval: int = 1,
        process_group: "ProcessGroup | None" = None,
    ) -> None:
        # Optimizer.__init__ is not called: everything that it would set up is the base optimizer's own.
        _check_base(base_optimizer)
        self.base_optimizer = base_optimizer
        self.foreach, self.adaptive, self.process_group = foreach, adaptive, process_group
        self._knobs = Knobs(base_optimizer, eps, alpha, interval)
        self._perturbation = Perturbation()
        self._aside: dict[Tensor, Tensor] = {}
        self._unused_sum: list[Tensor] = []
        """One of the gradients that `second_step` made, until `step` or `zero_grad`."""
        # From here on attributes are changed in place only: Lightning runs these methods on an object of its own,
        # which reads this one's attributes and keeps what is assigned to itself.
        self._knobs.warn_if_useless()
        self._knobs.fill_in()

    # ------------------------------------------------------------------ the algorithm

    @property
    def grad_norm(self) -> Tensor | None:
        """||g1|| of the last `first_step`, 0-dim, on the device.

        In a GradScaler's units if one is used. If `adaptive`, || |theta| g1 ||.
        """
        return self._perturbation.grad_norm

    @property
    def due(self) -> bool:
        """Whether the present update is to have a perturbed pass: the first, and every `interval`-th after it."""
        return self._knobs.updates % self.interval == 0

    @torch.no_grad()
    def first_step(self, *, separate: bool = False) -> None:
        """theta -> theta* = theta + eps * g1 / ||g1|| (Algorithm 1, lines 6-7), with g1 in `.grad`.

        Where ||g1|| is zero or not finite the parameters stay as they are; the host does not wait to find
        out.

        Args:
            separate: keep g1 apart until `second_step`, so that the perturbed pass leaves g2 alone in `.grad`, to be
                clipped or looked at. This costs one copy of the gradients.

        Raises:
            RuntimeError: called twice, or not `due`; no parameter has a gradient, or a gradient is sparse or a graph of
                its own; with a `process_group`, any of these errors on one of its ranks, or ranks with different
                parameters.
        """
        if self.process_group is not None:
            ranks.check_together(self.process_group, self._checked_groups, self.param_groups)
        groups = self._checked_groups()
        try:
            self._warn_of_unused_sum(groups)
            self._perturbation.begin(groups, foreach=self.foreach, adaptive=self.adaptive, separate=separate)
            self._watch_base()
            self._forget_cached_theta()
        except BaseException:
            self._abandon()
            raise

    @torch.no_grad()
    def second_step(self) -> None:
        """theta* -> theta, bit for bit, and `.grad` = g1 + alpha * g2 (Algorithm 1, lines 9-10).

        A gradient that was set aside (`set_aside`) is added.

        Raises:
            RuntimeError: no `first_step` before it, or no usable gradient at theta*. Then theta is restored
                all the same, and all gradients are dropped.
        """
        accumulation = self._perturbation.accumulation
        if accumulation is None:
            raise RuntimeError("second_step() without first_step(): call first_step() after the backward of g1.")
        try:
            accumulation.combine()
            self._return_aside()
            self._restore()
            self._note_sum()
        except BaseException:
            self._abandon()
            raise

    @contextmanager
    def perturbed(
        self, model: nn.Module | None = None, *, rng: RNGState | None = None, separate: bool = False
    ) -> Iterator[None]:
        """`first_step` on entry, `second_step` on exit; the pass of g2 belongs inside.

        If the pass raises, the parameters are restored, all gradients are dropped (they are half a sum), and
        the exception goes on its way.

        Args:
            model: hold its batch-norm running statistics still inside (see `frozen_running_stats`), and let FSDP2
                gather its parameters anew after they have moved.
            rng: random state taken just before the pass of g1, so that the perturbed pass draws the same
                dropout masks. By default it draws its own, as any other pass does.
            separate: as for `first_step`.

        Raises:
            RuntimeError: as for `first_step` and `second_step`.
        """
        outer = self._perturbation.accumulation
        try:
            self.first_step(separate=separate)
            if model is not None:
                reshard(model)
            with (
                nullcontext() if model is None else frozen_running_stats(model),
                nullcontext() if rng is None else replayed(rng),
            ):
                yield
            self.second_step()
        except BaseException:
            if self._perturbation.accumulation is not outer:  # else nothing has been moved here, or it is back
                self._abandon()
            raise
        finally:
            if model is not None:
                reshard(model)

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Gradients computed inside stay out of g1; `second_step` adds them to the sum.

        For code whose labelled and unlabelled losses share one forward pass: the labelled backward has to
        come before the parameters move. This costs one copy of the gradients until `second_step`.

        Raises:
            RuntimeError: the parameters are perturbed.

        Examples:
            >>> import torch
            >>> from gap_torch import GAPWrapper
            >>> model = torch.nn.Linear(2, 1)
            >>> optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), lr=0.1), eps=0.05)
            >>> inputs = torch.ones(4, 2)
            >>> labelled, unlabelled = model(inputs).square().split([1, 3])
            >>> with optimizer.set_aside():
            ...     labelled.mean().backward(retain_graph=True)  # g_l
            >>> unlabelled.mean().backward()  # g1, without g_l
            >>> with optimizer.perturbed(model):
            ...     model(inputs[1:]).square().mean().backward()  # g2
            >>> optimizer.step()  # g1 + g2 + g_l
        """
        self._forbid_while_perturbed("set_aside()")
        params = list(self._params())
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

    def step(self, closure: Callable[[], float] | None = None, *args: Any, **kwargs: Any) -> Any:
        """The base optimizer's update with whatever is in `.grad` (line 13).

        Args:
            closure: as for the base optimizer's `step`.
            *args: further arguments of the base optimizer's `step`.
            **kwargs: further keyword arguments of the base optimizer's `step`.

        Returns:
            What the base optimizer's `step` returns.

        Raises:
            RuntimeError: the parameters are perturbed, or a set-aside gradient has not come back.
        """
        self._forbid_while_perturbed("step()")
        if self._aside and not self.due:
            self._return_aside()
        if self._aside:
            raise RuntimeError(
                "step() would lose the gradients that were set aside: they return at second_step(), so run "
                "the perturbed pass first, or leave set_aside() out of a step without GAP."
            )
        initialises = self._only_initialises()
        step = self.base_optimizer.step
        result = step(**kwargs) if closure is None and not args else step(closure, *args, **kwargs)
        if not initialises:
            self._knobs.count_update()
        self._unused_sum.clear()
        return result

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Clear the gradients, those that were set aside too. While the parameters are perturbed it does nothing.

        Args:
            set_to_none: as for the base optimizer; None for its default, also where it takes no argument.
        """
        if not self._perturbed:
            self._aside.clear()
            self._unused_sum.clear()
            zero_grad = self.base_optimizer.zero_grad
            # None is what a base that takes no argument sets; Accelerate passes True wherever the wrapper takes it
            if set_to_none and "set_to_none" not in inspect.signature(zero_grad).parameters:
                set_to_none = None
            zero_grad(**({} if set_to_none is None else {"set_to_none": set_to_none}))

    # ------------------------------------------------------------------ what makes it an Optimizer

    @property
    def eps(self) -> Eps:
        """Default radius of a group, or its schedule.

        To change it, write to `param_groups[i]["gap_eps"]`. A schedule overwrites this in groups that had no radius of
        their own.
        """
        return self._knobs.eps

    @property
    def alpha(self) -> float:
        """Default weight of g2 of a group. To change it, write to `param_groups[i]["gap_alpha"]`."""
        return self._knobs.alpha

    @property
    def interval(self) -> int:
        """GAP runs in every `interval`-th update."""
        return self._knobs.interval

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's own list."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups
        self._knobs.fill_in()

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
        """Add a group to the base optimizer; its `gap_eps` and `gap_alpha` default to the wrapper's `eps` and `alpha`.

        Args:
            param_group: as for the base optimizer.

        Raises:
            RuntimeError: the parameters are perturbed.
            ValueError: `gap_eps` or `gap_alpha` is negative or not finite.
        """
        self._forbid_while_perturbed("add_param_group()")
        if "gap_eps" in param_group:
            check_eps("gap_eps", param_group["gap_eps"])
        check_alpha("gap_alpha", param_group.get("gap_alpha", self.alpha))
        self.base_optimizer.add_param_group(param_group)
        self._knobs.fill_in()

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state, which a bare base optimizer can load too.

        Its groups carry `gap_eps` and `gap_alpha`, and `gap_updates` where a schedule or an interval counts updates.

        Raises:
            RuntimeError: the parameters are perturbed.
        """
        self._forbid_while_perturbed("state_dict()")
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of a wrapper, or of a bare base optimizer: then the groups keep their eps and alpha.

        Args:
            state_dict: what `state_dict` returned.

        Raises:
            RuntimeError: the parameters are perturbed.
        """
        self._forbid_while_perturbed("load_state_dict()")
        before = [dict(group) for group in self.param_groups]
        self.base_optimizer.load_state_dict(state_dict)
        self._knobs.loaded(before)
        self._aside.clear()

    def __getattr__(self, name: str) -> Any:
        # hooks, and whatever else a base optimizer has beyond torch.optim.Optimizer
        if name == "base_optimizer":  # not there yet while unpickling
            raise AttributeError(name)
        try:
            found = getattr(self.base_optimizer, name)
        except AttributeError:
            base = type(self.base_optimizer).__name__
            raise AttributeError(f"neither GAPWrapper nor its base optimizer, {base}, has {name!r}.") from None
        if name in _MOVES_THETA:
            self._forbid_while_perturbed(f"{name}()")
        return found

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler may leave unscaling, and skipping a step, to `step`.

        It looks for `grad_scaler` in the signature of `step`, and the wrapper's has none: where the base optimizer's
        has it, the scaler is to do both itself.
        """
        base = self.base_optimizer
        takes_scaler = "grad_scaler" in inspect.signature(base.step).parameters
        return getattr(base, "_step_supports_amp_scaling", False) and not takes_scaler

    # What a GradScaler sets before `step` and deletes after it. The step of a fused base looks for it there.
    grad_scale = _OnBase()
    found_inf = _OnBase()

    def __getstate__(self) -> dict[str, Any]:
        self._forbid_while_perturbed("copying or pickling")
        if self._aside:
            raise RuntimeError(
                "copying or pickling would lose the gradients that were set aside: do it after the step."
            )
        return {**{key: getattr(self, key) for key in _ARGUMENTS}, "scheduled": self._knobs.scheduled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the groups have their knobs already, and keep them
            self.__init__(**{key: state[key] for key in _ARGUMENTS})  # type: ignore[misc]
        self._knobs.scheduled.update(state["scheduled"])

    def __repr__(self) -> str:
        knobs = {"eps": self.eps, "alpha": self.alpha, "adaptive": self.adaptive, "interval": self.interval}
        shown = [f"{name}={value}" for name, value in knobs.items() if value != _DEFAULTS.get(name)]
        return f"GAPWrapper({', '.join(shown)}, base_optimizer={self.base_optimizer!r})"

    # ------------------------------------------------------------------ details

    def _params(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def _watch_base(self) -> None:
        """Make a step of the base optimizer, behind the wrapper's back, an error while perturbed."""
        accumulation = self._perturbation.accumulation
        if accumulation is not None and not torch.compiler.is_compiling():
            hook = self.base_optimizer.register_step_pre_hook(lambda *_: self._forbid_while_perturbed("step()"))
            accumulation.hooks.append(hook)

    def _note_sum(self) -> None:
        if not torch.compiler.is_compiling():
            # DDP hands the same views out again and again
            sums = (g for p in self._params() if (g := p.grad) is not None and not (is_sharded(p) or g._is_view()))
            self._unused_sum[:] = sorted(islice(sums, 8), key=Tensor.numel)[:1]  # a small one, for it is held

    def _warn_of_unused_sum(self, groups: list[Group]) -> None:
        if torch.compiler.is_compiling():
            return
        if any(g1 is old for old in self._unused_sum for group in groups for g1 in group.g1):
            warn(
                "GAP: first_step() takes as g1 what it finds in .grad, where the last second_step() left its sum, and "
                "the wrapper has seen no step() or zero_grad() since. To accumulate micro-batches, let each of the "
                "three passes go over all of them."
            )
        self._unused_sum.clear()

    def _only_initialises(self) -> bool:
        """Whether this is torch's own step that makes an optimizer's state: learning rate and gradients are zero."""
        if torch.compiler.is_compiling() or self.state:
            return False
        rates = [group.get("lr", 1.0) for group in self.param_groups]
        if any(isinstance(lr, Tensor) and lr.is_cuda for lr in rates) or any(lr != 0 for lr in rates):
            return False  # that step's are on the CPU
        return not any(p.grad is not None and local(p.grad).any() for p in self._params())

    def _checked_groups(self) -> list[Group]:
        """The parameter groups as they are, if this is the time for a `first_step`."""
        self._forbid_while_perturbed("first_step() a second time")
        self._knobs.fill_in()
        if not self.due:
            raise RuntimeError(
                f"first_step() in an update without GAP (interval={self.interval}): put the perturbed pass under "
                "`if optimizer.due:`."
            )
        groups = [Group.snapshot(group) for group in self.param_groups]
        _check_first_gradients([g1 for group in groups for g1 in group.g1])
        return groups

    def _forbid_while_perturbed(self, action: str) -> None:
        if self._perturbed:
            raise RuntimeError(
                f"{action} while the parameters are perturbed: call second_step() first "
                "(or leave the `with optimizer.perturbed()` block)."
            )

    @property
    def _perturbed(self) -> bool:
        return self._perturbation.accumulation is not None

    def _restore(self) -> None:
        self._perturbation.restore()
        self._forget_cached_theta()

    @staticmethod
    def _forget_cached_theta() -> None:
        if not torch.compiler.is_compiling():
            # a region of autocast or `parametrize.cached()` around both passes would go on with other weights
            torch.clear_autocast_cache()
            parametrize._cache.clear()

    def _return_aside(self) -> None:
        for p, gradient in self._aside.items():
            p.grad = gradient if p.grad is None else p.grad.add_(gradient)
        self._aside.clear()

    @torch.no_grad()
    def _abandon(self) -> None:
        if self._perturbed:
            self._restore()
        self._aside.clear()
        _drop_gradients(self._params())


def _drop_gradients(params: Iterable[Tensor]) -> None:
    for p in params:
        p.grad = None


def _check_first_gradients(g1: list[Tensor]) -> None:
    if not g1:
        raise RuntimeError(
            "first_step() found no gradient: call backward() on the consistency loss before it, on a model "
            "whose parameters this optimizer holds."
        )
    if {g.layout for g in g1} != {torch.strided}:
        shape = next(tuple(g.shape) for g in g1 if g.layout != torch.strided)
        raise RuntimeError(f"first_step() can't take the sparse gradient of a parameter of shape {shape}.")
    if any(map(attrgetter("requires_grad"), g1)):
        raise RuntimeError(f"g1 {CREATE_GRAPH}")


def _check_base(base: object) -> None:
    if isinstance(base, type):
        raise TypeError(f"base_optimizer must be an instance: GAPWrapper({base.__name__}(model.parameters(), ...)).")
    if not isinstance(base, Optimizer):
        raise TypeError(f"base_optimizer must be a torch.optim.Optimizer, not {type(base).__name__}.")
    if isinstance(base, GAPWrapper):
        raise TypeError("base_optimizer is a GAPWrapper already: wrap the optimizer inside it once.")
    if not hasattr(base, "_optimizer_step_pre_hooks"):
        raise TypeError(
            f"{type(base).__name__} is a proxy of an optimizer, without what Optimizer.__init__ sets up: wrap the "
            "optimizer inside it, before prepare() (Accelerate) or whatever made the proxy."
        )
    if isinstance(base, LBFGS):
        raise TypeError(
            "LBFGS can't be wrapped: its step evaluates the loss at several points along a line and needs "
            "the plain gradient of that loss at each, not one sum g1 + alpha * g2 + g_l."
        )
