"""Losses with soft targets, against values by hand and PyTorch's own."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gap_torch.losses import dice_loss, mean_squared, soft_cross_entropy, soft_dice_loss

SHAPES = [(2, 4, 8, 8), (3, 2, 5, 6), (1, 5, 4, 5, 6)]
BOTH = pytest.mark.parametrize("loss", [soft_cross_entropy, mean_squared, soft_dice_loss])


def _problem(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64).softmax(1)


def test_two_pixels_by_hand() -> None:
    logits = torch.tensor([[0.8, 0.5], [0.2, 0.5]]).log().view(1, 2, 2)  # softmax: 0.8, 0.2 and a half each
    target = torch.tensor([[0.6, 1.0], [0.4, 0.0]]).view(1, 2, 2)
    entropies = [-0.6 * math.log(0.8) - 0.4 * math.log(0.2), -math.log(0.5)]
    assert soft_cross_entropy(logits, target).item() == pytest.approx(sum(entropies) / 2)
    assert mean_squared(logits, target).item() == pytest.approx((2 * 0.2**2 + 2 * 0.5**2) / 4)


def test_soft_dice_by_hand() -> None:
    """Both classes: 2 (p . q) / (p . p + q . q) over the two pixels."""
    logits = torch.tensor([[0.8, 0.5], [0.2, 0.5]]).log().view(1, 2, 2)
    target = torch.tensor([[0.6, 1.0], [0.4, 0.0]]).view(1, 2, 2)
    first = 2 * (0.8 * 0.6 + 0.5) / (0.8**2 + 0.5**2 + 0.6**2 + 1)
    second = 2 * 0.2 * 0.4 / (0.2**2 + 0.5**2 + 0.4**2)
    assert soft_dice_loss(logits, target).item() == pytest.approx(1 - (first + second) / 2, rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_soft_dice_of_one_hot_targets_is_dice(shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape, dtype=torch.float64)
    label = torch.randint(shape[1], (shape[0], *shape[2:]))
    one_hot = F.one_hot(label, shape[1]).movedim(-1, 1).double()
    torch.testing.assert_close(soft_dice_loss(logits, one_hot), dice_loss(logits, label))


@pytest.mark.parametrize("shape", SHAPES)
def test_they_are_pytorchs(shape: tuple[int, ...]) -> None:
    logits, target = _problem(shape)
    torch.testing.assert_close(soft_cross_entropy(logits, target), F.cross_entropy(logits, target))
    torch.testing.assert_close(mean_squared(logits, target), F.mse_loss(logits.softmax(1), target))


@BOTH
@pytest.mark.parametrize("shape", SHAPES)
def test_agreement_is_the_minimum(loss, shape: tuple[int, ...]) -> None:
    logits, target = _problem(shape)
    agreed = target.log().requires_grad_()
    least = loss(agreed, target)
    least.backward()
    assert least < loss(logits, target)
    assert agreed.grad.abs().max() < 1e-12
    floor = torch.special.entr(target).sum(1).mean() if loss is soft_cross_entropy else 0.0
    assert least.item() == pytest.approx(float(floor), abs=1e-12)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(loss, dtype: torch.dtype) -> None:
    logits, target = _problem(SHAPES[0])
    narrow = loss(logits.to(dtype), target.to(dtype))
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, loss(logits.to(dtype).float(), target.to(dtype).float()))


@BOTH
def test_bad_targets_are_named(loss) -> None:
    logits, target = _problem(SHAPES[0])
    for wrong in (target[:1], target[:, :1], target[0]):
        with pytest.raises(ValueError, match="probabilities must be of shape"):
            loss(logits, wrong)
    with pytest.raises(ValueError, match="probabilities must be of a floating dtype"):
        loss(logits, target.argmax(1))
