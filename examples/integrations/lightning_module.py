"""GapMatch in Lightning, with manual optimization.

    python examples/integrations/lightning_module.py

`self.optimizers()` is Lightning's own object around the wrapper. It passes GAP's calls on; its `step()` counts the step
and goes through the strategy and the precision plugin, so call that one.
"""

from typing import Any

import lightning as L
import torch
from tiny import BATCH, CLIP, EPOCHS, EPS, LR, Discs, method, network, score, supervised
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gap_torch import GAPWrapper
from gap_torch.consistency import Batch


class GapMatch(L.LightningModule):
    """FixMatch with GAP around any network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.automatic_optimization = False  # one optimizer step has three backward calls
        self.network = network

    def configure_optimizers(self) -> GAPWrapper:
        # GAP 1: a scheduler is built on the wrapper too; in manual optimization its step() is yours to call.
        return GAPWrapper(torch.optim.AdamW(self.parameters(), lr=LR), eps=EPS)

    def training_step(self, batch: dict[str, Tensor], index: int) -> None:
        optimizer: Any = self.optimizers()
        views = method.prepare(self.network, Batch(batch["unlabelled"]))
        self.manual_backward(method.loss(self.network, views))
        with optimizer.perturbed(self.network):  # GAP 2: inside, the network is at theta*
            self.manual_backward(method.loss(self.network, views))  # GAP 3: averages and scales
        self.manual_backward(supervised(self.network(batch["image"]), batch["label"]))
        optimizer.step()  # unscales first where there is a scaler
        optimizer.zero_grad()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Here, not in training_step: with precision="16-mixed" gradients are still scaled there.
        self.clip_gradients(optimizer, gradient_clip_val=CLIP)


def train(model: nn.Module, **options: Any) -> None:
    """Train `model` in place; `options` go to the trainer."""
    trainer = L.Trainer(
        accelerator="cpu",  # yours: leave it out
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(GapMatch(model), DataLoader(Discs(), BATCH // trainer.world_size))


def main() -> None:
    model = network()
    before = score(model)
    train(model)
    print(f"Lightning: {before} -> {score(model)}")


if __name__ == "__main__":
    main()
