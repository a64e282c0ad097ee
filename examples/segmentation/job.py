"""A whole job on a data set: load, train one run a method, score on the test volumes, table and pictures."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from palette import METHOD_COLOURS
from torch import nn

from . import ranks
from .components import largest_component
from .data import Volume, check_files, check_patients, read_list, split_by_patients
from .errors import InputError
from .evaluate import Evaluation, evaluate
from .figures import Case, RunLog, save_curves
from .identity import Identity, identity
from .logs import counting
from .recipe import Recipe
from .report import Row, print_table, write_json, write_markdown
from .task import Scores, Task
from .train import Progress, fit, resume
from .trainer import Trainer, refuse_wrong_gradients

PICTURED_CASES = 3

OldRuns = Literal["refuse", "resume", "replace"]
Goal = Literal["training", "scores", "pictures"]


@dataclass(frozen=True)
class Job:
    """What to do, with which data, and where.

    Attributes:
        task: the data set.
        data: root of its files.
        patients: how many of the training patients count as labelled.
        recipes: one run each, in this order; they share everything but the method.
        device: where to train.
        amp: autocast dtype, or None for float32.
        out: folder for one folder a run, and the table and pictures of all.
        old_runs: what to do about runs found in `out`.
        title: above the table.
        stride: of the sliding window, if the task has one.
        largest_component: whether of each predicted class only the largest connected component is kept.
        compiled: whether `torch.compile` makes the training passes; one process alone.
        published: scores to print below ours: method -> (Dice in percent, ASD in voxels).
        log_name: what log lines call a run; None for the name of its method.
        goal: how far to go, each including what comes before: "training" chooses on validation and never reads the
            test volumes, "scores" is without table and pictures.
    """

    task: Task
    data: Path
    patients: int
    recipes: Sequence[Recipe]
    device: torch.device
    amp: torch.dtype | None
    out: Path
    old_runs: OldRuns
    title: str
    stride: tuple[int, ...] | None = None
    largest_component: bool = False
    compiled: bool = False
    published: Mapping[str, Scores] = field(default_factory=dict)
    log_name: str | None = None
    goal: Goal = "pictures"

    def folder(self, recipe: Recipe) -> Path:
        """Where the run of `recipe` has its checkpoints, logs and `result.json`."""
        return self.out / recipe.name

    def logged_as(self, recipe: Recipe) -> str:
        """What log lines call the run of `recipe`."""
        return self.log_name or recipe.name


def run(job: Job) -> list[Row]:
    """Everything, from the lists to the pictures. Returns the table's rows, of runs that were scored.

    With several ranks, all call this.

    Raises:
        InputError: bad input, before any training.
        RunError: a loss is not finite.
    """
    task, recipe = job.task, job.recipes[0]
    _require_even_shares(recipe)
    refuse_wrong_gradients(recipe, job.device, job.amp)
    if ranks.is_main():
        _warn_of_slow_convolutions(recipe, job.device, job.amp)
    names = ranks.together(lambda: read_lists(task, job.data))
    labelled_names, unlabelled_names = split_by_patients(names[task.training_list], job.patients, task.patient)
    folders = [job.folder(r) for r in job.recipes]
    ranks.on_main(lambda: _prepare_folders(folders, job))

    print(f"reading {job.data}", flush=True)
    labelled, unlabelled = ranks.together(
        lambda: [
            task.read_labelled(job.data, labelled_names, recipe).to(job.device),
            task.read_unlabelled(job.data, unlabelled_names, recipe).to(job.device),
        ]
    )
    scored = None if job.goal == "training" else task.test_list
    splits = [names[split] if split else [] for split in (task.validation_list, scored)]
    validation, test = ranks.together(lambda: [task.read_volumes(job.data, split) for split in splits])
    print(
        f"{len(labelled)} labelled samples of {job.patients} patient(s), {len(unlabelled)} unlabelled ones, "
        f"{len(validation)} validation and {len(test)} test volumes",
        flush=True,
    )

    torch.backends.cudnn.benchmark = job.device.type == "cuda"  # every batch has the same shape
    patients = list(dict.fromkeys(map(task.patient, labelled_names)))
    identities = [identity(task.name, r, patients, job.amp, names, job.compiled) for r in job.recipes]
    trainers = [Trainer(task, r, labelled, unlabelled, job.device, job.amp, job.compiled) for r in job.recipes]
    found = ranks.together(
        lambda: [_resume(*of_run, job.old_runs) for of_run in zip(trainers, folders, identities, strict=True)]
    )
    if not ranks.same([progress and (progress.iteration, progress.best_iteration) for progress in found]):
        raise InputError(f"{job.out}: the processes found different runs there; --out must be a folder that all share.")

    rows, models = [], {}
    for trainer, folder, run_identity, progress in zip(trainers, folders, identities, found, strict=True):
        recipe = trainer.recipe
        result = fit(trainer, validation, folder, run_identity, progress, job.logged_as(recipe))
        evaluation = _evaluate(result.model, test, job, recipe) if scored else None
        if ranks.is_main():
            write_json(folder / "result.json", _record(job, recipe, result.progress, evaluation))
        if evaluation:
            rows.append(_row(recipe, result.progress, evaluation))
        models[recipe.label] = result.model
    if job.goal == "pictures" and ranks.is_main():
        _report(job, rows, models, test, folders)
    return rows


def _warn_of_slow_convolutions(recipe: Recipe, device: torch.device, amp: torch.dtype | None) -> None:
    """In 3D, on a GPU, in the versions of torch that nnU-Net excludes for it (pytorch/pytorch issue 166122)."""
    slow = torch.__version__.startswith("2.9.") and device.type == "cuda"
    if slow and len(recipe.size) == 3 and amp is not None:
        print(
            f"warning: torch {torch.__version__} takes several times as long as 2.8 or 2.10 for 3D convolutions under "
            "autocast on a GPU; another version will train faster.",
            file=sys.stderr,
            flush=True,
        )


def _require_even_shares(recipe: Recipe) -> None:
    for name in ("labelled_batch", "unlabelled_batch"):
        batch = getattr(recipe, name)
        if batch % ranks.world():
            raise InputError(
                f"{name}: {batch} samples can't be shared out evenly to {ranks.world()} processes; "
                f"start a number of them that divides {batch}."
            )


def read_lists(task: Task, root: Path) -> dict[str, list[str]]:
    """The names in every list file of a data set. Raises InputError for bad lists, and for files that are missing."""
    if root.is_file():
        raise InputError(f"{root}: is a file; give the folder that holds the lists and the data.")
    names = {split: read_list(root / f"{split}.list") for split in task.lists}
    check_patients(names, task.patient)
    for split in task.lists:
        path = task.training_path if split == task.training_list else task.volume_path
        check_files(path(root, name) for name in names[split])
    return names


def _prepare_folders(folders: Sequence[Path], job: Job) -> None:
    for folder, recipe in zip(folders, job.recipes, strict=True):
        _prepare_folder(folder, recipe, job.old_runs)


def _prepare_folder(folder: Path, recipe: Recipe, old_runs: OldRuns) -> None:
    try:
        if old_runs == "replace" and folder.is_dir():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{folder}: can't be written ({error.strerror}); choose another --out.") from None
    if (folder / "last.pt").exists() and old_runs == "refuse":
        raise InputError(f"{folder}: holds a {recipe.name} run already; add --resume, or choose another --out.")


def _resume(trainer: Trainer, folder: Path, run_identity: Identity, old_runs: OldRuns) -> Progress | None:
    if old_runs != "resume":
        return None
    progress, name = resume(trainer, folder, run_identity), trainer.recipe.name
    if progress is None:
        print(f"{name}: no run to resume in {folder}, starting from zero", flush=True)
    else:
        print(f"resuming {name} at iteration {progress.iteration}", flush=True)
    return progress


def _evaluate(model: nn.Module, volumes: list[Volume], job: Job, recipe: Recipe) -> Evaluation:
    def segment(image: np.ndarray) -> np.ndarray:
        labels = job.task.segment(model, image, recipe, job.stride, job.device)
        count()
        return largest_component(labels) if job.largest_component else labels

    with counting(f"{job.logged_as(recipe)}: scoring test volumes", len(volumes[:: ranks.world()])) as count:
        return evaluate(segment, volumes, job.task.num_classes)


def _record(job: Job, recipe: Recipe, progress: Progress, evaluation: Evaluation | None) -> dict[str, Any]:
    return {
        "data_set": job.task.name,
        "recipe": recipe.to_dict(),
        "stride": job.stride,
        "largest_component": job.largest_component,
        "labelled_patients": job.patients,
        "device": _device_name(job.device),
        "amp": str(job.amp) if job.amp else None,
        "compiled": job.compiled,
        "torch": torch.__version__,
        "processes": ranks.world(),
        "threads": torch.get_num_threads(),
        "seconds_per_iteration": progress.seconds / progress.iteration,
        "chosen_iteration": progress.best_iteration,
        "validation_dice": progress.best_dice if job.task.validation_list else None,
        "test": evaluation and evaluation.to_dict(),
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _row(recipe: Recipe, progress: Progress, evaluation: Evaluation) -> Row:
    seconds = progress.seconds / progress.iteration
    return Row(recipe.label, evaluation, seconds, progress.best_iteration, _note(evaluation))


def _note(evaluation: Evaluation) -> str:
    """A word where a mean over mostly empty predictions would say nothing of the method."""
    predictions = sum(len(volume) for volume in evaluation.scores)
    collapsed = evaluation.empty > predictions / 2
    return f"collapsed: {evaluation.empty} of {predictions} empty" if collapsed else ""


def _report(job: Job, rows: list[Row], models: dict[str, nn.Module], test: list[Volume], folders: list[Path]) -> None:
    recipe = job.recipes[0]
    print("drawing pictures", flush=True)
    pictured = test[:: max(1, len(test) // PICTURED_CASES)][:PICTURED_CASES]
    logs = {
        r.label: RunLog(folder / "train.csv", folder / "validation.csv" if job.task.validation_list else None)
        for r, folder in zip(job.recipes, folders, strict=True)
    }
    names, at_once = [*logs], len(METHOD_COLOURS)
    for first in range(0, len(names), at_once):
        page = names[first : first + at_once]
        folder = job.out / f"pictures_{first // at_once + 1}" if first else job.out
        of_page = {name: models[name] for name in page}
        job.task.draw(folder, [_case(volume, of_page, job, recipe) for volume in pictured])
        save_curves(folder / "curves.png", {name: logs[name] for name in page})
    write_markdown(job.out / "table.md", rows, job.title, job.task.classes, job.published)
    print_table(rows, job.title, job.task.classes, job.published)
    print(f"table, pictures, logs and checkpoints: {job.out}")


def _case(volume: Volume, models: dict[str, nn.Module], job: Job, recipe: Recipe) -> Case:
    predictions = {}
    for name, model in models.items():
        labels, entropy = job.task.predict(model, volume.image, recipe, job.stride, job.device)
        predictions[name] = (largest_component(labels) if job.largest_component else labels, entropy)
    return Case(volume.image, volume.label, predictions, volume.name.replace("_", "\n"))
