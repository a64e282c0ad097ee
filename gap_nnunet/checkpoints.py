"""Checkpoints that nnU-Net predicts with where this package is not installed."""

import os
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

STATE = "gap_nnunet"


def detach(filename: str, trainer: type, method: nn.Module | None) -> None:
    """Let the checkpoint name nnU-Net's trainer in place of ours, for nnU-Net looks it up; add the method's state."""
    checkpoint = _load(filename)
    checkpoint["trainer_name"] = builder(trainer).__name__
    state = {} if method is None else method.state_dict()
    if state:
        checkpoint[STATE] = dict(state)
    part = f"{filename}.part"
    torch.save(checkpoint, part)
    del checkpoint  # whose tensors are the old file's
    os.replace(part, filename)


def builder(trainer: Any) -> Any:
    """The class of nnU-Net's own in `trainer`'s ancestry, or `trainer` itself if it builds another network.

    nnU-Net predicts with the trainer for nothing but the network's architecture, which ours leave alone.
    """
    classes = (c for c in trainer.__mro__ if issubclass(c, nnUNetTrainer))
    nnunets = next(c for c in classes if c.__module__.startswith("nnunetv2."))
    return nnunets if nnunets.build_network_architecture is trainer.build_network_architecture else trainer


def state(filename_or_checkpoint: dict[str, Any] | str) -> dict[str, Any] | None:
    """What `detach` has added, if anything."""
    checkpoint = filename_or_checkpoint
    found = (_load(checkpoint) if isinstance(checkpoint, str) else checkpoint).get(STATE)
    return found if found is None else dict(found)


def _load(filename: str) -> dict[str, Any]:
    """On the CPU, and tensors only when they are read. Pickled, as nnU-Net's checkpoints are."""
    return dict(torch.load(filename, map_location="cpu", mmap=True, weights_only=False))
