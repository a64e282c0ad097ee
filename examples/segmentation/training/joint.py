"""A network whose batch is shared out over several ranks, with the result of one process that has all of it.

Every rank prepares the same batch, from the same random numbers, and passes it to `joint(model)`, which sends this
rank's part through the network and gathers the logits of all. So the training step does not see the ranks: each has
the loss of the joint batch (Dice over all samples, all confident pixels), and DistributedDataParallel makes its
gradient.
"""

import copy
import warnings
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from gap_torch.consistency import Outputs
from gap_torch.consistency.feature_perturbations import FeaturePerturbation
from gap_torch.losses import at_least_float32
from segmentation import ranks
from segmentation.errors import InputError
from segmentation.methods import ENTRIES
from segmentation.networks.dropout import Dropout3d, channel_mask, dropout_mask
from segmentation.recipe import Recipe


def joint(model: nn.Module) -> nn.Module:
    """`model` for the passes of the training step: itself with one process, and with several their joint network.

    The two share parameters and buffers. `model` itself stays free of communication.

    Args:
        model: (B, ...) images -> (B, ...) logits, on this rank's device, with the same values on every rank.
    """
    return model if ranks.world() == 1 else Joint(model)


def require_even_shares(recipe: Recipe) -> None:
    """Raise InputError for a batch that the ranks can't divide, or, where it goes by halves, a half of it."""
    parts = 2 if ENTRIES[recipe.method].mixed else 1
    for name in ("labelled_batch", "unlabelled_batch"):
        batch = getattr(recipe, name)
        if ranks.world() > 1 and batch % (parts * ranks.world()):
            raise InputError(
                f"{name}: {batch} samples can't be shared out evenly to {ranks.world()} processes"
                f"{f', of {recipe.name} each half' if parts > 1 else ''}; "
                f"start a number of them that divides {batch // parts}."
            )


class Joint(nn.Module):
    """What `joint` makes: (B, ...) images -> (B, ...) logits in float32 at least; the ranks divide B.

    Where one process leaves parameters without a gradient, as CCT's further decoders during a warm-up, this one gives
    them zeros: SGD, which would pass them by, then decays them.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        shared = [*model.parameters(), *model.buffers()]
        network = _with_joint_layers(copy.deepcopy(model, {id(tensor): tensor for tensor in shared}))
        device = shared[0].device
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # `broadcast_buffers` has a new name since torch 2.15
            self.network = DistributedDataParallel(
                network,
                device_ids=None if device.type == "cpu" else [device],
                broadcast_buffers=False,  # joint statistics are the same everywhere
            )

    def forward(self, images: Tensor) -> Outputs:
        outputs = self.network(_Share.apply(images))
        if isinstance(outputs, Tensor):
            return _Gather.apply(at_least_float32(outputs))
        # As one tensor: then every parameter gets a gradient, zeros where the loss leaves some of them out, for which
        # DistributedDataParallel would wait in vain.
        rows = [at_least_float32(output).reshape(len(output), prod(output.shape[1:])) for output in outputs]
        parts = _Gather.apply(torch.cat(rows, dim=1)).split([part.shape[1] for part in rows], dim=1)
        return tuple(part.reshape(len(part), *output.shape[1:]) for part, output in zip(parts, outputs, strict=True))


class _Share(torch.autograd.Function):
    """The rows of all ranks -> this rank's."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        return images.unflatten(0, (ranks.world(), -1))[ranks.rank()]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Those of all ranks, for methods that perturb images (VAT); over world, which `_Gather` has put in for DDP."""
        return ranks.stacked(grad).flatten(0, 1) / ranks.world()


class _Gather(torch.autograd.Function):
    """This rank's rows -> those of all ranks."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        return ranks.stacked(own).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Every rank has the whole gradient, and takes its rows; times world, since DDP will take the mean."""
        return grad.unflatten(0, (ranks.world(), -1))[ranks.rank()] * ranks.world()


def _with_joint_layers(network: nn.Module) -> nn.Module:
    """`network`, changed in place: batch norm with the joint batch's statistics, dropout with its masks."""
    on_cpu = next(network.parameters()).device.type == "cpu"
    for layer in network.modules():
        if isinstance(layer, nn.Dropout):
            layer.__class__ = JointDropout
        elif isinstance(layer, Dropout3d):
            layer.__class__ = JointDropout3d
        elif isinstance(layer, FeaturePerturbation):
            layer.rand = _joint_rand  # type: ignore[method-assign]
        elif isinstance(layer, _BatchNorm) and on_cpu:
            layer.__class__ = JointBatchNorm
    return network if on_cpu else nn.SyncBatchNorm.convert_sync_batchnorm(network)


class JointDropout(nn.Dropout):
    """Dropout with this rank's part of the mask that one process would draw for the joint batch.

    The random numbers of all ranks stay in step with each other, and with those of one process.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        batch = torch.cat([input.detach()] * ranks.world())  # in the memory format of `input`
        return input * dropout_mask(batch, self.p).unflatten(0, (ranks.world(), -1))[ranks.rank()]


class JointDropout3d(Dropout3d):
    """The same for whole channels."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        batch = input.new_empty(ranks.world() * len(input), input.shape[1], 1, 1, 1)
        return input * channel_mask(batch, self.p).unflatten(0, (ranks.world(), -1))[ranks.rank()]


def _joint_rand(features: Tensor, *size: int) -> Tensor:
    """This rank's rows of what `FeaturePerturbation.rand` would draw for the joint batch."""
    batch = torch.rand(ranks.world() * len(features), *size, device=features.device)
    return batch.unflatten(0, (ranks.world(), -1))[ranks.rank()]


class JointBatchNorm(_BatchNorm):
    """Batch norm that normalises by the joint batch of all ranks, whose parts are of one size.

    torch.nn.SyncBatchNorm does that on GPUs alone; this one is for the CPU.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        mean, var = _joint_statistics(input)
        if self.track_running_stats:
            self._track(mean, var, ranks.world() * input.numel() // input.shape[1])
        return _Normalise.apply(input, mean, var, self.weight, self.bias, self.eps)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions will do."""

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, count: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        weight = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(var * (count / (count - 1)), weight)


def _joint_statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of every channel of `input` (B, C, ...) over all ranks.

    Variances around each rank's own mean, put together: sums of squares would cancel.
    """
    count = input.numel() // input.shape[1]
    mean, var = torch.zeros(2, input.shape[1], dtype=at_least_float32(input[:0]).dtype)
    F.batch_norm(input.detach(), mean, var, training=True, momentum=1.0)  # far faster than torch.var_mean
    means, variances = ranks.stacked(torch.stack([mean, var * ((count - 1) / count)])).unbind(1)
    return means.mean(0), variances.mean(0) + means.var(0, correction=0)


class _Normalise(torch.autograd.Function):
    """Normalisation by joint statistics, with the gradient that goes through them to the inputs of all ranks."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        ctx.save_for_backward(input, mean, var, weight)
        ctx.eps = eps
        return F.batch_norm(input, mean, var, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """As for constant statistics, less what reaches the output through them; over all ranks where it counts."""
        input, mean, var, weight = ctx.saved_tensors
        of_input, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            grad, input, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        slope, level = ranks.stacked(torch.stack([of_weight, of_bias])).sum(0)
        count = ranks.world() * input.numel() // input.shape[1]
        scale = (var + ctx.eps).rsqrt() / count if weight is None else weight * (var + ctx.eps).rsqrt() / count
        of_input = of_input - F.batch_norm(input, mean, var, scale * slope, scale * level, eps=ctx.eps)
        own = (of_weight, of_bias) if weight is not None else (None, None)  # DDP adds those of the other ranks
        return of_input, None, None, *own, None
