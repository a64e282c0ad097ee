"""Running statistics of batch normalisation stay still while the model is perturbed.

At theta* the activations are not those of the model that will be evaluated, so their means and variances must not
enter the running ones. The batch statistics themselves are still used to normalise the perturbed pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

# With these, a layer in training mode whose `track_running_stats` is off normalises by the batch and leaves its
# buffers alone. A subclass with a forward of its own may not look at the flag.
_HEEDS_THE_FLAG = {
    nn.modules.batchnorm._BatchNorm.forward,
    nn.SyncBatchNorm.forward,
    _InstanceNorm.forward,
}


@contextmanager
def frozen_running_stats(model: nn.Module) -> Iterator[None]:
    """Within the context, no forward pass of `model` changes its running means, variances and batch counts.

    Holds for every BatchNorm and InstanceNorm layer that tracks statistics, SyncBatchNorm, `momentum=None` and
    subclasses included. Layers in evaluation mode behave as ever.

    Args:
        model: the module whose sub-modules are held; others are not touched.
    """
    layers = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    training = [layer for layer in layers if layer.training]
    headstrong = [layer for layer in training if type(layer).forward not in _HEEDS_THE_FLAG]
    saved = [(buffer, buffer.detach().clone()) for layer in headstrong for buffer in layer.buffers()]
    for layer in training:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in training:
            layer.track_running_stats = True
        _write_back(saved)


@torch.no_grad()
def _write_back(saved: list[tuple[Tensor, Tensor]]) -> None:
    for buffer, value in saved:
        buffer.copy_(value)
