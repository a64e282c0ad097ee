"""Signed distances: values by hand, every pair of pixels in plain Python, and what is left where a class is not."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from gap_torch.consistency import signed_distances


def _disc() -> Tensor:
    """Of radius 3 in the middle of 11 x 11: 29 pixels, 16 of them on the inner boundary."""
    from_middle = torch.arange(11) - 5
    return (from_middle.square()[:, None] + from_middle.square() <= 9).long()[None]


def test_a_disc() -> None:
    s = signed_distances(_disc(), 2)
    assert s.shape == (1, 1, 11, 11)
    half = [0.4714, 0.2357, 0, -0.4472, -0.7071]
    assert s[0, 0, 5].tolist() == pytest.approx([*half, -1, *half[::-1]], abs=1e-4)
    assert (s == 0).sum() == 16
    assert s[0, 0, 0, 0] == 1


def test_a_square() -> None:
    labels = torch.zeros(1, 8, 8, dtype=torch.uint8)
    labels[:, 2:6, 2:6] = 1
    s = signed_distances(labels, 2)[0, 0]
    assert (s[3:5, 3:5] == -1).all()
    assert (s == 0).sum() == 12
    assert s[1, 3].item() == pytest.approx(0.3536, abs=1e-4)
    assert s[0, 0] == 1


def _by_pairs(mask: list[bool], places: list[tuple[int, ...]]) -> list[float]:
    """The definition, over lists of pixels."""

    def nearest(place: tuple[int, ...], value: bool) -> float:
        return min(math.dist(place, other) for other, m in zip(places, mask, strict=True) if m is value)

    outer = [0.0 if inside else nearest(place, True) for place, inside in zip(places, mask, strict=True)]
    inner = [nearest(place, False) if inside else 0.0 for place, inside in zip(places, mask, strict=True)]
    maps = [o / max(outer) - i / max(inner) for o, i in zip(outer, inner, strict=True)]
    return [0.0 if i == 1 else s for s, i in zip(maps, inner, strict=True)]


@pytest.mark.parametrize("shape", [(6, 9), (5, 4, 6)])
@pytest.mark.parametrize("classes", [2, 4])
def test_they_are_those_of_every_pair_of_pixels(shape: tuple[int, ...], classes: int) -> None:
    labels = torch.randint(classes, (3, *shape))
    s = signed_distances(labels, classes)
    places = list(product(*map(range, shape)))
    assert s.shape == (3, classes - 1, *shape)
    for sample in range(3):
        for c in range(1, classes):
            expected = _by_pairs((labels[sample] == c).flatten().tolist(), places)
            assert s[sample, c - 1].flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_a_class_that_is_not_there_or_fills_the_image_has_zeros() -> None:
    labels = torch.zeros(2, 5, 6, dtype=torch.int64)
    labels[1] = 2
    assert torch.equal(signed_distances(labels, 4), torch.zeros(2, 3, 5, 6))


def test_each_sample_is_normalised_by_its_own_distances() -> None:
    labels = torch.cat([_disc(), torch.zeros(1, 11, 11, dtype=torch.int64)])
    labels[1, 0, 0] = 1
    s = signed_distances(labels, 2)
    assert torch.equal(s[:1], signed_distances(_disc(), 2))
    assert s[1].max() == 1


def test_scipys_transform_gives_the_same_at_the_size_of_a_crop() -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    axes = torch.meshgrid(*(torch.linspace(-1, 1, side) for side in (48, 40, 32)), indexing="ij")
    mask = sum(axis.square() for axis in axes) < 0.5 + 0.2 * torch.rand(48, 40, 32)
    outer, inner = (torch.from_numpy(ndimage.distance_transform_edt(m.numpy())) for m in (~mask, mask))
    expected = torch.where(inner == 1, 0.0, outer / outer.max() - inner / inner.max())
    torch.testing.assert_close(signed_distances(mask[None].long(), 2)[0, 0].double(), expected, atol=1e-6, rtol=0)
