"""The weights that are scored: averaged over the last iterations, with batch-norm statistics that fit them.

One labelled patient's running statistics do not fit the other patients, and the weights of two iterations differ by
tens of Dice points at this label share. Both are noise of the measurement more than of the method.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of `model`'s parameters; its buffers are copies of the latest."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))


def with_statistics_of(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """A copy of `model` whose batch-norm running statistics are the mean over `batches` of images."""
    scored = copy.deepcopy(model)
    with _without_dropout(scored), torch.random.fork_rng():
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
