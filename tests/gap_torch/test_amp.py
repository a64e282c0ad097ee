"""Gradient scaling and autocast: the radius is that of the unscaled step, an overflow costs one step and no more."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from gap_torch import GAPWrapper
from gap_torch.reference import algorithm_1

Context = Callable[[], AbstractContextManager]

EPS, ALPHA, MAX_NORM = 0.5, 0.5, 0.1

BASES: dict[str, Callable[..., Optimizer]] = {
    "SGD": lambda p: SGD(p, 0.1),
    "SGD momentum": lambda p: SGD(p, 0.1, momentum=0.9, weight_decay=1e-2),
    "SGD fused": lambda p: SGD(p, 0.1, momentum=0.9, fused=True),
    "AdamW": lambda p: AdamW(p, 1e-2),
    "AdamW fused": lambda p: AdamW(p, 1e-2, fused=True),
}


class Pair(nn.Module):
    """A network, its data, and the two losses."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(device, dtype)
        self.register_buffer("x", torch.randn(6, 4, device=device, dtype=dtype))

    def unsupervised(self) -> Tensor:
        return (self.net(self.x).sin() - 0.3).square().mean()

    def supervised(self) -> Tensor:
        return self.net(self.x * 2).square().mean()


def scaled_step(
    pair: Pair,
    optimizer: GAPWrapper,
    scaler: torch.amp.GradScaler,
    *,
    max_norm: float | None = None,
    bad: str = "",
    value: float = 1.0,
    around_all: Context = nullcontext,
    around_each: Context = nullcontext,
) -> None:
    """The whole recipe of docs/at_scale.md; in the pass `bad` one number of one gradient is multiplied by `value`."""
    weight = pair.net[2].weight

    def backward(name: str, loss: Callable[[], Tensor]) -> None:
        with around_each():
            scaled = scaler.scale(loss())
        spoil = torch.ones_like(weight)
        spoil[0, 0] = value if name == bad else 1.0
        hook = weight.register_hook(lambda gradient: gradient * spoil)
        scaled.backward()
        hook.remove()

    with around_all():
        backward("g1", pair.unsupervised)
        with optimizer.perturbed(pair):
            backward("g2", pair.unsupervised)
        backward("g_labelled", pair.supervised)
        scaler.unscale_(optimizer)
        if max_norm is not None:
            nn.utils.clip_grad_norm_(pair.parameters(), max_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def reference_step(pair: Pair, base: Optimizer, max_norm: float | None = None) -> None:
    params = list(pair.parameters())
    gradient = algorithm_1(params, pair.unsupervised, pair.supervised, eps=EPS, alpha=ALPHA)
    for p, g in zip(params, gradient, strict=True):
        p.grad = g
    if max_norm is not None:
        assert nn.utils.clip_grad_norm_(params, max_norm) > 2 * max_norm
    base.step()
    base.zero_grad()


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """Of two gradients, relative to the second."""
    x, y = (torch.cat([g.flatten() for g in gradient]) for gradient in (a, b))
    return float((x - y).norm() / y.norm())


def assert_same(a: nn.Module, b: nn.Module, **tolerance: float) -> None:
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, **tolerance)


def values(pair: Pair, optimizer: Optimizer) -> list[Tensor]:
    """Copies of all parameters and all tensors of the state."""
    state = [v for p in pair.parameters() for v in optimizer.state[p].values() if isinstance(v, Tensor)]
    return [t.detach().clone() for t in (*pair.parameters(), *state)]


# ---------------------------------------------------------------- scales


@pytest.mark.parametrize("power", range(0, 17, 4))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_radius_does_not_depend_on_the_scale(power: int, dtype: torch.dtype, device: str) -> None:
    pair = Pair(device, dtype)
    theta = [p.detach().double().clone() for p in pair.parameters()]
    g1 = torch.autograd.grad(pair.unsupervised(), list(pair.parameters()))
    norm = torch.cat([g.double().flatten() for g in g1]).norm()
    optimizer = GAPWrapper(BASES["SGD"](pair.parameters()), EPS, ALPHA)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**power)
    scaler.scale(pair.unsupervised()).backward()
    with optimizer.perturbed(pair):
        moved = torch.cat([(p.double() - t).flatten() for p, t in zip(pair.parameters(), theta, strict=True)])
        scaler.scale(pair.unsupervised()).backward()
    torch.testing.assert_close(moved.norm().item(), EPS, rtol=1e-6, atol=0)
    torch.testing.assert_close(optimizer.grad_norm.double() / 2.0**power, norm, rtol=1e-6, atol=0)


@pytest.mark.parametrize("max_norm", [None, MAX_NORM], ids=["no clipping", "clipping"])
@pytest.mark.parametrize("power", [0, 8, 16])
@pytest.mark.parametrize("name", BASES)
def test_the_update_is_that_of_the_reference(name: str, power: int, max_norm: float | None, device: str) -> None:
    pair = Pair(device, torch.float64)
    twin = copy.deepcopy(pair)
    optimizer, base = GAPWrapper(BASES[name](pair.parameters()), EPS, ALPHA), BASES[name](twin.parameters())
    scaler = torch.amp.GradScaler(device, init_scale=2.0**power, growth_interval=2)
    for _ in range(5):  # the scale grows on the way
        scaled_step(pair, optimizer, scaler, max_norm=max_norm)
        reference_step(twin, base, max_norm)
    assert_same(pair, twin, rtol=1e-7, atol=1e-9)
    assert scaler.get_scale() == 2.0 ** (power + 2)


# ---------------------------------------------------------------- overflows


@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("bad", ["g1", "g2", "g_labelled"])
@pytest.mark.parametrize("name", BASES)
def test_an_overflow_skips_the_update_and_changes_nothing(name: str, bad: str, value: float, device: str) -> None:
    pair = Pair(device, torch.float64)
    twin = copy.deepcopy(pair)
    optimizer, base = GAPWrapper(BASES[name](pair.parameters()), EPS, ALPHA), BASES[name](twin.parameters())
    scaler = torch.amp.GradScaler(device, init_scale=2.0**16)
    scaled_step(pair, optimizer, scaler)
    before = values(pair, optimizer)
    scaled_step(pair, optimizer, scaler, max_norm=MAX_NORM, bad=bad, value=value)
    after = values(pair, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert scaler.get_scale() == 2.0**15
    scaled_step(pair, optimizer, scaler)
    assert scaler.get_scale() == 2.0**15
    for _ in range(2):
        reference_step(twin, base)
    assert_same(pair, twin, rtol=1e-7, atol=1e-9)


# ---------------------------------------------------------------- autocast

REGIONS = ["around all passes", "around each pass", "around all and each"]


@pytest.mark.parametrize("power", [10, 30], ids=["fitting scale", "scale too high"])
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_scaled_step_under_autocast_is_the_reference_up_to_rounding(
    dtype: torch.dtype, region: str, power: int, device: str
) -> None:
    pair = Pair(device, torch.float32)
    exact = copy.deepcopy(pair).double()
    theta = list(exact.parameters())
    expected, without_gap = (
        algorithm_1(theta, exact.unsupervised, exact.supervised, eps=eps, alpha=ALPHA) for eps in (2.0, 0.0)
    )
    optimizer = GAPWrapper(SGD(pair.parameters(), 1.0), 2.0, ALPHA)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**power)

    def cast() -> AbstractContextManager:
        return torch.autocast(device, dtype)

    while True:  # float16 overflows until the scale has come down
        scale = scaler.get_scale()
        scaled_step(
            pair,
            optimizer,
            scaler,
            around_all=cast if "all" in region else nullcontext,
            around_each=cast if "each" in region else nullcontext,
        )
        if scaler.get_scale() == scale:
            break
        assert all(torch.equal(p.double(), t) for p, t in zip(pair.parameters(), theta, strict=True))
    assert (scale < 2.0**power) == (power == 30 and dtype == torch.float16)
    actual = [(t - p).detach() for t, p in zip(theta, pair.parameters(), strict=True)]
    assert distance(actual, expected) < 0.02
    assert distance(without_gap, expected) > 0.1  # a copy of theta in autocast's cache would have been noticed
