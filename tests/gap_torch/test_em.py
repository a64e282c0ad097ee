"""Entropy minimisation: values by hand, its two ends, and logits at the edge of half precision."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Categorical

from gap_torch.consistency import Batch, EntropyMinimisation


def _identity(images: Tensor) -> Tensor:
    return images


def _loss(logits: Tensor) -> Tensor:
    method = EntropyMinimisation(_identity)
    return method.loss(nn.Identity(), method.prepare(nn.Identity(), Batch(logits)))


def test_two_pixels_by_hand() -> None:
    logits = torch.tensor([[0.8, 0.5], [0.2, 0.5]]).log().view(1, 2, 1, 2)
    first = -0.8 * math.log(0.8) - 0.2 * math.log(0.2)
    assert _loss(logits).item() == pytest.approx((first / math.log(2) + 1) / 2)


@settings(max_examples=30, deadline=None)
@given(
    classes=st.integers(2, 6),
    spatial=st.lists(st.integers(1, 4), min_size=2, max_size=3),
    scale=st.floats(0, 100),
    seed=st.integers(0, 1000),
)
def test_it_is_the_mean_entropy_between_0_and_1(classes: int, spatial: list[int], scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(2, classes, *spatial, dtype=torch.float64, generator=generator)
    loss = _loss(logits)
    entropy = Categorical(logits=logits.movedim(1, -1)).entropy().mean()
    torch.testing.assert_close(loss, entropy / math.log(classes))
    assert -1e-12 <= loss <= 1 + 1e-12


@pytest.mark.parametrize("classes", [2, 5])
def test_certainty_costs_0_and_ignorance_1(classes: int) -> None:
    certain = torch.zeros(2, classes, 4, 4)
    certain[:, 1] = 100
    assert _loss(certain).item() == pytest.approx(0, abs=1e-6)
    assert _loss(torch.full((2, classes, 4, 4), 7.0)).item() == pytest.approx(1)


def test_a_step_down_its_gradient_makes_the_prediction_more_certain() -> None:
    logits = torch.tensor([0.6, 0.4]).log().view(1, 2, 1, 1).requires_grad_()
    _loss(logits).backward()
    assert (logits - logits.grad).softmax(1)[0, 0].item() > 0.6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_extreme_half_precision_logits_are_finite(dtype: torch.dtype) -> None:
    logits = torch.tensor([[60000.0, -60000.0, 0.0], [60000.0, 1.0, 0.5]], dtype=dtype).view(2, 3, 1, 1)
    logits.requires_grad_()
    loss = _loss(logits)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert logits.grad.isfinite().all()


def test_the_view_is_the_weak_one_and_has_no_target() -> None:
    views = EntropyMinimisation(lambda x: x + 1).prepare(nn.Identity(), Batch(torch.zeros(1, 2, 3, 3)))
    assert torch.equal(views.inputs[0], torch.ones(1, 2, 3, 3))
    assert views.target is None
    assert views.mask is None
