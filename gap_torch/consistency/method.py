"""The protocol that every consistency method follows."""

from typing import Any, Protocol

from torch import Tensor, nn


class Method(Protocol):
    """A consistency loss whose targets are fixed before it is evaluated."""

    def prepare(self, model: nn.Module, unlabelled: Tensor) -> Any:
        """Views of `unlabelled` (B, C, *spatial) and their targets, made at theta without gradient."""

    def loss(self, model: nn.Module, views: Any) -> Tensor:
        """0-dim consistency loss of `model` on `views`: at theta for g1, at theta* for g2."""
