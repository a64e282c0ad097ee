"""Intervals of paired differences: by hand, by counting, and what must hold for any."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.lab.intervals import LEAST_PAIRS, interval, pairs_needed

DIFFERENCES = st.lists(st.integers(-100, 100).map(float), min_size=1, max_size=4)
DRAWS = st.lists(DIFFERENCES, min_size=1, max_size=4).filter(lambda draws: sum(map(len, draws)) >= LEAST_PAIRS)


def test_few_pairs_have_none() -> None:
    assert interval([]) is interval([[]]) is interval([[1.0, 2.0]]) is interval([[1.0], [2.0], []]) is None


@pytest.mark.parametrize("draws", [[[2.0] * 5], [[2.0], [2.0, 2.0]]])
def test_of_equal_differences_it_is_a_point(draws: list[list[float]]) -> None:
    assert interval(draws) == (2.0, 2.0)


def test_of_one_draw_it_is_the_percentiles_over_all_resamples() -> None:
    """All 4^4 resamples of four pairs are as likely."""
    values = [0.0, 1.0, 3.0, 10.0]
    means = [np.mean(resample) for resample in product(values, repeat=4)]
    assert interval([values]) == pytest.approx(np.percentile(means, (2.5, 97.5)), abs=0.3)


def test_of_several_draws_it_is_the_percentiles_over_draws_and_the_pairs_within() -> None:
    """Two draws of two pairs: of four pairs of draws each has as many resamples within, all as likely."""
    draws = [[0.0, 2.0], [8.0, 16.0]]
    within = [list(product(draw, repeat=2)) for draw in draws]
    means = [np.mean(first + second) for a, b in product(within, repeat=2) for first in a for second in b]
    assert interval(draws) == pytest.approx(np.percentile(means, (2.5, 97.5)), abs=0.3)


def test_patients_that_differ_make_it_wider() -> None:
    """Ten pairs of two patients tell of two patients, not of ten."""
    low, high = interval([[0.0] * 5, [10.0] * 5])
    assert (low, high) == (0.0, 10.0)  # each patient alone has a quarter of all resamples
    one_low, one_high = interval([[0.0] * 5 + [10.0] * 5])
    assert 0 < one_low < one_high < 10


@settings(max_examples=25, deadline=None)
@given(DRAWS)
def test_it_lies_within_the_differences(draws: list[list[float]]) -> None:
    low, high = interval(draws)
    values = [value for draw in draws for value in draw]
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9


@settings(max_examples=25, deadline=None)
@given(DRAWS, st.randoms(use_true_random=False))
def test_order_means_nothing(draws: list[list[float]], random) -> None:
    shuffled = [random.sample(draw, len(draw)) for draw in random.sample(draws, len(draws))]
    assert interval(shuffled) == interval(draws)


@settings(max_examples=25, deadline=None)
@given(DRAWS, st.integers(-50, 50))
def test_a_constant_moves_it(draws: list[list[float]], constant: int) -> None:
    moved = interval([[value + constant for value in draw] for draw in draws])
    assert moved == pytest.approx([end + constant for end in interval(draws)], abs=1e-9)


@pytest.mark.parametrize(
    ("deviation", "pairs"),
    [(4.0, 14), (17.0, 252), (0.0, 0), (3.0, 8)],  # 13.9, 251.7, 0, 7.84
)
def test_pairs_that_a_gain_of_3_needs(deviation: float, pairs: int) -> None:
    assert pairs_needed(deviation, 3.0) == pairs
