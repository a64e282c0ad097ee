"""How far a prediction is from a given distribution."""

import torch.nn.functional as F
from torch import Tensor

from ..losses import at_least_float32, check_classes


def kl_divergence(logits: Tensor, probabilities: Tensor | None) -> Tensor:
    """KL(probabilities || softmax(logits)) of every pixel, in nats.

    Args:
        logits: (B, K, *spatial), any floating dtype; computed in float32 at least.
        probabilities: (B, K, *spatial), fixed; a class of probability 0 counts nothing.

    Returns:
        (B, *spatial).

    Raises:
        ValueError: the logits are of one class; logits and probabilities differ in shape; `probabilities` is None
            (`Views` without a target).
    """
    if probabilities is None or probabilities.shape != logits.shape:
        got = None if probabilities is None else (*probabilities.shape,)
        raise ValueError(f"probabilities must be of shape {(*logits.shape,)}, as the logits, got {got}.")
    log_p = at_least_float32(check_classes(logits)).log_softmax(dim=1)
    return F.kl_div(log_p, probabilities, reduction="none").sum(dim=1)
