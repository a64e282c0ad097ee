"""Dropout whose masks can be drawn apart: cheaply for 16 bits on a CPU, and for the joint batch of several ranks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """`nn.Dropout`; 16-bit activations on a CPU get their masks from `dropout_mask`."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p in (0, 1) or not _cheaply_masked(input):
            return super().forward(input)
        return input * dropout_mask(input, self.p)


@torch.no_grad()
def dropout_mask(like: Tensor, p: float) -> Tensor:
    """0 with probability `p`, else 1 / (1 - p), in shape, dtype and memory format of `like`.

    PyTorch's own on a CPU draws 64 random bits an element, in one thread however many there are. In bfloat16 that made
    an iteration 9 % longer with one thread. Activations of 16 bits get 16 here: `p` becomes a multiple of 2**-16.
    """
    if p in (0, 1) or not _cheaply_masked(like):
        return F.dropout(torch.ones_like(like), p)
    count, dropped = like.numel(), round(p * 2**16)
    words = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    scale = torch.tensor(1 / (1 - dropped / 2**16), dtype=like.dtype).view(torch.int16).item()
    # Comparing and scaling as integers, in place: mixed dtypes would cost as much as the random numbers.
    mask = words.view(torch.int16)[:count].ge_(dropped - 2**15).mul_(scale).view(like.dtype)
    return mask.as_strided(like.shape, torch.empty_like(like).stride())


def _cheaply_masked(input: Tensor) -> bool:
    return input.device.type == "cpu" and input.element_size() == 2 and not torch.compiler.is_compiling()


class Dropout3d(nn.Dropout3d):
    """`nn.Dropout3d`, bit for bit, with its mask from `channel_mask`."""

    def forward(self, input: Tensor) -> Tensor:
        return input * channel_mask(input, self.p) if self.training and self.p else input


@torch.no_grad()
def channel_mask(like: Tensor, p: float) -> Tensor:
    """(B, C, 1, 1, 1) for `like` (B, C, X, Y, Z), in its dtype: 0 with probability `p`, else 1 / (1 - p)."""
    return F.dropout3d(like.new_ones(*like.shape[:2], 1, 1, 1), p)
