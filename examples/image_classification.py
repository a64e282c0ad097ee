"""GAP in image classification: few labels, many images, and FixMatch with and without GAP.

    python examples/image_classification.py                    generated shapes: about a minute of one core
    python examples/image_classification.py --download         CIFAR-10, for a GPU
    python examples/image_classification.py --data DIR         the same, already there

Trains on the labels alone, with FixMatch, and with FixMatch and GAP (GapMatch), and ends with a table of the accuracies
and a picture of the curves. `step` holds all that GAP takes. What was measured: docs/classification.md.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torchvision.transforms import v2

from classification.data import CIFAR10_NAME, CLASSES, Data, labelled_indices, load
from classification.networks import cifar_network, small_network
from classification.results import Point, save_curves, save_logs, show_table
from gap_torch import GAPWrapper
from gap_torch.consistency import Batch, FixMatch, Views
from gap_torch.losses import cross_entropy
from segmentation.errors import InputError
from segmentation.printing import show_every_character
from segmentation.ranks import usable_device

LABELS = {"supervised": "Supervised", "fixmatch": "FixMatch", "gapmatch": "GapMatch"}
GROUP = 8  # images that share a draw of the augmentations: one an image would take longer than the network
POINTS = 20  # of a curve


@dataclass(frozen=True)
class Settings:
    """Of the training. The defaults are for the generated shapes on a CPU."""

    labels: int = 40
    """Labelled images, equally many of each class."""
    iterations: int = 250
    labelled_batch: int = 16
    unlabelled_batch: int = 48
    lr: float = 0.05
    weight_decay: float = 5e-4
    tau: float = 0.8
    eps: float = 0.1
    alpha: float = 1.0
    seed: int = 0


# as in FixMatch's own experiments, in a tenth of their iterations
CIFAR = Settings(iterations=100_000, labelled_batch=64, unlabelled_batch=448, lr=0.03, tau=0.95)


def in_groups(augmentation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """torchvision draws once for a whole batch; this draws anew for every `GROUP` images."""
    return lambda images: torch.cat([augmentation(group) for group in images.split(GROUP)])


weak = in_groups(v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(32, padding=4, padding_mode="reflect")]))
strong = in_groups(v2.RandAugment(num_ops=2, magnitude=10))


def step(
    model: nn.Module, optimizer: GAPWrapper, method: FixMatch | None, gap: bool, labelled: tuple, unlabelled: Tensor
) -> tuple[Tensor, Views | None]:
    """One training step. Returns the loss of the labelled images, and the unlabelled ones' views and pseudo-labels."""
    views = None
    if method is not None:
        views = method.prepare(model, Batch(unlabelled))
        method.loss(model, views).backward()  # g1
        if gap:
            with optimizer.perturbed(model):  # theta -> theta + eps * g1 / ||g1||, and back
                method.loss(model, views).backward()  # g2
    images, classes = labelled
    loss = F.cross_entropy(model(weak(images)), classes)
    loss.backward()  # g_l
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach(), views


def train(name: str, model: nn.Module, data: Data, settings: Settings, tick: Callable[[], None]) -> list[Point]:
    """Train `model` by method `name`; `tick` is called after each iteration."""
    s, (images, classes) = settings, data.train
    few = labelled_indices(classes, s.labels, s.seed)
    base = torch.optim.SGD(model.parameters(), s.lr, momentum=0.9, nesterov=True, weight_decay=s.weight_decay)
    optimizer = GAPWrapper(base, s.eps, s.alpha)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, s.iterations)
    method = None if name == "supervised" else FixMatch(weak, strong, s.tau, loss=cross_entropy, mode="batch")
    points, seconds = [], 0.0
    for iteration in range(1, s.iterations + 1):
        start = time.perf_counter()
        labelled = few[torch.randint(len(few), (s.labelled_batch,), device=few.device)]
        unlabelled = torch.randint(len(images), (s.unlabelled_batch,), device=few.device)
        batch = (images[labelled], classes[labelled])
        loss, views = step(model, optimizer, method, name == "gapmatch", batch, images[unlabelled])
        schedule.step()
        seconds += time.perf_counter() - start
        if iteration % max(1, s.iterations // POINTS) == 0 or iteration == s.iterations:
            confident, right = pseudo_labels(views, classes[unlabelled])
            points.append(Point(iteration, accuracy(model, *data.test), loss.item(), confident, right, seconds))
        tick()
    return points


def pseudo_labels(views: Views | None, classes: Tensor) -> tuple[float, float]:
    """How many count, and how many of these are right, per cent."""
    if views is None or views.target is None or views.mask is None:
        return 0.0, math.nan
    right = (views.target == classes)[views.mask].float()
    return 100 * views.mask.float().mean().item(), 100 * right.mean().item()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, classes: Tensor) -> float:
    """Per cent."""
    model.eval()
    right = sum((model(i).argmax(dim=1) == c).sum() for i, c in zip(images.split(500), classes.split(500), strict=True))
    model.train()
    return 100 * float(right) / len(classes)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--data", type=Path, help="folder of cifar-10-batches-py (default: data, if it is there)")
    parser.add_argument("--download", action="store_true", help="fetch CIFAR-10 if it is not there")
    parser.add_argument("--method", nargs="+", choices=LABELS, default=[*LABELS])
    parser.add_argument("--gap", action=argparse.BooleanOptionalAction, default=True, help="--no-gap: no GapMatch")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ..., mps or xpu (default: cuda if there is one)")
    parser.add_argument("--out", type=Path, default=Path("runs/classification"))
    for field in fields(Settings):  # without a default: that depends on the data
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), help=f"({field.default})")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    methods = [name for name in LABELS if name in arguments.method and (arguments.gap or name != "gapmatch")]
    if not methods:
        raise InputError("--no-gap: leaves none of the methods of --method")
    given = {f.name: getattr(arguments, f.name) for f in fields(Settings) if getattr(arguments, f.name) is not None}
    device, data = usable_device(arguments.device), load(arguments.data, arguments.download, arguments.seed or 0)
    real = data.name == CIFAR10_NAME
    settings = checked(replace(CIFAR if real else Settings(), **given), data)
    data = data.to(device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        for name in methods:
            torch.manual_seed(settings.seed)
            model = (cifar_network if real else small_network)().to(device)
            task = progress.add_task(LABELS[name], total=settings.iterations)
            runs[LABELS[name]] = train(name, model, data, settings, partial(progress.advance, task))
    title = f"{data.name}, {settings.labels} labels, seed {settings.seed}"
    save_logs(arguments.out, runs)
    save_curves(arguments.out / "curves.png", runs, title)
    show_table(arguments.out / "table.md", runs, title)
    print(f"table, curves and logs: {arguments.out}")


def checked(settings: Settings, data: Data) -> Settings:
    """`settings`, or InputError. The rest is checked by FixMatch and GAPWrapper."""
    fewest = int(data.train[1].bincount(minlength=CLASSES).min())  # images of a class
    if settings.labels % CLASSES or not 1 <= settings.labels // CLASSES <= fewest:
        most = CLASSES * fewest
        raise InputError(f"--labels: must be a multiple of {CLASSES}, {most} at most, got {settings.labels}")
    for name in ("iterations", "labelled_batch", "unlabelled_batch"):
        if getattr(settings, name) < 2:
            raise InputError(f"--{name.replace('_', '-')}: must be at least 2, got {getattr(settings, name)}")
    return settings


def main(argv: Sequence[str] | None = None) -> int:
    show_every_character()
    try:
        run(parse(argv))
    except (ValueError, OSError) as error:  # ours and the library's name the culprit
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
