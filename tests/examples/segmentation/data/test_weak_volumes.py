"""Geometry and intensity of the batched augmentations of volumes."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from gap_torch.consistency import CutMix
from segmentation.data.strong import BLUR_RADIUS, Strong, adjust_normalised, gaussian_blur
from segmentation.data.weak_volumes import WeakVolumes, turn

EIGHT = torch.cartesian_prod(*[torch.tensor([False, True])] * 3)
"""All that `WeakVolumes.draw` may say of a sample, one a row."""

intensities = partial(Strong, adjust=adjust_normalised)


def _images(batch: int = 8, size: int = 6) -> torch.Tensor:
    return torch.randn(batch, 1, size, size, size - 1)


def _is_symmetry_of_the_square(image: torch.Tensor, moved: torch.Tensor) -> int | None:
    """Which of the four rotations with and without a flip leads from `image` (1, X, Y, Z) to `moved`."""
    every = [f(image.rot90(k, (1, 2))) for k in range(4) for f in (lambda x: x, lambda x: x.flip(1))]
    fitting = [number for number, expected in enumerate(every) if torch.equal(moved, expected)]
    return fitting[0] if len(fitting) == 1 else None


seeds = st.integers(0, 10_000)
sides = st.integers(1, 5)


# WeakVolumes


@settings(max_examples=40, deadline=None)
@given(seed=seeds, x=sides, y=sides, z=sides)
def test_labels_move_with_their_images_and_none_is_lost(seed: int, x: int, y: int, z: int) -> None:
    torch.manual_seed(seed)
    labels = torch.randint(0, 4, (5, x, y, z), dtype=torch.uint8)
    images, moved = WeakVolumes().with_labels(labels.unsqueeze(1).float(), labels)
    assert torch.equal(images.squeeze(1), moved.float())
    assert moved.dtype == torch.uint8
    for before, after in zip(labels, moved, strict=True):
        assert torch.equal(before.flatten().bincount(), after.flatten().bincount())


@settings(max_examples=40, deadline=None)
@given(seed=seeds, side=sides, z=sides)
def test_every_turn_is_undone_by_one_of_the_eight(seed: int, side: int, z: int) -> None:
    torch.manual_seed(seed)
    image = torch.randn(1, 2, side, side, z)
    moved = turn(image, WeakVolumes().draw(1, image.device))
    assert any(torch.equal(turn(moved, back[:, None]), image) for back in EIGHT)


def test_the_eight_symmetries_of_the_square_come_equally_often() -> None:
    torch.manual_seed(0)
    image = torch.randn(1, 3, 3, 2)
    moved = WeakVolumes()(image.expand(1600, -1, -1, -1, -1))
    kinds = [_is_symmetry_of_the_square(image, sample) for sample in moved]
    assert set(kinds) == set(range(8))
    assert all(abs(kinds.count(kind) - 200) < 5 * 200**0.5 for kind in range(8))


def test_crops_that_are_not_square_keep_their_shape() -> None:
    torch.manual_seed(1)
    image = torch.randn(1, 4, 3, 2)
    moved = WeakVolumes()(image.expand(200, -1, -1, -1, -1))
    expected = [image, image.flip(1), image.flip(2), image.flip(1, 2)]
    kinds = [[torch.equal(sample, e) for e in expected] for sample in moved]
    assert all(sum(row) == 1 for row in kinds)
    assert {row.index(True) for row in kinds} == set(range(4))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float64])
def test_any_type_is_turned_exactly(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    volumes = torch.randint(0, 2, (8, 3, 3, 2)).to(dtype)
    moved = turn(volumes, EIGHT.T)
    assert moved.dtype == dtype
    assert torch.equal(moved.double(), turn(volumes.double(), EIGHT.T))


# CutMix, which is the package's own


@settings(max_examples=30, deadline=None)
@given(seed=seeds, side=st.integers(2, 6))
def test_image_pseudo_label_and_confidence_get_the_same_boxes(seed: int, side: int) -> None:
    labels = torch.arange(4).view(4, 1, 1, 1).expand(4, side, side + 1, side).contiguous()
    cutmix = CutMix(p=0.7, generator=torch.Generator().manual_seed(seed))
    images, pseudo, confidence = cutmix(labels.unsqueeze(1).float(), labels, labels / 4)
    assert torch.equal(images.squeeze(1), pseudo.float())
    assert torch.equal(confidence, pseudo / 4)
    boxes = pseudo != labels
    assert torch.equal(pseudo[boxes], labels.roll(1, 0)[boxes])
    for box in boxes:
        extent = [box.any(dim=tuple(d for d in range(3) if d != axis)).sum() for axis in range(3)]
        assert box.sum() == extent[0] * extent[1] * extent[2]


# Intensities


@settings(max_examples=25, deadline=None)
@given(seed=seeds)
def test_the_jitter_is_one_straight_line_a_sample(seed: int) -> None:
    torch.manual_seed(seed)
    images = 3 * _images().double() + 2
    changed = intensities(p_jitter=1.0, jitter=0.5, p_blur=0.0)(images)
    for image, result in zip(images, changed, strict=True):
        mean, std = image.mean(), image.std(correction=0)
        contrast = result.std(correction=0) / std
        shift = (result.mean() - mean) / std
        assert 0.5 <= contrast <= 1.5
        assert -0.5 <= shift <= 0.5
        torch.testing.assert_close(result, mean + (image - mean) * contrast + std * shift)


def test_the_jitter_covers_its_range() -> None:
    torch.manual_seed(3)
    images = _images(1000, 3)
    images = (images - images.mean((1, 2, 3, 4), keepdim=True)) / images.std((1, 2, 3, 4), correction=0, keepdim=True)
    changed = intensities(p_jitter=1.0, jitter=0.5, p_blur=0.0)(images).flatten(1)
    contrast, shift = changed.std(1, correction=0), changed.mean(1)
    for values, middle in ((contrast, 1.0), (shift, 0.0)):
        assert values.min().item() == pytest.approx(middle - 0.5, abs=0.02)
        assert values.max().item() == pytest.approx(middle + 0.5, abs=0.02)
    assert torch.corrcoef(torch.stack([contrast, shift]))[0, 1].abs() < 0.15


def test_brightness_and_contrast_of_a_known_image() -> None:
    image = torch.tensor([0.0, 4.0]).view(1, 1, 1, 1, 2)  # mean 2, standard deviation 2
    one = torch.ones(1, 1, 1, 1, 1)
    assert adjust_normalised(image, 1.25 * one, one).flatten().tolist() == [0.5, 4.5]
    assert adjust_normalised(image, one, 1.5 * one).flatten().tolist() == [-1.0, 5.0]
    assert adjust_normalised(image, 0.5 * one, 0.5 * one).flatten().tolist() == [0.0, 2.0]


def test_shares_of_jitter_and_blur() -> None:
    torch.manual_seed(4)
    images = _images(1000, 4)
    changed = intensities(p_jitter=0.8, p_blur=0.5, sigma=(1.0, 2.0))(images)
    untouched = (changed == images).flatten(1).all(1).float().mean()
    assert abs(untouched - 0.1) < 0.05
    for options, share in (({"p_blur": 0.0}, 0.8), ({"p_jitter": 0.0, "sigma": (1.0, 2.0)}, 0.5)):
        touched = (intensities(**options)(images) != images).flatten(1).any(1).float().mean()
        assert abs(touched - share) < 0.08


@settings(max_examples=25, deadline=None)
@given(seed=seeds, shape=st.tuples(st.integers(1, 3), *[st.integers(1, 16)] * 3))
def test_blur_is_scipys_with_one_sigma_a_sample_in_thin_crops_too(seed: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(seed)
    images, sigma = torch.randn(3, *shape), torch.tensor([0.1, 0.9, 2.0])
    ours = gaussian_blur(images, sigma)
    assert ours.shape == images.shape
    for image, s, result in zip(images, sigma.tolist(), ours, strict=True):
        for channel, blurred in zip(image, result, strict=True):
            expected = ndimage.gaussian_filter(channel.numpy(), s, mode="mirror", truncate=BLUR_RADIUS / s)  # in sigmas
            torch.testing.assert_close(blurred, torch.from_numpy(expected), atol=1e-4, rtol=0)


@settings(max_examples=15, deadline=None)
@given(value=st.floats(-5, 5), sigma=st.floats(0.1, 2.0), side=st.integers(1, 9))
def test_blur_keeps_constant_images(value: float, sigma: float, side: int) -> None:
    images = torch.full((2, 1, side, 4, 9), value)
    torch.testing.assert_close(gaussian_blur(images, torch.tensor([sigma, 1.0])), images, atol=1e-5, rtol=0)


# Both


def test_every_sample_has_its_own_random_numbers() -> None:
    torch.manual_seed(5)
    same = _images(1).expand(24, -1, -1, -1, -1).contiguous()
    turned = {tuple(image.flatten().tolist()) for image in WeakVolumes()(same)}
    changed = {tuple(image.flatten().tolist()) for image in intensities(p_jitter=1.0)(same)}
    assert len(turned) > 4
    assert len(changed) == 24


@pytest.mark.parametrize("augmentation", [WeakVolumes(), intensities()])
def test_a_sample_does_not_see_the_others(augmentation: WeakVolumes | Strong) -> None:
    images = _images()
    others = torch.cat([images[:3], 100 * _images()[3:]])
    outputs = []
    for batch in (images, others):
        torch.manual_seed(6)
        outputs.append(augmentation(batch)[:3])
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("make", [WeakVolumes, intensities])
def test_a_generator_decides_everything(make) -> None:
    images = _images()

    def run(seed: int) -> torch.Tensor:
        return make(generator=torch.Generator().manual_seed(seed))(images)

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def test_the_views_leave_the_batch_as_it_was() -> None:
    images = _images()
    before = images.clone()
    WeakVolumes()(images)
    intensities()(images)
    assert torch.equal(images, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_nothing_waits_for_the_gpu() -> None:
    images = _images().cuda()
    labels = torch.zeros(8, 6, 6, 5, dtype=torch.uint8, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        WeakVolumes().with_labels(images, labels)
        intensities()(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
