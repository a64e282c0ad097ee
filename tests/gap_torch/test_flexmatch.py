"""FlexMatch's thresholds: values by hand, and the paper's own counts where every class is predicted equally often."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gap_torch.consistency import CurriculumThreshold


def _predictions(label: Tensor, confidence: Tensor, classes: int) -> Tensor:
    """Probabilities (1, K, N): `confidence` for the class `label`, the rest in equal parts."""
    hot = torch.nn.functional.one_hot(label, classes).movedim(-1, 0)
    return torch.where(hot.bool(), confidence, (1 - confidence) / (classes - 1)).unsqueeze(0)


@settings(max_examples=50, deadline=None)
@given(
    confident=st.lists(st.integers(0, 20), min_size=2, max_size=5),
    warm_up=st.booleans(),
)
def test_equal_classes_have_the_papers_thresholds(confident: list[int], warm_up: bool) -> None:
    classes = len(confident)
    label = torch.arange(classes).repeat_interleave(20)
    confidence = torch.cat([torch.where(torch.arange(20) < n, 0.99, 0.9) for n in confident])
    threshold = CurriculumThreshold(classes, warm_up=warm_up)
    threshold(_predictions(label, confidence, classes))
    unused = 20 * classes - sum(confident)
    most = max(*confident, unused if warm_up else 0, 1e-9)
    betas = [n / most for n in confident]
    expected = torch.tensor([0.95 * beta / (2 - beta) for beta in betas])
    torch.testing.assert_close(threshold.thresholds(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("spatial", [(4, 5), (2, 2, 5)])
def test_a_pixel_counts_from_its_classs_threshold_on(spatial: tuple[int, ...]) -> None:
    # Class 0: 8 of 10 pixels confident. Class 1: 4 of 10. beta = 1 and 0.5, M(0.5) = 1 / 3, thresholds 0.9 and 0.3.
    label = torch.tensor([0] * 10 + [1] * 10)
    confidence = torch.tensor([0.95] * 8 + [0.6] * 2 + [0.95] * 4 + [0.6] * 6)
    threshold = CurriculumThreshold(2, tau=0.9, warm_up=False)
    mask = threshold(_predictions(label, confidence, 2).reshape(1, 2, *spatial))
    torch.testing.assert_close(threshold.thresholds(), torch.tensor([0.9, 0.3]))
    assert mask.shape == (1, *spatial)
    assert mask.flatten().tolist() == [True] * 8 + [False] * 2 + [True] * 10


def test_the_size_of_a_class_does_not_lower_its_threshold() -> None:
    label = torch.tensor([0] * 990 + [1] * 10)
    threshold = CurriculumThreshold(2)
    threshold(_predictions(label, torch.tensor([0.99] * 1000), 2))
    torch.testing.assert_close(threshold.thresholds(), torch.tensor([0.95, 0.95]))


def test_thresholds_begin_at_0_and_warm_up() -> None:
    threshold, label = CurriculumThreshold(2), torch.tensor([0, 1]).repeat(50)
    assert threshold(_predictions(label, torch.full((100,), 0.6), 2)).all()
    assert not threshold.thresholds().any()
    # One pixel of class 0 in two batches: rates 0.01 and 0, unconfident 199 / 200, and beta = 0.01 / (2 * 199 / 200).
    threshold.momentum = 0.5
    threshold.confident.zero_()
    threshold.predicted.copy_(torch.tensor([0.5, 0.5]))
    confidence = torch.full((100,), 0.6)
    confidence[0] = 0.99
    threshold(_predictions(label, confidence, 2))
    beta = 0.01 / (2 * 199 / 200)
    torch.testing.assert_close(threshold.thresholds(), torch.tensor([0.95 * beta / (2 - beta), 0.0]))


def test_the_average_over_batches() -> None:
    threshold = CurriculumThreshold(2, momentum=0.75)
    threshold(_predictions(torch.tensor([0, 0, 1, 1]), torch.tensor([0.99, 0.6, 0.99, 0.99]), 2))
    threshold(_predictions(torch.tensor([0, 0, 0, 0]), torch.tensor([0.6, 0.6, 0.6, 0.99]), 2))
    torch.testing.assert_close(threshold.confident, torch.tensor([0.25 * (0.75 * 0.25 + 0.25), 0.25 * 0.75 * 0.5]))
    torch.testing.assert_close(threshold.predicted, torch.tensor([0.25 * (0.75 * 0.5 + 1), 0.25 * 0.75 * 0.5]))


def test_a_class_that_is_absent_for_a_while_keeps_its_rate() -> None:
    threshold = CurriculumThreshold(2, momentum=0.9, warm_up=False)
    threshold(_predictions(torch.tensor([0, 0, 1, 1]), torch.tensor([0.99, 0.99, 0.6, 0.99]), 2))
    before = threshold.thresholds()
    for _ in range(20):
        threshold(_predictions(torch.tensor([0, 0, 0, 0]), torch.full((4,), 0.99), 2))
    torch.testing.assert_close(threshold.thresholds(), before)


@settings(max_examples=20, deadline=None)
@given(classes=st.integers(2, 5), seed=st.integers(0, 1000), warm_up=st.booleans())
def test_no_threshold_is_above_tau_and_the_order_does_not_matter(classes: int, seed: int, warm_up: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    probabilities = (4 * torch.randn(4, classes, 3, 4, 5, generator=generator)).softmax(1)
    order = torch.randperm(4, generator=generator)
    one, other = CurriculumThreshold(classes, warm_up=warm_up), CurriculumThreshold(classes, warm_up=warm_up)
    assert torch.equal(one(probabilities)[order], other(probabilities[order]))
    assert (one.thresholds() >= 0).all()
    assert (one.thresholds() <= 0.95).all()


@pytest.mark.parametrize(
    "bad", [{"num_classes": 1}, {"tau": 1.1}, {"momentum": 1.0}, {"momentum": -0.1}], ids=lambda bad: str(bad)
)
def test_bad_arguments_are_named(bad) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        CurriculumThreshold(**{"num_classes": 3, **bad})


def test_another_number_of_classes_is_an_error() -> None:
    with pytest.raises(ValueError, match="probabilities must be of 3 classes"):
        CurriculumThreshold(3)(torch.rand(2, 2, 4, 4).softmax(1))
