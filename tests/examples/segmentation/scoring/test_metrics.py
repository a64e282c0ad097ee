"""Dice and ASD agree with medpy, which the field scores with; empty masks follow the table in `score`."""

import io
import math
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from medpy.metric.binary import asd, dc
from scipy.ndimage import gaussian_filter, shift

from segmentation.errors import InputError
from segmentation.scoring import metrics
from segmentation.scoring.metrics import ClassScore, score

ARCHIVE = Path(__file__).parents[5] / "shared" / "data" / "acdc_eval.zip"
REAL_CASES = ("patient028_frame01", "patient082_frame02", "patient011_frame02")


def assert_like_medpy(prediction: np.ndarray, reference: np.ndarray, num_classes: int) -> None:
    for index, result in enumerate(score(prediction, reference, num_classes), start=1):
        predicted, expected = prediction == index, reference == index
        assert result.dice == pytest.approx(dc(predicted, expected), abs=1e-6)
        assert result.asd == pytest.approx(asd(predicted, expected), rel=1e-5, abs=1e-6)
        assert not result.empty


def blobs(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Smooth labels 0 .. 3 that fill the volume up to its border."""
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=shape), sigma=(0.5, 6, 6))
    return np.digitize(noise, np.quantile(noise, [0.4, 0.6, 0.8])).astype(np.uint8)


@pytest.mark.parametrize("shape", [(10, 64, 56), (1, 48, 40), (3, 90, 17), (16, 20, 20)])
def test_blobs_in_anisotropic_volumes_score_as_medpy(shape):
    assert_like_medpy(blobs(shape, seed=0), blobs(shape, seed=1), 4)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), shape=array_shapes(min_dims=3, max_dims=3, max_side=5))
def test_any_two_filled_masks_score_as_medpy(data, shape):
    masks = arrays(np.bool_, shape)
    prediction, reference = data.draw(masks), data.draw(masks)
    assume(prediction.any() and reference.any())
    assert_like_medpy(prediction.astype(np.uint8), reference.astype(np.uint8), 2)


def test_single_voxels_in_opposite_corners():
    prediction, reference = np.zeros((2, 4, 5), np.uint8), np.zeros((2, 4, 5), np.uint8)
    prediction[0, 0, 0] = reference[1, 3, 4] = 1
    (result,) = score(prediction, reference, 2)
    assert result == ClassScore(dice=0.0, asd=pytest.approx(math.sqrt(1 + 9 + 16)), empty=False)


def test_asd_is_directed_from_prediction_to_reference():
    reference = np.zeros((1, 1, 20), np.uint8)
    reference[0, 0, [2, 12]] = 1
    prediction = np.zeros_like(reference)
    prediction[0, 0, 2] = 1
    assert score(prediction, reference, 2)[0].asd == 0
    assert score(reference, prediction, 2)[0].asd == 5


@pytest.mark.skipif(not ARCHIVE.exists(), reason=f"{ARCHIVE} is not there")
@pytest.mark.parametrize("case", REAL_CASES)
def test_real_volumes_score_as_medpy(case):
    with (
        zipfile.ZipFile(ARCHIVE) as archive,
        np.load(io.BytesIO(archive.read(f"ACDC/data/{case}.npz"))) as file,
    ):
        reference = file["label"]
    moved = shift(reference, (0, 5, -7), order=0)
    speckled = np.where(np.random.default_rng(0).random(reference.shape) < 0.01, 2, moved)
    wrapped = np.roll(reference, reference.shape[1] // 2, axis=1)  # structures cut by the border
    for prediction in (moved, speckled, wrapped):
        assert_like_medpy(prediction, reference, 4)


EMPTY, FILLED = np.zeros((2, 6, 6), np.uint8), np.pad(np.ones((2, 2, 2), np.uint8), ((0, 0), (2, 2), (2, 2)))


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        (EMPTY, FILLED, ClassScore(0.0, 0.0, empty=True)),
        (EMPTY, EMPTY, ClassScore(1.0, 0.0, empty=True)),
        (FILLED, EMPTY, ClassScore(0.0, 0.0, empty=False)),
        (FILLED, FILLED, ClassScore(1.0, 0.0, empty=False)),
    ],
)
def test_empty_masks(prediction, reference, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # MONAI's warnings would flood a training log
        assert score(prediction, reference, 2) == [expected]


def test_a_class_that_is_missing_leaves_the_others_alone():
    reference = blobs((4, 32, 32), seed=2)
    prediction = np.where(reference == 2, 0, reference)
    assert [(r.dice, r.asd, r.empty) for r in score(prediction, reference, 4)] == [
        (1.0, 0.0, False),
        (0.0, 0.0, True),
        (1.0, 0.0, False),
    ]


def test_without_asd_the_dice_stays():
    prediction, reference = blobs((4, 32, 32), seed=0), blobs((4, 32, 32), seed=1)
    full, quick = score(prediction, reference, 4), score(prediction, reference, 4, with_asd=False)
    assert [r.dice for r in quick] == [r.dice for r in full]
    assert all(math.isnan(r.asd) for r in quick)


@pytest.mark.parametrize(
    ("prediction", "reference", "culprit"),
    [
        (EMPTY, EMPTY[:1], "shape"),
        (EMPTY + 2, EMPTY, "prediction: labels 2 .. 2"),
        (EMPTY, EMPTY.astype(np.int64) - 1, "reference: labels -1 .. -1"),
        (EMPTY.astype(np.float32), EMPTY, "prediction: needs integer labels"),
        (EMPTY[:0], EMPTY[:0], "at least one voxel"),
    ],
)
def test_bad_input_names_the_culprit(prediction, reference, culprit):
    with pytest.raises(InputError, match=culprit):
        score(prediction, reference, 2)


def test_a_distance_that_went_wrong_is_not_hidden_as_zero(monkeypatch):
    broken = torch.tensor([[torch.nan, torch.inf]])
    monkeypatch.setattr(metrics, "compute_average_surface_distance", lambda *_, **__: broken)
    prediction = reference = np.arange(12, dtype=np.uint8).reshape(1, 3, 4) % 3
    assert not any(math.isfinite(r.asd) for r in score(prediction, reference, 3))
    assert [r.asd for r in score(np.zeros_like(prediction), reference, 3)] == [0, 0]
