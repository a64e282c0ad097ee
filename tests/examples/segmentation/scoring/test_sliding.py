"""Sliding windows against a plain triple loop."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from segmentation.errors import InputError
from segmentation.scoring.sliding import _overlaps, predict_volume, segment_volume

CLASSES = 3


def network(seed: int = 0) -> nn.Module:
    """Not invariant to shifts: zeros around each window, and a normalisation over all of it."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1),
        nn.InstanceNorm3d(4),
        nn.LeakyReLU(),
        nn.BatchNorm3d(4),
        nn.Dropout(0.5),
        nn.Conv3d(4, CLASSES, 3, padding=1),
    )


def random_image(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def plain_loop(model: nn.Module, image: np.ndarray, window: tuple[int, ...], stride: tuple[int, ...]) -> np.ndarray:
    """The averaged softmax (C, X, Y, Z), window after window."""
    front = [max(w - s, 0) // 2 for s, w in zip(image.shape, window, strict=True)]
    back = [max(w - s, 0) - f for s, w, f in zip(image.shape, window, front, strict=True)]
    padded = np.pad(image, list(zip(front, back, strict=True)))
    starts = [
        [min(d * i, s - w) for i in range(math.ceil((s - w) / d) + 1)]
        for s, w, d in zip(padded.shape, window, stride, strict=True)
    ]
    total, count = np.zeros((CLASSES, *padded.shape)), np.zeros(padded.shape)
    model.eval()
    for corner in itertools.product(*starts):
        place = tuple(slice(c, c + w) for c, w in zip(corner, window, strict=True))
        with torch.no_grad():
            total[(slice(None), *place)] += model(torch.from_numpy(padded[place])[None, None]).softmax(1)[0].numpy()
        count[place] += 1
    inside = tuple(slice(f, f + s) for f, s in zip(front, image.shape, strict=True))
    return (total / count)[(slice(None), *inside)]


def entropy_of(probabilities: np.ndarray) -> np.ndarray:
    return -(probabilities * np.log(probabilities)).sum(0) / math.log(len(probabilities))


@pytest.mark.parametrize(
    ("shape", "window", "stride"),
    [
        ((13, 12, 10), (6, 5, 4), (2, 3, 1)),  # strides that do not divide
        ((12, 12, 8), (6, 6, 4), (3, 2, 4)),  # strides that do, one as long as the window
        ((7, 12, 9), (6, 6, 4), (5, 5, 3)),  # a last step of one voxel
        ((9, 5, 10), (6, 8, 4), (4, 3, 3)),  # smaller than the window in one axis, by an odd number
        ((3, 4, 5), (6, 8, 6), (1, 2, 3)),  # in all
        ((6, 5, 4), (6, 5, 4), (2, 2, 2)),  # as large as the window
        ((1, 1, 1), (4, 4, 4), (1, 1, 1)),
    ],
)
@pytest.mark.parametrize("batch", [1, 4])
def test_averages_are_those_of_a_plain_loop(shape, window, stride, batch):
    model, image = network(), random_image(shape)
    labels, entropy = predict_volume(model, image, window, stride, "cpu", batch=batch)
    expected = plain_loop(model, image, window, stride)
    np.testing.assert_allclose(entropy, entropy_of(expected), atol=1e-6)
    top = np.sort(expected, axis=0)
    clear = top[-1] - top[-2] > 1e-6
    np.testing.assert_array_equal(labels[clear], expected.argmax(0)[clear])
    assert clear.mean() > 0.99
    assert labels.shape == entropy.shape == shape
    assert (labels.dtype, entropy.dtype) == (np.uint8, np.float32)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_shape_is_covered_as_by_the_plain_loop(data):
    def axes(low, high):
        return data.draw(st.tuples(*[st.integers(low, high)] * 3))

    shape, window = axes(1, 9), axes(2, 6)
    stride = tuple(data.draw(st.integers(1, side)) for side in window)
    model, image = network(), random_image(shape)
    _, entropy = predict_volume(model, image, window, stride, "cpu", batch=7)
    np.testing.assert_allclose(entropy, entropy_of(plain_loop(model, image, window, stride)), atol=1e-6)


@given(st.integers(1, 512), st.data())
def test_monai_steps_by_just_the_stride(side, data):
    step = data.draw(st.integers(1, side))
    (overlap, *_) = _overlaps([side], [step])
    assert 0 <= overlap < 1
    assert int(side * (1 - overlap)) == step  # as MONAI reckons


def test_labels_alone_are_the_same_labels():
    model, image = network(), random_image((9, 8, 7))
    labels, _ = predict_volume(model, image, (6, 6, 4), (2, 3, 2), "cpu")
    np.testing.assert_array_equal(segment_volume(model, image, (6, 6, 4), (2, 3, 2), "cpu"), labels)
    assert len(np.unique(labels)) > 1


def test_a_volume_in_other_types_and_strides_is_taken_as_float32():
    model, image = network(), random_image((9, 8, 7))
    turned = image.astype(np.float64)[::-1].transpose(1, 0, 2)
    _, entropy = predict_volume(model, turned, (6, 6, 4), (2, 3, 2), "cpu")
    _, expected = predict_volume(model, np.ascontiguousarray(turned, np.float32), (6, 6, 4), (2, 3, 2), "cpu")
    np.testing.assert_array_equal(entropy, expected)


class Constant(nn.Module):
    """The same logits for every voxel."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)
        self.crops: list[Tensor] = []

    def forward(self, crops: Tensor) -> Tensor:
        self.crops.append(crops)
        return self.logits.view(1, -1, 1, 1, 1).expand(len(crops), -1, *crops.shape[2:])


@pytest.mark.parametrize(
    ("logits", "expected"), [((0, 0), 1), ((50, 0), 0), ((math.log(3), 0, 0, 0), math.log(12) / 2 / math.log(4))]
)
def test_entropy_runs_from_certain_to_uniform(logits, expected):
    _, entropy = predict_volume(Constant(*logits), random_image((5, 5, 5)), (3, 3, 3), (1, 2, 3), "cpu")
    np.testing.assert_allclose(entropy, expected, atol=1e-6)
    assert 0 <= entropy.min() <= entropy.max() <= 1


def test_windows_come_in_batches():
    model = Constant(0, 0)
    predict_volume(model, random_image((5, 5, 4)), (3, 3, 4), (1, 2, 1), "cpu", batch=4)
    assert [tuple(crops.shape) for crops in model.crops] == [(4, 1, 3, 3, 4), (2, 1, 3, 3, 4)]


def test_zeros_fill_what_is_missing_around_a_small_volume():
    model, image = Constant(0, 0), random_image((3, 6, 4)) + 9
    predict_volume(model, image, (6, 6, 5), (1, 1, 1), "cpu")
    (crops,) = model.crops
    np.testing.assert_array_equal(crops[0, 0, 1:4, :, :4], image)
    assert np.count_nonzero(crops) == image.size


def test_the_softmax_is_float32_under_autocast():
    model, image = network(), random_image((8, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        _, entropy = predict_volume(model, image, (4, 4, 4), (1, 1, 1), "cpu")
        assert model(torch.zeros(1, 1, 4, 4, 4)).dtype == torch.bfloat16
    _, expected = predict_volume(model, image, (4, 4, 4), (1, 1, 1), "cpu")
    np.testing.assert_allclose(entropy, expected, atol=0.02)
    assert len(np.unique(entropy)) == entropy.size  # bfloat16 has but 128 numbers from 1/2 to 1


def test_the_model_is_left_as_it_was():
    model = network().train()
    model[3].eval()  # a frozen batch norm must stay frozen
    before = model[3].running_mean.clone()
    predict_volume(model, random_image((5, 5, 5)), (4, 4, 4), (2, 2, 2), "cpu")
    assert [module.training for module in model] == [True, True, True, False, True, True]
    assert torch.equal(model[3].running_mean, before)


GOOD = {"image": random_image((5, 5, 5)), "window": (4, 4, 4), "stride": (2, 2, 2)}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image": np.zeros((5, 5), np.float32)}, r"image: expected \(X, Y, Z\).* got \(5, 5\)"),
        ({"image": np.zeros((5, 0, 5), np.float32)}, r"image: .* got \(5, 0, 5\)"),
        ({"window": (4, 4)}, r"window: .*\(4, 4\)"),
        ({"window": (4, 0, 4)}, "window: "),
        ({"stride": (2, 2, 0)}, "stride: "),
        ({"stride": (2, 2)}, "stride: "),
        ({"stride": (2, 5, 2)}, r"stride: \(2, 5, 2\) leaves gaps"),
        ({"batch": 0}, "batch: 0"),
    ],
)
def test_bad_input_names_the_argument(wrong, message):
    for predict in (predict_volume, segment_volume):
        with pytest.raises(InputError, match=message):
            predict(network(), device="cpu", **{**GOOD, **wrong})
