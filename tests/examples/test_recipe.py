"""What a recipe refuses, and that the presets are none of it."""

import acdc_gapmatch
import la_gapmatch
import pytest
from segmentation.errors import InputError
from segmentation.recipe import Recipe
from segmentation.task import Task

PRESETS = [(task, preset) for task in (acdc_gapmatch.ACDC, la_gapmatch.LA) for preset in task.presets]


@pytest.mark.parametrize(("task", "preset"), PRESETS)
def test_presets_are_valid(task: Task, preset: str) -> None:
    Recipe(**task.presets[preset])


@pytest.mark.parametrize(
    "bad",
    [
        {"size": (96, 100)},
        {"size": (0, 16, 16)},
        {"width": 0},
        {"average_decay": 1.0},
        {"average_decay": -0.1},
        {"average_decay": float("nan")},
        {"statistics_samples": -1},
        {"seed": -1},
        {"seed": 2**32},
        {"lr": float("inf")},
        {"tau": 1.01},
    ],
)
def test_bad_values_are_refused_by_name(bad: dict) -> None:
    with pytest.raises(InputError, match=next(iter(bad))):
        Recipe(**bad)
