"""The outputs of deep supervision: a loss over all of them, with nnU-Net's weights."""

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import Tensor


def listed(outputs: Any) -> list[Tensor]:
    """One entry a resolution, the full one first; a single one without deep supervision."""
    return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]


def summed(loss: Callable[..., Tensor], weights: Sequence[float], *entries: Sequence[Tensor]) -> Tensor:
    """`loss` in each resolution times its weight; a weight of 0 leaves one out."""
    total: Tensor = DeepSupervisionWrapper(loss, weights)(*entries)
    return total


def resized(labels: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
    """`labels` (B, *spatial) or (B, K, *spatial) in the resolution of each of `outputs`, as nnU-Net's own are."""
    return [labels if _same(labels, o) else _nearest(labels, o) for o in outputs]


def _same(labels: Tensor, output: Tensor) -> bool:
    return labels.shape[-(output.ndim - 2) :] == output.shape[2:]


def _nearest(labels: Tensor, output: Tensor) -> Tensor:
    with_channels = labels if labels.ndim == output.ndim else labels[:, None]
    small = F.interpolate(with_channels.float(), output.shape[2:], mode="nearest-exact").to(labels.dtype)
    return small if labels.ndim == output.ndim else small[:, 0]
