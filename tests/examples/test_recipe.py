"""What a recipe refuses, and that the presets are none of it."""

import pytest
from segmentation.errors import InputError
from segmentation.recipe import PRESETS, Recipe


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid(preset: str) -> None:
    Recipe(**PRESETS[preset])


@pytest.mark.parametrize(
    "bad",
    [
        {"size": 100},
        {"size": 0},
        {"width": 0},
        {"average_decay": 1.0},
        {"average_decay": -0.1},
        {"average_decay": float("nan")},
        {"statistics_slices": -1},
        {"seed": -1},
        {"seed": 2**32},
        {"lr": float("inf")},
        {"tau": 1.01},
    ],
)
def test_bad_values_are_refused_by_name(bad: dict) -> None:
    with pytest.raises(InputError, match=next(iter(bad))):
        Recipe(**bad)
