"""The lines of docs/recipes/lightning.md around a module that somebody wrote for automatic optimization."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import gap_torch
from gap_torch import GAPWrapper
from gap_torch.reference import algorithm_1

L = pytest.importorskip("lightning", reason="pip install 'gap-torch[integrations]'")

EPS, ALPHA = 0.1, 1.0  # the page's, and its default


class Theirs(L.LightningModule):
    """Mean Teacher; labelled and unlabelled images go through one after the other."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.teacher = network, copy.deepcopy(network)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.network.parameters(), 0.1, momentum=0.9)

    def targets(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.teacher(images + 0.1).softmax(1)

    def consistency(self, images: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(self.network(images).softmax(1), target)

    def supervised(self, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self.network(batch["image"]), batch["label"])

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        consistency = self.consistency(batch["unlabelled"], self.targets(batch["unlabelled"]))
        return self.supervised(batch) + consistency

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            for mine, theirs in zip(self.teacher.parameters(), self.network.parameters(), strict=True):
                mine.lerp_(theirs, 0.1)


class Manual(Theirs):
    """The same by hand, with the wrapper and without GAP's lines."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return GAPWrapper(super().configure_optimizers())

    def training_step(self, batch: dict[str, Tensor], index: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, index))
        optimizer.step()


def _data(dtype: torch.dtype) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    image, unlabelled = torch.randn(2, 4, 1, 6, 6, generator=generator, dtype=dtype)
    labels = torch.randint(3, (4, 6, 6), generator=generator)
    return [{"image": image[i], "label": labels[i], "unlabelled": unlabelled[i]} for i in range(4)]


def _fit(module: Any, dtype: torch.dtype) -> Any:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    steps = 1 if dtype is torch.float64 else 4
    trainer = L.Trainer(accelerator="cpu", max_steps=steps, max_epochs=4, **quiet)
    trainer.fit(module, DataLoader(_data(dtype), 2 if steps > 1 else 4))
    return module


def test_the_step_is_that_of_gap(lines: Any, network: Any, updated_with: Any) -> None:
    names: dict[str, Any] = {"Theirs": Theirs}
    exec(*lines("lightning", "Change these lines"), names)
    seen: list = []

    class Watched(names["WithGAP"]):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            seen.append(updated_with(optimizer))
            seen.append(gap_torch.check(optimizer, self.network, show=None).report)
            return optimizer

    module = Watched(network())
    twin = copy.deepcopy(module.network)
    data = _data(torch.float64)
    image, label, unlabelled = (torch.stack([d[key] for d in data]) for key in ("image", "label", "unlabelled"))
    target = copy.deepcopy(module.teacher)(unlabelled + 0.1).softmax(1).detach()
    expected = algorithm_1(
        list(twin.parameters()),
        lambda: (twin(unlabelled).softmax(1) - target).square().mean(),
        lambda: F.cross_entropy(twin(image), label),
        eps=EPS,
        alpha=ALPHA,
    )
    _fit(module, torch.float64)
    gradients, report = seen
    torch.testing.assert_close(gradients, expected)
    assert report.ok, report.problems
    assert report.updates == 1


def test_without_the_lines_it_is_automatic_optimization(network: Any) -> None:
    weights = [_fit(kind(network(0, torch.float32)), torch.float32).state_dict() for kind in (Theirs, Manual)]
    torch.testing.assert_close(*weights, rtol=0, atol=0)
