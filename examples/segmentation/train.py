"""Training: one step of Algorithm 1, and the loop around it with validation, checkpoints and resuming."""

import copy
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from gap_torch import GAPWrapper
from gap_torch.consistency import CutMix, FixMatch
from gap_torch.losses import ce_dice_loss, dice_loss

from . import checkpoint
from .augment import Strong, Weak
from .average import averaged, with_statistics_of
from .batches import ShuffledStream, mix
from .data import Slices, Volume
from .errors import InputError
from .evaluate import evaluate
from .logs import RunLog
from .networks import UNet
from .recipe import Recipe

UNLABELLED_LOSSES = {"ce_dice": ce_dice_loss, "dice": dice_loss}


class Autocast(nn.Module):
    """A network whose forward pass runs under autocast, so that no other code has to think of it."""

    def __init__(self, network: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.network, self.dtype = network, dtype

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            return self.network(images.contiguous(memory_format=torch.channels_last))


class Trainer:
    """Model, optimizer and data of one run.

    Iteration t draws all its random numbers from (seed, t). A run that was interrupted therefore goes on as if it
    had not been, and runs of different methods see the same batches in the same order.

    Args:
        recipe: what to run.
        labelled: slices with labels to learn from.
        unlabelled: slices whose labels are never looked at.
        device: where to train.
        amp: autocast dtype (bfloat16 or float16), or None for float32.
    """

    def __init__(
        self,
        recipe: Recipe,
        labelled: Slices,
        unlabelled: Slices,
        device: torch.device,
        amp: torch.dtype | None,
    ) -> None:
        self.recipe, self.device = recipe, device
        self.images, self.labels = labelled.images.to(device), labelled.labels.to(device)
        self.unlabelled = unlabelled.images.to(device)
        self.labelled_stream = ShuffledStream(len(labelled), recipe.labelled_batch, recipe.seed)
        self.unlabelled_stream = ShuffledStream(len(unlabelled), recipe.unlabelled_batch, recipe.seed + 1)

        torch.manual_seed(recipe.seed)
        network = UNet(num_classes=recipe.num_classes, width=recipe.width)
        self.model = Autocast(network.to(device).to(memory_format=torch.channels_last), amp)
        base = torch.optim.SGD(
            self.model.parameters(), recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )
        self.optimizer = GAPWrapper(base, recipe.eps, recipe.alpha)
        self.scheduler = LambdaLR(self.optimizer, lambda t: (1 - t / recipe.iterations) ** recipe.power)
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
        self.average = averaged(self.model, recipe.average_decay)
        self.weak = Weak()
        self.method = FixMatch(
            self.weak,
            Strong(),
            recipe.tau,
            cutmix=CutMix(),
            loss=UNLABELLED_LOSSES[recipe.unlabelled_loss],
            mode=recipe.targets,
        )

    def step(self, iteration: int) -> dict[str, Tensor]:
        """One iteration (Algorithm 1, lines 3-13). Returns what to log, still on the device."""
        torch.manual_seed(mix(self.recipe.seed, iteration))
        index = self.labelled_stream[iteration]
        images, labels = self.weak.with_labels(self.images[index], self.labels[index])
        values = {} if self.recipe.method == "supervised" else self._consistency(iteration)

        loss = ce_dice_loss(self.model(images), labels.long())
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.scheduler.step()
        if self.recipe.average_decay:
            self.average.update_parameters(self.model)
        return {"loss_labelled": loss.detach(), **values}

    def _consistency(self, iteration: int) -> dict[str, Tensor]:
        """g1, and with GAP alpha * g2 on top of it, into `.grad`."""
        model, method, optimizer = self.model, self.method, self.optimizer
        views = method.prepare(model, self.unlabelled[self.unlabelled_stream[iteration]])
        loss = method.loss(model, views)
        self.scaler.scale(loss).backward()
        values = {"loss_unlabelled": loss.detach(), "confident": views.confident.float().mean()}
        if self.recipe.method == "gapmatch":
            with optimizer.perturbed(model):
                perturbed_loss = method.loss(model, views)
                self.scaler.scale(perturbed_loss).backward()
            assert optimizer.grad_norm is not None
            values["loss_perturbed"] = perturbed_loss.detach()
            values["grad_norm"] = optimizer.grad_norm
        return values

    def to_host(self, values: dict[str, Tensor]) -> dict[str, float]:
        """What `step` returned as numbers, ||g1|| without the scaler's factor; this waits for the device."""
        numbers = {name: float(value) for name, value in values.items()}
        if "grad_norm" in numbers:
            numbers["grad_norm"] /= self.scaler.get_scale()
        return {**numbers, "learning_rate": float(self.scheduler.get_last_lr()[0])}

    def scored_model(self) -> nn.Module:
        """The weights to validate and to test, as the recipe says."""
        recipe = self.recipe
        model = self.average.module if recipe.average_decay else self.model
        if not recipe.statistics_slices:
            return model
        pool = torch.cat([self.images, self.unlabelled])
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(recipe.seed))
        batches = pool[order[: recipe.statistics_slices]].split(24)
        return with_statistics_of(model, batches)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next iteration depends on."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` gave."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "average": self.average,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
        }


@dataclass
class Progress:
    """How far a run has come; part of every checkpoint."""

    iteration: int = 0
    validated: int = 0
    """The last iteration that was validated."""
    best_iteration: int = 0
    best_dice: float = -1.0
    seconds: float = 0.0
    """Spent on training steps alone."""


@dataclass(frozen=True)
class Result:
    """What a finished run hands on: its best model on validation, and its progress."""

    model: nn.Module
    progress: Progress


def fit(trainer: Trainer, validation: list[Volume], folder: Path, resume: bool) -> Result:
    """Train to the end, validating and writing checkpoints at intervals.

    Writes `last.pt`, `best.pt`, `train.csv`, `validation.csv` and TensorBoard events into `folder`. Ctrl-C finishes
    the iteration, writes `last.pt` and raises KeyboardInterrupt; a second one doesn't wait.

    Args:
        trainer: a fresh one.
        validation: volumes to choose the iteration on.
        folder: where to write; it exists.
        resume: go on from `last.pt` if there is one.

    Raises:
        InputError: `last.pt` is damaged or of another recipe or network.
    """
    recipe = trainer.recipe
    last = folder / "last.pt"
    progress = _resume(trainer, last) if resume and last.exists() else Progress()
    log = RunLog(folder, recipe.method, progress.iteration, recipe.iterations)
    try:
        with interruptible() as interrupted:
            while progress.validated < recipe.iterations:
                interval = progress.validated // recipe.validate_every
                stop = min((interval + 1) * recipe.validate_every, recipe.iterations)
                _train_until(stop, trainer, progress, log, interrupted)
                if interrupted():
                    _save_last(last, trainer, progress)
                    log.say(f"{recipe.method}: stopped after iteration {progress.iteration}; --resume goes on.")
                    raise KeyboardInterrupt
                _validate(trainer, validation, progress, log, folder)
                _save_last(last, trainer, progress)
    finally:
        log.close()
    best = copy.deepcopy(trainer.model)
    best.load_state_dict(checkpoint.load(folder / "best.pt", trainer.device)["model"])
    return Result(best, progress)


def _train_until(stop: int, trainer: Trainer, progress: Progress, log: RunLog, interrupted: Callable[[], bool]) -> None:
    while progress.iteration < stop and not interrupted():
        started = time.perf_counter()
        values = trainer.step(progress.iteration)
        progress.iteration += 1
        if progress.iteration % trainer.recipe.log_every == 0:
            log.step(progress.iteration, trainer.to_host(values))
        progress.seconds += time.perf_counter() - started


def _validate(trainer: Trainer, validation: list[Volume], progress: Progress, log: RunLog, folder: Path) -> None:
    recipe = trainer.recipe
    model = trainer.scored_model()
    dice = evaluate(
        model,
        validation,
        size=recipe.size,
        num_classes=recipe.num_classes,
        device=trainer.device,
        with_asd=False,
    ).dice
    progress.validated = progress.iteration
    if dice > progress.best_dice:
        progress.best_dice, progress.best_iteration = dice, progress.iteration
        checkpoint.save(folder / "best.pt", {"model": model.state_dict(), "recipe": recipe.to_dict()})
    log.validated(progress.iteration, dice, progress.best_dice)


def _save_last(path: Path, trainer: Trainer, progress: Progress) -> None:
    content = {
        "recipe": trainer.recipe.to_dict(),
        "progress": asdict(progress),
        "state": trainer.state_dict(),
    }
    checkpoint.save(path, content)


def _resume(trainer: Trainer, path: Path) -> Progress:
    content = checkpoint.load(path, trainer.device)
    theirs, ours = content.get("recipe", {}), trainer.recipe.to_dict()
    differing = [key for key in ours if theirs.get(key) != ours[key]]
    if differing:
        key = differing[0]
        raise InputError(f"{path}: was made with {key}={theirs.get(key)}, this run has {key}={ours[key]}.")
    try:
        trainer.load_state_dict(content["state"])
        return Progress(**content["progress"])
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise InputError(f"{path}: does not fit this run ({str(error).splitlines()[0]}).") from error


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Within the context a first Ctrl-C only makes the yielded function return True; a second one raises."""
    presses: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        if presses:
            raise KeyboardInterrupt
        presses.append(signum)

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # not in the main thread: whoever is there decides
        yield lambda: False
        return
    try:
        yield lambda: bool(presses)
    finally:
        signal.signal(signal.SIGINT, before)
