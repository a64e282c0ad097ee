"""The perturbed prediction against the unperturbed one: KL by hand, none at equality, no gradient to the latter."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gap_torch.consistency import alignment, hard_alignment
from gap_torch.consistency.divergence import kl_divergence
from gap_torch.losses import ce_dice_loss


def _logits(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_pixel_by_hand() -> None:
    """KL((1/2, 1/2) || (1/4, 3/4)) = 1/2 ln 2 + 1/2 ln(2/3)."""
    before, outputs = torch.zeros(1, 2, 1, 1), torch.tensor([1 / 4, 3 / 4]).log().view(1, 2, 1, 1)
    assert alignment(outputs, before).item() == pytest.approx(math.log(2) / 2 + math.log(2 / 3) / 2)


def test_a_class_of_probability_0_counts_nothing() -> None:
    probabilities, logits = torch.tensor([1.0, 0.0]).view(1, 2, 1), torch.tensor([3.0, 3.0]).view(1, 2, 1)
    assert kl_divergence(logits, probabilities).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("shape", [(3, 2, 5, 6), (2, 5, 3, 4, 2)])
def test_it_is_the_mean_over_the_pixels(shape: tuple[int, ...]) -> None:
    outputs, before = _logits(shape, 0), _logits(shape, 1)
    p, q = before.exp() / before.exp().sum(1, keepdim=True), outputs.exp() / outputs.exp().sum(1, keepdim=True)
    pixels = shape[0] * math.prod(shape[2:])
    torch.testing.assert_close(alignment(outputs, before), (p * (p / q).log()).sum() / pixels)


@pytest.mark.parametrize("shape", [(3, 2, 5, 6), (2, 5, 3, 4, 2)])
def test_nothing_at_equality(shape: tuple[int, ...]) -> None:
    outputs = _logits(shape, 0).requires_grad_()
    value = alignment(outputs, outputs)
    value.backward()
    assert abs(value.item()) < 1e-15
    assert outputs.grad is not None
    assert outputs.grad.abs().max() < 1e-15


def test_auxiliary_outputs_are_averaged() -> None:
    outputs, before = ([_logits((2, 3, 4, 4), seed) for seed in seeds] for seeds in (range(3), range(3, 6)))
    each = [alignment(o, b) for o, b in zip(outputs, before, strict=True)]
    torch.testing.assert_close(alignment(tuple(outputs), tuple(before)), sum(each) / 3)


def test_the_gradient_goes_to_what_came_after_alone() -> None:
    outputs, before = _logits((2, 3, 4, 4), 0).requires_grad_(), _logits((2, 3, 4, 4), 1).requires_grad_()
    alignment((outputs, outputs), (before, before)).backward()
    assert before.grad is None
    torch.testing.assert_close(outputs.grad, (outputs.softmax(1) - before.softmax(1)).detach() / 32)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), classes=st.integers(2, 6), spatial=st.sampled_from([(3,), (4, 3), (2, 3, 2)]))
def test_it_is_not_negative_and_the_order_of_batch_and_classes_does_not_matter(seed, classes, spatial) -> None:
    outputs, before = _logits((4, classes, *spatial), seed), _logits((4, classes, *spatial), seed + 1)
    value = alignment(outputs, before)
    assert value > 0
    generator = torch.Generator().manual_seed(seed)
    samples, order = (torch.randperm(n, generator=generator) for n in (4, classes))
    torch.testing.assert_close(alignment(outputs[samples][:, order], before[samples][:, order]), value)


def test_half_precision_logits_are_widened() -> None:
    outputs, before = _logits((2, 3, 4, 4), 0).bfloat16(), _logits((2, 3, 4, 4), 1).bfloat16()
    assert alignment(outputs, before).dtype == torch.float32


def test_what_does_not_match_is_refused() -> None:
    logits = _logits((2, 3, 4, 4), 0)
    with pytest.raises(ValueError, match="probabilities"):
        alignment(logits, logits[:1])
    with pytest.raises(ValueError, match="outputs has 2 logits, before 1: both must come from the same model"):
        alignment((logits, logits), logits)
    with pytest.raises(TypeError, match="got dict"):
        alignment(logits, {"out": logits})


def test_one_logit_is_refused():
    with pytest.raises(ValueError, match="2 classes or more"):
        alignment(torch.randn(2, 1, 4), torch.randn(2, 1, 4))


def test_hard_alignment_is_r_of_the_confident_classes_before() -> None:
    outputs, before = 3 * torch.randn(2, 2, 3, 4, 5)
    p = before.softmax(1)
    expected = ce_dice_loss(outputs, p.argmax(1), p.amax(1) >= 0.8)
    assert 0 < (p.amax(1) >= 0.8).float().mean() < 1
    torch.testing.assert_close(hard_alignment(outputs, before, tau=0.8), expected)
    both = hard_alignment((outputs, before), (before, outputs), tau=0.8)
    torch.testing.assert_close(both, (expected + hard_alignment(before, outputs, tau=0.8)) / 2)


def test_no_gradient_of_hard_alignment_reaches_the_prediction_before() -> None:
    outputs, before = (torch.randn(2, 3, 4, requires_grad=True) for _ in range(2))
    hard_alignment(outputs, before, tau=0.3).backward()
    assert outputs.grad.abs().sum() > 0
    assert before.grad is None


def test_hard_alignment_wants_the_same_logits_before_and_after() -> None:
    with pytest.raises(ValueError, match="outputs has 2 logits, before 1"):
        hard_alignment((torch.randn(2, 3, 4),) * 2, torch.randn(2, 3, 4))
