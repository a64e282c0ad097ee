"""The lines of docs/recipes/ssl4mis.md in loops of the same structure as SSL4MIS's."""

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

EPS, WEIGHT, LABELLED, UNLABELLED = 0.3, 0.7, 2, 3


class Loop:
    """The names that a script's iteration has at its three last lines, and those lines as they are there."""

    def __init__(self, models: list[nn.Sequential], wrap: Callable[[Any], Any]) -> None:
        self.models = models
        self.optimizers = [wrap(torch.optim.SGD(m.parameters(), 0.1, 0.9, weight_decay=1e-4)) for m in models]
        dtype = models[0][0].weight.dtype
        generator = torch.Generator().manual_seed(1)
        self.volume_batch = torch.randn(LABELLED + UNLABELLED, 1, 6, 6, generator=generator, dtype=dtype)
        self.labels = torch.randint(3, (LABELLED, 6, 6), generator=generator)
        self.common = {
            "torch": torch,
            "args": SimpleNamespace(labeled_bs=LABELLED),
            "volume_batch": self.volume_batch,
            "consistency_weight": WEIGHT,
            "ce_loss": F.cross_entropy,
        }

    def plain(self, loss: Tensor) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()


class MeanTeacher(Loop):
    def forward(self) -> dict[str, Any]:
        model, (optimizer,) = self.models[0], self.optimizers
        with torch.no_grad():
            teacher = torch.softmax(self.models[1](self.volume_batch[LABELLED:] + 0.1), dim=1)
        outputs = model(self.volume_batch)
        consistency = torch.mean((torch.softmax(outputs[LABELLED:], dim=1) - teacher) ** 2)
        return {
            **self.common,
            "model": model,
            "optimizer": optimizer,
            "ema_output_soft": teacher,
            "supervised_loss": F.cross_entropy(outputs[:LABELLED], self.labels),
            "consistency_loss": consistency,
        }

    def __init__(self, models: list[nn.Sequential], wrap: Callable[[Any], Any]) -> None:
        super().__init__(models, wrap)
        del self.optimizers[1]  # the teacher's


class CrossSupervision(Loop):
    def forward(self) -> dict[str, Any]:
        one, two = (model(self.volume_batch) for model in self.models)
        pseudo1, pseudo2 = (outputs[LABELLED:].detach().argmax(dim=1) for outputs in (one, two))
        return {
            **self.common,
            **dict(zip(("model1", "model2"), self.models, strict=True)),
            **dict(zip(("optimizer1", "optimizer2"), self.optimizers, strict=True)),
            "pseudo_outputs1": pseudo1,
            "pseudo_outputs2": pseudo2,
            "loss1": F.cross_entropy(one[:LABELLED], self.labels),
            "loss2": F.cross_entropy(two[:LABELLED], self.labels),
            "pseudo_supervision1": F.cross_entropy(one[LABELLED:], pseudo2),
            "pseudo_supervision2": F.cross_entropy(two[LABELLED:], pseudo1),
        }


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_mean_teacher_takes_the_step_of_gap(lines: Any, network: Any, updated_with: Any, alpha: float) -> None:
    loop = MeanTeacher([network(0), network(1)], lambda base: GAPWrapper(base, EPS, alpha))
    twin = copy.deepcopy(loop.models[0])
    names = loop.forward()
    expected = algorithm_1(
        list(twin.parameters()),
        lambda: WEIGHT * F.mse_loss(twin(loop.volume_batch)[LABELLED:].softmax(1), names["ema_output_soft"]),
        lambda: F.cross_entropy(twin(loop.volume_batch)[:LABELLED], loop.labels),
        eps=EPS,
        alpha=alpha,
    )
    statistics = {name: b.clone() for name, b in loop.models[0].named_buffers()}
    seen = updated_with(loop.optimizers[0])
    exec(lines("ssl4mis", "One network and an EMA teacher"), names)
    torch.testing.assert_close(seen, expected)
    torch.testing.assert_close(dict(loop.models[0].named_buffers()), statistics, rtol=0, atol=0)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_each_of_two_networks_takes_its_own_step_of_gap(
    lines: Any, network: Any, updated_with: Any, alpha: float
) -> None:
    loop = CrossSupervision([network(0), network(1)], lambda base: GAPWrapper(base, EPS, alpha))
    twins = copy.deepcopy(loop.models)
    names = loop.forward()
    seen = [updated_with(optimizer) for optimizer in loop.optimizers]
    statistics = [{name: b.clone() for name, b in model.named_buffers()} for model in loop.models]
    exec(lines("ssl4mis", "Two networks that teach each other"), names)
    torch.testing.assert_close([dict(m.named_buffers()) for m in loop.models], statistics, rtol=0, atol=0)
    for twin, pseudo, found in zip(twins, (names["pseudo_outputs2"], names["pseudo_outputs1"]), seen, strict=True):
        expected = algorithm_1(
            list(twin.parameters()),
            lambda twin=twin, pseudo=pseudo: WEIGHT * F.cross_entropy(twin(loop.volume_batch)[LABELLED:], pseudo),
            lambda twin=twin: F.cross_entropy(twin(loop.volume_batch)[:LABELLED], loop.labels),
            eps=EPS,
            alpha=alpha,
        )
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", [MeanTeacher, CrossSupervision])
def test_without_the_lines_it_is_the_plain_loop(network: Any, kind: type[Loop]) -> None:
    loops = [kind([network(0, torch.float32), network(1, torch.float32)], w) for w in (lambda o: o, GAPWrapper)]
    for loop in loops:
        for _ in range(3):
            names = loop.forward()
            parts = [value for name, value in names.items() if name in ("supervised_loss", "loss1", "loss2")]
            rest = [value for name, value in names.items() if name.startswith(("consistency_loss", "pseudo_sup"))]
            loop.plain(sum(parts) + WEIGHT * sum(rest))
    for plain, wrapped in zip(loops[0].models, loops[1].models, strict=True):
        torch.testing.assert_close(plain.state_dict(), wrapped.state_dict(), rtol=0, atol=0)
