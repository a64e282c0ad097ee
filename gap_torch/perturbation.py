"""theta -> theta* = theta + eps * g1 / ||g1||, and back to theta bit for bit (Algorithm 1, lines 6, 7 and 10)."""

import math
from types import ModuleType

import torch
from torch import Tensor

from . import multi_tensor, sharding, single_tensor
from .accumulation import Accumulation, Group
from .memory import Memory
from .rounding import HALF, warn_if_rounded_away
from .sharding import all_local, local
from .tensors import by_kind


class Perturbation:
    """Moves parameters along g1 and puts them back.

    An object of its own, for torch.compile takes note of attributes that change, but not on an optimizer.
    """

    def __init__(self) -> None:
        self.memory = Memory()
        """Memory for theta."""
        self.moved: list[tuple[list[Tensor], list[Tensor]]] = []
        """Parameters that are to be put back, and the copies of their theta: a pair of lists for each device and
        dtype."""
        self.accumulation: Accumulation | None = None
        """Accumulation of g1 and g2, while the parameters are perturbed."""
        self.grad_norm: Tensor | None = None
        self.kernels: ModuleType = multi_tensor
        """`multi_tensor` or `single_tensor`, chosen once a step."""
        self.rounding_checked = False

    def begin(self, groups: list[Group], *, foreach: bool, adaptive: bool, separate: bool) -> None:
        """Move the parameters of `groups` along their g1, and make room for g2 in `.grad`."""
        self.kernels = multi_tensor if foreach else single_tensor
        groups = [group._replace(g1=sharding.all_laid_out_as(group.params, group.g1)) for group in groups]
        self.accumulation = Accumulation(groups, self.kernels, separate)
        directions = self._directions(groups, adaptive)
        self._move(groups, directions)
        if not (self.rounding_checked or torch.compiler.is_compiling() or _capturing()):
            self.rounding_checked = self._check_rounding(groups, directions)
        self.accumulation.make_room_for_g2()

    def restore(self) -> None:
        """Put everything back that `begin` moved; `.grad` is not touched."""
        assert self.accumulation is not None
        for params, theta in self.moved:
            self.kernels.restore(all_local(params), theta)
        self.accumulation.stop_watching()
        self.moved, self.accumulation = [], None

    def _directions(self, groups: list[Group], adaptive: bool) -> list[list[Tensor]]:
        """Directions in which each group's parameters move, by eps / `grad_norm` of them."""
        directions = [group.g1 for group in groups]
        if adaptive:
            directions = [_times_size(group.params, along) for group, along in zip(groups, directions, strict=True)]
        self.grad_norm = sharding.joint_norm(_concatenated(directions), self.kernels.global_norm)
        if adaptive:
            directions = [_times_size(group.params, along) for group, along in zip(groups, directions, strict=True)]
        return [all_local(along) for along in directions]

    def _move(self, groups: list[Group], directions: list[list[Tensor]]) -> None:
        assert self.grad_norm is not None
        moving = [(group, along) for group, along in zip(groups, directions, strict=True) if group.moves and along]
        params = _concatenated([group.params for group, _ in moving])
        shards = [all_local(group.params) for group, _ in moving]
        most = sum(len(group.params) + len(group.others) for group in groups)
        theta = self.memory.like(params, _concatenated(shards), most)
        parts = self._parts(_concatenated(shards), theta, params)
        for here, copies, _ in parts:
            self.kernels.backup(here, copies)
        self.moved = [(whole, copies) for _, copies, whole in parts]  # to be restored from now on
        for (group, along), own in zip(moving, shards, strict=True):
            for here, along_here in self._parts(own, along):
                self.kernels.perturb(here, along_here, self.grad_norm, group.eps)

    def _parts(self, *lists: list[Tensor]) -> list[tuple[list[Tensor], ...]]:
        """`lists`, cut into parts of one device and dtype."""
        return [lists] if self.memory.uniform else by_kind(*lists)

    def _check_rounding(self, groups: list[Group], directions: list[list[Tensor]]) -> bool:
        """Warn of a perturbation that is rounded away. Returns whether this check need not be done again.

        The host waits, if there are half-precision parameters.
        """
        assert self.grad_norm is not None
        half = []
        for group, along in zip(groups, directions, strict=True):
            moved = zip(group.params, along, strict=True) if group.moves else ()
            half += [(group.eps, local(p), self.memory.copies[p], g) for p, g in moved if p.dtype in HALF]
        if not half:
            return True
        norm = self.grad_norm.item()
        if not 0 < norm < math.inf:
            return False
        eps, after, before, g1 = zip(*half, strict=True)
        warn_if_rounded_away(eps, after, before, g1, norm)
        return True


def _concatenated(lists: list[list[Tensor]]) -> list[Tensor]:
    return lists[0] if len(lists) == 1 else [tensor for tensors in lists for tensor in tensors]


def _times_size(params: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """|theta| g, element by element, wide enough for half precision."""
    return [g.to(torch.promote_types(g.dtype, torch.float32)) * p.abs() for p, g in zip(params, gradients, strict=True)]


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
