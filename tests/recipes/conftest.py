"""What the recipes' tests share: an import path, the code of a page, a network to train, gradients at the step."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "integrations"))  # the pages' files of code

Lines = Callable[[str, str], list[str]]
Gradients = Callable[[Optimizer], list[Tensor | None]]


@pytest.fixture(scope="session")
def lines() -> Lines:
    """`lines(page, heading)`: the blocks of code under a heading of docs/recipes/<page>.md, to be run with `exec`."""

    def blocks(page: str, heading: str) -> list[str]:
        text = (ROOT / "docs" / "recipes" / f"{page}.md").read_text()
        section = re.split(rf"\n##+ {heading}\n", text)[1]
        return re.findall(r"```python\n(.*?)```", re.split(r"\n##+ ", section)[0], re.DOTALL)

    return blocks


@pytest.fixture
def updated_with() -> Gradients:
    """`updated_with(optimizer)`: a list that holds, after each step, the gradients which that step was made with."""

    def watch(optimizer: Optimizer) -> list[Tensor | None]:
        seen: list[Tensor | None] = []
        params = [p for group in optimizer.param_groups for p in group["params"]]

        def note(*_: Any) -> None:
            seen[:] = [None if p.grad is None else p.grad.clone() for p in params]

        optimizer.register_step_pre_hook(note)
        return seen

    return watch


@pytest.fixture
def network() -> Callable[..., nn.Sequential]:
    """`network(seed, dtype)`: a small segmentation network with batch norm, three classes."""

    def build(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
        torch.manual_seed(seed)
        layers = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 1)
        return nn.Sequential(*layers).to(dtype).train()

    return build
