"""DTC: values by hand, both losses in plain Python, where the gradient goes, errors."""

import math

import pytest
import torch
from torch import Tensor

from gap_torch.consistency import DTC, Batch, Views, signed_distances
from gap_torch.losses import ce_dice_loss, dice_loss


def _identity(images: Tensor) -> Tensor:
    return images


def _views(like: Tensor) -> Views:
    return Views((like[:, :1],))


def _logits_of(mask: Tensor) -> Tensor:
    """(B, 2, *spatial), so sure that softmax is the mask."""
    return 200.0 * torch.stack([mask == 0, mask == 1], dim=1) - 100


def test_the_exact_distances_of_a_disc_and_its_mask_differ_on_the_boundary_alone() -> None:
    from_middle = torch.arange(11) - 5
    disc = (from_middle.square()[:, None] + from_middle.square() <= 9).long()[None]
    outputs = _logits_of(disc), signed_distances(disc, 2)
    loss = DTC(_identity).compare((outputs,), _views(outputs[0]))
    assert loss.item() == pytest.approx(16 * 0.25 / 121, abs=1e-6)
    flipped = DTC(_identity).compare(((outputs[0], -outputs[1]),), _views(outputs[0]))
    assert flipped > 0.8


@pytest.mark.parametrize("classes", [2, 4])
def test_the_loss_pixel_by_pixel(classes: int) -> None:
    logits = torch.randn(2, classes, 4, 4, dtype=torch.float64)
    z = (torch.rand(2, classes - 1, 4, 4, dtype=torch.float64) - 0.5) / 100
    terms = []
    for sample in range(2):
        for place in [(i, j) for i in range(4) for j in range(4)]:
            e = [math.exp(logits[sample, k][place].item()) for k in range(classes)]
            for c in range(1, classes):
                mask = 1 / (1 + math.exp(1500 * z[sample, c - 1][place].item()))
                terms.append((mask - e[c] / sum(e)) ** 2)
    loss = DTC(_identity).compare(((logits, z),), _views(logits))
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-9)


def test_both_sides_get_a_gradient_the_distances_in_a_band_alone() -> None:
    z = torch.tensor([-0.5, -0.003, 0.003, 0.5]).view(1, 1, 1, 4).requires_grad_()
    logits = torch.zeros(1, 2, 1, 4, requires_grad=True)
    DTC(_identity).compare(((logits, z),), _views(logits)).backward()
    assert logits.grad.ne(0).all()
    assert z.grad.abs().flatten().gt(1e-3).tolist() == [False, True, True, False]


@pytest.mark.parametrize("classes", [2, 3])
def test_the_labelled_loss_is_dice_and_the_distances_squared_difference(classes: int) -> None:
    logits, labels = torch.randn(2, classes, 4, 5, dtype=torch.float64), torch.randint(classes, (2, 4, 5))
    z = torch.rand(2, classes - 1, 4, 5, dtype=torch.float64) * 2 - 1
    loss = DTC(_identity, distance_weight=0.3).labelled_loss(ce_dice_loss, (logits, z), labels)
    difference = z - signed_distances(labels, classes).double()
    dice = dice_loss(logits, labels)
    if classes == 2:  # one sigmoid's: of the difference of the logits
        q, t = (logits[:, 1] - logits[:, 0]).sigmoid().flatten().tolist(), labels.flatten().tolist()
        both = sum(a * b for a, b in zip(q, t, strict=True))
        total = sum(a * a for a in q) + sum(b * b for b in t)
        dice = 1 - (2 * both + 1e-5) / (total + 1e-5)
    expected = float(dice) + 0.3 * sum(d * d for d in difference.flatten().tolist()) / z.numel()
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (torch.zeros(2, 1, 4, 4, dtype=torch.int64), r"of shape \(2, 4, 4\)"),
        (torch.zeros(1, 4, 4, dtype=torch.int64), r"of shape \(2, 4, 4\)"),
        (torch.zeros(2, 4, 4), "of torch.int64"),
        (torch.full((2, 4, 4), 255), "values from 255 to 255"),
    ],
)
def test_labels_that_would_be_broadcast_or_taken_for_background_are_named(
    wrong: Tensor, text: str, classes: int
) -> None:
    outputs = torch.randn(2, classes, 4, 4), torch.rand(2, classes - 1, 4, 4)
    with pytest.raises(ValueError, match=f"target must .*{text}"):
        DTC(_identity).labelled_loss(ce_dice_loss, outputs, wrong)


def test_labelled_images_are_compared_too() -> None:
    unlabelled, labelled = torch.rand(2, 1, 4, 4), torch.rand(1, 1, 4, 4)
    method = DTC(lambda images: images.flip(-1))
    views = method.prepare(torch.nn.Identity(), Batch(unlabelled, labelled))
    assert torch.equal(views.inputs[0], torch.cat([labelled, unlabelled.flip(-1)]))
    assert views.labelled_first
    views = method.prepare(torch.nn.Identity(), Batch(unlabelled))
    assert torch.equal(views.inputs[0], unlabelled.flip(-1))
    assert not views.labelled_first


def test_half_precision_keeps_the_band() -> None:
    logits, z = torch.randn(1, 3, 8, 8), (torch.rand(1, 2, 8, 8) - 0.5) / 100
    halves = logits.half(), z.half()
    expected = DTC(_identity).compare((tuple(h.float() for h in halves),), _views(logits))
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(DTC(_identity).compare((halves,), _views(logits)), expected)


def test_errors() -> None:
    logits = torch.randn(2, 3, 4, 4)
    for options, text in (({"k": 0}, "k must be above 0"), ({"distance_weight": -1.0}, "distance_weight must be at")):
        with pytest.raises(ValueError, match=text):
            DTC(_identity, **options)
    for outputs, found in (
        (logits, "nothing"),
        ((logits, logits), r"\[\(2, 3, 4, 4\)\]"),
        ((logits, logits[:, 1:], logits[:, 1:]), r"\[\(2, 2, 4, 4\), \(2, 2, 4, 4\)\]"),
    ):
        with pytest.raises(ValueError, match=rf"of shape \(2, 2, 4, 4\); behind the logits came {found}"):
            DTC(_identity).compare((outputs,), _views(logits))
