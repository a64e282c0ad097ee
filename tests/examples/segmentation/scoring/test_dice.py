"""The mean Dice of a validation is that of `evaluate`, and nothing waits for the device but its last line."""

import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from segmentation.acdc import ACDC
from segmentation.data.files import Volume
from segmentation.errors import InputError
from segmentation.image_task import ImageTask
from segmentation.la import LA
from segmentation.recipe import Recipe
from segmentation.scoring import slicewise
from segmentation.scoring.dice import mean_dice
from segmentation.scoring.evaluate import evaluate
from segmentation.task import Task

SHARED = Path(__file__).parents[5] / "shared" / "data"
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")))
PHOTOS = ImageTask(
    name="photographs",
    classes=("one", "two"),
    presets={},
    training_list="train",
    validation_list="val",
    test_list="test",
    training_patients=1,
    published={},
)
CASES: dict[str, tuple[Task, Recipe, list[tuple[int, ...]]]] = {
    "slices": (ACDC, Recipe(size=(32, 48)), [(3, 40, 24), (1, 17, 33), (7, 32, 48), (2, 256, 216)]),
    "photographs": (PHOTOS, Recipe(size=(32, 32)), [(3, 30, 50), (3, 64, 20), (3, 32, 32)]),
    "volumes": (LA, Recipe(size=(16, 16, 16)), [(20, 17, 19), (12, 30, 16)]),
}


def volumes(task: Task, shapes: list[tuple[int, ...]]) -> list[Volume]:
    """Blobs, and images by which they can be told."""
    result = []
    for seed, shape in enumerate(shapes):
        noise = gaussian_filter(np.random.default_rng(seed).normal(size=shape[-3:]), sigma=(0, 4, 4))
        plane = noise if shape[0] != task.channels or task.channels == 1 else noise[0]
        label = np.digitize(plane, np.quantile(plane, np.linspace(0, 1, task.num_classes + 1)[1:-1])).astype(np.uint8)
        image = np.broadcast_to(label / task.num_classes, shape) + 0.2 * np.random.default_rng(9).normal(size=shape)
        result.append(Volume(f"case{seed}", image.astype(np.float32), label))
    return result


def network(task: Task, recipe: Recipe, device: str) -> nn.Module:
    """Untrained, but for a head that makes all classes appear."""
    torch.manual_seed(1)
    conv = (nn.Conv2d if len(recipe.size) == 2 else nn.Conv3d)(task.channels, task.num_classes, 3, padding=1)
    norm = (nn.BatchNorm2d if len(recipe.size) == 2 else nn.BatchNorm3d)(task.num_classes)
    model = nn.Sequential(conv, norm).to(device)
    with torch.no_grad():
        for _ in range(60):
            model(torch.rand(4, task.channels, *recipe.size, device=device))
    return model


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_it_is_that_of_evaluate(name, device):
    task, recipe, shapes = CASES[name]
    model, cases = network(task, recipe, device), volumes(task, shapes)
    arguments = {"recipe": recipe, "stride": task.stride, "device": torch.device(device)}
    expected = evaluate(partial(task.segment, model, **arguments), cases, task.num_classes)
    assert mean_dice(partial(task.segment_each, model, **arguments), cases, task.num_classes) == pytest.approx(
        expected.dice,
        abs=1e-4,  # percent
    )
    assert 1 < expected.dice < 99
    assert len(set(expected.class_dice)) == len(task.classes)


def test_of_real_volumes():
    archive = SHARED / "acdc_eval.zip"
    if not archive.exists():
        pytest.skip(f"{archive} is not there")
    cases = []
    with ZipFile(archive) as file:
        for name in ("patient028_frame01", "patient082_frame02", "patient011_frame02"):
            (member,) = (m for m in file.namelist() if name in m)
            with file.open(member) as stream, np.load(stream) as content:
                code = np.cumsum(content["delta"], axis=0, dtype=content["delta"].dtype)
                cases.append(Volume(name, content["lut"][code].astype(np.float32), content["label"]))
    recipe = Recipe(size=(64, 64))
    model = network(ACDC, recipe, "cpu")
    arguments = {"recipe": recipe, "stride": None, "device": torch.device("cpu")}
    expected = evaluate(partial(ACDC.segment, model, **arguments), cases, 4)
    assert mean_dice(partial(ACDC.segment_each, model, **arguments), cases, 4) == pytest.approx(expected.dice, abs=1e-4)
    assert expected.dice > 1


def as_predicted(labels: Iterable[np.ndarray]):
    """A `segment` that gives these."""
    return lambda images: map(torch.from_numpy, labels)


masks = arrays(np.uint8, (2, 2, 3), elements=st.integers(0, 2))


@settings(max_examples=100, deadline=None)
@given(pairs=st.lists(st.tuples(masks, masks), min_size=1, max_size=4))
def test_any_labels_empty_masks_among_them(pairs):
    cases = [Volume(str(i), np.zeros((2, 2, 3), np.float32), reference) for i, (_, reference) in enumerate(pairs)]
    predictions = iter([prediction for prediction, _ in pairs])
    expected = evaluate(lambda image: next(predictions), cases, 3).dice
    assert mean_dice(as_predicted(prediction for prediction, _ in pairs), cases, 3) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("prediction", "reference", "dice"), [(0, 0, 100), (0, 1, 0), (1, 0, 0), (1, 1, 100)])
def test_empty_masks(prediction, reference, dice):
    case = Volume("a", np.zeros((1, 2, 2), np.float32), np.full((1, 2, 2), reference, np.uint8))
    assert mean_dice(as_predicted([np.full((1, 2, 2), prediction, np.uint8)]), [case], 2) == dice


def test_bad_input_names_the_culprit():
    label = np.zeros((1, 2, 2), np.uint8)
    case = Volume("case7", np.zeros((1, 2, 2), np.float32), label)
    with pytest.raises(InputError, match="volumes: nothing to evaluate"):
        mean_dice(as_predicted([]), [], 2)
    with pytest.raises(InputError, match=r"case7: prediction \(2, 2\) and reference \(1, 2, 2\) differ in shape"):
        mean_dice(as_predicted([label[0]]), [case], 2)
    with pytest.raises(InputError, match=r"case7: prediction: labels reach outside 0 \.\. 1"):
        mean_dice(as_predicted([label + 2]), [case], 2)
    with pytest.raises(InputError, match=r"case8: reference: labels reach outside 0 \.\. 1"):
        mean_dice(as_predicted([label, label]), [case, Volume("case8", case.image, label + 2)], 2)


def test_slices_of_several_volumes_share_batches(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(slicewise, "PIXELS", {"cpu": 4 * 8 * 8})
    monkeypatch.setattr(slicewise, "BATCHES", 2)
    sizes = []

    def network(images: Tensor) -> Tensor:
        sizes.append(len(images))
        return torch.cat([0.5 - images, images - 0.5], dim=1)

    model = nn.Module()
    model.forward = network  # type: ignore[method-assign]
    rng = np.random.default_rng(0)
    images = [rng.random((depth, 8, 8)).astype(np.float32) for depth in (3, 4, 3, 1, 9, 1)]
    labels = [*slicewise.segment_volumes(model, iter(images), (8, 8), "cpu")]
    assert sizes == [4, 4, 2, 4, 4, 2, 1]  # two times 10, and what is left
    for image, label in zip(images, labels, strict=True):
        np.testing.assert_array_equal(label.numpy(), image > 0.5)


def test_gradients_are_on_between_two_volumes():
    model = network(ACDC, Recipe(size=(16, 16)), "cpu").train()
    images = [np.zeros((40, 16, 16), np.float32)] * 40
    for _ in slicewise.segment_volumes(model, images, (16, 16), "cpu"):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert model.training


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["slices", "photographs"])
def test_the_host_waits_once_on_cuda(name):
    task, recipe, shapes = CASES[name]
    model, cases = network(task, recipe, "cuda"), volumes(task, shapes)

    def segment(images: Iterable[np.ndarray]) -> Iterator[Tensor]:
        return task.segment_each(model, images, recipe, task.stride, torch.device("cuda"))

    mean_dice(segment, cases, task.num_classes)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            mean_dice(segment, cases, task.num_classes)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([wait for wait in waits if "synchronizing" in str(wait.message)]) == 1
