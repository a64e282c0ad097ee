"""The wrapper and its peers, each as `first` (to theta*) and `second` (back to theta) around a pass of g2.

A peer is counted with what its method asks for and no more: SAM drops g1 (zero_grad after the first step) and has
nothing to combine; Algorithm 1 needs g1 + alpha * g2. The update of the base optimizer is nobody's.
"""

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import second_gradient
from gap_torch import GAPWrapper

EPS = 0.1


class Nothing(torch.optim.Optimizer):
    """A base optimizer whose update costs nothing."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        super().__init__(params, {})

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        pass


class Ours:
    """GAPWrapper. g2 adds up in `.grad`, by autograd's own hand."""

    sums = True

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.optimizer = GAPWrapper(Nothing(params), eps=EPS)

    def first(self) -> None:
        self.optimizer.first_step()

    def second(self) -> None:
        self.optimizer.second_step()

    def after(self) -> None:
        self.optimizer.step()


class OursCompiled(Ours):
    """With both steps under torch.compile, where g1 is kept apart: one copy of the gradients more."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params)
        self.compiled_first = torch.compile(self.optimizer.first_step, fullgraph=True)
        self.compiled_second = torch.compile(self.optimizer.second_step, fullgraph=True)
        started = perf_counter()
        for _ in range(3):  # it is traced anew in the second round, when memory for the copy is there
            self.first()
            second_gradient(params)
            self.second()
            self.after()
        print(f"torch.compile of first_step and second_step: {perf_counter() - started:.1f} s until the steady state")

    def first(self) -> None:
        self.compiled_first()

    def second(self) -> None:
        self.compiled_second()


class PytorchOptimizerSAM:
    """`SAM` of the package pytorch_optimizer, which drops g1."""

    sums = False

    def __init__(self, params: list[nn.Parameter]) -> None:
        from pytorch_optimizer import SAM

        self.optimizer = SAM(params, Nothing, rho=EPS)

    def first(self) -> None:
        self.optimizer.first_step(zero_grad=True)

    def second(self) -> None:
        self.optimizer.second_step()

    def after(self) -> None:
        pass


class PlainSAM:
    """SAM tensor by tensor, as its public PyTorch version describes it: norms stacked, theta cloned, g1 dropped."""

    sums = False

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.params = params
        self.theta: list[Tensor] = []

    @torch.no_grad()
    def first(self) -> None:
        norm = torch.norm(torch.stack([p.grad.norm(p=2) for p in self.params if p.grad is not None]), p=2)
        scale = EPS / (norm + 1e-12)
        self.theta = []
        for p in self.params:
            assert p.grad is not None
            self.theta.append(p.data.clone())
            p.add_(p.grad * scale.to(p))
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def second(self) -> None:
        for p, theta in zip(self.params, self.theta, strict=True):
            p.data = theta

    def after(self) -> None:
        self.theta = []


class NaiveAlgorithm1:
    """Algorithm 1 line by line, as public ports have it: theta, g1 and g2 cloned, the norm summed on the host."""

    sums = False

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.params = params
        self.theta: list[Tensor] = []
        self.g1: list[Tensor] = []

    @torch.no_grad()
    def first(self) -> None:
        self.theta = [p.data.clone() for p in self.params]
        self.g1 = [p.grad.clone() for p in self.params if p.grad is not None]
        norm = sum(g.norm().item() ** 2 for g in self.g1) ** 0.5
        for p, g in zip(self.params, self.g1, strict=True):
            p.data = p.data + EPS * g / (norm + 1e-12)
            p.grad = None

    @torch.no_grad()
    def second(self) -> None:
        g2 = [p.grad.clone() for p in self.params if p.grad is not None]
        for p, theta, first, second in zip(self.params, self.theta, self.g1, g2, strict=True):
            p.data.copy_(theta)
            p.grad = first + 1.0 * second

    def after(self) -> None:
        self.theta, self.g1 = [], []


PEERS = {
    "gap-torch": Ours,
    "pytorch_optimizer.SAM": PytorchOptimizerSAM,
    "plain SAM": PlainSAM,
    "naive Algorithm 1": NaiveAlgorithm1,
}


def contestants(compiled: bool = False) -> dict[str, Any]:
    """What is worth a row, with our compiled path if wanted."""
    ours: dict[str, Any] = {"gap-torch": Ours}
    if compiled:
        ours["gap-torch compiled"] = OursCompiled
    return {**ours, **PEERS}
