"""The base optimizer."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from segmentation.recipe import Recipe


class SGD(torch.optim.SGD):
    """torch's, with a learning rate that is set from outside, once an iteration.

    Fused, it reads learning rate, gradient scale and overflow on the device: a step that can be captured as a CUDA
    graph. The CPU's other kernel is the faster one there, for it leaves small tensors to one thread.

    Args:
        parameters: what it trains, all on one device.
        recipe: says lr, momentum and weight decay.
        fused: by default on CUDA.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], recipe: Recipe, fused: bool | None = None) -> None:
        parameters = list(parameters)
        device = parameters[0].device
        self.fused = (device.type == "cuda" if fused is None else fused) or None  # False would mean no foreach either
        self.lr = recipe.lr
        self.lr_on_device = torch.tensor(recipe.lr, dtype=torch.float32, device=device) if self.fused else recipe.lr
        super().__init__(
            parameters, self.lr_on_device, recipe.momentum, weight_decay=recipe.weight_decay, fused=self.fused
        )
        if self.fused and recipe.momentum:
            # The fused kernel leaves those that it makes itself unwritten where a GradScaler has the first step
            # skipped, and goes on from whatever was in that memory (seen with torch 2.14).
            for p in parameters:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    def set_lr(self, lr: float) -> None:
        """Of the next step. The host does not wait."""
        self.lr = lr
        if isinstance(self.lr_on_device, Tensor):
            self.lr_on_device.fill_(lr)
        else:
            self.lr_on_device = lr
        for group in self.param_groups:  # a checkpoint may have brought another tensor, and another device's kernel
            group["lr"], group["fused"] = self.lr_on_device, self.fused
