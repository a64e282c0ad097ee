"""Deep co-training of one network: the turn, and the loss by hand."""

import math

import pytest
import torch
from torch import Tensor, nn

from gap_torch.consistency import DCT, Batch, Views
from gap_torch.consistency.dct import turned


def _identity(images: Tensor) -> Tensor:
    return images


@pytest.mark.parametrize("spatial", [(5, 5), (4, 4, 3)])
@pytest.mark.parametrize("quarters", range(4))
def test_a_turn_is_rot90_of_the_first_two_axes(quarters: int, spatial: tuple[int, ...]) -> None:
    images = torch.rand(2, 3, *spatial)
    assert torch.equal(turned(images, torch.tensor(quarters)), images.rot90(quarters, (2, 3)))


@pytest.mark.parametrize("spatial", [(5, 4), (4, 6, 3)])
def test_what_is_not_square_is_turned_by_half(spatial: tuple[int, ...]) -> None:
    images = torch.rand(2, 3, *spatial)
    for quarters in range(4):
        assert torch.equal(turned(images, torch.tensor(quarters)), images.rot90(quarters // 2 * 2, (2, 3)))


def test_all_turns_are_as_likely_and_one_is_drawn_for_a_batch() -> None:
    method, images = DCT(_identity), torch.rand(2, 1, 4, 4)
    drawn = [method.prepare(nn.Identity(), Batch(images)) for _ in range(400)]
    counts = [sum(views.fixed.item() == k for views in drawn) for k in range(4)]
    assert all(70 < count < 130 for count in counts), counts
    for views in drawn[:20]:
        assert torch.equal(views.inputs[0], images)
        assert torch.equal(views.inputs[1], images.rot90(views.fixed.item(), (2, 3)))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("quarters", range(4))
def test_a_network_of_single_pixels_has_no_loss_unless_it_is_turned_back_wrongly(quarters: int, dims: int) -> None:
    model = (nn.Conv2d if dims == 2 else nn.Conv3d)(1, 3, 1)
    method, images = DCT(lambda x: x + 1), torch.randn(2, 1, *[4] * dims)
    method.draw = lambda device: torch.tensor(quarters)
    views = method.prepare(model, Batch(images))
    assert method.loss(model, views).item() == 0
    for wrong in {*range(4)} - {quarters}:
        assert method.loss(model, Views(views.inputs, fixed=torch.tensor(wrong))).item() > 1e-4


def test_the_loss_in_plain_python() -> None:
    upright, other = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    total = 0.0
    for b in range(2):
        for x in range(4):
            for y in range(4):  # rot90: what is at (y, -1 - x) comes to (x, y)
                before = [math.exp(v) for v in upright[b, :, y, 3 - x].tolist()]
                after = [math.exp(v) for v in other[b, :, x, y].tolist()]
                pairs = zip(before, after, strict=True)
                total += sum((p / sum(before) - q / sum(after)) ** 2 for p, q in pairs)
    loss = DCT(_identity).compare((upright, other), Views((), fixed=torch.tensor(1)))
    assert loss.item() == pytest.approx(total / (2 * 3 * 16))


def test_each_side_has_half_of_the_gradient() -> None:
    upright, other = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64).requires_grad_()
    loss = DCT(_identity).compare((upright, other), Views((), fixed=torch.tensor(3)))
    whole = (other.softmax(1) - upright.softmax(1).rot90(3, (2, 3))).square().mean()
    torch.testing.assert_close(loss, whole)
    ours, expected = torch.autograd.grad(loss, (upright, other)), torch.autograd.grad(whole / 2, (upright, other))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
