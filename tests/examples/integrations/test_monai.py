"""What is particular to MONAI: the engine's handlers, events and mixed precision go on working."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BATCH, EPOCHS, LR, Discs, network, supervised
from torch.utils.data import DataLoader

from gap_torch import GAPWrapper

pytest.importorskip("ignite")
example = pytest.importorskip("monai_engine")


def _engine(**options: Any) -> Any:
    model = network()
    return example.SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=EPOCHS,
        train_data_loader=DataLoader(Discs(), BATCH),
        network=model,
        optimizer=GAPWrapper(torch.optim.AdamW(model.parameters(), lr=LR), eps=0.05),
        loss_function=supervised,
        iteration_update=example.gap_iteration,
        **options,
    )


def test_handlers_go_on_working(tmp_path: Path) -> None:
    from ignite.engine import Events
    from ignite.metrics import RunningAverage
    from monai.handlers import CheckpointLoader, CheckpointSaver, LrScheduleHandler, MetricLogger, from_engine

    engine = _engine(key_train_metric={"loss": RunningAverage(output_transform=from_engine("loss", first=True))})
    contents = {"network": engine.network, "optimizer": engine.optimizer}
    logger = MetricLogger(loss_transform=from_engine("loss", first=True))
    for handler in (
        CheckpointSaver(str(tmp_path), contents, save_final=True),
        LrScheduleHandler(torch.optim.lr_scheduler.StepLR(engine.optimizer, 1, gamma=0.5), print_lr=False),
        logger,
    ):
        handler.attach(engine)
    engine.run()

    assert len(logger.loss) == EPOCHS * len(Discs()) // BATCH
    assert engine.state.metrics["loss"] > 0
    assert engine.optimizer.param_groups[0]["lr"] == pytest.approx(LR * 0.5**EPOCHS)

    again = _engine()
    loaded = {"network": again.network, "optimizer": again.optimizer}
    CheckpointLoader(str(next(tmp_path.glob("*final*"))), loaded).attach(again)
    again.fire_event(Events.STARTED)
    torch.testing.assert_close(again.network.state_dict(), engine.network.state_dict(), rtol=0, atol=0)


def test_bfloat16_autocast() -> None:
    engine = _engine(amp=True, amp_kwargs={"dtype": torch.bfloat16})
    engine.run()
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in engine.network.parameters())
    assert 0 < engine.optimizer.grad_norm < torch.inf
