"""The command line of every example, from its arguments to a job."""

import argparse
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from segmentation import ranks
from segmentation.data.files import patients_for_share
from segmentation.errors import InputError
from segmentation.job import Job, OldRuns
from segmentation.methods import TABLE, parsed
from segmentation.printing import show_every_character
from segmentation.recipe import (
    CHOICES,
    GAP_FIELDS,
    GAPMATCH,
    METHOD_FIELDS,
    METHODS,
    SUPERVISED,
    Recipe,
    Run,
    method_of,
)
from segmentation.run import run
from segmentation.task import Task
from segmentation.training.captured import obstacle

AMP = {"bfloat16": torch.bfloat16, "float16": torch.float16, "none": None, "off": None}
KNOBS = (
    "eps",
    "alpha",
    "tau",
    "weight",
    "ramp_up",
    "labelled_weight",
    "unlabelled_loss",
    "joint",
    "pre_training",
    "lr",
    "lr_schedule",
    "average_decay",
    "statistics_samples",
    "warm_up",
    "aligned",
    "freeze_statistics",
    "replay_dropout",
    "iterations",
)
"""Options that say what a field of the recipe is."""
COMPILE_PAYS_AFTER = 15_000
"""Iterations in the plane, on CUDA: there compiled passes save 5 ms of each, and take about a minute to make. On a CPU
they are slower, and in space nobody has measured them (docs/performance.md)."""


LEAST_EPS_UNDER_AUTOCAST = 0.05
"""Below it the cosine of the move that convolutions see in bfloat16 with the one that was meant is under 0.76."""


def main(task: Task, description: str, argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; returns the exit status."""
    show_every_character()
    return ranks.exit_status(lambda: run(job(task, parse(task, description, argv))))


def parse(task: Task, description: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of an example for `task`."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter)
    otherwise = "; without it a phantom is made" if task.has_phantom else ""
    parser.add_argument("--data", type=Path, help=f"folder of {task.name}{otherwise}")
    parser.add_argument(
        "--labelled", "--labeled", type=int, choices=(1, 5, 10, 100), help="labelled share in percent (default: 1)"
    )
    parser.add_argument("--patients", type=int, help="labelled patients, instead of --labelled")
    parser.add_argument(
        "--patients-seed", type=_natural, help="draw them at random (default: the first of the list, as the field does)"
    )
    parser.add_argument(
        "--method",
        nargs="+",
        metavar="NAME",
        help=f"one or more, run in this order: {', '.join(METHODS)}; each also as NAME+gap; gapmatch is fixmatch+gap",
    )
    on_or_off = argparse.BooleanOptionalAction
    parser.add_argument("--gap", action=on_or_off, help="every method with GAP, or every one without")
    presets = [name for name in task.presets if name != "phantom"]
    parser.add_argument("--preset", choices=presets, help="recipe (default: paper on a GPU, cpu else)")
    parser.add_argument("--eps", type=float, help="radius of the perturbation")
    parser.add_argument("--alpha", type=float, help="weight of g2")
    parser.add_argument("--tau", type=float, help="confidence threshold of the pseudo-labels")
    parser.add_argument(
        "--option",
        nargs="+",
        action="extend",
        metavar="NAME=VALUE",
        help=f"of a method itself: {_there_are()}",
    )
    parser.add_argument("--weight", type=float, help="of the consistency loss (default: the method's own)")
    parser.add_argument(
        "--ramp-up", type=float, help="share of the run in which that weight grows (default: the method's own)"
    )
    parser.add_argument("--labelled-weight", type=float, help="of the labelled loss (default: the method's own)")
    parser.add_argument(
        "--unlabelled-loss", choices=CHOICES["unlabelled_loss"], help="R of equation 7 (default: the method's own)"
    )
    parser.add_argument("--joint", action=on_or_off, help="labelled images in one batch with the first view")
    parser.add_argument(
        "--pre-training", type=float, help="iterations of the run that a method starts from, in its own; 0 for none"
    )
    parser.add_argument("--lr", type=float, help="the first learning rate")
    parser.add_argument("--lr-schedule", choices=CHOICES["lr_schedule"], help="what becomes of it")
    parser.add_argument("--average-decay", type=float, help="score a moving average of the weights; 0 for none")
    parser.add_argument(
        "--statistics-samples",
        type=int,
        help="take batch norm's statistics anew over so many before scoring; 0 for none",
    )
    parser.add_argument("--warm-up", type=int, help="iterations on labelled images alone at the start (not of BCP)")
    parser.add_argument(
        "--aligned",
        choices=CHOICES["aligned"],
        help="hold the perturbed prediction to the method's targets, or to the unperturbed prediction: its "
        "probabilities, or its confident classes",
    )
    parser.add_argument("--freeze-statistics", action=on_or_off, help="of batch norm, in the perturbed pass")
    parser.add_argument("--replay-dropout", action=on_or_off, help="the same masks in the perturbed pass")
    parser.add_argument("--iterations", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ..., mps or xpu (default: cuda if there is one)")
    parser.add_argument("--amp", choices=AMP, default="bfloat16", help="autocast dtype; none or off: float32")
    parser.add_argument(
        "--compile", choices=("auto", "on", "off"), default="auto", help="torch.compile the passes (auto: if it pays)"
    )
    parser.add_argument(
        "--graph",
        choices=("auto", "on", "off"),
        default="auto",
        help="capture the training step as a CUDA graph (auto: on CUDA, in one process; a line says where it can't be)",
    )
    if task.stride is not None:
        parser.add_argument(
            "--stride",
            type=int,
            nargs=3,
            metavar=("X", "Y", "Z"),
            help=f"of the sliding window in voxels (default: {' '.join(map(str, task.stride))})",
        )
    parser.add_argument(
        "--largest-component", action="store_true", help="keep only the largest piece of each predicted class"
    )
    parser.add_argument("--out", type=Path, help=f"folder for the results (default: {_folder(task)}, or with -phantom)")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run in --out")
    return parser.parse_args(argv)


def _natural(text: str) -> int:
    """A seed; Python's generator would take -1 for 1."""
    if (number := int(text)) < 0:
        raise ValueError(text)
    return number


def job(task: Task, arguments: argparse.Namespace) -> Job:
    """The job that the command line asks for. Raises InputError."""
    if arguments.data is None and not task.has_phantom:
        raise InputError(f"--data: {task.name} has no phantom to stand in for it; give the folder of the data.")
    _refuse_contradictions(arguments)
    device = ranks.together(ranks.usable_device)(arguments.device)
    phantom = arguments.data is None
    out = arguments.out or (_folder(task).with_name(f"{_folder(task).name}-phantom") if phantom else _folder(task))
    preset = "phantom" if phantom else arguments.preset or ("cpu" if device.type == "cpu" else "paper")
    knobs = {name: getattr(arguments, name) for name in KNOBS}
    knobs = {name: value for name, value in knobs.items() if value is not None}
    recipe = Recipe(seed=arguments.seed, **{**task.presets[preset], **knobs})
    methods = _methods(arguments.method, arguments.gap, all_three=phantom)
    _refuse_idle_knobs(knobs, methods, recipe)
    _warn_of_a_rounded_move(arguments.eps, AMP[arguments.amp])
    options = _options(arguments.option or (), [method for method, _ in methods])
    stride = _stride(task, arguments, recipe)
    patients = arguments.patients
    if patients is None:
        patients = 1 if phantom else patients_for_share(arguments.labelled or 1, task.training_patients)
    return Job(
        task=task,
        data=_phantom(task, out / "phantom") if phantom else arguments.data,
        patients=patients,
        patients_seed=arguments.patients_seed,
        recipes=[_of_run(recipe, run, options, task.num_classes) for run in methods],
        device=device,
        amp=AMP[arguments.amp],
        compiled=_compiled(arguments.compile, device, recipe),
        graph=_graph(arguments.graph, device, recipe),
        out=out,
        old_runs=_old_runs(arguments),
        title=f"{f'{task.name} phantom' if phantom else task.name} test set, labelled patients: {patients}"
        f"{'' if arguments.patients_seed is None else f' (drawn with seed {arguments.patients_seed})'}, "
        f"preset {preset}, seed {arguments.seed}{_scored(stride, arguments.largest_component)}",
        stride=stride,
        largest_component=arguments.largest_component,
        published={} if phantom or arguments.patients is not None else task.published.get(arguments.labelled or 1, {}),
    )


def _options(given: Sequence[str], methods: Sequence[str]) -> dict[str, str]:
    """Name -> text. Raises InputError for what none of `methods` has."""
    options: dict[str, str] = {}
    for option in given:
        name, equals, text = option.partition("=")
        if not equals:
            raise InputError(f"--option {option}: must be NAME=VALUE.")
        if not any(name in TABLE[method].options for method in methods):
            there_are = "; ".join(f"{m}: {', '.join(TABLE[m].options) or 'none'}" for m in dict.fromkeys(methods))
            raise InputError(f"--option {option}: there is no {name!r} here. Options of {there_are}.")
        if name in options:
            raise InputError(f"--option {name}: is given twice; leave one out.")
        options[name] = text
    return options


def _there_are() -> str:
    """The options of each method that has any, with their defaults."""
    each = [(name, entry.options) for name, entry in TABLE.items() if entry.options]
    return "; ".join(f"{name} {', '.join(f'{n}={_short(v)}' for n, v in options.items())}" for name, options in each)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _of_run(recipe: Recipe, run: Run, options: Mapping[str, str], num_classes: int) -> Recipe:
    """`recipe` for one of several runs, with those of the options that it has."""
    method, gap = run
    return replace(recipe, method=method, gap=gap, options=parsed(method, options, num_classes, recipe.tau))


def _folder(task: Task) -> Path:
    return Path("runs") / task.name.lower()


def _refuse_contradictions(arguments: argparse.Namespace) -> None:
    """Raise InputError for options that would have no effect."""
    for option in ("labelled", "preset"):
        if arguments.data is None and getattr(arguments, option) is not None:
            raise InputError(f"--{option}: means nothing on the phantom; give --data, or leave it out.")
    if arguments.labelled is not None and arguments.patients is not None:
        raise InputError("--labelled and --patients: both say how much is labelled; give one of them.")


def _methods(names: Sequence[str] | None, gap: bool | None, all_three: bool) -> list[Run]:
    """What to run, each method with or without GAP. Raises InputError for what can't be, or would be twice.

    Args:
        names: as given; None for FixMatch.
        gap: as given; None leaves it to the names.
        all_three: run labelled images alone, and FixMatch with and without GAP, where nothing was said.
    """
    method, _ = GAPMATCH
    if names is None:
        if all_three and gap is None:
            return [(SUPERVISED, False), (method, False), GAPMATCH]
        return [(method, gap is not False)]
    asked = [method_of(name) for name in names]
    for name, (_, with_gap) in zip(names, asked, strict=True):
        if with_gap and gap is False:
            raise InputError(f"--method {name} --no-gap: contradict each other; leave one of them out.")
    methods = [(method, with_gap or gap is True) for method, with_gap in asked]
    if len(set(methods)) < len(methods):
        raise InputError(f"--method {' '.join(names)}{' --gap' * (gap is True)}: names a method twice.")
    return methods


def _refuse_idle_knobs(knobs: Mapping[str, object], methods: Sequence[Run], recipe: Recipe) -> None:
    """Raise InputError for options that mean nothing to any of the runs."""
    with_gap, unlabelled = any(gap for _, gap in methods), any(method != "supervised" for method, _ in methods)
    for name in knobs:
        option = f"--{name.replace('_', '-')}"
        if name in GAP_FIELDS and not with_gap:
            raise InputError(f"{option}: means nothing without GAP; name a run that has it, or leave it out.")
        if name in METHOD_FIELDS and not unlabelled:
            raise InputError(f"{option}: means nothing to supervised alone; name another method, or leave it out.")
    by_classes = with_gap and recipe.aligned == "pseudo_labels"  # of which tau says which count
    if "tau" in knobs and not by_classes:
        _refuse_idle_knob("tau", {name for name, entry in TABLE.items() if entry.thresholded}, methods)
    if "pre_training" in knobs:
        _refuse_idle_knob("pre-training", {name for name, entry in TABLE.items() if entry.phase}, methods)
    if "unlabelled_loss" in knobs:
        _refuse_idle_knob("unlabelled-loss", {name for name, entry in TABLE.items() if entry.hard}, methods)


def _refuse_idle_knob(option: str, having: Collection[str], methods: Sequence[Run]) -> None:
    """Raise InputError if none of `methods` is among those that have the option."""
    if not any(method in having for method, _ in methods):
        names = ", ".join(name for name in TABLE if name in having)
        raise InputError(f"--{option}: means nothing to these methods; name one of {names}, or leave it out.")


@ranks.on_main
def _warn_of_a_rounded_move(eps: float | None, amp: torch.dtype | None) -> None:
    """theta moves in float32, but under autocast convolutions see it in 16 bits (docs/eps_alpha.md).

    A preset's own radius was chosen as it is run, and needs no warning.
    """
    if eps is not None and 0 < eps < LEAST_EPS_UNDER_AUTOCAST and amp is torch.bfloat16:
        print(
            f"warning: of a move by eps={eps:g} the network sees much rounding noise under bfloat16; "
            "--amp off shows it the move itself.",
            file=sys.stderr,
            flush=True,
        )


def _stride(task: Task, arguments: argparse.Namespace, recipe: Recipe) -> tuple[int, ...] | None:
    """The window's stride. Raises InputError for one that would leave voxels out."""
    if task.stride is None:
        return None
    if arguments.stride is None:
        return tuple(map(min, task.stride, recipe.size))
    if not all(1 <= step <= side for step, side in zip(arguments.stride, recipe.size, strict=True)):
        stride = " ".join(map(str, arguments.stride))
        raise InputError(f"--stride {stride}: must be at least 1 and at most the window, {recipe.size}.")
    return tuple(arguments.stride)


def _scored(stride: tuple[int, ...] | None, largest_component: bool) -> str:
    """What a table has to say of how its predictions were made."""
    window = "" if stride is None else f", stride {' x '.join(map(str, stride))}"
    return window + (", largest component" if largest_component else "")


def _compiled(choice: str, device: torch.device, recipe: Recipe) -> bool:
    """Whether to compile. Raises InputError where that can't be had."""
    if choice == "on" and ranks.world() > 1:
        raise InputError("--compile on: works in one process alone; leave it out.")  # layers talk to other ranks
    if choice == "auto":
        pays = device.type == "cuda" and len(recipe.size) == 2 and recipe.iterations >= COMPILE_PAYS_AFTER
        return pays and ranks.world() == 1
    return choice == "on"


def _graph(choice: str, device: torch.device, recipe: Recipe) -> bool:
    """Whether to capture the step. Raises InputError where that can't be had."""
    reason = obstacle(device, recipe)
    if choice == "on" and reason:
        raise InputError(f"--graph on: {reason}; leave it out.")
    if choice == "auto" and reason and device.type == "cuda" and ranks.is_main():
        print(f"the step is not captured as a CUDA graph: {reason}", file=sys.stderr, flush=True)
    return choice != "off" and reason is None


def _old_runs(arguments: argparse.Namespace) -> OldRuns:
    """The phantom's own default folder may be started anew; elsewhere may lie a day's work."""
    if arguments.resume:
        return "resume"
    return "replace" if arguments.data is None and arguments.out is None else "refuse"


def _phantom(task: Task, root: Path) -> Path:
    _write_phantom(task, root)
    return root


@ranks.on_main  # the others read it
def _write_phantom(task: Task, root: Path) -> None:
    assert task.write_phantom is not None
    try:
        task.write_phantom(root)
    except OSError as error:
        raise InputError(f"{root}: can't be written ({error.strerror}); choose another --out.") from None
