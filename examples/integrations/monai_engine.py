"""GapMatch in MONAI: an iteration update for `SupervisedTrainer`, whose handlers go on working.

    python examples/integrations/monai_engine.py

It follows the trainer's own iteration, with its events, its inferer and its mixed precision.
"""

from typing import Any

import torch
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.handlers import StatsHandler, from_engine
from monai.utils.enums import CommonKeys as Keys
from tiny import BATCH, CLIP, EPOCHS, EPS, LR, Discs, method, network, score, supervised
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gap_torch import GAPWrapper
from gap_torch.consistency import Batch


def gap_iteration(engine: Any, batchdata: dict[str, Tensor]) -> Any:
    """One step of a `SupervisedTrainer` on a batch with the keys "image", "label" and "unlabelled"."""
    image, label = engine.prepare_batch(batchdata, engine.state.device, engine.non_blocking, **engine.to_kwargs)
    unlabelled = batchdata["unlabelled"].to(engine.state.device, non_blocking=engine.non_blocking)
    model, optimizer = engine.network, engine.optimizer
    scaler = engine.scaler or torch.amp.GradScaler(enabled=False)
    autocast = torch.autocast(engine.state.device.type, enabled=engine.amp, **engine.amp_kwargs)

    model.train()
    with autocast:
        views = method.prepare(model, Batch(unlabelled))
        consistency = method.loss(model, views)
    scaler.scale(consistency).backward()
    with optimizer.perturbed(model):  # GAP 2: the engine holds the wrapper itself
        with autocast:
            consistency = method.loss(model, views)
        scaler.scale(consistency).backward()  # GAP 3: scaled, as the other two

    output = engine.state.output = {Keys.IMAGE: image, Keys.LABEL: label}
    with autocast:
        output[Keys.PRED] = engine.inferer(image, model)
        engine.fire_event(IterationEvents.FORWARD_COMPLETED)
        output[Keys.LOSS] = engine.loss_function(output[Keys.PRED], label).mean()
        engine.fire_event(IterationEvents.LOSS_COMPLETED)
    scaler.scale(output[Keys.LOSS]).backward()
    engine.fire_event(IterationEvents.BACKWARD_COMPLETED)  # with the whole sum in .grad
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    engine.fire_event(IterationEvents.MODEL_COMPLETED)  # postprocessing and decollating wait for it
    return engine.state.output


def train(model: nn.Module, **options: Any) -> None:
    """Train `model` in place; `options` go to the engine."""
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=EPOCHS,
        train_data_loader=DataLoader(Discs(), BATCH),
        network=model,
        optimizer=GAPWrapper(torch.optim.AdamW(model.parameters(), lr=LR), eps=EPS),  # GAP 1
        loss_function=supervised,
        iteration_update=gap_iteration,
        **options,
    )
    trainer.run()


def main() -> None:
    model = network()
    before = score(model)
    train(model, train_handlers=[StatsHandler(output_transform=from_engine(Keys.LOSS, first=True))])
    print(f"MONAI: {before} -> {score(model)}")


if __name__ == "__main__":
    main()
