"""FreeMatch's thresholds against the paper's averages, taken step by step in plain Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gap_torch.consistency import SelfAdaptiveThreshold


@settings(max_examples=20, deadline=None)
@given(
    classes=st.integers(2, 5),
    spatial=st.lists(st.integers(1, 4), min_size=2, max_size=3),
    momentum=st.floats(0, 0.99),
    seed=st.integers(0, 1000),
)
def test_three_batches_are_the_papers(classes: int, spatial: list[int], momentum: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    threshold = SelfAdaptiveThreshold(classes, momentum)
    overall, local = 1 / classes, [1 / classes] * classes
    for _ in range(3):
        probabilities = (3 * torch.randn(2, classes, *spatial, generator=generator)).softmax(1)
        pixels = probabilities.movedim(1, -1).reshape(-1, classes).tolist()
        mask = threshold(probabilities)
        overall = momentum * overall + (1 - momentum) * sum(max(p) for p in pixels) / len(pixels)
        local = [momentum * q + (1 - momentum) * sum(p[c] for p in pixels) / len(pixels) for c, q in enumerate(local)]
        bounds = [overall * q / max(local) for q in local]
        torch.testing.assert_close(threshold.thresholds(), torch.tensor(bounds), rtol=1e-4, atol=1e-6)
        margins = [max(p) - bounds[p.index(max(p))] for p in pixels]
        for counts, margin in zip(mask.flatten().tolist(), margins, strict=True):
            assert counts == (margin >= 0) or abs(margin) < 1e-5


def test_two_pixels_by_hand() -> None:
    # tau = (0.9 + 0.6) / 2; p~ = (0.65, 0.35); thresholds 0.75 and 0.75 * 0.35 / 0.65 = 0.404.
    probabilities = torch.tensor([[0.9, 0.4], [0.1, 0.6]]).view(1, 2, 1, 2)
    threshold = SelfAdaptiveThreshold(2, momentum=0.0)
    assert threshold(probabilities).all()
    torch.testing.assert_close(threshold.thresholds(), torch.tensor([0.75, 0.75 * 0.35 / 0.65]))
    # Both of class 0: tau stays 0.75, and so does its threshold.
    assert threshold(torch.tensor([[0.9, 0.6], [0.1, 0.4]]).view(1, 2, 1, 2)).tolist() == [[[True, False]]]


def test_it_begins_at_one_over_k() -> None:
    threshold = SelfAdaptiveThreshold(4)
    torch.testing.assert_close(threshold.thresholds(), torch.full((4,), 0.25))
    assert threshold(torch.full((1, 4, 2, 2), 0.25)).all()


def test_the_order_of_the_batch_does_not_matter() -> None:
    probabilities, order = torch.randn(4, 3, 5, 5).double().softmax(1), torch.tensor([2, 0, 3, 1])
    one, other = SelfAdaptiveThreshold(3, 0.5), SelfAdaptiveThreshold(3, 0.5)
    assert torch.equal(one(probabilities)[order], other(probabilities[order]))
    torch.testing.assert_close(one.thresholds(), other.thresholds())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_prediction_that_is_not_finite_is_forgotten(bad: float) -> None:
    """The average of a batch that holds one stays out; the next batch comes in as if there had been none."""
    good = torch.randn(2, 3, 4, 4).softmax(1)
    broken = good.clone()
    broken[1, :, 2, 3] = bad
    threshold, unharmed = SelfAdaptiveThreshold(3, 0.5), SelfAdaptiveThreshold(3, 0.5)
    begin = threshold.thresholds()
    threshold(broken)
    torch.testing.assert_close(threshold.thresholds(), begin)
    assert torch.equal(threshold(good), unharmed(good))
    torch.testing.assert_close(threshold.thresholds(), unharmed.thresholds())


@pytest.mark.parametrize("bad", [{"num_classes": 1}, {"momentum": 1.0}, {"momentum": -0.1}], ids=lambda bad: str(bad))
def test_bad_arguments_are_named(bad) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        SelfAdaptiveThreshold(**{"num_classes": 3, **bad})


def test_another_number_of_classes_is_an_error() -> None:
    with pytest.raises(ValueError, match="probabilities must be of 3 classes"):
        SelfAdaptiveThreshold(3)(torch.rand(2, 2, 4, 4).softmax(1))
