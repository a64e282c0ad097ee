"""Predictions to learn from: without gradient, in the mode that the method wants."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ..batchnorm import has_running_stats
from ..losses import at_least_float32, check_classes
from .method import logits_of

Mode = Literal["eval", "batch", "train"]
"""Mode of a model while it makes targets. "eval": running statistics, no dropout. "batch": no dropout either, but batch
norm takes its statistics from the batch, which also enters the running statistics; the same goes for every other layer
that tracks running statistics. "train": the model's own mode, as a rule with dropout."""


@torch.no_grad()
def probabilities(model: nn.Module, images: Tensor, mode: Mode) -> Tensor:
    """Softmax of `model` (a teacher, or the model itself at theta) on `images`, (B, K, *spatial), float32 at least.

    Raises:
        ValueError: the logits are of one class.
    """
    with in_mode(model, mode):
        outputs = model(images)
    torch.clear_autocast_cache()  # an autocast region around this and the loss would reuse casts without gradient
    logits = check_classes(logits_of(outputs))
    return at_least_float32(logits).softmax(dim=1)


@contextmanager
def in_mode(model: nn.Module, mode: Mode) -> Iterator[None]:
    """`model` in `mode` for a while; then every sub-module has its own training flag again.

    No mode puts a layer into training that the user has frozen.
    """
    before = {module: module.training for module in model.modules()}
    for module in before:
        by_batch = isinstance(module, _BatchNorm) or has_running_stats(module)
        if mode == "eval" or (mode == "batch" and not by_batch):
            module.training = False
    try:
        yield
    finally:
        for module, was_training in before.items():
            module.training = was_training


def without_dropout(model: nn.Module) -> AbstractContextManager[None]:
    """`model` without dropout for a while, and otherwise as it is: in training mode it returns auxiliary logits too."""
    return _in_eval_mode(module for module in model.modules() if isinstance(module, _DropoutNd))


def layers_in_eval_mode(model: nn.Module) -> AbstractContextManager[None]:
    """Batch norm and dropout of `model` as in eval mode for a while, though it returns what it does in training mode.

    Modules that hold no others are the layers.
    """
    return _in_eval_mode(module for module in model.modules() if next(module.children(), None) is None)


@contextmanager
def _in_eval_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    layers = [module for module in modules if module.training]
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer in layers:
            layer.training = True


def check_mode(mode: str) -> None:
    """Raise ValueError for an unknown mode."""
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {get_args(Mode)}, got {mode!r}.")
