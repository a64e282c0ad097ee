"""Endless shuffled batches that are a function of the iteration, so that resuming needs no state."""

import torch
from torch import Tensor


class ShuffledStream:
    """Indices 0 .. n - 1 in ever new random orders, one behind the other, cut into batches.

    Args:
        n: number of samples, at least 1.
        batch: indices a batch; may exceed `n`.
        seed: decides every order.
    """

    def __init__(self, n: int, batch: int, seed: int) -> None:
        self.n, self.batch, self.seed = n, batch, seed
        self.orders: dict[int, Tensor] = {}
        """Of the epochs that the last batch came from: each is made once."""

    def __getitem__(self, iteration: int) -> Tensor:
        """The batch of `iteration`, int64, on the CPU."""
        start = iteration * self.batch
        first, last = start // self.n, (start + self.batch - 1) // self.n
        epochs = range(first, last + 1)
        self.orders = {e: self.orders[e] if e in self.orders else self._order(e) for e in epochs}
        offset = start - first * self.n
        return torch.cat([*self.orders.values()])[offset : offset + self.batch]

    def _order(self, epoch: int) -> Tensor:
        return torch.randperm(self.n, generator=torch.Generator().manual_seed(mix(self.seed, epoch)))


def mix(seed: int, counter: int) -> int:
    """One seed for each pair of a run's seed and a counter (an iteration or an epoch)."""
    return (seed * 1_000_003 + counter) % 2**63
