"""The largest connected component of each class."""

import numpy as np
import pytest
import torch

from segmentation.errors import InputError
from segmentation.scoring.components import largest_component, largest_components


def test_the_largest_component_of_each_class_is_kept():
    labels = np.zeros((8, 8, 8), np.uint8)
    labels[0, 0, :3] = 1
    labels[5, 5, :2] = 1
    labels[7, 7, 4:] = 2
    labels[0, 7, 0] = 2
    labels[0, 1, 0] = 3  # touches class 1, and is a piece of its own
    expected = labels.copy()
    expected[5, 5] = 0
    expected[0, 7, 0] = 0
    given = labels.copy()
    kept = largest_component(given)
    np.testing.assert_array_equal(kept, expected)
    np.testing.assert_array_equal(given, labels)
    assert kept.dtype == np.uint8


def test_corners_connect():
    labels = np.zeros((4, 4, 4), np.int64)
    labels[range(3), range(3), range(3)] = 1  # three voxels along the diagonal against a pair
    labels[3, 0, :2] = 1
    kept = largest_component(labels)
    assert kept.sum() == 3
    assert kept[1, 1, 1] == 1


@pytest.mark.parametrize("value", [0, 1])
def test_nothing_and_everything_stay(value):
    labels = np.full((3, 4, 5), value, np.uint8)
    np.testing.assert_array_equal(largest_component(labels), labels)


def test_of_an_image_too_the_largest_piece_stays():
    labels = np.array([[1, 1, 0, 1], [0, 1, 0, 0]])
    np.testing.assert_array_equal(largest_component(labels), [[1, 1, 0, 0], [0, 1, 0, 0]])


def test_five_of_eight_pixels_stay_where_a_corner_connects():
    labels = torch.zeros(6, 6, dtype=torch.int64)
    labels[0:2, 0:2] = 1
    labels[2, 2] = 1  # by its corner
    labels[5, 3:6] = 1
    expected = labels.clone()
    expected[5] = 0
    assert torch.equal(largest_components(labels[None]), expected[None])


def test_of_a_batch_each_sample_and_class_has_its_own_largest_piece():
    torch.manual_seed(0)
    labels = torch.randint(3, (4, 7, 9))
    kept = largest_components(labels)
    assert kept.dtype == torch.int64
    for sample, given in zip(kept, labels, strict=True):
        np.testing.assert_array_equal(sample.numpy(), largest_component(given.numpy()))
    assert (kept != labels).any()


def test_largest_component_takes_integers_in_two_or_three_dimensions():
    with pytest.raises(InputError, match="labels: "):
        largest_component(np.zeros(4, np.uint8))
    with pytest.raises(InputError, match=r"labels: .*float32"):
        largest_component(np.zeros((4, 4, 4), np.float32))
