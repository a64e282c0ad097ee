"""GAP in an nnU-Net trainer: the consistency loss a second time, where the weights make it worst."""

from typing import Any

from torch import Tensor

from gap_torch import GAPWrapper
from gap_torch.consistency import Views

from .semi_supervised import SemiSupervisedTrainer


class WithGAP(SemiSupervisedTrainer):
    """To be written before a method's trainer: `class MyTrainer(WithGAP, FixMatchTrainer)`."""

    gap_eps = 0.1
    gap_alpha = 1.0

    def configure_optimizers(self) -> tuple[GAPWrapper, Any]:
        optimizer, scheduler = super().configure_optimizers()
        return GAPWrapper(optimizer, self.gap_eps, self.gap_alpha), scheduler

    def backward_unlabelled(self, views: Views) -> Tensor:
        loss = super().backward_unlabelled(views)  # g1
        with self.optimizer.perturbed(self.network):
            super().backward_unlabelled(views)  # g2, at theta*
        return loss
