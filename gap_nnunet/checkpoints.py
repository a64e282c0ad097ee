"""Checkpoints that nnU-Net predicts with where this package is not installed."""

import os
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

STATE = "gap_nnunet"


def detach(filename: str, trainer: type, method: nn.Module | None) -> None:
    """Let the checkpoint name nnU-Net's trainer in place of ours, for nnU-Net looks it up; and add the method's state.

    nnU-Net needs the trainer for nothing but the network's architecture, which ours leave alone.
    """
    checkpoint = _load(filename)
    checkpoint["trainer_name"] = nnunets(trainer).__name__
    state = {} if method is None else method.state_dict()
    if state:
        checkpoint[STATE] = dict(state)
    part = f"{filename}.part"
    torch.save(checkpoint, part)
    del checkpoint  # whose tensors are the old file's
    os.replace(part, filename)


def nnunets(trainer: type) -> type:
    """The class in `trainer`'s ancestry that is nnU-Net's own."""
    return next(c for c in trainer.__mro__ if issubclass(c, nnUNetTrainer) and c.__module__.startswith("nnunetv2."))


def state(filename_or_checkpoint: dict[str, Any] | str) -> dict[str, Any] | None:
    """What `detach` has added, if anything."""
    checkpoint = filename_or_checkpoint
    found = (_load(checkpoint) if isinstance(checkpoint, str) else checkpoint).get(STATE)
    return found if found is None else dict(found)


def _load(filename: str) -> dict[str, Any]:
    """On the CPU, and tensors only when they are read. Pickled, as nnU-Net's checkpoints are."""
    return dict(torch.load(filename, map_location="cpu", mmap=True, weights_only=False))
