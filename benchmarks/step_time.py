"""What a GapMatch iteration of the ACDC example costs beyond its passes, beside supervised training, and scoring.

    python benchmarks/step_time.py                        the sizes of --preset cpu
    python benchmarks/step_time.py --size 256             the sizes of --preset paper
    python benchmarks/step_time.py --data DIR --size 256  and scoring volumes of ACDC
    python benchmarks/step_time.py --threads 1            on a busy machine: in processor time
    python benchmarks/step_time.py --only methods         every method of the examples, without GAP and with it
    python benchmarks/step_time.py --device cuda --size 256 --only captured profile --compile

On CUDA `captured` has the step as a CUDA graph too, as the example runs it, and `profile` says where the time goes,
kernel by kernel. Images are random: no pass looks at what it is given. Everything takes turns, so ratios hold on a busy
machine too.

Passes of one iteration, in units of one sample's forward pass (a backward pass counts 2), for L labelled and U
unlabelled samples:

- UNet: 3 (L + U), with labels for all.
- GapMatch: 3 L + U + 3 U + 3 U, where FixMatch has 3 L + U + 3 U. For L = U that is 10 / 6 = 1.67 and 1.17 of the UNet.
- Mean Teacher: 3 L + U + 3 U, the U for the teacher; 7 / 6 = 1.17.
- URPC: 3 (L + U), and three more heads, a hundredth of that; 1.01.
- CCT: a decoder is d = 0.64 of a forward pass, and there are three further ones. U for the targets; forward, labelled
  or not, (1 + 3 d) (L + U); backward 2 L, and 2 (1 + 2 d) U, since the own decoder gets no gradient there. For L = U
  that is (7 + 10 d) / 6 = 2.23.
- The other methods: as the lab plans with them (`benchmarks/lab/plan.py`), in passes of L = U samples.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from rich.console import Console
from torch import Tensor, nn

from benchmarks import common
from benchmarks.lab import grid, plan
from gap_torch.consistency import FixMatch
from gap_torch.consistency.targets import in_mode
from gap_torch.losses import at_least_float32, ce_dice_loss
from presentation.palette import BLUE
from segmentation.acdc import ACDC
from segmentation.data.files import read_list
from segmentation.data.slices import Slices
from segmentation.methods import TABLE
from segmentation.networks.dropout import Dropout
from segmentation.recipe import METHODS, SUPERVISED, Recipe, run_name
from segmentation.scoring.dice import mean_dice
from segmentation.scoring.evaluate import evaluate
from segmentation.scoring.predict import eval_mode
from segmentation.scoring.slicewise import batch_size
from segmentation.slice_task import plane
from segmentation.training.captured import REHEARSALS
from segmentation.training.logs import RunLog
from segmentation.training.step import Trainer

AMP = {"bfloat16": torch.bfloat16, "float32": None}
SECTIONS = ("iteration", "table_4", "methods", "choices", "captured", "profile", "scoring")
SEMI_SUPERVISED = tuple(name for name in METHODS if name != SUPERVISED)
LONGEST = 40
"""Kernels of a profile."""
PARTS = ("data", "augmentation", "targets and losses", "wrapper", "base optimizer", "average", "logging")
VOLUME = (10, 256, 216)  # a usual shape in ACDC


@dataclass(frozen=True)
class PaperRow:
    """One line of the paper's table 4, and how to run it here."""

    run: str
    """As on the command line."""
    all_labelled: bool
    """Is the whole batch labelled, as it is for the paper's UNet?"""
    paper: tuple[float, float]
    """Seconds an iteration and a case."""
    passes: float
    """Of one iteration, in those of the UNet (see above)."""


DECODER = 0.638  # of the UNet's multiplications in a forward pass
TABLE_4 = {
    "UNet": PaperRow("supervised", True, (0.1679, 0.6354), 1.0),
    "Mean Teacher": PaperRow("mean_teacher", False, (0.1999, 0.6363), 7 / 6),
    "URPC": PaperRow("urpc", False, (0.2745, 0.6322), 1.01),
    "CCT": PaperRow("cct", False, (0.5597, 0.9728), (7 + 10 * DECODER) / 6),
    "GapMatch": PaperRow("gapmatch", False, (0.3972, 0.6303), 10 / 6),
}


def main() -> None:
    arguments = parse()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    torch.backends.cudnn.benchmark = device.type == "cuda"  # as in the examples
    preset = ACDC.presets["paper" if arguments.size > 128 else "cpu"]
    recipe = Recipe(**{**preset, "size": (arguments.size, arguments.size), "width": arguments.width})
    recipe = replace(recipe, labelled_batch=arguments.batch, unlabelled_batch=arguments.batch)
    record: dict[str, Any] = {"environment": common.environment(str(device)), "recipe": recipe.to_dict()}
    sections: dict[str, Callable[[], dict[str, Any]]] = {
        "iteration": lambda: {name: iteration(recipe, device, amp, arguments.rounds) for name, amp in AMP.items()},
        "table_4": lambda: table_4(recipe, device, arguments.rounds),
        "methods": lambda: methods(recipe, device, arguments.methods, arguments.rounds),
        "choices": lambda: choices(recipe, device, arguments.compile, arguments.rounds),
        "captured": lambda: captured(recipe, device, arguments.compile, arguments.rounds),
        "profile": lambda: profiled(recipe, device, arguments.compile),
        "scoring": lambda: scoring(recipe, device, arguments.data, arguments.rounds),
    }
    for name in arguments.only or (*sections,):
        if name != "scoring" or arguments.data:
            record[name] = sections[name]()
    threads = f"_{arguments.threads}_threads" if arguments.threads else ""
    name = "_".join(["step_time", device.type, str(arguments.size), *(arguments.only or ())]) + threads
    common.write_json(arguments.results / f"{name}.json", record)
    if "iteration" in record and "table_4" in record:
        draw(record, arguments.figures / f"{name}.png")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels")
    parser.add_argument("--width", type=int, default=16, help="channels of the UNet's first level")
    parser.add_argument("--batch", type=int, default=12, help="labelled samples, and unlabelled ones")
    parser.add_argument("--rounds", type=int, default=10, help="how often everything takes its turn")
    parser.add_argument("--threads", type=int, help="on the CPU (default: torch's)")
    parser.add_argument("--compile", action="store_true", help="try compiled passes too, and what compiling costs")
    parser.add_argument("--data", type=Path, help="ACDC in the h5 layout, to score its volumes")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="some of the sections")
    parser.add_argument(
        "--methods", nargs="+", choices=SEMI_SUPERVISED, default=SEMI_SUPERVISED, help="of that section"
    )
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    parser.add_argument("--figures", type=Path, default=common.FIGURES)
    return parser.parse_args()


def trainer(
    recipe: Recipe, device: torch.device, amp: torch.dtype | None, compiled: bool = False, graph: bool = False
) -> Trainer:
    """One with random slices."""
    generator = torch.Generator().manual_seed(0)

    def slices(count: int) -> Slices:
        shape = (count, *recipe.size)
        images = torch.rand(shape, generator=generator).unsqueeze(1)
        labels = torch.randint(ACDC.num_classes, shape, dtype=torch.uint8, generator=generator)
        return Slices([str(i) for i in range(count)], images, labels)

    return Trainer(ACDC, recipe, slices(32), slices(128), device, amp, compiled, graph)


class Steps:
    """The iterations of a trainer, one a call."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.done = trainer, 0

    def __call__(self) -> dict[str, Tensor]:
        self.done += 1
        return self.trainer.step(self.done)


def iteration(recipe: Recipe, device: torch.device, amp: torch.dtype | None, rounds: int) -> dict[str, Any]:
    """A whole iteration against its bare passes, and against what else it does."""
    subject = trainer(recipe.for_run("gapmatch"), device, amp)
    with tempfile.TemporaryDirectory() as folder:
        log = RunLog(Path(folder), "benchmark", 0, recipe.iterations, Console(quiet=True))
        calls: dict[str, Callable[[], object]] = {
            "whole": Steps(subject),
            **bare_passes(subject),
            **other_parts(subject, log),
        }
        taken = take_turns(calls, device, rounds)
        log.close()
    median = common.medians(taken)
    bare = median["weak"] + 2 * median["strong"] + median["labelled"]
    whole = median["whole"] + median["logging"] / recipe.log_every
    parts = {name: median[name] / (recipe.log_every if name == "logging" else 1) for name in PARTS}
    passes = {
        "weak forward": median["weak"],
        "strong forward + backward, twice": 2 * median["strong"],
        "labelled forward + backward": median["labelled"],
    }
    rest = {"not told apart": whole - bare - sum(parts.values())}
    rows = [("whole iteration", whole), ("bare passes", bare), *{**passes, **parts, **rest}.items()]
    common.show(
        f"One GapMatch iteration, {recipe.size[0]} x {recipe.size[1]}, {amp or torch.float32}",
        ("", "ms", "of the bare passes"),
        [(name, f"{1e3 * value:.1f}", f"{value / bare:.3f}") for name, value in rows],
    )
    return {"seconds": dict(rows), "ratio": whole / bare, "taken": taken}


def take_turns(calls: Mapping[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of every call in every round."""
    return common.interleaved(
        {name: common.whole(call) for name, call in calls.items()}, str(device), rounds, warm_up=2
    )


def bare_passes(subject: Trainer) -> dict[str, Callable[[], object]]:
    """The passes through the network that an iteration consists of, with nothing around them."""
    recipe, device = subject.recipe, subject.device
    network = subject.joint

    def images(batch: int) -> Tensor:
        return torch.rand(batch, 1, *recipe.size, device=device)

    @torch.no_grad()
    def forward(batch: Tensor) -> None:
        with in_mode(network, recipe.own.targets):
            network(batch)

    def forward_backward(batch: Tensor) -> None:
        logits = network(batch)
        logits.backward(torch.ones_like(logits))
        for parameter in network.parameters():
            parameter.grad = None

    weak = images(recipe.unlabelled_batch)
    return {
        "weak": partial(forward, weak),
        "strong": partial(forward_backward, images(recipe.unlabelled_batch)),
        "labelled": partial(forward_backward, images(recipe.labelled_batch)),
    }


def other_parts(subject: Trainer, log: RunLog) -> dict[str, Callable[[], object]]:
    """What an iteration does beside its passes, each piece alone."""
    recipe, method, optimizer = subject.recipe, subject.method, subject.optimizer
    assert isinstance(method, FixMatch)
    assert method.cutmix is not None
    cutmix = method.cutmix
    logits = torch.randn(recipe.unlabelled_batch, ACDC.num_classes, *recipe.size, device=subject.device)
    if subject.model.dtype is not None:
        logits = logits.to(subject.model.dtype)
    logits = logits.to(memory_format=torch.channels_last).requires_grad_()
    target, confident = logits.argmax(1), logits[:, 0] > 0
    values = subject.step(0)

    def data() -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(0)
        return (*subject.labelled_batch(1), subject.unlabelled_batch(1))

    images, labels, unlabelled = data()

    @torch.no_grad()
    def augmentation() -> None:
        subject.weak.with_labels(images, labels)
        strong = method.strong(method.weak(unlabelled))
        cutmix(strong, target, confident)

    def targets_and_losses() -> None:
        with torch.no_grad():
            confidence, _ = at_least_float32(logits).softmax(1).max(1)
            (confidence >= recipe.tau).float().mean()
        for _ in range(2):
            method.criterion(logits, target, confident).backward()
        ce_dice_loss(logits, target).backward()
        logits.grad = None

    parameters = [*subject.model.parameters()]
    g1, g2 = ([scale * torch.randn_like(p) for p in parameters] for scale in (1e-4, 1e-8))  # too small to do harm

    def set_g1() -> None:
        for parameter, gradient in zip(parameters, g1, strict=True):
            parameter.grad = gradient

    def wrapper() -> None:
        set_g1()
        with optimizer.perturbed(subject.joint):
            torch.autograd.backward(parameters, g2)  # the end of a backward pass alone
        optimizer.zero_grad()

    def base_optimizer() -> None:
        set_g1()
        optimizer.step()
        optimizer.zero_grad()

    return {
        "data": data,
        "augmentation": augmentation,
        "targets and losses": targets_and_losses,
        "wrapper": wrapper,
        "base optimizer": base_optimizer,
        "average": (lambda: subject.average.update(subject.model)) if recipe.average_decay else lambda: None,
        "logging": lambda: log.step(recipe.log_every, {**subject.to_host(values), "it_per_s": 1.0}),
    }


def table_4(recipe: Recipe, device: torch.device, rounds: int) -> dict[str, Any]:
    """Seconds an iteration and a case for every method, in both precisions, side by side."""
    calls: dict[str, Callable[[], object]] = {}
    volume = torch.rand(VOLUME).numpy()
    for precision, amp in AMP.items():
        for label, entry in TABLE_4.items():
            batch = recipe.labelled_batch + (recipe.unlabelled_batch if entry.all_labelled else 0)
            subject = trainer(replace(recipe.for_run(entry.run), labelled_batch=batch), device, amp)
            calls[f"{label} {precision} iteration"] = Steps(subject)
            calls[f"{label} {precision} case"] = partial(ACDC.segment, subject.model, volume, recipe, None, device)
    taken = take_turns(calls, device, rounds)
    median = common.medians(taken)
    plain = median["UNet float32 iteration"]
    rows = []
    for precision in AMP:
        unet, case = median[f"UNet {precision} iteration"], median[f"UNet {precision} case"]
        for label, entry in TABLE_4.items():
            ours = median[f"{label} {precision} iteration"], median[f"{label} {precision} case"]
            paper = entry.paper[0] / TABLE_4["UNet"].paper[0]
            ratios = [f"{ratio:.2f}" for ratio in (ours[0] / unet, entry.passes, paper, ours[0] / plain)]
            inference = f"{ours[1]:.4f}", f"{ours[1] / case:.2f}"
            rows.append((f"{label}, {precision}", f"{ours[0]:.4f}", *ratios, *inference))
    columns = ("", "s / it", "/ UNet", "passes", "paper", "/ plain", "s / case", "/ UNet")
    common.show(f"Table 4, {recipe.size[0]} x {recipe.size[1]}", columns, rows)
    return {"seconds": median, "columns": columns, "rows": rows, "taken": taken}


def methods(recipe: Recipe, device: torch.device, names: Sequence[str], rounds: int) -> dict[str, Any]:
    """Seconds of an iteration of each method in bfloat16, without GAP and with it, beside the UNet of table 4."""
    labels_for_all = replace(recipe, labelled_batch=recipe.labelled_batch + recipe.unlabelled_batch)
    runs = {"UNet": labels_for_all.for_run(SUPERVISED)}
    for name in names:
        for gap in (False, True):
            runs[run_name(name, gap)] = replace(recipe, method=name, gap=gap)
    calls = {name: Steps(trainer(run, device, torch.bfloat16)) for name, run in runs.items()}
    median = common.medians(taken := take_turns(calls, device, rounds))
    rows = []
    for name in names:
        plain, with_gap = (median[run_name(name, gap)] / median["UNet"] for gap in (False, True))
        # in the lab's passes the UNet has two
        passes = [plan.passes(grid.cell("ACDC", "study", (name, gap), 1, 0)) / 2 for gap in (False, True)]
        values = plain, passes[0], with_gap, passes[1], with_gap / plain
        rows.append((TABLE[name].label, *(f"{value:.2f}" for value in values)))
    columns = ("", "/ UNet", "passes", "with GAP / UNet", "passes", "with GAP / without")
    common.show(f"An iteration, {recipe.size[0]} x {recipe.size[1]}, bfloat16", columns, rows)
    return {"seconds": median, "columns": columns, "rows": rows, "taken": taken}


def choices(recipe: Recipe, device: torch.device, compiled: bool, rounds: int) -> dict[str, Any]:
    """A GapMatch iteration as the example runs it, and with one choice at a time undone."""
    recipe, bfloat16 = recipe.for_run("gapmatch"), torch.bfloat16
    subjects = {
        "as the example runs it": trainer(recipe, device, bfloat16),
        "float32": trainer(recipe, device, None),
        "not channels_last": contiguous(trainer(recipe, device, bfloat16)),
        "PyTorch's dropout masks": with_usual_dropout(trainer(recipe, device, bfloat16)),
    }
    result: dict[str, Any] = {}
    if compiled:
        subjects["compiled"] = trainer(recipe, device, bfloat16, compiled=True)
        started = time.perf_counter()  # the C++ compiler is another process
        subjects["compiled"].step(0)
        result["first compiled iteration"] = time.perf_counter() - started
    taken = take_turns({name: Steps(subject) for name, subject in subjects.items()}, device, rounds)
    median = common.medians(taken)
    usual = median["as the example runs it"]
    rows = [(name, f"{value:.4f}", f"{value / usual:.2f}") for name, value in median.items()]
    common.show(f"One choice at a time, {recipe.size[0]} x {recipe.size[1]}", ("", "s / it", "ratio"), rows)
    return {**result, "seconds": median, "taken": taken}


def captured(recipe: Recipe, device: torch.device, compiled: bool, rounds: int) -> dict[str, Any]:
    """An iteration of UNet, FixMatch and GapMatch as it comes and, on CUDA, as a CUDA graph, compiled inside if wanted.

    The UNet has labels for its whole batch, as in table 4.
    """
    ways: dict[str, dict[str, Any]] = {"float32": {"amp": None}, "bfloat16": {"amp": torch.bfloat16}}
    if device.type == "cuda":
        ways["bfloat16, captured"] = {"amp": torch.bfloat16, "graph": True}
        if compiled:
            ways["bfloat16, compiled and captured"] = {"amp": torch.bfloat16, "graph": True, "compiled": True}
    labels_for_all = replace(recipe, labelled_batch=recipe.labelled_batch + recipe.unlabelled_batch)
    runs = {
        "UNet": labels_for_all.for_run("supervised"),
        "FixMatch": recipe.for_run("fixmatch"),
        "GapMatch": recipe.for_run("gapmatch"),
    }
    calls: dict[str, Callable[[], object]] = {}
    for way, how in ways.items():
        for label, run in runs.items():
            steps = calls[f"{label}, {way}"] = Steps(trainer(run, device, **how))
            for _ in range(REHEARSALS + 1 if how.get("graph") else 1):
                steps()
    median = common.medians(taken := take_turns(calls, device, rounds))
    plain = median["UNet, float32"]
    rows = [
        (name, f"{1e3 * s:.2f}", f"{s / median[name.replace(name.split(',')[0], 'UNet', 1)]:.2f}", f"{s / plain:.2f}")
        for name, s in median.items()
    ]
    title = f"An iteration, {recipe.size[0]} x {recipe.size[1]}"
    common.show(title, ("", "ms", "/ UNet done so", "/ plain UNet"), rows)
    return {"seconds": median, "taken": taken}


def profiled(recipe: Recipe, device: torch.device, compiled: bool, iterations: int = 5) -> dict[str, Any]:
    """Where the time of a GapMatch iteration goes: kernels of the captured step on CUDA, operations on the CPU."""
    on_cuda = device.type == "cuda"
    steps = Steps(trainer(recipe.for_run("gapmatch"), device, torch.bfloat16, compiled, graph=on_cuda))
    for _ in range(REHEARSALS + 2):
        steps()
    kinds = [torch.profiler.ProfilerActivity.CUDA if on_cuda else torch.profiler.ProfilerActivity.CPU]
    seconds = common.seconds(lambda: [steps() for _ in range(iterations)], str(device)) / iterations
    with torch.profiler.profile(activities=kinds) as profiler:
        for _ in range(iterations):
            steps()
        if on_cuda:
            torch.cuda.synchronize()
    times = {
        event.key: (
            (event.self_device_time_total if on_cuda else event.self_cpu_time_total) / 1e6 / iterations,
            event.count / iterations,
        )
        for event in profiler.key_averages()
    }
    busy = sum(time for time, _ in times.values())
    longest = sorted(((name, *time) for name, time in times.items()), key=lambda row: -row[1])[:LONGEST]
    common.show(
        f"One GapMatch iteration of {1e3 * seconds:.1f} ms, of which {1e3 * busy:.1f} ms are accounted for",
        ("", "ms", "share", "calls"),
        [(name[:70], f"{1e3 * s:.2f}", f"{s / busy:.3f}", f"{count:g}") for name, s, count in longest],
    )
    return {"seconds": seconds, "busy": busy, "longest": [[name[:200], s, count] for name, s, count in longest]}


def contiguous(subject: Trainer) -> Trainer:
    """`subject`, whose network gets no channels_last tensor."""
    network = subject.model.network.to(memory_format=torch.contiguous_format)
    # with one channel an image is contiguous either way, and only a copy has the usual strides
    network.register_forward_pre_hook(lambda _, images: images[0].clone(memory_format=torch.contiguous_format))
    return subject


def with_usual_dropout(subject: Trainer) -> Trainer:
    """`subject` with PyTorch's dropout."""
    for layer in subject.model.modules():
        if isinstance(layer, Dropout):
            layer.forward = partial(nn.Dropout.forward, layer)  # type: ignore[method-assign]
    return subject


def scoring(recipe: Recipe, device: torch.device, root: Path, rounds: int) -> dict[str, Any]:
    """Seconds to read ACDC, of a validation, of its forward passes alone, and of scoring the test volumes."""
    validation, test = (ACDC.read_volumes(root, read_list(root / f"{name}.list")) for name in ("val", "test"))
    batch = batch_size(plane(recipe), device)
    images = torch.rand(sum(len(volume.image) for volume in validation), 1, *recipe.size, device=device)
    calls: dict[str, Callable[[], object]] = {}
    for precision, amp in AMP.items():
        model = trainer(recipe, device, amp).model
        each = partial(ACDC.segment_each, model, recipe=recipe, stride=None, device=device)
        one = partial(ACDC.segment, model, recipe=recipe, stride=None, device=device)
        calls[f"{precision} validation"] = partial(mean_dice, each, validation, ACDC.num_classes)
        calls[f"{precision} validation, forward passes alone"] = partial(forward_passes, model, images.split(batch))
        calls[f"{precision} test volumes, with ASD"] = partial(evaluate, one, test, ACDC.num_classes)
    taken = take_turns(calls, device, rounds)
    median = {**reading(recipe, root), **common.medians(taken)}
    columns = f"{len(validation)} validation and {len(test)} test volumes", "s"
    common.show("Scoring", columns, [(name, f"{value:.2f}") for name, value in median.items()])
    return {"volumes": [len(validation), len(test)], "seconds": median, "taken": taken}


def reading(recipe: Recipe, root: Path) -> dict[str, float]:
    """Seconds to read all training slices from their files, and once more from what was kept of them."""
    names = read_list(root / "train_slices.list")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "data").symlink_to((root / "data").resolve())
        read = partial(ACDC.read_unlabelled, Path(folder), names, recipe)
        return {f"training slices, {turn} time": common.seconds(read, "cpu") for turn in ("first", "second")}


@torch.inference_mode()
def forward_passes(model: nn.Module, batches: Sequence[Tensor]) -> None:
    with eval_mode(model):
        for batch in batches:
            model(batch)


def draw(record: dict[str, Any], path: Path) -> None:
    """Where an iteration's time goes, and table 4, as bars."""
    figure, (left, right) = common.new_panels(2, width_ratios=(5, 4))
    seconds = record["iteration"]["bfloat16"]["seconds"]
    parts = {name: 1e3 * s for name, s in seconds.items() if name not in ("whole iteration", "bare passes")}
    _bars(left, parts, fmt="%.0f", padding=3)
    left.set(title="Where the time goes", xlabel="ms of one GapMatch iteration, bfloat16")
    measured = record["table_4"]["seconds"]
    methods = {name.removesuffix(" iteration"): s for name, s in measured.items() if name.endswith("iteration")}
    _bars(right, methods, fmt="%.2f", label_type="center", color="white")
    right.axvline(methods["UNet float32"], color="black", linewidth=1, linestyle="--", label="the plain UNet: float32")
    right.set(title="Beside the plain UNet", xlabel="seconds an iteration")
    right.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    common.save_plot(figure, path)


def _bars(axes: Axes, lengths: Mapping[str, float], **label: Any) -> None:
    """From top to bottom, each with its length as `label`, for `Axes.bar_label`."""
    bars = axes.barh([*lengths], [*lengths.values()], color=BLUE)
    axes.bar_label(bars, fontsize=9, **label)
    axes.invert_yaxis()
    axes.margins(x=0.15)


if __name__ == "__main__":
    main()
