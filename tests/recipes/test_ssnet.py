"""The lines of docs/recipes/ssnet.md in a loop of SS-Net's structure, with the side effects of its VAT."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gap_torch import GAPWrapper
from gap_torch.reference import algorithm_1

EPS, ALPHA, WEIGHT, LABELLED, UNLABELLED, CLASSES = 0.3, 0.5, 0.7, 2, 3, 3


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


class Loop:
    def __init__(self, network: nn.Sequential, wrap: Callable[[Any], Any]) -> None:
        self.model = WithEmbedding(network)
        self.optimizer = wrap(torch.optim.SGD(self.model.parameters(), 0.1, 0.9, weight_decay=1e-4))
        generator = torch.Generator().manual_seed(1)
        dtype = network[0].weight.dtype
        self.batch = torch.randn(LABELLED + UNLABELLED, 1, 6, 6, generator=generator, dtype=dtype)
        self.labels = torch.randint(CLASSES, (LABELLED, 6, 6), generator=generator)
        self.memory = [torch.randn(3, 4, generator=generator, dtype=dtype) for _ in range(CLASSES)]
        self.vat = VAT()

    def contrast(self, model: Any, embedding: Tensor, labels: Tensor) -> Tensor:
        rows = torch.cat([image.flatten(1).T for image in embedding])  # (pixels of all images, channels)
        return contrast(model, model.prediction_head(model.projection_head(rows)), labels, CLASSES, self.memory)

    def names(self) -> dict[str, Any]:
        model = self.model
        outputs, embedding = model(self.batch)
        pseudo_label = outputs[LABELLED:].argmax(1).reshape(-1)
        names = {
            "F": F,
            "args": SimpleNamespace(labeled_bs=LABELLED),
            "adv_loss": self.vat,
            "contrastive_losses": SimpleNamespace(contrastive_class_to_class_learned_memory=contrast),
            "prototype_memory": SimpleNamespace(memory=self.memory),
            **{"consistency_weight": WEIGHT, "num_classes": CLASSES, "volume_batch": self.batch},
            **{"model": model, "optimizer": self.optimizer, "pseudo_label": pseudo_label},
            "loss_seg_dice": F.cross_entropy(outputs[:LABELLED], self.labels),
            "loss_contr_labeled": self.contrast(model, embedding[:LABELLED], self.labels.flatten()),
            "loss_contr_unlabeled": self.contrast(model, embedding[LABELLED:], pseudo_label),
        }
        lds, x_adv, pred = self.vat(model, self.batch)
        return {**names, "loss_lds": lds, "x_adv": x_adv, "pred": pred}

    def expected(self, names: dict[str, Any]) -> list[Tensor | None]:
        twin = copy.deepcopy(self.model)

        def unsupervised() -> Tensor:
            lds = F.mse_loss(twin(names["x_adv"])[0].softmax(1), names["pred"])
            return WEIGHT * (lds + 0.1 * self.contrast(twin, twin(self.batch)[1][LABELLED:], names["pseudo_label"]))

        def supervised() -> Tensor:
            outputs, embedding = twin(self.batch)
            of_labels = self.contrast(twin, embedding[:LABELLED], self.labels.flatten())
            return F.cross_entropy(outputs[:LABELLED], self.labels) + WEIGHT * 0.1 * of_labels

        return algorithm_1(list(twin.parameters()), unsupervised, supervised, eps=EPS, alpha=ALPHA)


def wrapped(base: Any) -> GAPWrapper:
    return GAPWrapper(base, EPS, ALPHA)


def test_the_step_is_that_of_gap(lines: Any, network: Any, updated_with: Any) -> None:
    loop = Loop(network(), wrapped)
    names = loop.names()
    expected, seen = loop.expected(names), updated_with(loop.optimizer)
    statistics = {name: b.clone() for name, b in loop.model.named_buffers()}
    exec(lines("ssnet", "The lines"), names)
    torch.testing.assert_close(seen, expected)
    torch.testing.assert_close(dict(loop.model.named_buffers()), statistics, rtol=0, atol=0)


def test_a_search_inside_the_block_is_an_error_and_moves_the_statistics(network: Any) -> None:
    loop = Loop(network(), wrapped)
    loop.names()["loss_lds"].backward()
    mean = loop.model.features[1].running_mean.clone()
    with (
        pytest.raises(RuntimeError, match="replaced or dropped after g2"),
        loop.optimizer.perturbed(loop.model),
    ):
        loop.vat(loop.model, loop.batch)[0].backward()
    assert not torch.equal(loop.model.features[1].running_mean, mean)


def test_without_the_lines_it_is_the_plain_loop(network: Any) -> None:
    weights = []
    for wrap in (lambda base: base, GAPWrapper):
        loop = Loop(network(0, torch.float32), wrap)
        for _ in range(3):
            names = loop.names()
            contrasts = names["loss_contr_labeled"] + names["loss_contr_unlabeled"]
            loss = names["loss_seg_dice"] + WEIGHT * (names["loss_lds"] + 0.1 * contrasts)
            loop.optimizer.zero_grad()
            loss.backward()
            loop.optimizer.step()
        weights.append(loop.model.state_dict())
    torch.testing.assert_close(*weights, rtol=0, atol=0)
