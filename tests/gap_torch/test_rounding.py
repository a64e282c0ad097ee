"""What is left of a perturbation in half precision is found whatever the tensors' size and layout."""

import pytest
import torch

from gap_torch import rounding

LAYOUTS = {
    "as it is": lambda t: t,
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "with gaps": lambda t: t[:, ::2],
}
SHAPES = [(1, 2, 1, 1), (8, 64, 16, 16), (33, 64, 9, 9)]  # less than a part, two, and some with a rest


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_length_and_distance(layout, shape):
    a, b = (layout(torch.randn(shape).bfloat16()) for _ in range(2))
    for other in (b, b.contiguous()):  # in the same order, or in another
        exact = torch.linalg.vector_norm(a.double() - b.double()).item()
        assert rounding._distance(a, other) == pytest.approx(exact, rel=1e-5)
    assert rounding._norm(a) == pytest.approx(torch.linalg.vector_norm(a.double()).item(), rel=1e-5)
