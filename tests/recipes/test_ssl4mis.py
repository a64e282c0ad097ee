"""The lines of docs/recipes/ssl4mis.md in loops of the same structure as SSL4MIS's."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gap_torch
from gap_torch import GAPWrapper

from .loops import Loop, is_the_plain_loop_without_the_lines, takes_the_step_of_gap

WEIGHT, LABELLED, UNLABELLED, DECAY = 0.7, 2, 3, 0.9


class OneBatch(Loop):
    """Labelled images first, and unlabelled ones behind them."""

    def __init__(self, **networks: nn.Module) -> None:
        super().__init__(**networks)
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(LABELLED + UNLABELLED, 1, 6, 6, generator=generator, dtype=self.dtype)
        self.labels = torch.randint(3, (LABELLED, 6, 6), generator=generator)
        self.names |= {"args": SimpleNamespace(labeled_bs=LABELLED), "volume_batch": self.images}
        self.names |= {"consistency_weight": WEIGHT, "iter_num": 1000}

    def supervised(self, twin: Any, optimizer: str) -> Tensor:
        return F.cross_entropy(twin(self.images)[:LABELLED], self.labels)


class MeanTeacher(OneBatch):
    def __init__(self, network: nn.Module, teacher: nn.Module) -> None:
        super().__init__(model=network)
        self.names["ema_model"] = teacher

    def forward(self) -> None:
        with torch.no_grad():
            teacher = self.names["ema_model"](self.images[LABELLED:] + 0.1).softmax(1)
        outputs = self.names["model"](self.images)
        supervised = F.cross_entropy(outputs[:LABELLED], self.labels)
        consistency = 0.0
        if self.names["iter_num"] >= 1000:
            consistency = ((outputs.softmax(1)[LABELLED:] - teacher) ** 2).mean()
        self.names |= {"ema_output_soft": teacher, "supervised_loss": supervised, "consistency_loss": consistency}
        self.names["loss"] = supervised + WEIGHT * consistency

    def unsupervised(self, twin: Any, optimizer: str) -> Tensor:
        return WEIGHT * F.mse_loss(twin(self.images)[LABELLED:].softmax(1), self.names["ema_output_soft"])

    def end(self) -> None:
        with torch.no_grad():
            for mine, theirs in zip(
                self.names["ema_model"].parameters(), self.names["model"].parameters(), strict=True
            ):
                mine.lerp_(theirs, 1 - DECAY)


class UnlabelledAlone(MeanTeacher):
    """In the perturbed pass: the loss asked for a second time."""

    passes = 0

    def unsupervised(self, twin: Any, optimizer: str) -> Tensor:
        self.passes += 1
        if self.passes == 1:
            return super().unsupervised(twin, optimizer)
        return WEIGHT * F.mse_loss(twin(self.images[LABELLED:]).softmax(1), self.names["ema_output_soft"])


class CrossSupervision(OneBatch):
    def __init__(self, network1: nn.Module, network2: nn.Module) -> None:
        super().__init__(model1=network1, model2=network2)
        self.names["ce_loss"] = F.cross_entropy

    def forward(self) -> None:
        outputs = {i: self.names[f"model{i}"](self.images) for i in "12"}
        for i in "12":
            self.names[f"pseudo_outputs{i}"] = outputs[i][LABELLED:].detach().argmax(1)
        for i, other in ("12", "21"):
            self.names[f"loss{i}"] = F.cross_entropy(outputs[i][:LABELLED], self.labels)
            pseudo = self.names[f"pseudo_outputs{other}"]
            self.names[f"pseudo_supervision{i}"] = F.cross_entropy(outputs[i][LABELLED:], pseudo)
        self.names["loss"] = sum(self.names[f"loss{i}"] + WEIGHT * self.names[f"pseudo_supervision{i}"] for i in "12")

    def unsupervised(self, twin: Any, optimizer: str) -> Tensor:
        pseudo = self.names["pseudo_outputs2" if optimizer == "optimizer1" else "pseudo_outputs1"]
        return WEIGHT * F.cross_entropy(twin(self.images)[LABELLED:], pseudo)


LOOPS = {
    "One network and an EMA teacher": MeanTeacher,
    "Two networks that teach each other": CrossSupervision,
    "Cheaper: the unlabelled images alone": UnlabelledAlone,
}


@pytest.mark.parametrize("heading", LOOPS)
def test_the_step_is_that_of_gap(lines: Any, network: Any, updated_with: Any, heading: str) -> None:
    (wrap,), (backward,) = lines("ssl4mis", "Change these lines"), lines("ssl4mis", heading)
    takes_the_step_of_gap(LOOPS[heading](network(0), network(1)), wrap, backward, updated_with)


@pytest.mark.parametrize("heading", list(LOOPS)[:2])
def test_without_the_lines_it_is_the_plain_loop(lines: Any, network: Any, heading: str) -> None:
    (wrap,) = lines("ssl4mis", "Change these lines")
    make = lambda: LOOPS[heading](network(0, torch.float32), network(1, torch.float32))  # noqa: E731
    is_the_plain_loop_without_the_lines(make, wrap)


def test_as_long_as_there_is_no_consistency_the_step_is_plain(lines: Any, network: Any) -> None:
    (backward,) = lines("ssl4mis", "One network and an EMA teacher")
    weights = []
    for code in ("loss.backward()", backward):
        loop = MeanTeacher(network(0), network(1))
        loop.names["iter_num"] = 999
        loop.iterate(code)
        weights.append(loop.names["model"].state_dict())
    torch.testing.assert_close(*weights, rtol=0, atol=0)


@pytest.mark.parametrize("taken_before", ["strong", "weak"])
def test_rng_replays_the_pass_behind_it(lines: Any, network: Any, taken_before: str) -> None:
    """At eps = 0 g2 is g1 if the masks are. FixMatch: a weak pass, and the strong one that g1 comes from."""
    (note, strong_pass) = lines("ssl4mis", "The dropout masks of g1")[0].splitlines()
    weak_pass = "outputs_weak = model(weak_batch)"
    features, head = network()[:-1], network()[-1]
    model = nn.Sequential(features, nn.Dropout(0.5), head)
    weak, strong = torch.randn(2, 4, 1, 6, 6, dtype=torch.float64)
    names = {"gap_torch": gap_torch, "model": model, "weak_batch": weak, "strong_batch": strong}
    lines_run = [weak_pass, note, strong_pass] if taken_before == "strong" else [note, weak_pass, strong_pass]
    exec("\n".join(lines_run), names)

    target = names["outputs_weak"].argmax(1)
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1), eps=0.0)
    F.cross_entropy(names["outputs_strong"], target).backward()
    g1 = _flat(model)
    with optimizer.perturbed(model, rng=names["rng"], separate=True):
        F.cross_entropy(model(strong), target).backward()
        g2 = _flat(model)
    apart = (g2 - g1).norm() / g1.norm()
    assert apart == 0 if taken_before == "strong" else apart > 0.05


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])
