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
        fused = device.type == "cuda" if fused is None else fused
        self.lr = torch.tensor(recipe.lr, device=device) if fused else recipe.lr
        super().__init__(parameters, self.lr, recipe.momentum, weight_decay=recipe.weight_decay, fused=fused or None)
        if fused and recipe.momentum:
            # The fused kernel leaves those that it makes itself unwritten where a GradScaler has the first step
            # skipped, and goes on from whatever was in that memory (seen with torch 2.14).
            for p in parameters:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    def set_lr(self, lr: float) -> None:
        """Of the next step. The host does not wait."""
        if isinstance(self.lr, Tensor):
            self.lr.fill_(lr)
        else:
            self.lr = lr
        for group in self.param_groups:
            group["lr"] = self.lr  # also where a checkpoint has brought another tensor
