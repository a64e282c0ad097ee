"""Trainers of one's own, as docs/your_own_scans.md shows them."""

from nnunetv2.training.nnUNetTrainer.variants.training_length.nnUNetTrainer_Xepochs import nnUNetTrainer_250epochs

import gap_torch
from gap_nnunet.fixmatch import GapMatchTrainer


class MyTrainer(GapMatchTrainer, nnUNetTrainer_250epochs):
    tau = 0.9
    warm_up = 20


class CheckedTrainer(GapMatchTrainer):
    tau, warm_up = 0.0, 0  # everything confident, from the first step on

    def on_train_start(self):
        super().on_train_start()
        gap_torch.check(self.optimizer, self.network)
