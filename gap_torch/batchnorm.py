"""Running statistics of batch normalisation stay still while the model is perturbed.

At theta* the activations are not those of the model that will be evaluated, so their means and variances must
not enter the running ones. The batch statistics themselves are still used to normalise the perturbed pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

# With these, a layer in training mode whose `track_running_stats` is off normalises by the batch and leaves
# its buffers alone. InstanceNorm does not look at the flag, nor need a subclass with a forward of its own.
_HEEDS_THE_FLAG = {_BatchNorm.forward, nn.SyncBatchNorm.forward}


@contextmanager
def frozen_running_stats(model: nn.Module) -> Iterator[None]:
    """Within the context, no forward pass of `model` changes its running means, variances and batch counts.

    Holds for every BatchNorm and InstanceNorm layer that tracks statistics, SyncBatchNorm, `momentum=None`
    and subclasses included. Layers in evaluation mode behave as ever.

    Args:
        model: the module whose sub-modules are held; others are not touched.
    """
    layers = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats and m.training]
    obedient = [layer for layer in layers if type(layer).forward in _HEEDS_THE_FLAG]
    headstrong = [layer for layer in layers if type(layer).forward not in _HEEDS_THE_FLAG]
    # These get copies to update. Writing the old values back instead would tell autograd that a tensor was
    # modified which graphs from before the context may still need.
    buffers = [(layer, layer._buffers.copy()) for layer in headstrong]
    try:
        for layer in obedient:
            layer.track_running_stats = False
        for layer, own in buffers:
            layer._buffers.update({name: b if b is None else b.clone() for name, b in own.items()})
        yield
    finally:
        for layer in obedient:
            layer.track_running_stats = True
        for layer, own in buffers:
            layer._buffers.update(own)
