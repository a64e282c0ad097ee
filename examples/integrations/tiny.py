"""The tiny problem that every file here trains on: find the discs in noisy images, most of which have no label.

It stands in for your data set, network and augmentations. Its augmentations draw no random numbers and its batches
come in a fixed order, so that all files, with one process or two, arrive at the same weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from gap_torch.consistency import FixMatch
from gap_torch.losses import cross_entropy

EPOCHS, BATCH, LR, EPS, CLIP = 2, 8, 2e-2, 0.05, 1.0
LABELLED, UNLABELLED, SIZE = 8, 64, 16


class Discs(Dataset[dict[str, Tensor]]):
    """Unlabelled images, each together with a labelled one: there are few of these, so they come round again."""

    def __init__(self) -> None:
        self.images, self.labels = images_with_discs(LABELLED, seed=1)
        self.unlabelled, _ = images_with_discs(UNLABELLED, seed=2)

    def __len__(self) -> int:
        return UNLABELLED

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        j = i % LABELLED
        return {"image": self.images[j], "label": self.labels[j], "unlabelled": self.unlabelled[i]}


def images_with_discs(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (B, 1, H, W) and their labels (B, H, W): 1 in the disc, else 0."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.arange(SIZE)
    centre = 4 + (SIZE - 8) * torch.rand(number, 2, 1, 1, generator=generator)
    labels = (row[:, None] - centre[:, 0]).square() + (row - centre[:, 1]).square() < 10
    noise = 0.4 * torch.randn(number, SIZE, SIZE, generator=generator)
    return (labels + noise).unsqueeze(1), labels.long()


def network(batch_norm: bool = True) -> nn.Sequential:
    """The same small network, with the same weights, on every call."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels in (1, 8):
        norm = nn.BatchNorm2d(8, momentum=0.3) if batch_norm else nn.Identity()
        layers += [nn.Conv2d(channels, 8, 3, padding=1), norm, nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(8, 2, 1))


def weak(images: Tensor) -> Tensor:
    """A mirror image."""
    return images.flip(-1)


def strong(images: Tensor) -> Tensor:
    """Less contrast."""
    return 0.7 * images + 0.1


# A mean over all pixels, as is cross-entropy: then the mean over ranks is that over the joint batch.
method = FixMatch(weak, strong, tau=0.6, loss=cross_entropy)
supervised = F.cross_entropy


@torch.no_grad()
def score(model: nn.Module) -> str:
    """Loss and accuracy on labelled images that no training has seen."""
    device = next(model.parameters()).device
    images, labels = (t.to(device) for t in images_with_discs(32, seed=3))
    training = model.training
    logits = model.eval()(images)
    model.train(training)
    accuracy = (logits.argmax(1) == labels).float().mean()
    return f"loss {F.cross_entropy(logits, labels):.3f}, accuracy {accuracy:.1%}"
