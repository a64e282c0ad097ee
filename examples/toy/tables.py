"""The tables, in Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple

import torch

from presentation.markdown_table import markdown_table

from .margin import NEAR, Score

HEADINGS = ("right %", "margin, mean", "margin, 5th pct", f"within {NEAR} %", "unsure %")
PLACES = (1, 3, 3, 1, 1)
TOLD_APART = 99.0  # per cent of the points right from which on the moons count as told apart


def table(scores: Mapping[str, Score]) -> str:
    """One seed: a row a variant."""
    rows = [
        (name, *(f"{value:.{places}f}" for value, places in zip(astuple(score), PLACES, strict=True)))
        for name, score in scores.items()
    ]
    return markdown_table(("", *HEADINGS), rows)


def spread(scores: Mapping[str, Sequence[Score]]) -> str:
    """Several seeds: mean and standard deviation, and in how many of them the moons were told apart."""
    rows = [_spread_row(name, of_seeds) for name, of_seeds in scores.items()]
    return markdown_table(("", *HEADINGS, "told apart"), rows)


def duels(scores: Mapping[str, Sequence[Score]], champion: str) -> str:
    """In how many seeds `champion` has more points right, and a larger mean margin, than each of the others."""
    rows = []
    for name, others in scores.items():
        if name != champion:
            pairs = list(zip(scores[champion], others, strict=True))
            right, tied = (
                sum(a.accuracy > b.accuracy for a, b in pairs),
                sum(a.accuracy == b.accuracy for a, b in pairs),
            )
            wider = sum(a.margin > b.margin for a, b in pairs)
            rows.append((name, f"{right} (ties: {tied})", wider, len(pairs)))
    return markdown_table((f"{champion} against", "more points right", "larger mean margin", "seeds"), rows)


def _spread_row(name: str, scores: Sequence[Score]) -> tuple[object, ...]:
    values = torch.tensor([astuple(score) for score in scores])
    statistics = zip(values.mean(dim=0), values.std(dim=0), PLACES, strict=True)
    cells = [f"{mean:.{places}f} ± {deviation:.{places}f}" for mean, deviation, places in statistics]
    return (name, *cells, sum(score.accuracy >= TOLD_APART for score in scores))
