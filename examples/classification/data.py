"""CIFAR-10, or generated shapes in its place."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets import CIFAR10

from segmentation.errors import InputError

from .shapes import shapes

CLASSES = 10
CIFAR10_NAME = "CIFAR-10"


@dataclass(frozen=True)
class Data:
    """Images (N, 3, 32, 32), uint8, with classes (N,), int64."""

    name: str
    train: tuple[Tensor, Tensor]
    """All of its images are learnt from, and the classes of a few."""
    test: tuple[Tensor, Tensor]

    def to(self, device: torch.device) -> "Data":
        (images, classes), (test_images, test_classes) = self.train, self.test
        train, test = (images.to(device), classes.to(device)), (test_images.to(device), test_classes.to(device))
        return Data(self.name, train, test)


def generated(seed: int) -> Data:
    return Data("generated shapes", shapes(2_000, 2 * seed), shapes(1_000, 2 * seed + 1))


def cifar(folder: Path, download: bool) -> Data:
    """CIFAR-10 in `folder`. Raises RuntimeError where it is not, OSError where it can't be downloaded."""
    parts = (CIFAR10(str(folder), train, download=download) for train in (True, False))
    train, test = ((torch.from_numpy(p.data).permute(0, 3, 1, 2), torch.tensor(p.targets)) for p in parts)
    return Data(CIFAR10_NAME, train, test)


def labelled_indices(classes: Tensor, labels: int, seed: int) -> Tensor:
    """Indices of `labels` images, equally many of each class."""
    random = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(classes), generator=random).to(classes.device)
    return torch.cat([shuffled[classes[shuffled] == index][: labels // CLASSES] for index in range(CLASSES)])


def load(folder: Path | None, download: bool, seed: int) -> Data:
    """CIFAR-10 where it is or may be downloaded to, else the shapes of `seed`.

    Args:
        folder: of `cifar-10-batches-py`. None looks into `data`, and goes on without.
        download: fetch what is not there; where that fails, the shapes have to do.
        seed: of the shapes.

    Raises:
        InputError: CIFAR-10 is not in `folder`, or not whole.
    """
    place = folder or Path("data")
    try:
        return cifar(place, download)
    except (RuntimeError, OSError) as error:  # torchvision's for what is not there, and the network's
        if folder and not download:
            raise InputError(f"--data {folder}: holds no (whole) cifar-10-batches-py; --download fetches it") from None
        reason = f", and no download: {error}" if download else " (--download fetches it)"
        print(f"no CIFAR-10 in {place}{reason}. Generated shapes instead.", file=sys.stderr)
        return generated(seed)
