"""What a job leaves: a record a run, a table and pictures of all."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from presentation.palette import METHOD_COLOURS
from segmentation import ranks
from segmentation.data.files import Volume
from segmentation.figures.curves import LogFiles, save_curves
from segmentation.figures.tables import Row, print_table, write_json, write_markdown
from segmentation.job import Job
from segmentation.recipe import Recipe
from segmentation.scoring.components import largest_component
from segmentation.scoring.evaluate import Evaluation
from segmentation.task import Case
from segmentation.training.loop import Progress

PICTURED_CASES = 3


class Evaluations(NamedTuple):
    """A run's scores on the test volumes."""

    chosen: Evaluation
    """With the weights that validation chose."""
    last: Evaluation
    """With those of the last iteration; the same object where that is the chosen one."""


@ranks.on_main
def write_record(
    path: Path, job: Job, recipe: Recipe, progress: Progress, evaluations: Evaluations | None, captured: bool
) -> None:
    """Of one run, as JSON: what was run, where, and what came of it."""
    write_json(path, _record(job, recipe, progress, evaluations, captured))


def _record(
    job: Job, recipe: Recipe, progress: Progress, evaluations: Evaluations | None, captured: bool
) -> dict[str, Any]:
    return {
        "data_set": job.task.name,
        "recipe": recipe.to_dict(),
        "stride": job.stride,
        "largest_component": job.largest_component,
        "labelled_patients": job.patients,
        "patients_seed": job.patients_seed,
        "device": _device_name(job.device),
        "amp": str(job.amp) if job.amp else None,
        "compiled": job.compiled,
        "graph": captured,
        "torch": torch.__version__,
        "processes": ranks.world(),
        "threads": torch.get_num_threads(),
        "seconds_per_iteration": progress.seconds / progress.iteration,
        "chosen_iteration": progress.best_iteration,
        "validation_dice": progress.best_dice if job.task.validation_list else None,
        "test": evaluations and evaluations.chosen.to_dict(),
        "test_last": evaluations and evaluations.last.to_dict(),
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def row(recipe: Recipe, progress: Progress, evaluations: Evaluations) -> Row:
    """Of the table."""
    seconds = progress.seconds / progress.iteration
    return Row(recipe.label, evaluations.chosen, seconds, progress.best_iteration, _note(evaluations), evaluations.last)


def _note(evaluations: Evaluations) -> str:
    """A word where a mean over mostly empty predictions would say nothing of the method."""
    notes = [_collapsed(evaluations.chosen)]
    if evaluations.last is not evaluations.chosen:
        notes.append(_collapsed(evaluations.last, " at the last iteration"))
    return "; ".join(filter(None, notes))


def _collapsed(evaluation: Evaluation, when: str = "") -> str:
    predictions = sum(len(volume) for volume in evaluation.scores)
    return f"collapsed{when}: {evaluation.empty} of {predictions} empty" if evaluation.empty > predictions / 2 else ""


@ranks.on_main
def report(job: Job, rows: list[Row], models: dict[str, nn.Module], test: list[Volume]) -> None:
    """Pictures and the table of all runs, printed and written; `models` by the runs' labels."""
    recipe = job.recipes[0]
    print("drawing pictures", flush=True)
    pictured = test[:: max(1, len(test) // PICTURED_CASES)][:PICTURED_CASES]
    logs = {
        r.label: LogFiles(folder / "train.csv", folder / "validation.csv" if job.task.validation_list else None)
        for r, folder in zip(job.recipes, map(job.folder, job.recipes), strict=True)
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
