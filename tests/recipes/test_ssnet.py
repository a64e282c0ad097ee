"""The lines of docs/recipes/ssnet.md in a loop of SS-Net's structure, with the side effects of its VAT."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .loops import Loop, is_the_plain_loop_without_the_lines, takes_the_step_of_gap

WEIGHT, LABELLED, UNLABELLED, CLASSES = 0.7, 2, 3, 3


class WithEmbedding(nn.Module):
    """Logits and the features before them, and two heads for those."""

    def __init__(self, network: nn.Sequential) -> None:
        super().__init__()
        self.features, self.classifier = network[:-1], network[-1]
        self.projection_head = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4))
        self.prediction_head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4))
        self.to(network[0].weight.dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(x)
        return self.classifier(features), features


class VAT:
    """A search with SS-Net's side effects: statistics flipped, gradients zeroed. Returns what the page asks for."""

    def loss(self, p: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(p, target)

    def __call__(self, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            pred = model(x)[0].softmax(1)
        direction = torch.ones_like(x).requires_grad_()
        self._flip(model)
        self.loss(model(x + 0.1 * direction)[0].softmax(1), pred).backward()
        x_adv = x + 0.5 * F.normalize(direction.grad.flatten(1)).view_as(x)
        model.zero_grad()
        lds = self.loss(model(x_adv)[0].softmax(1), pred)
        self._flip(model)
        return lds, x_adv, pred

    @staticmethod
    def _flip(model: nn.Module) -> None:
        for module in model.modules():
            if hasattr(module, "track_running_stats"):
                module.track_running_stats ^= True


def contrast(model: nn.Module, features: Tensor, labels: Tensor, classes: int, memory: list[Tensor]) -> Tensor:
    """Mean distance, on the sphere, of the features to the prototypes of their class."""
    each = [(1 - F.normalize(features[labels == c]) @ F.normalize(memory[c]).T).mean() for c in range(classes)]
    return torch.stack(each).nan_to_num().mean()


class SSNet(Loop):
    def __init__(self, network: nn.Sequential, call_of_vat: str) -> None:
        super().__init__(model=WithEmbedding(network))
        self.call_of_vat = call_of_vat
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(LABELLED + UNLABELLED, 1, 6, 6, generator=generator, dtype=self.dtype)
        self.labels = torch.randint(CLASSES, (LABELLED, 6, 6), generator=generator)
        self.memory = [torch.randn(3, 4, generator=generator, dtype=self.dtype) for _ in range(CLASSES)]
        self.names |= {
            "F": F,
            "args": SimpleNamespace(labeled_bs=LABELLED),
            "adv_loss": VAT(),
            "contrastive_losses": SimpleNamespace(contrastive_class_to_class_learned_memory=contrast),
            "prototype_memory": SimpleNamespace(memory=self.memory),
            **{"consistency_weight": WEIGHT, "num_classes": CLASSES, "volume_batch": self.images},
        }

    def contrast(self, model: Any, embedding: Tensor, labels: Tensor) -> Tensor:
        rows = torch.cat([image.flatten(1).T for image in embedding])  # (pixels of all images, channels)
        return contrast(model, model.prediction_head(model.projection_head(rows)), labels, CLASSES, self.memory)

    def forward(self) -> None:
        model, names = self.names["model"], self.names
        outputs, embedding = model(self.images)
        names["pseudo_label"] = outputs[LABELLED:].argmax(1).reshape(-1)
        names["loss_seg_dice"] = F.cross_entropy(outputs[:LABELLED], self.labels)
        names["loss_contr_labeled"] = self.contrast(model, embedding[:LABELLED], self.labels.flatten())
        names["loss_contr_unlabeled"] = self.contrast(model, embedding[LABELLED:], names["pseudo_label"])
        exec(self.call_of_vat, names)
        contrasts = names["loss_contr_labeled"] + names["loss_contr_unlabeled"]
        names["loss"] = names["loss_seg_dice"] + WEIGHT * (names["loss_lds"] + 0.1 * contrasts)

    def unsupervised(self, twin: Any, optimizer: str) -> Tensor:
        lds = F.mse_loss(twin(self.names["x_adv"])[0].softmax(1), self.names["pred"])
        return WEIGHT * (lds + 0.1 * self.contrast(twin, twin(self.images)[1][LABELLED:], self.names["pseudo_label"]))

    def supervised(self, twin: Any, optimizer: str) -> Tensor:
        outputs, embedding = twin(self.images)
        of_labels = self.contrast(twin, embedding[:LABELLED], self.labels.flatten())
        return F.cross_entropy(outputs[:LABELLED], self.labels) + WEIGHT * 0.1 * of_labels


class UnlabelledAlone(SSNet):
    """In the perturbed pass: the loss asked for a second time."""

    passes = 0

    def unsupervised(self, twin: Any, optimizer: str) -> Tensor:
        self.passes += 1
        if self.passes == 1:
            return super().unsupervised(twin, optimizer)
        lds = F.mse_loss(twin(self.names["x_adv"])[0].softmax(1), self.names["pred"])
        embedding = twin(self.images[LABELLED:])[1]
        return WEIGHT * (lds + 0.1 * self.contrast(twin, embedding, self.names["pseudo_label"]))


def test_the_step_is_that_of_gap(lines: Any, network: Any, updated_with: Any) -> None:
    wrap, call_of_vat, backward = lines("ssnet", "Change these lines")
    takes_the_step_of_gap(SSNet(network(), call_of_vat), wrap, backward, updated_with)


def test_the_cheaper_line(lines: Any, network: Any, updated_with: Any) -> None:
    wrap, call_of_vat, backward = lines("ssnet", "Change these lines")
    cheaper = "model(volume_batch[args.labeled_bs :])[1]"
    assert cheaper in (Path(__file__).parents[2] / "docs" / "recipes" / "ssnet.md").read_text()
    changed = backward.replace("model(volume_batch)[1][args.labeled_bs :]", cheaper)
    assert changed != backward
    takes_the_step_of_gap(UnlabelledAlone(network(), call_of_vat), wrap, changed, updated_with)


def test_a_search_inside_the_block_is_an_error_and_moves_the_statistics(lines: Any, network: Any) -> None:
    wrap, call_of_vat, _ = lines("ssnet", "Change these lines")
    loop = SSNet(network(), call_of_vat)
    exec(wrap, loop.names)
    loop.forward()
    loop.names["loss_lds"].backward()
    model, optimizer = loop.names["model"], loop.names["optimizer"]
    mean = model.features[1].running_mean.clone()
    with pytest.raises(RuntimeError, match="replaced or dropped after g2"), optimizer.perturbed(model):
        loop.names["adv_loss"](model, loop.images)[0].backward()
    assert not torch.equal(model.features[1].running_mean, mean)


def test_without_the_lines_it_is_the_plain_loop(lines: Any, network: Any) -> None:
    wrap, call_of_vat, _ = lines("ssnet", "Change these lines")
    is_the_plain_loop_without_the_lines(lambda: SSNet(network(0, torch.float32), call_of_vat), wrap)
