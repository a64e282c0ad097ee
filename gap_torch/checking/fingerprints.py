"""Fingerprints of the samples that a model is called with, by which they are known again in another pass."""

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils._pytree import tree_leaves

from ..sharding import is_sharded
from .values import bits


def samples(inputs: Any, is_data: Callable[[Tensor], bool]) -> list[int]:
    """A fingerprint of each sample of a batch: equal bits, equal number, whatever else is in the batch.

    Args:
        inputs: what a model is called with. Its samples lie along the first dimension of the largest tensor that is
            data. Without such a tensor there are none.
        is_data: whether a tensor is data, and not features that other parameters would make differently.
    """
    try:
        tensors = [t for t in tensors_in(inputs) if is_data(t)]
        size = len(max(tensors, key=Tensor.numel)) if tensors else 0
        batch = [_row_sums(bits(t.detach(), size)) for t in tensors if len(t) == size]
    except RuntimeError:  # tensors without values of their own: in torch.func's transforms, on the device "meta"
        return []
    return [hash(numbers) for numbers in zip(*batch, strict=True)]


def tensors_in(inputs: Any) -> list[Tensor]:
    """The tensors that can be looked into."""
    return [t for t in tree_leaves(inputs) if isinstance(t, Tensor) and _is_plain(t)]


def from_network(tensor: Tensor, trained: Container[Tensor] = ()) -> bool:
    """Whether parameters have had a part in `tensor`, or something that can't be looked into.

    An input that requires grad need not have come from a network: it may be the one for which an adversarial search
    wants a gradient. One that is `trained`, by an optimizer, is a parameter.
    """

    def is_parameter(leaf: Any) -> bool:
        return isinstance(leaf, nn.Parameter) or (leaf is not None and leaf in trained)

    if tensor.grad_fn is None:
        return is_parameter(tensor)
    nodes: list[Any] = [tensor.grad_fn]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        # a Function of its own, as checkpointing's, may hide parameters
        if isinstance(node, BackwardCFunction) or is_parameter(getattr(node, "variable", None)):
            return True
        behind = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= behind
        nodes += behind
    return False


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not is_sharded(tensor) and bool(tensor.ndim and tensor.numel())


def _row_sums(rows: Tensor) -> list[int]:
    """Integers, whose sum doesn't depend on its order, unlike that of floating-point numbers."""
    odd = torch.arange(rows.shape[1], device=rows.device) * 0x1E3779B97F4A7C15 | 1
    return [int(total) for total in (rows.to(torch.int64) * odd).sum(1).tolist()]
