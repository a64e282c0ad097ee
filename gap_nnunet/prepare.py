"""From raw files to what training reads: nnU-Net's own steps for the labelled cases, then imagesUn by the same plan."""

import inspect
import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from os.path import join
from pathlib import Path
from typing import Any

import nnunetv2
from batchgenerators.utilities.file_and_folder_operations import load_pickle, write_pickle
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess
from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id, maybe_convert_to_dataset_name
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from tqdm import tqdm

from . import folders, scans
from .problems import Problems

PROCESSES = {"2d": 8, "3d_fullres": 4, "3d_lowres": 8}  # nnU-Net's own numbers
PLANNER = "ExperimentPlanner"  # nnU-Net's default
FOLDS = 5  # nnU-Net's own
PART = ".part"  # where a case is written before it is complete


def prepare(
    dataset: str,
    configurations: Sequence[str],
    planner: str | None = None,
    plans_name: str | None = None,
    processes: int | None = None,
    verify: bool = False,
    clean: bool = False,
) -> None:
    """Do what is not there yet; each step says what it does or finds.

    Args:
        dataset: number or name.
        configurations: of nnU-Net's plans.
        planner: class name of nnU-Net's planner; None for the one that made the plans, or nnU-Net's default.
        plans_name: None for the planner's own.
        processes: None for nnU-Net's numbers; 1 does without further processes.
        verify: let nnU-Net look at the labelled cases first.
        clean: do everything anew.

    Raises:
        Problems: what is wrong with the files, all at once as far as it can be seen.
        ValueError: one of nnU-Net's folders is not set, or the dataset, a planner or a configuration is unknown.
    """
    root = folders.of_environment("nnUNet_raw")
    folders.of_environment("nnUNet_preprocessed")
    if "3d_cascade_fullres" in configurations:
        raise ValueError(
            "3d_cascade_fullres reads what 3d_fullres prepares, and is not trained on scans without labels."
        )
    try:
        name = str(maybe_convert_to_dataset_name(dataset))
    except RuntimeError as error:  # none of this number, or several: nnU-Net says where it looked
        raise ValueError(str(error)) from error
    raw = root / name
    dataset_json = scans.read_dataset_json(raw)
    unlabelled = scans.find(raw, dataset_json)
    labelled = _labelled_cases(raw, dataset_json)
    scans.check_apart(unlabelled, {case: files["images"] for case, files in labelled.items()})
    print(f"{name}: {len(labelled)} labelled cases, {len(unlabelled)} in {scans.FOLDER}.")
    if verify:
        verify_dataset_integrity(str(raw), processes or 8)

    clean = clean or _has_changed(name, len(labelled))
    plans = _plans(name, planner, plans_name, processes or 8, clean)
    _splits(name, sorted(labelled))
    problems = []
    for configuration in [c for c in configurations if _is_planned(c, plans)]:
        workers = processes or PROCESSES.get(configuration, 4)
        anew = clean or _is_of_another_plan(name, plans, configuration)
        _labelled(name, {*labelled}, plans, configuration, workers, anew)
        problems += _unlabelled(name, unlabelled, plans, configuration, dataset_json, workers, anew)
    if problems:
        raise Problems(str(raw / scans.FOLDER), dict.fromkeys(problems))


def _labelled_cases(raw: Path, dataset_json: dict[str, Any]) -> dict[str, Any]:
    """The files of each, `images` and `label`, as nnU-Net finds them: in imagesTr, or where dataset.json says."""
    images, ending, found = raw / scans.LABELLED, dataset_json["file_ending"], {}
    if images.is_dir() or "dataset" in dataset_json:
        found = get_filenames_of_train_images_and_targets(str(raw), json.loads(json.dumps(dataset_json)))
    if not found:
        raise Problems(str(raw), [f"{images} has no scans that end with {ending}: put those with labels there."])
    scans.check_labels(found)
    return {str(case): files for case, files in found.items()}


# ------------------------------------------------------------------ nnU-Net's own steps


def _has_changed(name: str, labelled: int) -> bool:
    """Whether the fingerprint is of another number of labelled cases than there are now."""
    file = folders.of_environment("nnUNet_preprocessed") / name / "dataset_fingerprint.json"
    known = len(json.loads(file.read_text())["spacings"]) if file.is_file() else labelled
    if known != labelled:
        print(f"The fingerprint is of {known} labelled cases, imagesTr has {labelled}: all is done anew.")
    return known != labelled


def _plans(name: str, planner: str | None, plans_name: str | None, processes: int, clean: bool) -> PlansManager:
    """Those that are there, unless they are to be made anew: then by the planner that made them, or `planner`."""
    folder = folders.of_environment("nnUNet_preprocessed") / name
    file = folder / f"{plans_name or _own_name(planner or PLANNER)}.json"
    number = convert_dataset_name_to_id(name)
    extract_fingerprints([number], num_processes=processes, clean=clean)
    if file.is_file() and not clean:
        print(f"The plans are there: {file}")
    else:
        before = json.loads(file.read_text())["experiment_planner_used"] if file.is_file() else PLANNER
        plan_experiments([number], planner or before, overwrite_plans_name=file.stem)
    return PlansManager(str(file))


def _own_name(planner: str) -> str:
    """What a planner calls its plans."""
    where = join(nnunetv2.__path__[0], "experiment_planning")
    found = recursive_find_python_class(where, planner, "nnunetv2.experiment_planning")
    if found is None:
        raise ValueError(f"nnU-Net has no planner {planner!r}.")
    return str(inspect.signature(found).parameters["plans_name"].default)


def _is_planned(configuration: str, plans: Any) -> bool:
    """Whether there is such a configuration; nnU-Net plans some for some data alone."""
    if configuration in plans.available_configurations:
        return True
    there = ", ".join(plans.available_configurations)
    if configuration not in PROCESSES:
        raise ValueError(f"{configuration!r} is no configuration of {plans.plans_name}, which has {there}.")
    print(f"{configuration}: not in the plans, which have {there}.")
    return False


def _is_of_another_plan(name: str, plans: Any, configuration: str) -> bool:
    """Whether the plan has changed since this configuration was prepared, as by hand."""
    manager = plans.get_configuration(configuration)
    folder = folders.unlabelled(folders.of_environment("nnUNet_preprocessed") / name / manager.data_identifier)
    return folder.is_dir() and not folders.made_by(folder, folders.recipe(plans, manager))


def _labelled(name: str, labelled: set[str], plans: Any, configuration: str, workers: int, clean: bool) -> None:
    folder = folders.of_environment("nnUNet_preprocessed") / name
    there = set(folders.cases(folder / plans.get_configuration(configuration).data_identifier))
    if there == labelled and not clean:
        print(f"{configuration}: the {len(labelled)} labelled cases are there.")
        return
    number = convert_dataset_name_to_id(name)
    preprocess([number], plans.plans_name, configurations=(configuration,), num_processes=(workers,))


def _splits(name: str, labelled: list[str]) -> None:
    """nnU-Net splits into five, which takes five cases; fewer are left out one by one."""
    file = folders.of_environment("nnUNet_preprocessed") / name / "splits_final.json"
    if file.is_file():
        known = {case for split in json.loads(file.read_text()) for case in (*split["train"], *split["val"])}
        if known != set(labelled):
            print(f"{file} is of other cases than imagesTr: delete it to have them split anew.")
    elif len(labelled) == 1:
        print("One labelled case leaves none to validate on: train with fold all.")
    elif len(labelled) < FOLDS:
        splits = [{"train": [other for other in labelled if other != case], "val": [case]} for case in labelled]
        file.write_text(json.dumps(splits, indent=1))
        print(f"{len(labelled)} labelled cases: folds 0 to {len(labelled) - 1} validate on one each ({file}).")


# ------------------------------------------------------------------ imagesUn


@dataclass(frozen=True)
class _Job:
    """One case for a worker, which cannot be handed open files."""

    case: str
    images: list[str]
    folder: str
    plans: dict[str, Any]
    configuration: str
    dataset_json: dict[str, Any]
    labelled: scans.Labelled


def _unlabelled(
    name: str,
    found: scans.Cases,
    plans: Any,
    configuration: str,
    dataset_json: dict[str, Any],
    workers: int,
    clean: bool,
) -> list[str]:
    """The problems that came up; what had none is there."""
    base = folders.of_environment("nnUNet_preprocessed") / name
    manager = plans.get_configuration(configuration)
    folder = folders.unlabelled(base / manager.data_identifier)
    _start(folder, folders.recipe(plans, manager), set(found), clean)
    todo = [case for case in found if not _is_there(folder, case, found[case])]
    print(f"{configuration}: {len(found) - len(todo)} of the {len(found)} cases in {scans.FOLDER} are there.")
    fingerprint = json.loads((base / "dataset_fingerprint.json").read_text())
    labelled = scans.Labelled.of(fingerprint, scans.channels(dataset_json))
    jobs = [_Job(c, found[c], str(folder), plans.plans, configuration, dataset_json, labelled) for c in todo]
    problems = []
    with tqdm(desc=f"{scans.FOLDER}, {configuration}", total=len(jobs), disable=not jobs) as progress:
        for entries in _run(_preprocess, jobs, workers):
            problems += entries
            progress.update()
    shutil.rmtree(folder / PART, ignore_errors=True)
    return problems


def _start(folder: Path, recipe: dict[str, Any], found: set[str], clean: bool) -> None:
    """The folder without what does not belong: all if it is to be done anew, and what imagesUn no longer has."""
    if folder.is_dir() and clean:
        print(f"{folder} is of another plan, or to be done anew: its cases are removed.")
        shutil.rmtree(folder)
    for case in set(folders.cases(folder)) - found:
        print(f"{case} is no longer in {scans.FOLDER}: what was made of it is removed.")
        _remove(folder, case)
    if found:
        folder.mkdir(parents=True, exist_ok=True)
        folders.recipe_file(folder).write_text(json.dumps(recipe))


def _remove(folder: Path, case: str) -> None:
    (folder / f"{case}.pkl").unlink()  # first: without it the case is not there
    for ending in (".b2nd", "_seg.b2nd", ".npz", ".npy", "_seg.npy"):
        (folder / f"{case}{ending}").unlink(missing_ok=True)


def _is_there(folder: Path, case: str, images: Sequence[str]) -> bool:
    """Complete, and not older than its images."""
    made = folder / f"{case}.pkl"
    return made.is_file() and all(Path(image).stat().st_mtime <= made.stat().st_mtime for image in images)


def _run(function: Callable[[_Job], list[str]], jobs: list[_Job], workers: int) -> Iterator[list[str]]:
    if workers == 1 or not jobs:
        yield from map(function, jobs)
        return
    context = multiprocessing.get_context("spawn")  # as nnU-Net does
    with ProcessPoolExecutor(min(workers, len(jobs)), context) as pool:
        try:
            for done in as_completed([pool.submit(function, job) for job in jobs]):
                yield done.result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"A process was killed, most likely for want of memory: try -np {max(1, workers // 2)}. What is done "
                "stays done."
            ) from error


def _preprocess(job: _Job) -> list[str]:
    """nnU-Net's preprocessing of one case, moved to its place when it is complete; or what is wrong with it."""
    plans = PlansManager(job.plans)
    configuration = plans.get_configuration(job.configuration)
    problems = scans.check_content(job.images, plans.image_reader_writer_class(), job.labelled)
    if problems:
        return problems
    part = Path(job.folder) / PART / job.case
    part.mkdir(parents=True, exist_ok=True)
    preprocessor = configuration.preprocessor_class(verbose=False)
    try:  # without a label nnU-Net stores where the scan is not zero, which some normalisations need
        preprocessor.run_case_save(str(part / job.case), job.images, None, plans, configuration, job.dataset_json)
    except (RuntimeError, ValueError, AssertionError) as error:
        return [f"{job.images[0]}: nnU-Net's preprocessing fails ({error}): take it out, or mend it."]
    properties = load_pickle(str(part / f"{job.case}.pkl"))
    properties["class_locations"] = {}  # nnU-Net's loader asks for it
    write_pickle(properties, str(part / f"{job.case}.pkl"))
    for file in sorted(part.iterdir(), key=lambda path: path.suffix == ".pkl"):
        file.replace(Path(job.folder) / file.name)
    return []
