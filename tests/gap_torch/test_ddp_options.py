"""DistributedDataParallel's options, ZeroRedundancyOptimizer, and a perturbation for each rank (m-sharpness)."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

from gap_torch import GAPWrapper
from gap_torch.reference import algorithm_1

STEPS, LR, EPS = 3, 0.1, 0.1


class Net(nn.Module):
    """With a layer that no forward pass uses."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def _model(unused: bool = False) -> nn.Module:
    torch.manual_seed(0)
    net = Net().double()
    return net if unused else net.layers


def _data(step: int) -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def _zero_redundancy(params: list[Tensor]) -> Optimizer:
    return ZeroRedundancyOptimizer(params, SGD, lr=LR, momentum=0.9)


@dataclass(frozen=True)
class Case:
    """A way of running a step under DDP."""

    ddp: dict[str, Any] = field(default_factory=dict)
    alpha: float = 1.0
    local: tuple[str, ...] = ()
    """Which backwards are not synchronised."""
    unused: bool = False
    zero_in_place: bool = False
    shared: bool = False
    """Labelled and unlabelled samples in one forward pass."""
    base: Callable[[list[Tensor]], Optimizer] = lambda params: SGD(params, lr=LR, momentum=0.9)

    @property
    def own_perturbation(self) -> bool:
        return "g1" in self.local or self.shared


VIEW = {"gradient_as_bucket_view": True}
CASES = {
    "find_unused_parameters": Case({"find_unused_parameters": True}, unused=True),
    "find_unused_parameters, views, alpha 0.5": Case({"find_unused_parameters": True, **VIEW}, 0.5, unused=True),
    "static_graph": Case({"static_graph": True}),
    "static_graph, unused, views": Case({"static_graph": True, **VIEW}, unused=True),
    "ZeroRedundancyOptimizer": Case(base=_zero_redundancy),
    "ZeroRedundancyOptimizer, views": Case(VIEW, base=_zero_redundancy),
    "m-sharpness": Case(local=("g1", "g2")),
    "m-sharpness, alpha 0.5": Case(alpha=0.5, local=("g1", "g2")),
    "m-sharpness, alpha 0": Case(alpha=0.0, local=("g1", "g2")),
    "m-sharpness, views": Case(VIEW, local=("g1", "g2")),
    "m-sharpness, views that stay": Case(VIEW, local=("g1", "g2"), zero_in_place=True),
    "m-sharpness, views that stay, alpha 0.5": Case(VIEW, 0.5, local=("g1", "g2"), zero_in_place=True),
    "m-sharpness, g2 synchronised": Case(local=("g1",)),
    "m-sharpness, g2 synchronised, views": Case(VIEW, local=("g1",), zero_in_place=True),
    "shared forward": Case(shared=True),
    "shared forward, views, alpha 0.5": Case(VIEW, 0.5, shared=True),
}


def _expected(case: Case) -> dict[str, list]:
    """On the joint batch or, where every rank has a perturbation of its own, the mean over ranks of each one's."""
    model = _model(case.unused)
    theta, base = [*model.parameters()], SGD(model.parameters(), lr=LR, momentum=0.9)
    gradients = []
    for step in range(STEPS):
        batches = _data(step).chunk(2) if case.own_perturbation else [_data(step)]
        found = [
            algorithm_1(
                theta,
                lambda x=x: _loss(model, x),
                lambda x=x: _loss(model, x + 1),
                eps=EPS,
                alpha=case.alpha,
            )
            for x in batches
        ]
        means = [None if g[0] is None else sum(g) / len(g) for g in zip(*found, strict=True)]
        for p, gradient in zip(theta, means, strict=True):
            p.grad = gradient
        gradients.append([g.clone() for g in means if g is not None])
        base.step()
    return {"gradients": gradients, "theta": [p.detach() for p in theta]}


def _train(rank: int, case: Case) -> dict[str, list]:
    model = DistributedDataParallel(_model(case.unused), **case.ddp)
    optimizer = GAPWrapper(case.base([*model.parameters()]), eps=EPS, alpha=case.alpha)
    gradients = []
    for step in range(STEPS):
        x = _data(step).chunk(2)[rank]
        if case.shared:
            logits = model(torch.cat([x + 1, x]))
            with optimizer.set_aside():
                logits[: len(x)].square().mean().backward(retain_graph=True)
            logits[len(x) :].square().mean().backward()
        else:
            _backward(model, x, "g1" in case.local)
        with optimizer.perturbed(model):
            _backward(model, x, "g2" in case.local)
        if not case.shared:
            _backward(model, x + 1, False)
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad(set_to_none=not case.zero_in_place)
    return {"gradients": gradients, "theta": [p.detach().clone() for p in model.parameters()]}


def _backward(model: DistributedDataParallel, x: Tensor, local: bool) -> None:
    with model.no_sync() if local else nullcontext():  # forward too: DDP prepares there what backward does
        _loss(model, x).backward()


def _worker(rank: int) -> dict[str, Any]:
    return {name: _train(rank, case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def ranks(on_two_ranks: Callable[..., list[dict]]) -> list[dict]:
    return on_two_ranks(_worker)


@pytest.mark.parametrize("name", CASES)
def test_every_rank_takes_the_references_step(ranks: list[dict], name: str) -> None:
    expected = _expected(CASES[name])
    for rank in ranks:
        for step, theirs in zip(rank[name]["gradients"], expected["gradients"], strict=True):
            for a, b in zip(step, theirs, strict=True):
                torch.testing.assert_close(a, b)
        for a, b in zip(rank[name]["theta"], expected["theta"], strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", CASES)
def test_the_ranks_agree_to_the_last_bit(ranks: list[dict], name: str) -> None:
    for a, b in zip(ranks[0][name]["theta"], ranks[1][name]["theta"], strict=True):
        assert torch.equal(a, b)
