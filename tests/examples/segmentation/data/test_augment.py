"""Geometry and intensity of the batched augmentations."""

import math

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tv
from hypothesis import given, settings
from hypothesis import strategies as st

from segmentation.data.strong import Strong, adjust_unit, gaussian_blur
from segmentation.data.weak_slices import WeakSlices


def _images(batch: int = 8, size: int = 32) -> torch.Tensor:
    return torch.rand(batch, 1, size, size)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.sampled_from([16, 31, 64]))
def test_labels_move_with_their_images(seed: int, size: int) -> None:
    torch.manual_seed(seed)
    labels = torch.randint(0, 4, (6, size, size), dtype=torch.uint8)
    images, moved = WeakSlices(0.4, 0.4).with_labels(labels.unsqueeze(1).float(), labels)
    assert torch.equal(images.squeeze(1), moved.float())
    assert moved.dtype == torch.uint8


def test_quarter_turns_and_flips_lose_nothing_and_all_eight_occur() -> None:
    torch.manual_seed(0)
    image = torch.rand(1, 1, 32, 32)
    expected = [f(image.rot90(k, (2, 3))) for k in range(4) for f in (lambda x: x, lambda x: x.flip(3))]
    moved = WeakSlices(p_turn=1.0).__call__(image.expand(200, -1, -1, -1).contiguous())
    kinds = [[torch.equal(m[None], e) for e in expected] for m in moved]
    assert all(sum(row) == 1 for row in kinds)
    assert {row.index(True) for row in kinds} == set(range(8))


def test_small_rotations_stay_within_their_angle_and_cover_it() -> None:
    torch.manual_seed(1)
    motions = WeakSlices(p_turn=0.0, p_rotate=1.0, degrees=20).motions(2000, torch.device("cpu"))
    angles = torch.atan2(motions[:, 1, 0], motions[:, 0, 0]) * 180 / math.pi
    assert angles.abs().max() <= 20.001
    assert angles.min() < -19
    assert angles.max() > 19
    assert torch.equal(motions[:, :, 2], torch.zeros(2000, 2))


def test_a_rotation_forth_and_back_returns_to_the_middle_of_the_image() -> None:
    torch.manual_seed(2)
    image = F.interpolate(torch.rand(1, 1, 8, 8), size=64, mode="nearest")
    motion = WeakSlices(0.0, 1.0).motions(1, torch.device("cpu"))
    inverse = torch.linalg.inv(F.pad(motion, (0, 0, 0, 1)) + torch.diag(torch.tensor([0.0, 0.0, 1.0])))[:, :2]
    there = F.grid_sample(image, F.affine_grid(motion, [1, 1, 64, 64], False), "nearest", align_corners=False)
    back = F.grid_sample(there, F.affine_grid(inverse, [1, 1, 64, 64], False), "nearest", align_corners=False)
    middle = (slice(None), slice(None), slice(16, 48), slice(16, 48))
    assert (back[middle] == image[middle]).float().mean() > 0.85


def test_shares_of_the_three_motions() -> None:
    torch.manual_seed(3)
    motions = WeakSlices(0.5, 0.25).motions(4000, torch.device("cpu"))
    quarter = motions[:, :, :2].abs().round(decimals=4)
    still = torch.isclose(motions[:, :, :2], torch.eye(2)).all((1, 2)).float().mean()
    oblique = ((quarter > 0) & (quarter < 1)).any(2).any(1).float().mean()
    assert abs(oblique - 0.25) < 0.03
    assert abs(still - (0.25 + 0.5 / 8)) < 0.03


def test_every_sample_has_its_own_random_numbers() -> None:
    torch.manual_seed(4)
    same = _images(1).expand(16, -1, -1, -1).contiguous()
    for augmented in (WeakSlices()(same), Strong()(same)):
        distinct = {tuple(image.flatten().tolist()) for image in augmented}
        assert len(distinct) > 6


@pytest.mark.parametrize("make", [WeakSlices, Strong])
def test_a_generator_decides_everything(make) -> None:
    images = _images()

    def run(seed: int) -> torch.Tensor:
        return make(generator=torch.Generator().manual_seed(seed))(images)

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def test_brightness_and_contrast_are_torchvisions() -> None:
    torch.manual_seed(5)
    images = _images(4)
    brightness, contrast = torch.tensor([0.5, 0.8, 1.0, 1.5]), torch.tensor([1.5, 0.5, 1.2, 0.9])
    ours = adjust_unit(images, brightness.view(4, 1, 1, 1), contrast.view(4, 1, 1, 1))
    for image, b, c, result in zip(images, brightness.tolist(), contrast.tolist(), ours, strict=True):
        torch.testing.assert_close(result, tv.adjust_contrast(tv.adjust_brightness(image, b), c))


def test_blur_is_torchvisions_with_one_sigma_a_sample() -> None:
    torch.manual_seed(6)
    images, sigma = torch.rand(3, 2, 24, 20), torch.tensor([0.1, 0.9, 2.0])
    ours = gaussian_blur(images, sigma)
    for image, s, result in zip(images, sigma.tolist(), ours, strict=True):
        torch.testing.assert_close(result, tv.gaussian_blur(image, [13, 13], [s, s]), atol=1e-6, rtol=0)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000))
def test_the_strong_view_keeps_range_and_place(seed: int) -> None:
    torch.manual_seed(seed)
    images = _images()
    strong = Strong(p_blur=0.0)(images)
    assert strong.shape == images.shape
    assert strong.min() >= 0
    assert strong.max() <= 1
    for image, changed in zip(images.flatten(1), strong.flatten(1), strict=True):
        order = image.argsort()
        assert (changed[order].diff() >= -1e-6).all()


def test_strong_probabilities() -> None:
    torch.manual_seed(7)
    images = _images(600, 8).clamp(0.2, 0.6)
    images = F.interpolate(images, size=16)
    untouched = (Strong(p_jitter=0.8, p_blur=0.5)(images) == images).flatten(1).all(1).float().mean()
    assert abs(untouched - 0.1) < 0.04


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_nothing_waits_for_the_gpu() -> None:
    images = _images().cuda()
    labels = torch.zeros(8, 32, 32, dtype=torch.uint8, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        WeakSlices().with_labels(images, labels)
        Strong()(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
