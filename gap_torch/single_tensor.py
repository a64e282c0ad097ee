"""Norm, perturbation and restoration of one tensor after the other: the functions of `multi_tensor`, plainly."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .tensors import as_real, by_kind, norm_dtype, norm_of_norms, ones_for, unconjugated, usable_scale


def global_norm(tensors: list[Tensor]) -> Tensor:
    """L2 norm of all `tensors` as if they were one vector."""
    norms = []
    for (group,) in by_kind(tensors):
        dtype = norm_dtype(group[0].device)
        norms.append(torch.stack([torch.linalg.vector_norm(unconjugated(t), dtype=dtype) for t in group]))
    return norm_of_norms(norms, tensors[0].device)


def backup(params: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
    """Copy `params` into `copies`."""
    for param, copy in zip(params, copies, strict=True):
        copy.copy_(param)


def restore(params: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
    """Copy `copies` back into `params`."""
    backup(copies, params)


def perturb(params: Sequence[Tensor], grads: Sequence[Tensor], norm: Tensor, eps: float | Tensor) -> None:
    """theta <- theta + eps * g / norm, in place, for `params` of one device and dtype."""
    theta, along = [*map(as_real, params)], [*map(unconjugated, grads)]
    scale = usable_scale(eps, norm, params[0].device, params[0].dtype)
    if isinstance(scale, Tensor):
        add_scaled(theta, along, scale)
    elif scale:
        for param, grad, one in zip(theta, along, ones_for(theta), strict=True):
            param.addcmul_(grad, one, value=scale)


def add_scaled(params: Sequence[Tensor], grads: Sequence[Tensor], scale: Tensor) -> None:
    """theta <- theta + scale * g, of real tensors; nothing where `scale` is zero."""
    moves = scale > 0
    for param, grad in zip(params, grads, strict=True):
        # `where`, for a gradient with inf or NaN in it times zero is still NaN.
        # Widened first: CUDA would cast a 0-dim `scale` to float16, where it may overflow.
        param.add_(torch.where(moves, grad.to(scale.dtype) * scale, 0.0))


def scale_(tensors: Sequence[Tensor], factor: float) -> None:
    """Multiply every tensor by `factor` in place."""
    for tensor in tensors:
        tensor.mul_(factor)
