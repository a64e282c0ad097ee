"""A whole job on a data set: load, train one run a method, score on the test volumes, table and pictures."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from segmentation import ranks
from segmentation.data.files import Volume, check_files, check_patients, read_list, split_by_patients
from segmentation.errors import InputError
from segmentation.figures.tables import Row
from segmentation.job import Job, OldRuns
from segmentation.recipe import SUPERVISED, Recipe
from segmentation.report import Evaluations, report, row, write_record
from segmentation.scoring.components import largest_component
from segmentation.scoring.evaluate import Evaluation, evaluate
from segmentation.task import Pool, Task
from segmentation.training.identity import Identity, identity
from segmentation.training.joint import require_even_shares
from segmentation.training.loop import Progress, Result, fit, resume
from segmentation.training.step import Trainer, refuse_joint_gap_on_ranks, refuse_wrong_gradients


class Samples(NamedTuple):
    """What a job reads."""

    names: Mapping[str, Sequence[str]]
    """In each list file."""
    patients: list[str]
    """The labelled ones."""
    labelled: Pool
    unlabelled: Pool
    validation: list[Volume]
    test: list[Volume]


def run(job: Job) -> list[Row]:
    """Everything, from the lists to the pictures. Returns the table's rows, of runs that were scored.

    With several ranks, all call this.

    Raises:
        InputError: bad input, before any training.
        RunError: a loss is not finite.
        CaptureError: a CUDA graph could not be captured; the process can't go on.
    """
    recipe = job.recipes[0]
    refuse_wrong_gradients(recipe, job.device, job.amp)
    for each in job.runs:
        require_even_shares(each)
        refuse_joint_gap_on_ranks(each)
    _warn_of_slow_convolutions(recipe, job.device, job.amp)
    samples = read(job)
    torch.backends.cudnn.benchmark = job.device.type == "cuda"  # every batch has the same shape
    pools = samples.labelled, samples.unlabelled
    trainers = [Trainer(job.task, r, *pools, job.device, job.amp, job.compiled, job.graph) for r in job.runs]
    identities = [identity(job.task.name, r, samples.patients, job.amp, samples.names, job.compiled) for r in job.runs]
    found = _resumed(job, trainers, identities)
    if not ranks.same([progress and (progress.iteration, progress.best_iteration) for progress in found]):
        raise InputError(f"{job.out}: the processes found different runs there; --out must be a folder that all share.")

    started_from = {r.phase for r, progress in zip(job.runs, found, strict=True) if progress is None}
    kept: dict[Recipe, dict[str, Tensor]] = {}
    rows, models = [], {}
    for trainer, run_identity, progress in zip(trainers, identities, found, strict=True):
        recipe, folder = trainer.recipe, job.folder(trainer.recipe)
        if recipe not in job.recipes and recipe not in started_from:
            continue
        if progress is None and recipe.phase is not None:
            trainer.start_from(kept[recipe.phase])
        result = fit(trainer, samples.validation, folder, run_identity, progress, job.logged_as(recipe))
        kept[recipe] = result.progress.best_weights
        scored = job.goal != "training" and recipe in job.recipes
        evaluations = _scored(result, samples.test, job, recipe) if scored else None
        write_record(folder / "result.json", job, recipe, result.progress, evaluations, trainer.captured)
        if evaluations:
            rows.append(row(recipe, result.progress, evaluations))
        models[recipe.label] = result.model
    if job.goal == "pictures":
        report(job, rows, models, samples.test)
    return rows


@ranks.together
def read(job: Job) -> Samples:
    """Lists, samples and volumes; nothing of a folder that can't be written to is lost by a long reading."""
    task, recipe = job.task, job.recipes[0]
    names = read_lists(task, job.data)
    listed = names[task.training_list]
    labelled_names, unlabelled_names = split_by_patients(listed, job.patients, task.patient, job.patients_seed)
    if not unlabelled_names:
        _require_no_unlabelled(job)
        unlabelled_names = labelled_names  # which nobody learns from
    if ranks.is_main():
        for each in job.runs:
            _prepare_folder(job.folder(each), each, job.old_runs)
    print(f"reading {job.data}", flush=True)
    labelled = task.read_labelled(job.data, labelled_names, recipe).to(job.device)
    unlabelled = task.read_unlabelled(job.data, unlabelled_names, recipe).to(job.device)
    splits = task.validation_list, None if job.goal == "training" else task.test_list
    validation, test = (task.read_volumes(job.data, names[split] if split else []) for split in splits)
    print(
        f"{len(labelled)} labelled samples of {job.patients} patient(s), {len(unlabelled)} unlabelled ones, "
        f"{len(validation)} validation and {len(test)} test volumes",
        flush=True,
    )
    patients = list(dict.fromkeys(map(task.patient, labelled_names)))
    return Samples(names, patients, labelled, unlabelled, validation, test)


def _require_no_unlabelled(job: Job) -> None:
    for recipe in job.recipes:
        if recipe.method != SUPERVISED:
            raise InputError(
                f"{job.patients} labelled patients are all that there are, and {recipe.name} needs unlabelled ones; "
                "label fewer, or run supervised alone."
            )


@ranks.on_main
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


@ranks.together
def _resumed(job: Job, trainers: Sequence[Trainer], identities: Sequence[Identity]) -> list[Progress | None]:
    """How far each run has come already, its trainer filled."""
    if job.old_runs != "resume":
        return [None for _ in trainers]
    return [_resume(trainer, job.folder(trainer.recipe), i) for trainer, i in zip(trainers, identities, strict=True)]


def _resume(trainer: Trainer, folder: Path, run_identity: Identity) -> Progress | None:
    progress, name = resume(trainer, folder, run_identity), trainer.recipe.name
    if progress is None:
        print(f"{name}: no run to resume in {folder}, starting from zero", flush=True)
    else:
        print(f"resuming {name} at iteration {progress.iteration}", flush=True)
    return progress


def _scored(result: Result, volumes: list[Volume], job: Job, recipe: Recipe) -> Evaluations:
    chosen = _evaluate(result.model, volumes, job, recipe)
    if result.last is result.model:
        return Evaluations(chosen, chosen)
    return Evaluations(chosen, _evaluate(result.last, volumes, job, recipe, " by the last iteration"))


def _evaluate(model: nn.Module, volumes: list[Volume], job: Job, recipe: Recipe, by: str = "") -> Evaluation:
    def segment(image: np.ndarray) -> np.ndarray:
        labels = job.task.segment(model, image, recipe, job.stride, job.device)
        return largest_component(labels) if job.largest_component else labels

    return evaluate(segment, volumes, job.task.num_classes, title=f"{job.logged_as(recipe)}: scoring test volumes{by}")
