"""Labels and losses of classes and of regions, by hand."""

import pytest
import torch

pytest.importorskip("nnunetv2", reason="pip install 'gap-torch[nnunet]'")

from gap_nnunet.depths import resized
from gap_nnunet.heads import Classes, Regions


def _pixels(*probabilities: list[float]) -> torch.Tensor:
    """(1, K, 1, pixels) of each pixel's K."""
    return torch.tensor(probabilities, dtype=torch.float64).T[None, :, None]


def test_a_class_counts_where_the_highest_probability_reaches_tau() -> None:
    label, counts = Classes().labels(_pixels([0.75, 0.25], [0.5, 0.5], [0.125, 0.875]), 0.75)
    assert label.flatten().tolist() == [0, 0, 1]
    assert counts.flatten().tolist() == [True, False, True]


def test_a_region_counts_where_it_is_sure_to_be_or_not_to_be() -> None:
    label, counts = Regions().labels(_pixels([0.875, 0.5], [0.25, 0.125], [0.75, 0.75]), 0.75)
    assert label.flatten(2)[0].tolist() == [[True, False, True], [True, False, True]]
    assert counts.flatten(2)[0].tolist() == [[True, True, True], [False, True, True]]


def test_the_loss_of_regions_is_that_of_each_region_alone() -> None:
    """One region is a problem of two classes: softmax of (0, z) is the sigmoid of z."""
    torch.manual_seed(0)
    z = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    target, mask = torch.rand(2, 1, 4, 4) > 0.5, torch.rand(2, 1, 4, 4) > 0.3
    p, inside = z.sigmoid(), mask.double()
    entropy = -(torch.where(target, p, 1 - p).log() * inside).mean()
    overlap, total = (p * inside * target).sum(), ((p * inside) ** 2).sum() + (inside * target).sum()
    expected = entropy + 1 - (2 * overlap + 1e-5) / (total + 1e-5)
    torch.testing.assert_close(Regions().loss(z, target, mask), expected)
    two = Regions().loss(torch.cat([z, z], 1), torch.cat([target, target], 1), torch.cat([mask, mask], 1))
    torch.testing.assert_close(two, expected)


def test_the_loss_is_least_where_the_labels_are_met_and_nothing_beside_the_mask() -> None:
    label = torch.tensor([[[0, 1]]])
    right, wrong = _pixels([50.0, -50.0], [-50.0, 50.0]), _pixels([-50.0, 50.0], [50.0, -50.0])
    nowhere, everywhere = torch.zeros(1, 1, 2, dtype=torch.bool), torch.ones(1, 1, 2, dtype=torch.bool)
    assert Classes().loss(right, label, everywhere) < 1e-4
    assert Classes().loss(wrong, label, everywhere) > 1
    assert Classes().loss(wrong, label, nowhere) == 0
    of_regions = torch.nn.functional.one_hot(label, 2).movedim(-1, 1).bool()
    assert Regions().loss(right, of_regions, everywhere[:, None].expand_as(of_regions)) < 1e-4
    assert Regions().loss(wrong, of_regions, nowhere[:, None].expand_as(of_regions)) == 0


def test_a_region_that_no_confident_pixel_has_counts_nothing_in_dice() -> None:
    z = torch.full((1, 1, 4, 4), -6.0, dtype=torch.float64, requires_grad=True)
    nowhere, everywhere = torch.zeros(1, 1, 4, 4, dtype=torch.bool), torch.ones(1, 1, 4, 4, dtype=torch.bool)
    loss = Regions().loss(z, nowhere, everywhere)
    torch.testing.assert_close(loss, torch.nn.functional.softplus(z).mean())  # cross-entropy alone


def test_half_precision_is_computed_in_single() -> None:
    z = torch.zeros(1, 2, 1, 2, dtype=torch.float16)
    assert Regions().probabilities(z).dtype == Classes().probabilities(z).dtype == torch.float32
    assert Regions().squared(z, torch.zeros(1, 2, 1, 2)).item() == 0.25


def test_labels_are_resized_as_nnunets_own() -> None:
    """By the place's nearest pixel, with channels and without; the full resolution is left alone."""
    outputs = [torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2, 2)]
    labels = torch.arange(16).view(1, 4, 4)
    full, half = resized(labels, outputs)
    assert full is labels
    assert half.tolist() == [[[5, 7], [13, 15]]]
    regions = (labels % 2 == 1)[:, None].expand(1, 2, 4, 4)
    assert resized(regions, outputs)[1].tolist() == [[[[True, True], [True, True]]] * 2]
