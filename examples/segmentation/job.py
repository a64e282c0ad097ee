"""A whole job on an ACDC-like data set: load, train one run a method, score on the test volumes, table and pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .data import Volume, check_files, load_slices, load_volumes, read_list, split_by_patients
from .errors import InputError
from .evaluate import Evaluation, evaluate, predict_volume
from .figures import Case, RunLog, middle_slice, save_curves, save_predictions
from .recipe import Recipe
from .report import ACDC_CLASSES, Row, print_table, write_json, write_markdown
from .train import Progress, Trainer, fit

LABELS = {"supervised": "Supervised", "fixmatch": "FixMatch", "gapmatch": "GapMatch"}
PICTURED_CASES = 3


@dataclass(frozen=True)
class Job:
    """What to do, with which data, and where.

    Attributes:
        data: root of the h5 layout (see `data`).
        patients: how many of the training patients count as labelled.
        recipes: one run each, in this order; they share everything but the method.
        device: where to train.
        amp: autocast dtype, or None for float32.
        out: folder for one folder a run, and the table and pictures of all.
        resume: go on with runs found in `out`.
        title: above the table.
        paper_share: labelled share whose published rows go below ours, or None.
    """

    data: Path
    patients: int
    recipes: Sequence[Recipe]
    device: torch.device
    amp: torch.dtype | None
    out: Path
    resume: bool
    title: str
    paper_share: int | None = None


def run(job: Job) -> list[Row]:
    """Everything, from the lists to the pictures. Returns the table's rows.

    Raises:
        InputError: bad input, before any training.
    """
    recipe = job.recipes[0]
    names = {split: read_list(job.data / f"{split}.list") for split in ("train_slices", "val", "test")}
    labelled_names, unlabelled_names = split_by_patients(names["train_slices"], job.patients)
    check_files(job.data, names["train_slices"], names["val"] + names["test"])
    folders = [_prepare_folder(job.out / r.method, r, job.resume) for r in job.recipes]

    print(f"reading {job.data}", flush=True)
    labelled = load_slices(job.data, labelled_names, recipe.size, recipe.num_classes)
    unlabelled = load_slices(job.data, unlabelled_names, recipe.size, recipe.num_classes)
    validation = load_volumes(job.data, names["val"], recipe.num_classes)
    test = load_volumes(job.data, names["test"], recipe.num_classes)
    print(
        f"{len(labelled)} labelled slices of {job.patients} patient(s), {len(unlabelled)} unlabelled slices, "
        f"{len(validation)} validation and {len(test)} test volumes",
        flush=True,
    )

    rows, models = [], {}
    for recipe, folder in zip(job.recipes, folders, strict=True):
        trainer = Trainer(recipe, labelled, unlabelled, job.device, job.amp)
        result = fit(trainer, validation, folder, job.resume)
        evaluation = _evaluate(result.model, test, job, recipe)
        write_json(folder / "result.json", _record(job, recipe, result.progress, evaluation))
        rows.append(_row(recipe, result.progress, evaluation))
        models[LABELS[recipe.method]] = result.model
    _report(job, rows, models, test, folders)
    return rows


def _prepare_folder(folder: Path, recipe: Recipe, resume: bool) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{folder}: can't be written ({error.strerror}); choose another --out.") from None
    if (folder / "last.pt").exists() and not resume:
        raise InputError(f"{folder}: holds a {recipe.method} run already; add --resume, or choose another --out.")
    return folder


def _evaluate(model: nn.Module, volumes: list[Volume], job: Job, recipe: Recipe) -> Evaluation:
    print(f"{recipe.method}: scoring {len(volumes)} test volumes", flush=True)
    return evaluate(model, volumes, size=recipe.size, num_classes=recipe.num_classes, device=job.device)


def _record(job: Job, recipe: Recipe, progress: Progress, evaluation: Evaluation) -> dict[str, Any]:
    return {
        "recipe": recipe.to_dict(),
        "labelled_patients": job.patients,
        "device": _device_name(job.device),
        "amp": str(job.amp) if job.amp else None,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seconds_per_iteration": progress.seconds / progress.iteration,
        "chosen_iteration": progress.best_iteration,
        "validation_dice": progress.best_dice,
        "test": evaluation.to_dict(),
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _row(recipe: Recipe, progress: Progress, evaluation: Evaluation) -> Row:
    seconds = progress.seconds / progress.iteration
    return Row(LABELS[recipe.method], evaluation, seconds, progress.best_iteration)


def _report(job: Job, rows: list[Row], models: dict[str, nn.Module], test: list[Volume], folders: list[Path]) -> None:
    recipe = job.recipes[0]
    cases = [_case(volume, models, job, recipe) for volume in test[:: max(1, len(test) // PICTURED_CASES)]]
    save_predictions(job.out / "predictions.png", cases[:PICTURED_CASES], ACDC_CLASSES)
    logs = {
        LABELS[r.method]: RunLog(folder / "train.csv", folder / "validation.csv")
        for r, folder in zip(job.recipes, folders, strict=True)
    }
    save_curves(job.out / "curves.png", logs)
    write_markdown(job.out / "table.md", rows, job.title, paper_share=job.paper_share)
    print_table(rows, job.title, paper_share=job.paper_share)
    print(f"table, pictures, logs and checkpoints: {job.out}")


def _case(volume: Volume, models: dict[str, nn.Module], job: Job, recipe: Recipe) -> Case:
    z = middle_slice(volume.label)
    image = volume.image[z : z + 1]
    predictions = {}
    for name, model in models.items():
        labels, entropy = predict_volume(model, image, recipe.size, job.device)
        predictions[name] = (labels[0], entropy[0])
    return Case(image[0], volume.label[z], predictions, volume.name)
