"""The protocol of `predict_volume`, and the means of `Evaluation`."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import zoom
from torch import nn

from segmentation.data.files import Volume
from segmentation.errors import InputError
from segmentation.scoring.evaluate import Evaluation, evaluate
from segmentation.scoring.metrics import ClassScore
from segmentation.scoring.slicewise import predict_volume, segment_volumes


class Threshold(nn.Module):
    """Class `floor(4 x)` for a pixel x in [0, 1): its logit is `sharpness`, the others' are 0."""

    def __init__(self, sharpness: float = 50.0) -> None:
        super().__init__()
        self.sharpness = sharpness
        self.norm = nn.BatchNorm2d(1)
        self.dropout = nn.Dropout(0.5)
        self.batches: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.batches.append(images)
        classes = (4 * self.dropout(images)).long().clamp(0, 3)[:, 0]
        return self.sharpness * nn.functional.one_hot(classes, 4).movedim(-1, 1).float()


def segment(image: np.ndarray) -> np.ndarray:
    (labels,) = segment_volumes(Threshold(), [image], (16, 16), "cpu")
    return labels.numpy()


def image_of(labels: np.ndarray) -> np.ndarray:
    return ((labels + 0.5) / 4).astype(np.float32)


def random_labels(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4, shape).astype(np.uint8)


@pytest.mark.parametrize("shape", [(3, 40, 24), (2, 17, 33), (1, 32, 32)])
def test_each_slice_is_resized_predicted_and_resized_back(shape):
    labels, size = random_labels(shape), 32
    model = Threshold()
    prediction, entropy = predict_volume(model, image_of(labels), (size, size), "cpu")
    expected = [
        zoom(zoom(x, (size / shape[1], size / shape[2]), order=0), (shape[1] / size, shape[2] / size), order=0)
        for x in labels
    ]
    np.testing.assert_array_equal(prediction, np.stack(expected))
    assert prediction.dtype == np.uint8
    assert entropy.dtype == np.float32
    assert entropy.shape == shape
    assert {tuple(batch.shape[1:]) for batch in model.batches} == {(1, size, size)}


def test_slices_go_through_in_batches_and_the_result_is_the_same():
    image = image_of(random_labels((5, 16, 16)))
    model = Threshold()
    whole = predict_volume(model, image, (16, 16), "cpu")
    split = predict_volume(model, image, (16, 16), "cpu", batch=2)
    assert [len(batch) for batch in model.batches] == [5, 2, 2, 1]
    for a, b in zip(whole, split, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("sharpness", "expected"), [(0.0, 1.0), (50.0, 0.0), (math.log(3), None)])
def test_entropy_runs_from_certain_to_uniform(sharpness, expected):
    if expected is None:  # softmax of (log 3, 0, 0, 0) is (1/2, 1/6, 1/6, 1/6)
        expected = (0.5 * math.log(2) + 0.5 * math.log(6)) / math.log(4)
    _, entropy = predict_volume(Threshold(sharpness), image_of(random_labels((2, 8, 8))), (8, 8), "cpu")
    np.testing.assert_allclose(entropy, expected, atol=1e-6)
    assert entropy.max() <= 1


def test_the_model_is_left_as_it_was():
    model = Threshold().train()
    model.norm.eval()  # a frozen batch norm must stay frozen
    predict_volume(model, image_of(random_labels((2, 8, 8))), (8, 8), "cpu")
    assert model.training
    assert model.dropout.training
    assert not model.norm.training


def test_the_model_is_left_as_it_was_after_an_error():
    class Broken(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("out of memory")

    model = Broken().train()
    with pytest.raises(RuntimeError, match="out of memory"):
        predict_volume(model, image_of(random_labels((2, 8, 8))), (8, 8), "cpu")
    assert model.training


def test_no_graph_is_kept():
    seen = []

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3, padding=1).to(memory_format=torch.channels_last)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(self.conv(images))
            return seen[-1]

    image = image_of(random_labels((2, 16, 16)))
    predict_volume(Spy(), image, (16, 16), "cpu")
    assert [logits.requires_grad for logits in seen] == [False]


def volume(name: str, labels: np.ndarray, reference: np.ndarray | None = None) -> Volume:
    return Volume(name, image_of(labels), labels if reference is None else reference)


def test_a_perfect_model_scores_100_percent():
    volumes = [volume(f"case{i}", random_labels((2, 16, 16), seed=i)) for i in range(2)]
    result = evaluate(segment, volumes, num_classes=4)
    assert (result.dice, result.asd, result.empty) == (100, 0, 0)
    assert result.names == ("case0", "case1")


def test_means_go_over_classes_and_volumes():
    evaluation = Evaluation(
        names=("a", "b"),
        scores=(
            (ClassScore(0.5, 2.0, False), ClassScore(0.0, 0.0, True)),
            (ClassScore(0.7, 4.0, False), ClassScore(0.8, 1.0, False)),
        ),
    )
    assert evaluation.class_dice == pytest.approx((60, 40))
    assert evaluation.class_asd == pytest.approx((3, 0.5))
    assert evaluation.dice == pytest.approx(50)
    assert evaluation.asd == pytest.approx(1.75)
    assert evaluation.empty == 1
    written = evaluation.to_dict()
    assert written["dice"] == evaluation.dice
    assert written["volumes"]["b"] == {"dice": [70, 80], "asd": [4.0, 1.0], "empty": [False, False]}


def test_bad_input_names_the_culprit():
    labels = random_labels((2, 16, 16))
    with pytest.raises(InputError, match="volumes"):
        evaluate(segment, [], num_classes=4)
    with pytest.raises(InputError, match=r"case7: .*shape"):
        evaluate(segment, [volume("case7", labels, labels[:1])], num_classes=4)
    with pytest.raises(InputError, match=r"case8: prediction: labels 0 \.\. 3"):
        evaluate(segment, [volume("case8", labels)], num_classes=3)
    with pytest.raises(InputError, match=r"\(D, H, W\)"):
        predict_volume(Threshold(), image_of(labels)[0], (16, 16), "cpu")
