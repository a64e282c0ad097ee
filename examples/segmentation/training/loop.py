"""The loop around the training step: logs, validation, checkpoints, and going on where a run stopped."""

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from segmentation import ranks
from segmentation.data.files import Volume
from segmentation.errors import OldRunError, RunError
from segmentation.scoring.dice import mean_dice
from segmentation.training import checkpoint
from segmentation.training.identity import Identity, require_same
from segmentation.training.interrupt import interruptible
from segmentation.training.logs import Log, RunLog
from segmentation.training.step import Trainer


@dataclass
class Progress:
    """How far a run has come, and the best that it has found; part of every checkpoint."""

    iteration: int = 0
    validated: int = 0
    """The last iteration that was validated."""
    best_iteration: int = 0
    """The one whose weights are kept: the best on validation, or the last where there is none."""
    best_dice: float = -1.0
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    """Spent on training steps alone."""


@dataclass(frozen=True)
class Result:
    """What a finished run hands on."""

    model: nn.Module
    """With the weights that are kept: those of `progress.best_iteration`."""
    last: nn.Module
    """With those of the last iteration; the same object where it is the one that is kept."""
    progress: Progress


def fit(
    trainer: Trainer,
    validation: list[Volume],
    folder: Path,
    identity: Identity,
    progress: Progress | None = None,
    name: str | None = None,
) -> Result:
    """Train to the end, validating and writing checkpoints at intervals.

    Writes `last.pt` (all that resuming needs), `best.pt` (the best weights, for use elsewhere), `train.csv`,
    `validation.csv` and TensorBoard events into `folder`. Ctrl-C finishes the iteration, or the validation, writes
    `last.pt` and raises KeyboardInterrupt; a second one doesn't wait. With several ranks, all call this and rank 0
    writes.

    Args:
        trainer: a fresh one, or one that `resume` has filled.
        validation: volumes to choose the iteration on; without any the last one is kept.
        folder: where to write; it exists.
        identity: of this run, for `last.pt`.
        progress: what `resume` returned; None starts from zero.
        name: of the run in log lines; None for that of its method.

    Raises:
        RunError: a loss is not finite.
        CaptureError: a CUDA graph could not be captured; the process can't go on.
    """
    recipe, progress = trainer.recipe, progress or Progress()
    name = name or recipe.name
    log = RunLog(folder, name, progress.iteration, recipe.iterations) if ranks.is_main() else Log()
    if progress.best_weights:
        _export_best(folder, trainer, progress)  # `last.pt` is right where the two differ
    try:
        with interruptible() as interrupted:
            while progress.validated < recipe.iterations:
                interval = progress.validated // recipe.validate_every
                stop = min((interval + 1) * recipe.validate_every, recipe.iterations)
                _train_until(stop, trainer, progress, log, interrupted)
                if not interrupted():
                    _validate(trainer, validation, progress, log, folder)
                _save_last(folder, trainer, progress, identity)
                if interrupted():
                    log.say(f"{name}: stopped after iteration {progress.iteration}; --resume goes on.")
                    raise KeyboardInterrupt
    finally:
        log.close()
        trainer.release()
    best = copy.deepcopy(trainer.model)
    best.load_state_dict(progress.best_weights)
    last = best if progress.best_iteration == progress.iteration else trainer.scored_model()
    return Result(best, last, progress)


def resume(trainer: Trainer, folder: Path, identity: Identity) -> Progress | None:
    """Fill a fresh `trainer` from `last.pt` in `folder`; None where there is none.

    Raises:
        InputError: `last.pt` is damaged; an OldRunError if it is of another run than `identity`.
    """
    path = folder / "last.pt"
    if not path.exists():
        return None
    content = checkpoint.load(path, trainer.device)
    require_same(path, content.get("identity"), identity)
    try:
        progress = Progress(**content["progress"])
        if progress.best_weights:
            trainer.model.load_state_dict(progress.best_weights)  # they fit, or we want to know now
        trainer.load_state_dict(content["state"])
    except (KeyError, TypeError, RuntimeError, ValueError, AttributeError) as error:
        raise OldRunError(f"{path}: does not fit this run, or is damaged", "choose another --out") from error
    return progress


def _train_until(stop: int, trainer: Trainer, progress: Progress, log: Log, interrupted: Callable[[], bool]) -> None:
    every = trainer.recipe.log_every
    while progress.iteration < stop and not interrupted():
        first, started = progress.iteration, time.perf_counter()
        pause = min(stop, (first // every + 1) * every)
        while True:
            values = trainer.step(progress.iteration)
            progress.iteration += 1
            if progress.iteration == pause or interrupted():
                break
        numbers = trainer.to_host(values)  # waits for the device, so the clock below is right
        seconds = time.perf_counter() - started
        progress.seconds += seconds
        if progress.iteration % every == 0:
            log.step(progress.iteration, {**numbers, "it_per_s": (progress.iteration - first) / seconds})
        _require_finite(numbers, progress.iteration)


def _require_finite(numbers: dict[str, float], iteration: int) -> None:
    for name in ("loss_labelled", "loss_unlabelled"):
        if not math.isfinite(numbers.get(name, 0.0)):
            raise RunError(f"{name} is {numbers[name]} at iteration {iteration}; lower lr or --eps, or try --amp none.")


def _validate(trainer: Trainer, validation: list[Volume], progress: Progress, log: Log, folder: Path) -> None:
    progress.validated = progress.iteration
    if not validation and progress.iteration < trainer.recipe.iterations:
        return
    model = trainer.scored_model()
    dice = _dice(model, trainer, validation) if validation else progress.best_dice
    if dice > progress.best_dice or not validation:
        progress.best_dice, progress.best_iteration = dice, progress.iteration
        progress.best_weights = {name: value.clone() for name, value in model.state_dict().items()}
        _export_best(folder, trainer, progress)
    if validation:
        log.validated(progress.iteration, dice, progress.best_dice)


def _dice(model: nn.Module, trainer: Trainer, volumes: list[Volume]) -> float:
    """Mean Dice in percent."""
    task = trainer.task

    def segment(images: Iterable[np.ndarray]) -> Iterator[Tensor]:
        return task.segment_each(model, images, trainer.recipe, task.stride, trainer.device)

    return mean_dice(segment, volumes, task.num_classes)


@ranks.on_main  # the others wait: where one ends after an interruption, torchrun ends all
def _save(path: Path, content: dict[str, Any]) -> None:
    checkpoint.save(path, content)


def _save_last(folder: Path, trainer: Trainer, progress: Progress, identity: Identity) -> None:
    content = {"identity": identity, "progress": vars(progress), "state": trainer.state_dict()}
    _save(folder / "last.pt", content)


def _export_best(folder: Path, trainer: Trainer, progress: Progress) -> None:
    content = {
        "model": progress.best_weights,
        "recipe": trainer.recipe.to_dict(),
        "iteration": progress.best_iteration,
        "dice": progress.best_dice if progress.best_dice >= 0 else None,  # None without validation
    }
    _save(folder / "best.pt", content)
