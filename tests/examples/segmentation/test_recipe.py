"""What a recipe refuses, and that the presets are none of it."""

from dataclasses import replace

import pytest

import acdc_gapmatch
import la_gapmatch
from gap_torch.consistency import MixUp
from segmentation.errors import InputError
from segmentation.methods import TABLE, Entry, Setting, parsed
from segmentation.recipe import METHODS, RUNS, Recipe, method_of
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
        {"weight": -0.1},
        {"pre_training": -0.1},
        {"warm_up": -1},
        {"warm_up": 4, "iterations": 4},
        {"warm_up": 5, "iterations": 4, "method": "supervised", "gap": False},
        {"method": "UNet"},
        {"aligned": "prediction"},
        {"targets": "evaluation"},
        {"unlabelled_loss": "ce"},
    ],
)
def test_bad_values_are_refused_by_name(bad: dict) -> None:
    with pytest.raises(InputError, match=next(iter(bad))):
        Recipe(**bad)


def test_a_warm_up_is_of_all_methods() -> None:
    Recipe(iterations=4, warm_up=3)
    assert Recipe(iterations=4, warm_up=3).for_run("supervised").warm_up == 3


def test_a_run_that_starts_from_one_of_labelled_images_has_no_warm_up_of_its_own() -> None:
    recipe = Recipe(iterations=6, warm_up=3)
    assert (recipe.own_warm_up, recipe.to_dict()["warm_up"]) == (3, 3)
    after = recipe.for_run("bcp")
    assert (after.own_warm_up, after.to_dict()["warm_up"]) == (0, 0)
    assert after.for_run("fixmatch").own_warm_up == 3
    assert replace(after, pre_training=0).own_warm_up == 3


def test_an_unknown_word_is_answered_with_the_known_ones() -> None:
    with pytest.raises(
        InputError, match="aligned must be one of targets, predictions, pseudo_labels, not 'prediction'"
    ):
        Recipe(aligned="prediction")  # type: ignore[arg-type]


def test_a_method_has_a_weight_of_its_own_unless_one_is_given() -> None:
    em, fixmatch = (Recipe(method=method, gap=False) for method in ("em", "fixmatch"))
    assert (em.own.weight, em.own.ramp_up) == (0.1, 1.0)
    assert (fixmatch.own.weight, fixmatch.own.ramp_up) == (1.0, 0.0)
    assert fixmatch.for_run("em").own == em.own
    given = Recipe(method="em", gap=False, weight=0.5, joint=True)
    assert (given.own.weight, given.own.ramp_up, given.own.joint) == (0.5, 1.0, True)
    assert given.to_dict()["ramp_up"] == 1.0


def test_options_have_one_form() -> None:
    vat = Recipe(method="vat", gap=False, options={"xi": 0.01, "radius": 6 / 256})
    assert vat == Recipe(method="vat", gap=False, options=(("xi", 0.01),))
    assert vat != Recipe(method="vat", gap=False)
    assert hash(vat) != hash(Recipe(method="vat", gap=False))
    assert vat.to_dict()["options"] == {"radius": 6 / 256, "xi": 0.01, "iterations": 1, "variant": "original"}
    assert Recipe(**vat.to_dict()).to_dict() == vat.to_dict()
    with pytest.raises(InputError, match="options: vat has no 'beta'; its options: radius, xi, iterations, variant"):
        Recipe(method="vat", options={"beta": 0.1})


def test_options_are_read_by_the_type_of_their_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    def built(s: Setting, *, detach: bool = True, head: str = "small", steps: int = 2) -> MixUp:
        return MixUp(s.weak)

    monkeypatch.setitem(TABLE, "new", Entry("New", built, (0, 1)))
    assert parsed("new", {"detach": "false", "head": "large", "radius": "1"}, 2, 0.9) == {
        "detach": False,
        "head": "large",
    }
    for bad in ({"detach": "0"}, {"steps": "2.5"}):
        with pytest.raises(InputError, match="is not a value of"):
            parsed("new", bad, 2, 0.9)
    with pytest.raises(InputError, match="--option of vat: radius must"):
        parsed("vat", {"radius": "-1"}, 2, 0.9)


def test_a_default_that_no_text_can_become_is_refused() -> None:
    def built(s: Setting, *, sizes: tuple[int, ...] = (1, 2)) -> MixUp:
        raise AssertionError

    with pytest.raises(TypeError, match="option sizes must have"):
        Entry("New", built, (0, 1))


@pytest.mark.parametrize("method", ["dtc", "sassnet"])
def test_what_reads_more_than_logits_is_held_to_its_own_targets(method: str) -> None:
    assert Recipe(method=method).gap
    for aligned in ("predictions", "pseudo_labels"):
        assert Recipe(method=method, gap=False, aligned=aligned).name == method
        with pytest.raises(InputError, match=rf"{method}\+gap with aligned={aligned}: .* take aligned=targets"):
            Recipe(method=method, aligned=aligned)


def test_names_and_back() -> None:
    assert len(RUNS) == 2 * len(METHODS) - 1
    assert all(Recipe().for_run(name).name == name for name in RUNS)
    assert [Recipe(method="fixmatch").name, Recipe(method="ict").name] == ["gapmatch", "ict+gap"]
    assert method_of("fixmatch+gap") == method_of("gapmatch") == ("fixmatch", True)
    for unknown in ("", "+gap", "gap", "gapmatch+gap", "ict+gap+gap"):
        with pytest.raises(InputError, match="not one of"):
            method_of(unknown)


def test_without_a_consistency_loss_there_is_nothing_to_perturb_by() -> None:
    with pytest.raises(InputError, match="supervised with GAP"):
        Recipe(method="supervised", gap=True)
