"""Micro-batches are one large batch, and gradients may be clipped: g1, g2 (`separate=True`), and the sum."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from gap_torch import GAPWrapper
from gap_torch.reference import algorithm_1

Clip = Callable[[list[Tensor]], object]

EPS, N, SCALE = 0.5, 8, 2.0**10
ALPHAS = [0.0, 0.5, 1.0, 2.0]


class Problem:
    """A model, a batch of each kind, and the two losses, each a mean over its whole batch whatever part is given."""

    def __init__(self, device: str = "cpu", seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(device, torch.float64)
        self.params = list(self.model.parameters())
        self.x, self.u = torch.randn(2, N, 4, device=device, dtype=torch.float64)

    def supervised(self, logits: Tensor) -> Tensor:
        return logits.square().sum() / N

    def unsupervised(self, logits: Tensor) -> Tensor:
        return (logits.sin() - 0.3).square().sum() / N

    def reference(self, alpha: float, eps: float = EPS) -> list[Tensor]:
        def unsupervised() -> Tensor:
            return self.unsupervised(self.model(self.u))

        def supervised() -> Tensor:
            return self.supervised(self.model(self.x))

        return algorithm_1(self.params, unsupervised, supervised, eps=eps, alpha=alpha)

    def gradients(self) -> list[Tensor]:
        return [p.grad.clone() for p in self.params]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def by_hand(problem: Problem, loss: Callable[[], Tensor], alpha: float, g1: Clip, g2: Clip) -> list[Tensor]:
    """g1 + alpha * g2 on a twin, either clipped as soon as it is there."""
    twin = copy.deepcopy(problem)
    first = _clipped(twin, loss, g1)
    norm = torch.cat([g.flatten() for g in first]).norm()
    with torch.no_grad():
        for p, g in zip(twin.params, first, strict=True):
            p += EPS * g / norm
    second = _clipped(twin, loss, g2)
    return [a + alpha * b for a, b in zip(first, second, strict=True)]


def _clipped(twin: Problem, loss: Callable[[Problem], Tensor], clip: Clip) -> list[Tensor]:
    twin.model.zero_grad()
    loss(twin).backward()
    clip(twin.params)
    return twin.gradients()


def consistency(problem: Problem) -> Tensor:
    return problem.unsupervised(problem.model(problem.u))


# ---------------------------------------------------------------- micro-batches

splits = st.lists(st.integers(1, N - 1), unique=True, max_size=N - 1).map(sorted)


@settings(max_examples=60, deadline=None)
@given(
    alpha=st.sampled_from(ALPHAS),
    cuts=st.tuples(splits, splits, splits),
    scaled=st.booleans(),
    foreach=st.booleans(),
    seed=st.integers(0, 100),
)
def test_any_split_of_any_pass_is_one_large_batch(
    alpha: float, cuts: tuple[list[int], ...], scaled: bool, foreach: bool, seed: int
) -> None:
    problem = Problem(seed=seed)
    model, expected = problem.model, problem.reference(alpha)
    optimizer = GAPWrapper(torch.optim.SGD(problem.params, 0.1), EPS, alpha, foreach=foreach)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=scaled)
    for u in problem.u.tensor_split(cuts[0]):
        scaler.scale(problem.unsupervised(model(u))).backward()
    with optimizer.perturbed(model):
        for u in problem.u.tensor_split(cuts[1]):
            scaler.scale(problem.unsupervised(model(u))).backward()
    for x in problem.x.tensor_split(cuts[2]):
        scaler.scale(problem.supervised(model(x))).backward()
    scaler.unscale_(optimizer)
    assert_same(problem.gradients(), expected)


@settings(max_examples=60, deadline=None)
@given(
    alpha=st.sampled_from(ALPHAS),
    cuts=st.tuples(splits, splits),
    scaled=st.booleans(),
    labelled_first=st.booleans(),
    seed=st.integers(0, 100),
)
def test_any_split_with_set_aside_is_one_large_batch(
    alpha: float, cuts: tuple[list[int], ...], scaled: bool, labelled_first: bool, seed: int
) -> None:
    problem = Problem(seed=seed)
    model, expected = problem.model, problem.reference(alpha)
    optimizer = GAPWrapper(torch.optim.SGD(problem.params, 0.1), EPS, alpha)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=scaled)

    def labelled(logits: Tensor, keep: bool) -> None:
        with optimizer.set_aside():
            scaler.scale(problem.supervised(logits)).backward(retain_graph=keep)

    for x, u in zip(problem.x.tensor_split(cuts[0]), problem.u.tensor_split(cuts[0]), strict=True):
        logits = model(torch.cat([x, u]))
        if labelled_first:
            labelled(logits[: len(x)], keep=True)
        scaler.scale(problem.unsupervised(logits[len(x) :])).backward(retain_graph=not labelled_first)
        if not labelled_first:
            labelled(logits[: len(x)], keep=False)
    with optimizer.perturbed(model):
        for u in problem.u.tensor_split(cuts[1]):
            scaler.scale(problem.unsupervised(model(u))).backward()
    scaler.unscale_(optimizer)
    assert_same(problem.gradients(), expected)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_updates_after_accumulation_are_those_of_large_batches(alpha: float, device: str) -> None:
    problem = Problem(device)
    twin = copy.deepcopy(problem)
    optimizer = GAPWrapper(torch.optim.SGD(problem.params, 0.1, momentum=0.9), EPS, alpha)
    base = torch.optim.SGD(twin.params, 0.1, momentum=0.9)
    for _ in range(3):
        for u in problem.u.split(3):
            problem.unsupervised(problem.model(u)).backward()
        with optimizer.perturbed(problem.model):
            for u in problem.u.split(2):
                problem.unsupervised(problem.model(u)).backward()
        for x in problem.x.split(5):
            problem.supervised(problem.model(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
        for p, g in zip(twin.params, twin.reference(alpha), strict=True):
            p.grad = g
        base.step()
    assert_same(problem.params, twin.params)


# ---------------------------------------------------------------- clipping

CLIPS: dict[str, Clip] = {  # each bites on the gradients of Problem
    "norm": lambda params: clip_grad_norm_(params, 0.1),
    "max norm": lambda params: clip_grad_norm_(params, 0.05, norm_type=float("inf")),
    "value": lambda params: clip_grad_value_(params, 0.01),
}


def leave(params: list[Tensor]) -> None:
    pass


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("clip", CLIPS)
def test_the_sum_may_be_clipped(clip: str, alpha: float, device: str) -> None:
    problem = Problem(device)
    for p, g in zip(problem.params, problem.reference(alpha), strict=True):
        p.grad = g.clone()
    CLIPS[clip](problem.params)
    expected = problem.gradients()
    assert not torch.allclose(expected[0], problem.reference(alpha)[0])
    problem.model.zero_grad()
    optimizer = GAPWrapper(torch.optim.SGD(problem.params, 0.1), EPS, alpha)
    consistency(problem).backward()
    with optimizer.perturbed(problem.model):
        consistency(problem).backward()
    problem.supervised(problem.model(problem.x)).backward()
    CLIPS[clip](problem.params)
    assert_same(problem.gradients(), expected)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("clip", CLIPS)
def test_g1_alone_may_be_clipped_before_first_step(clip: str, alpha: float, device: str) -> None:
    problem = Problem(device)
    expected = by_hand(problem, consistency, alpha, CLIPS[clip], leave)
    assert not torch.allclose(expected[0], by_hand(problem, consistency, alpha, leave, leave)[0])
    optimizer = GAPWrapper(torch.optim.SGD(problem.params, 0.1), EPS, alpha)
    consistency(problem).backward()
    CLIPS[clip](problem.params)
    with optimizer.perturbed(problem.model):
        consistency(problem).backward()
    assert_same(problem.gradients(), expected)


def test_clipping_g1_by_its_norm_shrinks_its_share_and_leaves_theta_star(device: str) -> None:
    problem = Problem(device)
    optimizer = GAPWrapper(torch.optim.SGD(problem.params, 0.1), EPS)
    stars, sums = [], []
    for max_norm in (float("inf"), 0.01):
        consistency(problem).backward()
        clip_grad_norm_(problem.params, max_norm)
        g1 = problem.gradients()
        with optimizer.perturbed(problem.model):
            stars.append([p.detach().clone() for p in problem.params])
            consistency(problem).backward()
        sums.append([s - g for s, g in zip(problem.gradients(), g1, strict=True)])
        optimizer.zero_grad()
    assert_same(*stars)
    assert_same(*sums)  # g2 is the same; what is left of g1 is what was clipped
    torch.testing.assert_close(optimizer.grad_norm.item(), 0.01, rtol=1e-4, atol=0)  # clip_grad_norm_ adds 1e-6


# ---------------------------------------------------------------- g2 by itself


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("how", ["perturbed", "first_step and second_step"])
def test_g2_alone_may_be_clipped_if_it_is_kept_separate(how: str, clip: str, alpha: float, device: str) -> None:
    problem = Problem(device)
    expected = by_hand(problem, consistency, alpha, leave, CLIPS[clip])
    assert not torch.allclose(expected[0], by_hand(problem, consistency, alpha, leave, leave)[0]) or alpha == 0
    before = [p.detach().clone() for p in problem.params]
    optimizer = GAPWrapper(torch.optim.SGD(problem.params, 0.1), EPS, alpha)
    consistency(problem).backward()
    if how == "perturbed":
        with optimizer.perturbed(problem.model, separate=True):
            consistency(problem).backward()
            CLIPS[clip](problem.params)
    else:
        optimizer.first_step(separate=True)
        consistency(problem).backward()
        CLIPS[clip](problem.params)
        optimizer.second_step()
    assert_same(problem.gradients(), expected)
    assert all(torch.equal(p, b) for p, b in zip(problem.params, before, strict=True))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_grad_is_g2_alone_if_it_is_kept_separate(alpha: float, device: str) -> None:
    problem = Problem(device)
    optimizer = GAPWrapper(torch.optim.SGD(problem.params, 0.1), EPS, alpha)
    consistency(problem).backward()
    with optimizer.perturbed(problem.model, separate=True):
        g2 = torch.autograd.grad(consistency(problem), problem.params)
        for u in problem.u.split(3):  # micro-batches add up as ever
            problem.unsupervised(problem.model(u)).backward()
        assert_same(problem.gradients(), list(g2))
    problem.supervised(problem.model(problem.x)).backward()
    assert_same(problem.gradients(), problem.reference(alpha))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_separate_g2_may_be_replaced(alpha: float) -> None:
    problem = Problem()
    expected = by_hand(problem, consistency, alpha, leave, CLIPS["value"])
    optimizer = GAPWrapper(torch.optim.SGD(problem.params, 0.1), EPS, alpha)
    consistency(problem).backward()
    with optimizer.perturbed(problem.model, separate=True):
        problem.model.zero_grad()  # nothing is there yet
        consistency(problem).backward()
        for p in problem.params:
            p.grad = p.grad.clamp(-0.01, 0.01)
    assert_same(problem.gradients(), expected)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_separate_g2_under_a_scaler_and_with_set_aside(alpha: float) -> None:
    problem = Problem()
    unlabelled = by_hand(problem, consistency, alpha, leave, CLIPS["norm"])
    labelled = torch.autograd.grad(problem.supervised(problem.model(problem.x)), problem.params)
    optimizer = GAPWrapper(torch.optim.SGD(problem.params, 0.1), EPS, alpha)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    with optimizer.set_aside():
        scaler.scale(problem.supervised(problem.model(problem.x))).backward()
    scaler.scale(consistency(problem)).backward()
    with optimizer.perturbed(problem.model, separate=True):
        scaler.scale(consistency(problem)).backward()
        norm = torch.cat([p.grad.flatten() for p in problem.params]).norm()
        for p in problem.params:
            p.grad *= 0.1 / (norm / SCALE + 1e-6)
    scaler.unscale_(optimizer)
    assert_same(problem.gradients(), [a + b for a, b in zip(unlabelled, labelled, strict=True)])


def test_a_separate_pass_without_a_backward_is_an_error_and_the_next_step_is_as_ever() -> None:
    problem = Problem()
    optimizer = GAPWrapper(torch.optim.SGD(problem.params, 0.1), EPS, 0.5)
    consistency(problem).backward()
    with pytest.raises(RuntimeError, match="no backward pass"), optimizer.perturbed(separate=True):
        pass
    assert all(p.grad is None for p in problem.params)
    consistency(problem).backward()
    with optimizer.perturbed(problem.model):
        consistency(problem).backward()
    problem.supervised(problem.model(problem.x)).backward()
    assert_same(problem.gradients(), problem.reference(0.5))
