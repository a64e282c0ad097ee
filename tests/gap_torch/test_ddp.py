"""Under DistributedDataParallel every rank gets the gradient of Algorithm 1 on the joint batch."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gap_torch import GAPWrapper
from gap_torch.reference import algorithm_1

STEPS = 3
CASES = list(itertools.product([False, True], [0.0, 0.5, 1.0], [False, True]))


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def _data(step: int) -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def _expected(alpha: float) -> list[list[Tensor]]:
    model = _model()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    gradients = []
    for step in range(STEPS):
        x = _data(step)
        g = algorithm_1(
            list(model.parameters()),
            lambda x=x: _loss(model, x),
            lambda x=x: _loss(model, x + 1),
            eps=0.1,
            alpha=alpha,
        )
        for p, gradient in zip(model.parameters(), g, strict=True):
            p.grad = gradient.clone()
        gradients.append(g)
        base.step()
    return gradients


def _train(rank: int, view: bool, alpha: float, zero: bool) -> list[list[Tensor]]:
    model = DistributedDataParallel(_model(), gradient_as_bucket_view=view)
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), lr=0.1), eps=0.1, alpha=alpha)
    gradients = []
    for step in range(STEPS):
        mine = _data(step).chunk(2)[rank]
        _loss(model, mine).backward()
        with optimizer.perturbed(model):
            if zero:
                model.zero_grad()
            _loss(model, mine).backward()
        _loss(model, mine + 1).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
        optimizer.zero_grad()
    return gradients


def _set_aside_in_micro_batches() -> tuple[Tensor, Tensor]:
    """g1 and the sum, for a model whose gradient is the sum of its inputs."""
    model = DistributedDataParallel(nn.Linear(1, 1, bias=False).double(), gradient_as_bucket_view=True)
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1), eps=0.1)
    (weight,) = model.parameters()

    def backward(value: float) -> None:
        model(torch.tensor([[value]], dtype=torch.float64)).sum().backward()

    for labelled, unlabelled in ((10.0, 1.0), (20.0, 2.0)):
        with optimizer.set_aside():
            backward(labelled)
        backward(unlabelled)
    g1 = weight.grad.clone()
    with optimizer.perturbed(model):
        backward(1.0)
        backward(2.0)
    return g1, weight.grad.clone()


def _worker(rank: int) -> dict:
    return {**{case: _train(rank, *case) for case in CASES}, "set aside": _set_aside_in_micro_batches()}


@pytest.fixture(scope="module")
def ranks(on_two_ranks: Callable[..., list[dict]]) -> list[dict]:
    return on_two_ranks(_worker)


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("zero", [False, True])
def test_every_rank_has_the_joint_batchs_gradient(ranks: list[dict], view: bool, alpha: float, zero: bool) -> None:
    expected = _expected(alpha)
    for rank in ranks:
        for ours, theirs in zip(rank[view, alpha, zero], expected, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b)


def test_what_is_set_aside_stays_out_of_ddps_buckets(ranks: list[dict]) -> None:
    for rank in ranks:
        g1, total = rank["set aside"]
        assert g1.item() == 3
        assert total.item() == 3 + 3 + 30
