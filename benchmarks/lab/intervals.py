"""How sure a mean of paired differences is."""

import math
from collections.abc import Sequence

import numpy as np

Interval = tuple[float, float]

RESAMPLES = 10_000
LEAST_PAIRS = 3
"""With fewer an interval would say nothing."""
SURE, DETECTED = 1.96, 0.84
"""Standard normal quantiles of a 95 % interval's ends, and of 80 % power."""


def interval(draws: Sequence[Sequence[float]]) -> Interval | None:
    """95 % bootstrap interval of the mean over all pairs: percentiles of resampled means.

    Pairs of one draw share their labelled patients, so that they are no independent sample of what other patients would
    give. Where there are several draws, draws are resampled, and then the pairs within each.

    Args:
        draws: differences of the pairs of each draw.

    Returns:
        Its lower and upper end; None for fewer than LEAST_PAIRS pairs.
    """
    draws = sorted(sorted(differences) for differences in draws if differences)  # their order is to mean nothing
    if sum(map(len, draws)) < LEAST_PAIRS:
        return None
    low, high = np.percentile(_resampled_means(draws, np.random.default_rng(0)), (2.5, 97.5))
    return float(low), float(high)


def _resampled_means(draws: Sequence[Sequence[float]], rng: np.random.Generator) -> np.ndarray:
    total, pairs = np.zeros(RESAMPLES), np.zeros(RESAMPLES)
    for _ in draws:
        taken = rng.integers(len(draws), size=RESAMPLES)
        for index, differences in enumerate(draws):
            here = taken == index
            total[here] += rng.choice(differences, (here.sum(), len(differences))).sum(axis=1)
            pairs[here] += len(differences)
    return total / pairs


def pairs_needed(deviation: float, gain: float) -> int:
    """Pairs for which a true mean `gain` has a 95 % interval above zero in 80 % of all studies.

    Args:
        deviation: standard deviation of the differences, in the unit of `gain`.
    """
    return math.ceil(((SURE + DETECTED) * deviation / gain) ** 2)
