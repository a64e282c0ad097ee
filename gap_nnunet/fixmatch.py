"""FixMatch (Sohn et al., 2020) in nnU-Net; with GAP it is GapMatch (Huang et al., 2025)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gap_torch.consistency import Batch, Method, Outputs, Views

from .depths import listed, resized, summed
from .gap import WithGAP
from .heads import Heads
from .semi_supervised import SemiSupervisedTrainer


class DeepFixMatch(Method):
    """Pseudo-labels of the weak view's full resolution, learnt on the strong view in every resolution.

    Args:
        heads: what the outputs mean.
        weights: of each resolution.
        tau: least confidence of a pseudo-label that counts.
    """

    def __init__(self, heads: Heads, weights: Sequence[float], tau: float) -> None:
        super().__init__()
        self.heads, self.weights, self.tau = heads, weights, tau

    @torch.no_grad()
    def prepare(self, model: nn.Module, batch: Batch) -> Views:
        """Of `batch.unlabelled`, both views behind each other, (B, 2C, *spatial)."""
        weak, strong = batch.unlabelled.chunk(2, dim=1)
        p = self.heads.probabilities(listed(model(weak))[0])
        torch.clear_autocast_cache()  # casts that were made without gradient
        return Views((strong,), *self.heads.labels(p, self.tau))

    def compare(self, outputs: tuple[Outputs, ...], views: Views) -> Tensor:
        (logits,) = map(listed, outputs)
        assert views.target is not None
        assert views.mask is not None
        return summed(self.heads.loss, self.weights, logits, resized(views.target, logits), resized(views.mask, logits))


class FixMatchTrainer(SemiSupervisedTrainer):
    """FixMatch: what the network is sure of on a weak view, it learns on a strong one."""

    tau = 0.95  # least confidence of a pseudo-label

    def build_method(self) -> Method:
        return DeepFixMatch(self.heads(), self.depth_weights(), self.tau)


class GapMatchTrainer(WithGAP, FixMatchTrainer):
    """GapMatch: FixMatch with GAP."""
