"""Pseudo-Label: the model's own confident classes, on the very view that they come from."""

import pytest
import torch
from torch import Tensor, nn

from gap_torch.consistency import Batch, PseudoLabel
from gap_torch.losses import ce_dice_loss, dice_loss


def _identity(images: Tensor) -> Tensor:
    return images


def test_the_confident_classes_of_the_weak_view_are_its_labels() -> None:
    probabilities = torch.tensor([[0.96, 0.94, 0.01], [0.02, 0.05, 0.98], [0.02, 0.01, 0.01]])
    images = probabilities.log()[None, :, None, :]
    views = PseudoLabel(lambda x: x.flip(-1), tau=0.95).prepare(nn.Identity(), Batch(images))
    assert torch.equal(views.inputs[0], images.flip(-1))
    assert views.target.tolist() == [[[1, 0, 0]]]
    assert views.mask.tolist() == [[[True, False, True]]]


@pytest.mark.parametrize("spatial", [(6, 7), (4, 5, 6)])
def test_the_loss_is_the_masked_one_that_was_asked_for(spatial: tuple[int, ...]) -> None:
    images = torch.randn(2, 3, *spatial, dtype=torch.float64)
    mask = images.softmax(1).amax(1) >= 0.5
    for loss in (ce_dice_loss, dice_loss):
        method = PseudoLabel(_identity, tau=0.5, loss=loss)
        value = method.loss(nn.Identity(), method.prepare(nn.Identity(), Batch(images)))
        torch.testing.assert_close(value, loss(images, images.argmax(1), mask))
    assert 0 < mask.sum() < mask.numel()


def test_certainty_costs_nothing() -> None:
    images = 100.0 * nn.functional.one_hot(torch.randint(4, (2, 5, 5)), 4).movedim(-1, 1)
    method = PseudoLabel(_identity)
    assert method.loss(nn.Identity(), method.prepare(nn.Identity(), Batch(images))) < 1e-6


def test_lees_own_counts_every_pixel() -> None:
    assert PseudoLabel(_identity, tau=0).prepare(nn.Identity(), Batch(torch.randn(2, 3, 4, 4))).mask.all()


def test_labels_are_made_in_the_asked_mode() -> None:
    dropout, images = nn.Dropout(0.999), 100 * torch.eye(3).view(1, 3, 1, 3)
    assert PseudoLabel(_identity, mode="eval").prepare(dropout, Batch(images)).mask.all()
    assert not PseudoLabel(_identity, mode="train").prepare(dropout, Batch(images)).mask.any()


@pytest.mark.parametrize("bad", [{"tau": -0.1}, {"tau": 1.1}, {"mode": "test"}])
def test_bad_arguments_are_named(bad) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        PseudoLabel(_identity, **bad)
