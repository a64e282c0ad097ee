"""What the tests of the self-check train."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gap_torch import GAPWrapper
from gap_torch.consistency import Batch, FixMatch


class Scene:
    """A model, data, a method, and an optimizer made with the given options."""

    def __init__(self, *middle: nn.Module, base: type = torch.optim.SGD, tau: float = 0.0, **options: Any) -> None:
        torch.manual_seed(0)
        norm = nn.BatchNorm2d(4)
        self.model: nn.Module = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), norm, nn.ReLU(), *middle, nn.Conv2d(4, 3, 1)
        )
        self.method = FixMatch(lambda x: x.flip(-1), lambda x: 0.7 * x, tau=tau)
        self.x, self.y, self.u = torch.randn(2, 1, 6, 6), torch.randint(3, (2, 6, 6)), torch.randn(4, 1, 6, 6)
        self.base = base(self.model.parameters(), lr=0.1)
        self.optimizer = GAPWrapper(self.base, **{"eps": 0.1, **options})
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def views(self, unlabelled: Tensor | None = None) -> Any:
        return self.method.prepare(self.model, Batch(self.u if unlabelled is None else unlabelled))

    def consistency(self, views: Any) -> Tensor:
        return self.method.loss(self.model, views)

    def supervised(self) -> Tensor:
        return F.cross_entropy(self.model(self.x), self.y)
