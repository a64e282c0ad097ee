"""eps, alpha and interval: where they live (in the parameter groups), and how a schedule changes them."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .warning import warn

Eps = float | Tensor | Callable[[int], float]
"""A radius: a number, a 0-dim tensor, or a function from the number of updates so far to the radius."""
KEYS = ("gap_eps", "gap_alpha", "gap_updates")
"""What GAP keeps in a parameter group, to be saved with it. (Plain `eps` and `alpha` are Adam's and RMSprop's.)"""


class Knobs:
    """The wrapper's knobs, and the groups' own, which win.

    Args:
        base: the optimizer whose groups they are written into.
        eps: radius, 0-dim tensor, or function from the number of updates so far to the radius.
        alpha: weight of g2.
        interval: GAP runs in every `interval`-th update.

    Raises:
        ValueError: `eps`, `alpha` or `interval` is out of range.
    """

    def __init__(self, base: Optimizer, eps: Eps, alpha: float, interval: int) -> None:
        if interval < 1:
            raise ValueError(f"interval must be at least 1, got {interval}.")
        self.base, self.interval = base, interval
        self.eps = eps if callable(eps) else check_eps("eps", eps)
        self.alpha = check_alpha("alpha", alpha)
        self.scheduled: set[int] = set()
        """Indices of the groups whose eps follows the schedule."""

    def fill_in(self) -> None:
        """Give every group an eps, an alpha and, where they matter, the number of updates.

        Raises:
            ValueError: a group's own eps or alpha is out of range.
        """
        for index, group in enumerate(self.base.param_groups):
            if callable(self.eps):
                if "gap_eps" not in group:
                    self.scheduled.add(index)
                if index in self.scheduled:
                    group["gap_eps"] = self.eps(self.updates)
            check_eps("gap_eps", group.setdefault("gap_eps", self.eps))
            check_alpha("gap_alpha", group.setdefault("gap_alpha", self.alpha))
            if self._counts:
                group.setdefault("gap_updates", self.updates)

    def warn_if_useless(self) -> None:
        """Warn if all groups have the same eps already, as in an optimizer that was wrapped, or loaded, before."""
        own = [group.get("gap_eps") for group in self.base.param_groups]
        alike = all(eps is own[0] or eps == own[0] for eps in own)
        if own[0] is None or not alike or own[0] is self.eps or own[0] == self.eps:
            return
        warn(
            f"GAP: eps={self.eps} has no effect, for the parameter groups have a gap_eps of their own, {own[0]}. If an "
            'earlier GAPWrapper or a checkpoint put it there, make the base optimizer anew, or del group["gap_eps"].'
        )

    @property
    def updates(self) -> int:
        """Number of updates so far, where updates are counted."""
        return self.base.param_groups[0].get("gap_updates", 0)

    def count_update(self) -> None:
        """To be called after an update of the base."""
        if self._counts:
            count = self.updates + 1
            for group in self.base.param_groups:
                group["gap_updates"] = count

    def loaded(self, before: list[dict[str, Any]]) -> None:
        """Complete the groups after `load_state_dict` has put new ones in the place of `before`."""
        for group, old in zip(self.base.param_groups, before, strict=True):
            for key in KEYS[:2]:
                if isinstance(old[key], Tensor):  # the user, or a CUDA graph, holds this very tensor
                    group[key] = old[key].copy_(torch.as_tensor(group.get(key, old[key]), device=old[key].device))
                group.setdefault(key, old[key])
        self.fill_in()

    @property
    def _counts(self) -> bool:
        # a number that nobody reads would make torch.compile trace the step anew
        return self.interval > 1 or callable(self.eps)


def check_eps(name: str, eps: Any) -> Any:
    """`eps`, if it is in range. The value of a tensor is not read: it may be on the device."""
    if isinstance(eps, Tensor):
        if eps.ndim or eps.is_complex():
            raise ValueError(f"{name} must be one real number, got a tensor {tuple(eps.shape)} of {eps.dtype}.")
        return eps
    return check_alpha(name, eps)


def check_alpha(name: str, alpha: Any) -> Any:
    """`alpha`, if it is in range."""
    if isinstance(alpha, Tensor):
        raise ValueError(f"{name} must be a plain number, not a tensor: the host decides by it.")
    if not 0 <= alpha < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {alpha}.")
    return alpha
