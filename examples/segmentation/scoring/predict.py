"""What every way of predicting a volume needs: eval mode, the image on the device, labels and entropy."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, each module's own flag back afterwards: a frozen batch norm stays frozen."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def on_device(array: np.ndarray, device: torch.device | str) -> Tensor:
    """`array` as a tensor there. CUDA takes pageable memory over before it returns, others may not."""
    device = torch.device(device)
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=device.type == "cuda")


def labels_of(scores: Tensor, dim: int) -> Tensor:
    """The class of the greatest score along `dim` (logits or probabilities), uint8."""
    return scores.argmax(dim=dim).to(torch.uint8)


def entropy_of(probabilities: Tensor, dim: int) -> Tensor:
    """Entropy over the classes along `dim`, in nats over log C: 0 is certain and 1 uniform."""
    entropy = torch.special.entr(probabilities).sum(dim=dim) / math.log(probabilities.shape[dim])
    return entropy.clamp(0.0, 1.0)
