"""The reference against values worked out by hand: everything else is held against the reference."""

import pytest
import torch

from gap_torch.reference import algorithm_1

# L_unsup = 1/2 (2 a^2 + 3 b^2) at (a, b) = (1.5, 4/3): g1 = (3, 4), ||g1|| = 5.
# eps = 1: theta* = (1.5 + 0.6, 4/3 + 0.8), g2 = (2 * 2.1, 3 * 32/15) = (4.2, 6.4).
A, B = 1.5, 4 / 3


def quadratic(a, b):
    return lambda: 0.5 * (2 * a**2 + 3 * b**2)


@pytest.fixture
def theta():
    return [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (A, B)]


@pytest.mark.parametrize(
    ("eps", "alpha", "expected"),
    [
        (1.0, 1.0, (3 + 4.2, 4 + 6.4)),
        (1.0, 0.5, (3 + 2.1, 4 + 3.2)),
        (1.0, 0.0, (3.0, 4.0)),
        (0.0, 1.0, (6.0, 8.0)),
        (0.5, 2.0, (3 + 2 * 3.6, 4 + 2 * 5.2)),
        ([1.0, 0.0], 1.0, (3 + 4.2, 8.0)),  # the norm still counts both
        (1.0, [0.0, 1.0], (3.0, 4 + 6.4)),
    ],
)
def test_quadratic_by_hand(theta, eps, alpha, expected):
    gradients = algorithm_1(theta, quadratic(*theta), eps=eps, alpha=alpha)
    assert [g.item() for g in gradients] == pytest.approx(expected, rel=1e-12)
    assert [p.item() for p in theta] == [A, B]


def test_supervised_gradient_is_taken_at_theta(theta):
    a, b = theta
    gradients = algorithm_1(theta, quadratic(a, b), lambda: a**3, eps=1.0)
    assert [g.item() for g in gradients] == pytest.approx((7.2 + 3 * A**2, 10.4), rel=1e-12)


def test_a_parameter_without_gradient_stays_without(theta):
    a, b = theta
    assert algorithm_1(theta, lambda: a**2, eps=1.0)[1] is None
    b.requires_grad_(False)
    assert algorithm_1(theta, quadratic(a, b), eps=1.0)[1] is None


@pytest.mark.parametrize("factor", [0.0, float("inf"), float("nan")])
def test_without_a_direction_there_is_no_perturbation(theta, factor):
    a, _ = theta
    seen = []

    def loss():
        seen.append(a.item())
        return factor * a

    algorithm_1(theta, loss, eps=1.0)
    assert seen == [A, A]


def test_complex_parameters_move_as_their_real_and_imaginary_parts():
    z = torch.tensor(A + 1j * B, dtype=torch.complex128, requires_grad=True)
    (gradient,) = algorithm_1([z], lambda: quadratic(z.real, z.imag)(), eps=1.0)
    assert gradient.item() == pytest.approx(7.2 + 10.4j, rel=1e-12)
