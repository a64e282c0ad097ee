"""Algorithm 1 of the paper in the plainest Python: what every fast path is held against.

It knows neither optimizers nor `.grad`: parameters and two losses go in, the gradient for the update out.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Loss = Callable[[], Tensor]


def algorithm_1(
    theta: Sequence[Tensor],
    unsupervised: Loss,
    supervised: Loss | None = None,
    *,
    eps: float | Sequence[float],
    alpha: float | Sequence[float] = 1.0,
    adaptive: bool = False,
) -> list[Tensor | None]:
    """Gradient g of one step (Algorithm 1, lines 5-12).

    Args:
        theta: leaf parameters; they have their old values again on return.
        unsupervised: closure for L_unsup at the current values of theta, its targets fixed.
        supervised: closure for L_sup, or None for the unlabelled part g_u alone.
        eps: radius of the perturbation, one for all or one for each parameter.
        alpha: weight of g2, one for all or one for each parameter.
        adaptive: measure the radius in units of |theta|, element by element (ASAM: Kwon et al., ICML 2021, equation 6).

    Returns:
        One gradient for each parameter, None where no loss reaches it.

    Examples:
        >>> import torch
        >>> from gap_torch.reference import algorithm_1
        >>> theta = torch.tensor(1.0, requires_grad=True)
        >>> algorithm_1([theta], lambda: theta**2, eps=0.5)  # g1 = 2, theta* = 1.5, g2 = 3
        [tensor(5.)]
    """
    radii = [eps] * len(theta) if isinstance(eps, (int, float)) else list(eps)
    weights = [alpha] * len(theta) if isinstance(alpha, (int, float)) else list(alpha)

    g1 = _gradient(unsupervised, theta)  # line 5
    sizes = [parameter.detach().abs() if adaptive else torch.ones_like(parameter) for parameter in theta]
    norm = _norm([_times(size, gradient) for size, gradient in zip(sizes, g1, strict=True)])
    saved = [parameter.detach().clone() for parameter in theta]  # line 6
    with torch.no_grad():
        for parameter, gradient, radius, size in zip(theta, g1, radii, sizes, strict=True):
            if gradient is not None and 0 < norm < float("inf"):
                parameter += radius * size**2 * gradient / norm  # line 7
    g2 = _gradient(unsupervised, theta)  # line 8
    g_u = [_add(first, _times(weight, second)) for first, second, weight in zip(g1, g2, weights, strict=True)]  # line 9
    with torch.no_grad():
        for parameter, value in zip(theta, saved, strict=True):
            parameter.copy_(value)  # line 10
    if supervised is None:
        return g_u
    g_l = _gradient(supervised, theta)  # line 11
    return [_add(unlabelled, labelled) for unlabelled, labelled in zip(g_u, g_l, strict=True)]  # line 12


def _gradient(loss: Loss, theta: Sequence[Tensor]) -> list[Tensor | None]:
    wanted = [parameter for parameter in theta if parameter.requires_grad]
    found = iter(torch.autograd.grad(loss(), wanted, allow_unused=True))
    return [next(found) if parameter.requires_grad else None for parameter in theta]


def _norm(gradients: Sequence[Tensor | None]) -> float:
    squares = [g.abs().double().square().sum().item() for g in gradients if g is not None]
    return sum(squares) ** 0.5


def _times(weight: float | Tensor, gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else weight * gradient


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    return a + b
