"""docs/faq.md: every answer names tests that exist, and what no other test holds is held here."""

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gap_torch import GAPWrapper
from gap_torch.reference import algorithm_1

ROOT = Path(__file__).parents[1]
ANSWERS = (ROOT / "docs" / "faq.md").read_text().split("\n### ")[1:]


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: answer.splitlines()[0])
def test_an_answer_names_its_threads_and_tests_that_exist(answer: str) -> None:
    files = re.findall(r"`([\w/]*test_\w+\.py)`", answer)
    assert files
    for file in files:
        assert (ROOT / file if "/" in file else ROOT / "tests" / "gap_torch" / file).is_file(), file
    assert re.search(r"\]\(https://github\.com/[\w.-]+/[\w.-]+/(issues|pull)/\d+\)", answer)


def test_a_threads_number_is_that_of_its_address() -> None:
    links = re.findall(r"\[([^]]*\d)\]\(https://github\.com/[^)]*/(\d+)\)", "\n".join(ANSWERS))
    assert len(links) > 30
    assert all(text.split()[-1] == number for text, number in links)


def _problem() -> tuple[nn.Module, Callable[[nn.Module], Tensor], Callable[[nn.Module], Tensor]]:
    torch.manual_seed(0)
    u, x = torch.randn(2, 5, 3).double()
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return model, lambda m: m(u).square().mean(), lambda m: (m(x) - 1).square().mean()


def _step(optimizer: GAPWrapper, model: nn.Module, *losses: Callable[[nn.Module], Tensor]) -> None:
    losses[0](model).backward()
    with optimizer.perturbed(model):
        losses[0](model).backward()
    for loss in losses[1:]:
        loss(model).backward()


@pytest.mark.parametrize(("eps", "alpha", "weight"), [(0.0, 0.5, 1.5), (0.0, 1.0, 2.0), (0.1, 0.0, 1.0)])
def test_without_eps_or_alpha_it_is_a_plain_loss_of_some_weight(eps: float, alpha: float, weight: float) -> None:
    model, consistency, supervised = _problem()
    expected = torch.autograd.grad(weight * consistency(model) + supervised(model), list(model.parameters()))
    _step(GAPWrapper(torch.optim.SGD(model.parameters(), 0.1), eps, alpha), model, consistency, supervised)
    torch.testing.assert_close([p.grad for p in model.parameters()], list(expected))


def test_a_scheduler_of_the_learning_rate_leaves_eps_alone() -> None:
    model, *losses = _problem()
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1), eps=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    _step(optimizer, model, *losses)
    optimizer.step()
    scheduler.step()
    (group,) = optimizer.param_groups
    assert (group["lr"], group["gap_eps"]) == (pytest.approx(0.01), 0.1)


def test_lookahead_inside_takes_the_references_steps() -> None:
    lookahead = pytest.importorskip("pytorch_optimizer").Lookahead
    model, consistency, supervised = _problem()
    twin = copy.deepcopy(model)
    wrapped, bare = (lookahead(torch.optim.SGD(m.parameters(), 0.1, momentum=0.9), k=2) for m in (model, twin))
    optimizer = GAPWrapper(wrapped, eps=0.1)
    for _ in range(5):
        _step(optimizer, model, consistency, supervised)
        params = list(twin.parameters())
        gradients = algorithm_1(params, lambda: consistency(twin), lambda: supervised(twin), eps=0.1)
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient
        for each in (optimizer, bare):
            each.step()
            each.zero_grad()
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
