"""A prediction after the perturbation against the prediction before it.

The GapMatch paper wants the predictions "aligned before and after perturbation" when GAP joins another method. That can
be read in two ways, which `loss` at theta* tells apart from `alignment` at theta*:

1. the method's own loss once more, its targets still those of theta: `method.loss(model, views)`;
2. the perturbed prediction against the unperturbed one, whatever the method's own loss is: `alignment`.

For FixMatch they nearly agree, since its targets are predictions at theta (equations 8-9): one-hot and on the weak view
in the first reading, soft and on the strong view in the second.
"""

import torch
from torch import Tensor

from ..losses import at_least_float32
from .divergence import kl_divergence
from .method import Outputs, all_logits


def alignment(outputs: Outputs, before: Outputs) -> Tensor:
    """Mean over the pixels of KL(softmax(before) || softmax(outputs)): zero, with zero gradient, where both agree.

    Args:
        outputs: logits (B, K, *spatial) of the perturbed model; with auxiliary ones, a tuple, whose mean is taken.
        before: the same at theta, for the same inputs. No gradient reaches it.

    Returns:
        0-dim tensor.

    Raises:
        ValueError: one of the two has more logits than the other, or logits of another shape.
        TypeError: one of them is neither a tensor nor a tuple or list of them.
    """
    after, fixed = all_logits(outputs), all_logits(before)
    if len(after) != len(fixed):
        raise ValueError(
            f"outputs has {len(after)} logits, before {len(fixed)}: "
            "both must come from the same model in the same mode."
        )
    pairs = zip(after, fixed, strict=True)
    return torch.stack([kl_divergence(a, at_least_float32(b.detach()).softmax(dim=1)).mean() for a, b in pairs]).mean()
