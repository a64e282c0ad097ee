"""FixMatch and GapMatch on ACDC in one plain training loop, to be copied.

    python examples/acdc_plain.py                                                    a phantom, in a few minutes
    python examples/acdc_plain.py --data data/ACDC --labelled 1 --method gapmatch    ACDC, 1 % of the labels

It reads the h5 layout of docs/acdc.md. A step is that of `acdc_gapmatch.py --preset paper --amp off`, which has logs,
pictures, checkpoints, mixed precision and several GPUs besides. Put your own network and views in place of the imports
from `segmentation`.
"""

import argparse
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import h5py
import numpy as np
import torch
from monai.metrics import compute_average_surface_distance, compute_dice
from scipy.ndimage import zoom
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from gap_torch import GAPWrapper
from gap_torch.consistency import CutMix
from gap_torch.losses import ce_dice_loss
from segmentation.data.phantoms.heart import write_phantom
from segmentation.data.strong import Strong
from segmentation.data.weak_slices import WeakSlices
from segmentation.networks.unet import UNet

CLASSES = ("RV", "Myo", "LV")  # classes 1, 2 and 3; 0 is the background
BATCH = 12  # labelled images, and as many unlabelled ones
LR, MOMENTUM, WEIGHT_DECAY, POWER = 0.01, 0.9, 1e-4, 0.9  # SGD with a poly learning rate
TAU = 0.95  # confidence from which on a pseudo-label counts; long runs can fall with it: try 0.8 (docs/acdc.md)
EPS, ALPHA = 0.1, 1.0  # GAP: radius of the perturbation, and weight of the gradient there

weak = WeakSlices()  # geometry: turns, flips and small rotations
strong = Strong()  # intensities: brightness, contrast and blur
cutmix = CutMix(p=0.5)  # boxes from another image of the batch, with their pseudo-labels


def train(
    model: nn.Module,
    labelled: Iterable[Sequence[Tensor]],
    unlabelled: Iterable[Sequence[Tensor]],
    iterations: int,
    gap: bool,
) -> None:
    """Algorithm 1 of the GapMatch paper, `iterations` times; without `gap` it is FixMatch.

    Args:
        model: images (B, 1, S, S) to logits (B, 4, S, S); trained in place.
        labelled: batches of images (B, 1, S, S), float32 in [0, 1], and labels (B, S, S), int64.
        unlabelled: batches of images (B, 1, S, S) alone.
        iterations: length of the poly schedule; there are as many batches.
        gap: whether to add the gradient at theta*.
    """
    device = next(model.parameters()).device
    base = torch.optim.SGD(model.parameters(), LR, MOMENTUM, weight_decay=WEIGHT_DECAY)
    optimizer = GAPWrapper(base, eps=EPS, alpha=ALPHA)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: (1 - t / iterations) ** POWER)
    model.train()
    for t, ((images, labels), (others,)) in enumerate(zip(labelled, unlabelled, strict=True)):
        images, labels = weak.with_labels(images.to(device), labels.to(device))
        view, pseudo_label, confident = fixmatch_views(model, others.to(device))

        loss = ce_dice_loss(model(view), pseudo_label, confident)
        loss.backward()  # g1
        if gap:
            with optimizer.perturbed(model):  # theta -> theta* = theta + eps * g1 / ||g1||, and back on leaving
                ce_dice_loss(model(view), pseudo_label, confident).backward()  # g2, with the targets of theta
        labelled_loss = ce_dice_loss(model(images), labels)
        labelled_loss.backward()  # g_l, at theta
        optimizer.step()  # g1 + alpha * g2 + g_l
        optimizer.zero_grad()
        schedule.step()
        if t % 100 == 0:
            print(f"{t:6}  labelled {labelled_loss.item():.3f}  unlabelled {loss.item():.3f}", flush=True)


@torch.no_grad()
def fixmatch_views(model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    """FixMatch (equations 4 and 5): a strong view, pseudo-labels from the weak view, and where these are confident."""
    moved = weak(images)
    for layer in model.modules():  # no dropout, but batch norm with the statistics of this batch
        layer.training = not isinstance(layer, nn.Dropout)
    confidence, pseudo_label = model(moved).softmax(dim=1).max(dim=1)
    model.train()
    return cutmix(strong(moved), pseudo_label, confidence >= TAU)


@torch.no_grad()
def score(model: nn.Module, root: Path, names: Sequence[str], size: int) -> tuple[Tensor, Tensor]:
    """Dice in percent and average surface distance in voxels, (volumes, 3) each. Volumes are predicted by slices.

    A class that is in neither has a Dice of 100; a distance that does not exist counts as 0.
    """
    device = next(model.parameters()).device
    model.eval()
    warnings.filterwarnings("ignore", module="monai")  # of classes that are not there
    dice, distance = [], []
    for name in names:
        image, label = read(root / "data" / f"{name}.h5", "image", "label")
        inputs = torch.from_numpy(np.stack([resized(plane, (size, size)) for plane in image]))[:, None]
        predicted = torch.cat([model(part.to(device)).argmax(dim=1).cpu() for part in inputs.split(BATCH)])
        planes = [resized(plane, label.shape[1:]) for plane in predicted.byte().numpy()]
        pair = one_hot(np.stack(planes)), one_hot(label)
        dice.append(100 * compute_dice(*pair, include_background=False, ignore_empty=False))
        distance.append(compute_average_surface_distance(*pair, symmetric=False).nan_to_num(0.0, posinf=0.0))
    return torch.cat(dice), torch.cat(distance)


def one_hot(label: np.ndarray) -> Tensor:
    """Class indices (D, H, W) as MONAI's metrics take them: (1, classes, D, H, W), bool."""
    return torch.stack([torch.from_numpy(label == index) for index in range(len(CLASSES) + 1)])[None]


def read(path: Path, *keys: str) -> list[np.ndarray]:
    """Arrays of an h5 file."""
    with h5py.File(path) as file:
        return [file[key][()] for key in keys]


def resized(plane: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """An image or a label (H, W) in another size, by nearest neighbour as in SSL4MIS."""
    return zoom(plane, np.divide(shape, plane.shape), order=0)


def slices(root: Path, names: Sequence[str], size: int, *keys: str) -> TensorDataset:
    """Training slices in memory, each an image (1, size, size) and, if asked for by its key, a label (size, size)."""
    samples = [[resized(a, (size, size)) for a in read(root / "data/slices" / f"{name}.h5", *keys)] for name in names]
    images, *labels = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*samples, strict=True))
    return TensorDataset(images.float()[:, None], *(label.long() for label in labels))


def batches(samples: Dataset, iterations: int) -> DataLoader:
    """As many shuffled batches as there are iterations, all samples before one comes again."""
    return DataLoader(samples, BATCH, sampler=RandomSampler(samples, num_samples=iterations * BATCH))  # type: ignore[arg-type]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of ACDC (docs/acdc.md); without it a phantom is made")
    parser.add_argument("--labelled", type=float, default=1, help="percent of the training patients (default: 1)")
    parser.add_argument("--method", nargs="+", choices=("fixmatch", "gapmatch"), default=("fixmatch", "gapmatch"))
    parser.add_argument("--iterations", type=int, help="default: 30,000; on the phantom 300")
    parser.add_argument("--size", type=int, help="side of the network's input (default: 256; on the phantom 64)")
    arguments = parser.parse_args(argv)
    with TemporaryDirectory() as phantom:
        root, size, iterations = arguments.data, arguments.size or 256, arguments.iterations or 30_000
        if root is None:
            root, size, iterations = Path(phantom), arguments.size or 64, arguments.iterations or 300
            write_phantom(root)
        run(root, arguments.labelled, arguments.method, iterations, size)


def run(root: Path, percent: float, methods: Sequence[str], iterations: int, size: int) -> None:
    """Train each method from the same weights; print the last weights' scores on the validation volumes."""
    names = (root / "train_slices.list").read_text().split()
    patients = list(dict.fromkeys(name.split("_")[0] for name in names))
    chosen = patients[: max(1, int(len(patients) * percent / 100))]
    labelled = slices(root, [name for name in names if name.split("_")[0] in chosen], size, "image", "label")
    unlabelled = slices(root, [name for name in names if name.split("_")[0] not in chosen], size, "image")
    volumes = (root / "val.list").read_text().split()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for method in methods:
        torch.manual_seed(0)
        model = UNet(1, len(CLASSES) + 1).to(device).to(memory_format=torch.channels_last)  # the faster layout
        train(model, batches(labelled, iterations), batches(unlabelled, iterations), iterations, method == "gapmatch")
        dice, distance = (scores.mean(dim=0) for scores in score(model, root, volumes, size))
        classes = "  ".join(f"{name} {value:.1f}" for name, value in zip(CLASSES, dice.tolist(), strict=True))
        print(f"{method}: Dice % {dice.mean():.1f}  ASD {distance.mean():.2f}  ({classes})")


if __name__ == "__main__":
    main()
