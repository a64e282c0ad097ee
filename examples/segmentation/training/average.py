"""The weights that are scored: averaged over the last iterations, with batch-norm statistics that fit them.

One labelled patient's running statistics do not fit the other patients, and the weights of two iterations differ by
tens of Dice points at this label share. Both are noise of the measurement more than of the method.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.optim.swa_utils import update_bn

from gap_torch.consistency.teacher import follow


class Average:
    """An exponential moving average of a model's parameters; its buffers are copies of the latest.

    `torch.optim.swa_utils.AveragedModel` does the same, but copies its counter to the device at every update.

    Args:
        model: what is averaged; the average starts as a copy.
        decay: weight of the old average, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module, self.decay = copy.deepcopy(model), decay
        self.updates = torch.zeros((), dtype=torch.int64, device=next(model.parameters()).device)
        """On the device, so that a captured CUDA graph counts them too."""

    def update(self, model: nn.Module) -> None:
        """Take in the present parameters of `model`."""
        follow(self.module, model, torch.where(self.updates > 0, self.decay, 0.0))  # at first nothing to average with
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """The averaged model and how many updates it holds."""
        return {"module": self.module.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` gave."""
        self.module.load_state_dict(state["module"])
        self.updates.fill_(int(state["updates"]))


def with_statistics_of(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """A copy of `model` whose batch-norm running statistics are the mean over `batches` of images."""
    scored = copy.deepcopy(model)
    with _without_dropout(scored):
        update_bn(batches, scored)
    return scored


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    # update_bn puts the whole model in training mode, but statistics are wanted as evaluation will meet them
    layers = [m for m in model.modules() if isinstance(m, _DropoutNd)]
    before = [layer.p for layer in layers]
    for layer in layers:
        layer.p = 0.0
    try:
        yield
    finally:
        for layer, p in zip(layers, before, strict=True):
            layer.p = p
