"""URPC: its equation by loops and by hand, the bound of its weights, and deep supervision."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gap_torch.consistency import URPC, Batch, MedicalURPC, Views
from gap_torch.losses import ce_dice_loss, cross_entropy

SHAPES = [(2, 2, 5, 6), (2, 5, 3, 4, 2)]


def _identity(images: Tensor) -> Tensor:
    return images


def _scales(shape: tuple[int, ...], count: int = 4, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(count))


def _loss(outputs: tuple[Tensor, ...]) -> Tensor:
    return URPC(_identity).compare((outputs,), Views((torch.empty(0),)))


class Pyramid(nn.Module):
    """Logits at three scales in training mode, one in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Conv2d(1, 3, 3, padding=1) for _ in range(3))

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        return tuple(head(images) for head in self.heads) if self.training else self.heads[0](images)


def test_a_pixel_by_hand() -> None:
    """p = (1, 0) and (1/2, 1/2) have the mean (3/4, 1/4).

    D = ln(4/3) and 1/2 ln(2/3) + 1/2 ln 2; one pixel has the weighted mean of its own distance, 1/8, at each scale.
    """
    outputs = tuple(torch.tensor(p).log().clamp(min=-200).view(1, 2, 1, 1) for p in ([1.0, 0.0], [0.5, 0.5]))
    uncertainty = (math.log(4 / 3) + (math.log(2 / 3) + math.log(2)) / 2) / 2
    assert _loss(outputs).item() == pytest.approx(1 / 8 + uncertainty, rel=1e-5)


def _pixel_by_pixel(outputs: tuple[Tensor, ...], medical: bool) -> float:
    """The equation of four scales; the medical variant has KL the other way round, and the mean of squares."""
    p = [logits.detach().softmax(1).flatten(2).movedim(1, 2).flatten(0, 1) for logits in outputs]
    total = 0.0
    for scale in p:
        weights, weighted, divergences = [], [], []
        for pixel in range(len(scale)):
            p_s, p_c = scale[pixel], sum(other[pixel] for other in p) / 4
            first, second = (p_c, p_s) if medical else (p_s, p_c)
            d = sum(a * math.log(a / b) for a, b in zip(first.tolist(), second.tolist(), strict=True))
            squares = (p_s - p_c) ** 2
            weights.append(math.exp(-d))
            weighted.append(math.exp(-d) * (squares.mean() if medical else squares.sum()).item())
            divergences.append(d)
        total += sum(weighted) / sum(weights) + sum(divergences) / len(divergences)
    return total / 4


@pytest.mark.parametrize("shape", SHAPES)
def test_the_equation_pixel_by_pixel(shape: tuple[int, ...]) -> None:
    outputs = _scales(shape)
    assert _loss(outputs).item() == pytest.approx(_pixel_by_pixel(outputs, medical=False))


@pytest.mark.parametrize("shape", SHAPES)
def test_scales_that_agree_cost_nothing(shape: tuple[int, ...]) -> None:
    (logits,) = _scales(shape, 1)
    loss = _loss((logits, logits + 3, logits.clone()))  # the same probabilities
    loss.backward()
    assert abs(loss.item()) < 1e-14
    assert logits.grad.abs().max() < 1e-14


def test_the_gradient_reaches_every_scale_and_is_right() -> None:
    outputs = _scales((1, 3, 2, 2), 3)
    assert torch.autograd.gradcheck(lambda *scales: _loss(scales), outputs)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(2, 5), sharpness=st.floats(0.0, 30.0))
def test_no_order_matters_and_the_loss_has_bounds(seed: int, count: int, sharpness: float) -> None:
    """||p_s - p_c||^2 is at most 2, and D_s at most ln S, as p_c is at least p_s / S."""
    outputs = tuple(sharpness * o.detach() for o in _scales((4, 3, 5, 5), count, seed))
    generator = torch.Generator().manual_seed(seed)
    order, classes = (torch.randperm(n, generator=generator) for n in (4, 3))
    loss = _loss(outputs)
    assert -1e-12 < loss.item() < 2 + math.log(count)
    torch.testing.assert_close(_loss(tuple(o[order][:, classes] for o in outputs[::-1])), loss)


def test_opposite_certainties_stay_finite() -> None:
    """exp(-D) has 1 / S as its least value, so no weight vanishes."""
    certain = 1e4 * torch.eye(2).view(2, 1, 2, 1, 1)
    outputs = tuple(logits.clone().requires_grad_() for logits in certain)
    loss = _loss(outputs)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2) + 0.5)
    assert all(logits.grad.isfinite().all() for logits in outputs)


def test_the_views_are_weak_ones_without_target() -> None:
    images = torch.randn(2, 1, 5, 5, requires_grad=True)
    views = URPC(lambda x: 2 * x).prepare(Pyramid(), Batch(images))
    assert torch.equal(views.inputs[0], 2 * images)
    assert not views.inputs[0].requires_grad
    assert views.target is None
    assert views.mask is None


def test_labels_supervise_every_scale() -> None:
    model, images, labels = Pyramid(), torch.randn(2, 1, 5, 5), torch.randint(3, (2, 5, 5))
    loss = URPC(_identity).labelled_loss(ce_dice_loss, model(images), labels)
    expected = sum(ce_dice_loss(head(images), labels) for head in model.heads) / 3
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("outputs", [torch.randn(2, 3, 4, 4), (torch.randn(2, 3, 4, 4),)])
def test_one_scale_alone_is_an_error(outputs) -> None:
    with pytest.raises(ValueError, match="auxiliary"):
        URPC(_identity).compare((outputs,), Views((torch.empty(0),)))
    with pytest.raises(ValueError, match="auxiliary"):
        URPC(_identity).labelled_loss(cross_entropy, outputs, torch.zeros(2, 4, 4, dtype=torch.int64))


def test_half_precision_logits_are_widened() -> None:
    assert _loss(tuple(logits.detach().bfloat16() for logits in _scales((2, 3, 4, 4)))).dtype == torch.float32


def _medical_loss(outputs: tuple[Tensor, ...]) -> Tensor:
    return MedicalURPC(_identity).compare((outputs,), Views((torch.empty(0),)))


def test_a_pixel_of_the_medical_variant_by_hand() -> None:
    """p = (0.9, 0.1) and (1/2, 1/2) have the mean (0.7, 0.3): D = KL(p_c || p_s), and a mean square of 0.2^2."""
    outputs = tuple(torch.tensor(p, dtype=torch.float64).log().view(1, 2, 1, 1) for p in ([0.9, 0.1], [0.5, 0.5]))
    first = 0.7 * math.log(0.7 / 0.9) + 0.3 * math.log(0.3 / 0.1)
    second = 0.7 * math.log(0.7 / 0.5) + 0.3 * math.log(0.3 / 0.5)
    assert _medical_loss(outputs).item() == pytest.approx(0.2**2 + (first + second) / 2, rel=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_medical_variant_pixel_by_pixel(shape: tuple[int, ...]) -> None:
    outputs = _scales(shape)
    assert _medical_loss(outputs).item() == pytest.approx(_pixel_by_pixel(outputs, medical=True), rel=1e-6)


def test_the_two_variants_on_the_same_random_logits() -> None:
    """0.65 and 0.87, as an independent reading of the article and of SSL4MIS had them."""
    generator = torch.Generator().manual_seed(0)
    outputs = tuple(2 * torch.randn(8, 4, 32, 32, generator=generator) for _ in range(4))
    assert _loss(outputs).item() == pytest.approx(0.648, abs=0.005)
    assert _medical_loss(outputs).item() == pytest.approx(0.874, abs=0.005)


def test_opposite_certainties_stay_finite_in_the_medical_variant() -> None:
    """Its divergence has no bound, so that weights may vanish."""
    outputs = tuple(logits.clone().requires_grad_() for logits in 1e4 * torch.eye(2).view(2, 1, 2, 1, 1))
    loss = _medical_loss(outputs)
    loss.backward()
    assert loss.isfinite()
    assert all(logits.grad.isfinite().all() for logits in outputs)
