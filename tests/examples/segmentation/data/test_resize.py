"""Nearest neighbour as SciPy finds it, on the host and on a device."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.ndimage import zoom

from segmentation.data.resize import resize_nearest, resize_tensor

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")))
TYPES = (np.float32, np.uint8, np.float64)


def by_scipy(planes: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """One plane after the other, as the field's code does it."""
    return np.stack([zoom(p, (shape[0] / p.shape[0], shape[1] / p.shape[1]), order=0) for p in planes])


def random_planes(shape: tuple[int, int], dtype: type) -> np.ndarray:
    """Without a 0."""
    return np.random.default_rng(0).integers(1, 200, (2, *shape)).astype(dtype)


sides = st.tuples(st.integers(1, 300), st.integers(1, 300))


@settings(max_examples=150, deadline=None)
@given(source=sides, target=sides, dtype=st.sampled_from(TYPES))
@example(source=(256, 256), target=(256, 216), dtype=np.float32)  # ACDC's, back: the last column is 0
@example(source=(216, 256), target=(256, 256), dtype=np.float32)
@example(source=(4, 4), target=(188, 274), dtype=np.uint8)
def test_any_shape_gets_the_voxels_of_scipy_bit_for_bit(source, target, dtype):
    planes = random_planes(source, dtype)
    expected = by_scipy(planes, target)
    for resized in (resize_nearest(planes, target), resize_tensor(torch.from_numpy(planes), target).numpy()):
        assert resized.dtype == dtype
        np.testing.assert_array_equal(resized, expected)
    np.testing.assert_array_equal(planes, random_planes(source, dtype))  # the argument stays


def test_what_scipy_leaves_out_is_0():
    resized = resize_nearest(np.ones((256, 256), np.uint8), (256, 216))
    assert not resized[:, -1].any()
    assert resized[:, :-1].all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("target", [(64, 64), (256, 216), (300, 17)])
def test_on_a_device_any_number_of_dimensions(device, target):
    planes = random_planes((256, 256), np.float32)
    resized = resize_tensor(torch.from_numpy(planes)[:, None].to(device), target)
    assert resized.device.type == device
    np.testing.assert_array_equal(resized[:, 0].cpu().numpy(), by_scipy(planes, target))
