"""Memory for theta, kept from step to step."""

from operator import is_
from typing import Any

import torch
from torch import Tensor

from .tensors import of_one_kind


class Memory:
    """A tensor like each of some parameters, kept from step to step while the parameter stays as it is."""

    def __init__(self) -> None:
        self.copies: dict[Tensor, Tensor] = {}
        """Parameter -> its copy; parameters that have no gradient just now are there too."""
        self.params: list[Tensor] = []
        """Parameters of the last step. `looks` and `theta` are about them."""
        self.looks: list[Any] = []
        self.theta: list[Tensor] = []
        self.uniform = False
        """Whether all parameters are of one device and dtype."""

    def like(self, params: list[Tensor], shards: list[Tensor], most: int) -> list[Tensor]:
        """A tensor like each of `shards`.

        Args:
            params: the parameters that the tensors are for.
            shards: this process's parts of `params`.
            most: how many parameters the optimizer has.
        """
        if len(self.copies) > most:  # some belong to parameters that have left
            self.copies.clear()
            self.params, self.theta = [], []
        # one look after the other: a list of them would keep Python's garbage collector busy
        if not _same(params, self.params) or any(_look(t) != look for t, look in zip(shards, self.looks, strict=True)):
            self.params, self.theta = [], []  # what is not wanted any more is freed before its place is taken
            self.looks = [_look(shard) for shard in shards]
            self.theta = [self._copy(*each) for each in zip(params, shards, self.looks, strict=True)]
            self.uniform = of_one_kind(shards)
            self.params = params  # last: memory may run out on the way
        return self.theta

    def _copy(self, param: Tensor, shard: Tensor, look: Any) -> Tensor:
        copy = self.copies.get(param)
        if copy is None or _look(copy) != look:
            copy = self.copies[param] = torch.empty_like(shard)
        return copy


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))


def _look(tensor: Tensor) -> Any:
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride()
