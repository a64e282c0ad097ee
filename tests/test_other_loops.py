"""docs/other_loops.md, and gradients set by hand in docs/your_code.md: at each step `.grad` is Algorithm 1's."""

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from gap_torch import GAPWrapper
from gap_torch.reference import algorithm_1

DOCS = Path(__file__).parents[1] / "docs"
EPS, ALPHA = 0.1, 0.5
Loss = Callable[[nn.Module], Tensor]


class Noting(GAPWrapper):
    """Notes theta and `.grad` at each step. alpha is not 1, as on the pages: a forgotten one would go unnoticed."""

    def __init__(self, base: Optimizer, **knobs: Any) -> None:
        super().__init__(base, **{**knobs, "alpha": ALPHA})
        self.seen: list[tuple[list[Tensor], list[Tensor]]] = []

    def step(self, *args: Any, **options: Any) -> Any:
        params = [p for group in self.param_groups for p in group["params"]]
        self.seen.append(([p.detach().clone() for p in params], [p.grad.clone() for p in params]))
        return super().step(*args, **options)


@pytest.fixture
def names() -> Iterator[dict[str, Any]]:
    """What the pages take for granted, in float64."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1)
    model = nn.Sequential(*layers)
    x, unlabelled = torch.rand(2, 2, 1, 8, 8)
    y, target = torch.randint(3, (2, 2, 8, 8))
    yield {
        "torch": torch,
        "GAPWrapper": Noting,
        "model": model,
        "optimizer": Noting(torch.optim.SGD(model.parameters(), 0.1), eps=EPS),
        **{"x": x, "y": y, "unlabelled": unlabelled, "supervised": F.cross_entropy},
        "supervised_loss": lambda model: F.cross_entropy(model(x), y),
        "consistency_loss": lambda model: F.cross_entropy(model(0.9 * unlabelled), target),
    }
    torch.set_default_dtype(torch.float32)


def _run(page: str, heading: str, names: dict[str, Any]) -> None:
    section = re.split(rf"\n##+ {heading}\n", (DOCS / page).read_text())[1]
    (block,) = re.findall(r"```python\n(.*?)```", re.split(r"\n##+ ", section)[0], re.DOTALL)
    exec(compile(block, f"{page}: {heading}", "exec"), names)


def _is_gaps(
    step: tuple[list[Tensor], list[Tensor]], model: nn.Module, unsupervised: Loss, labelled: Loss | None
) -> None:
    """The gradient of `step` is that of Algorithm 1 with these losses, at the theta of that step."""
    theta, gradient = step
    twin = copy.deepcopy(model)
    for p, value in zip(twin.parameters(), theta, strict=True):
        p.data.copy_(value)
    on_labels = None if labelled is None else lambda: labelled(twin)
    expected = algorithm_1(list(twin.parameters()), lambda: unsupervised(twin), on_labels, eps=EPS, alpha=ALPHA)
    torch.testing.assert_close(gradient, expected)


def test_a_loss_of_many_lines(names: dict[str, Any]) -> None:
    _run("other_loops.md", "A loss of many lines", names)
    x, u = names["x"], names["unlabelled"]
    assert 0 < names["sure"].mean() < 1

    def parts(model: nn.Module) -> tuple[Tensor, Tensor]:
        logits = model(torch.cat((x, 0.9 * u, 1.1 * u)))
        views = logits[2:4], logits[4:6]
        fixmatch = sum(F.cross_entropy(v, names["target"], reduction="none").mul(names["sure"]).mean() for v in views)
        apart = (views[0].softmax(1) - views[1].softmax(1)).square().mean()
        return F.cross_entropy(logits[:2], names["y"]), fixmatch / 4 + apart / 2

    (step,) = names["optimizer"].seen
    _is_gaps(step, names["model"], lambda m: parts(m)[1], lambda m: parts(m)[0])


def test_two_updates_in_an_iteration(names: dict[str, Any]) -> None:
    _run("other_loops.md", "Two updates in an iteration", names)
    first, second = names["optimizer"].seen
    model = names["model"]
    _is_gaps(first, model, names["consistency_loss"], names["supervised_loss"])
    rectified = names["rectified"]
    _is_gaps(second, model, lambda m: F.cross_entropy(m(names["unlabelled"]), rectified), None)


def test_two_networks_and_a_moving_average(names: dict[str, Any]) -> None:
    before = copy.deepcopy(names["model"])
    _run("other_loops.md", "Two networks and a moving average", names)
    x, u = names["x"], names["unlabelled"]
    for model, optimizer, target in zip(names["models"], names["optimizers"], names["taught"], strict=True):
        (step,) = optimizer.seen
        unsupervised = lambda m, target=target: F.cross_entropy(m(u), target)  # noqa: E731
        _is_gaps(step, model, unsupervised, lambda m: F.cross_entropy(m(x), names["y"]))
    networks = names["average"], before, names["models"][0]
    for mean, old, new in zip(*(network.parameters() for network in networks), strict=True):
        torch.testing.assert_close(mean, 0.99 * old + 0.01 * new)
        assert not torch.equal(old, new)


def test_gradients_set_by_hand(names: dict[str, Any]) -> None:
    _run("your_code.md", "Gradients set by hand", names)
    (step,) = names["optimizer"].seen
    _is_gaps(step, names["model"], names["consistency_loss"], names["supervised_loss"])
