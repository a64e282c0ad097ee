"""What differs from one iteration to the next, but the learning rate and the seed, which are set in place."""

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """All tensors, numbers too: a number of Python's own would be a captured step's for good."""

    images: Tensor
    """Labelled, (B, C, *size), float32, as they were drawn."""
    labels: Tensor
    """Theirs, (B, *size), uint8."""
    unlabelled: Tensor
    """(B, C, *size), float32."""
    progress: Tensor
    """How far the run has come, in [0, 1), 0-dim, float32."""
    weight: Tensor
    """Of the consistency loss, 0-dim, float32."""
