"""Running statistics of batch normalisation stay still while the model is perturbed.

At theta* the activations differ from those of the model that will be evaluated, so their means and variances must not
enter the running statistics. The batch statistics themselves are still used to normalise the perturbed pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeGuard

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def frozen_running_stats(model: nn.Module) -> Iterator[None]:
    """Within the context, no forward pass of `model` changes its running means, variances and batch counts.

    This holds for every layer in training mode that has such statistics (`has_running_stats`), whatever its class:
    torch's own, TorchScript's, an exported graph's, a user's. Layers in evaluation mode behave as before. Other state
    that a training pass updates is not held still: spectral norm's u and v, the ranges of quantisation observers.

    Args:
        model: the module whose layers are held still.

    Examples:
        >>> import torch
        >>> from gap_torch import frozen_running_stats
        >>> layer = torch.nn.BatchNorm1d(1)
        >>> with frozen_running_stats(layer):
        ...     outputs = layer(torch.tensor([[1.0], [3.0]]))
        >>> layer.running_mean
        tensor([0.])
        >>> outputs.mean().item()  # normalised by the batch all the same
        0.0
    """
    layers = [layer for layer in model.modules() if layer.training and has_running_stats(layer)]
    flagged = [layer for layer in layers if _respects_flag(layer) and layer.track_running_stats]
    # The others get copies to update. Writing the old values back instead would tell autograd that a tensor was
    # modified which graphs from before the context may still need.
    buffers = [(layer, _statistics(layer)) for layer in layers if not _respects_flag(layer)]
    try:
        for batch_norm in flagged:
            batch_norm.track_running_stats = False
        for layer, own in buffers:
            _set_buffers(layer, {name: buffer.clone() for name, buffer in own.items()})
        yield
    finally:
        for batch_norm in flagged:
            batch_norm.track_running_stats = True
        for layer, own in buffers:
            _set_buffers(layer, own)


def has_running_stats(layer: nn.Module) -> bool:
    """Whether one of the layer's own buffers is a running statistic (`is_running_stat`)."""
    return any(is_running_stat(name) and buffer is not None for name, buffer in layer._buffers.items())


def is_running_stat(name: str) -> bool:
    """Whether a buffer of that name is taken for a running statistic: "running_mean", "bn_running_var", ..."""
    return "running_" in name.rpartition(".")[2]


def _statistics(layer: nn.Module) -> dict[str, Tensor]:
    """The layer's running statistics, and its count of batches."""
    own = {name: b for name, b in layer._buffers.items() if is_running_stat(name) or name == "num_batches_tracked"}
    return {name: buffer for name, buffer in own.items() if buffer is not None}


def _respects_flag(layer: nn.Module) -> "TypeGuard[_BatchNorm]":
    """Whether, without `track_running_stats`, the layer in training mode leaves its buffers alone.

    InstanceNorm does not look at this flag, and a class with a `forward` of its own need not.
    """
    return isinstance(layer, _BatchNorm) and type(layer).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def _set_buffers(layer: nn.Module, buffers: dict[str, Tensor]) -> None:
    for name, buffer in buffers.items():
        setattr(layer, name, buffer)  # a ScriptModule has no dict of buffers that could be written to
