"""UniMatch: its loss by hand, whose boxes are where, in which mode the classes are predicted, and what moves."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gap_torch.consistency import Batch, CutMix, FixMatch, Threshold, UniMatch, Views
from gap_torch.losses import cross_entropy, dice_loss

SPATIAL = [(16, 16), (8, 8, 8)]
NO_BOXES = CutMix(p=0.0)


def _identity(images: Tensor) -> Tensor:
    return images


def _constant(p: float, rows: int) -> Tensor:
    """Logits of two classes, (rows, 2, 1, 1): the second has probability `p`."""
    return torch.tensor([1 - p, p]).log().view(1, 2, 1, 1).repeat(rows, 1, 1, 1)


def _views(target: list[int], mask: list[bool], label: list[int], confident: list[bool]) -> Views:
    """Of one pixel a sample."""
    fixed = (torch.tensor(label).view(-1, 1, 1), torch.tensor(confident).view(-1, 1, 1))
    return Views((), torch.tensor(target).view(-1, 1, 1), torch.tensor(mask).view(-1, 1, 1), fixed)


def test_the_loss_by_hand() -> None:
    """One sample, one pixel: - log p / 4 of each strong view and - log p / 2 of the perturbed features."""
    method = UniMatch(_identity, _identity, loss=cross_entropy)
    weak = (_constant(0.123, 1), _constant(0.5, 1))  # the first are the clean features', which nothing is asked of
    strong = torch.cat([_constant(0.8, 1), _constant(0.4, 1)])
    loss = method.compare((weak, strong), _views([1, 0], [True, True], [1], [True]))
    assert loss.item() == pytest.approx(-(math.log(0.8) + math.log(0.6)) / 4 - math.log(0.5) / 2)
    loss = method.compare((weak, strong), _views([1, 0], [False, True], [1], [False]))
    assert loss.item() == pytest.approx(-math.log(0.6) / 4)


def test_each_strong_view_has_a_dice_of_its_own() -> None:
    """Dice over both views at once would be another number."""
    method = UniMatch(_identity, _identity)
    strong, target = torch.randn(4, 3, 6, 6), torch.randint(3, (4, 6, 6))
    target[:2] = 0
    mask = torch.rand(4, 6, 6) < 0.7
    features, label, confident = torch.randn(2, 3, 6, 6), torch.randint(3, (2, 6, 6)), torch.rand(2, 6, 6) < 0.5
    views = Views((), target, mask, (label, confident))
    loss = method.compare(((torch.randn(2, 3, 6, 6), features), strong), views)
    first, second = (dice_loss(strong[rows], target[rows], mask[rows]) for rows in (slice(2), slice(2, 4)))
    by_hand = first / 4 + second / 4 + dice_loss(features, label, confident) / 2
    torch.testing.assert_close(loss, by_hand)
    assert (dice_loss(strong, target, mask) - (first + second) / 2).abs() > 1e-3


def test_the_pass_over_strong_views_may_have_auxiliary_logits_too() -> None:
    method, views = UniMatch(_identity, _identity), _views([1, 0], [True, True], [1], [True])
    weak, strong = (_constant(0.1, 1), _constant(0.5, 1)), _constant(0.7, 2)
    torch.testing.assert_close(
        method.compare((weak, (strong, _constant(0.2, 2))), views), method.compare((weak, strong), views)
    )


class Sure(nn.Module):
    """Logits that are the images; in training mode those of the next class are the perturbed features'."""

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return (images, images.roll(1, dims=1)) if self.training else images


def _sure(spatial: tuple[int, ...], samples: int = 6) -> Tensor:
    """Images that are certain logits themselves: sample i shows class i everywhere."""
    classes = torch.arange(samples).view(samples, *[1] * len(spatial)).expand(samples, *spatial)
    return 100.0 * nn.functional.one_hot(classes, samples).movedim(-1, 1)


@pytest.mark.parametrize("spatial", SPATIAL)
def test_boxes_come_from_the_second_half_labels_and_confidence_alike(spatial: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    images = _sure(spatial)
    images[1] /= 1000  # unsure of one's own
    images[5] /= 1000  # and of a partner
    views = UniMatch(_identity, _identity, cutmix=CutMix(p=1.0)).prepare(Sure(), Batch(images))
    weak, strong = views.inputs
    assert torch.equal(weak, images[:3])
    assert strong.shape == (6, 6, *spatial)
    assert torch.equal(views.target, strong.argmax(1))
    for row, target in enumerate(views.target):
        assert set(target.unique().tolist()) == {row % 3, row % 3 + 3}
    assert torch.equal(views.mask, (views.target != 1) & (views.target != 5))
    label, confident = views.fixed
    assert torch.equal(label, weak.argmax(1))
    assert torch.equal(confident, label != 1)
    first, second = (views.target >= 3).chunk(2)
    assert (first != second).any()  # boxes of their own


def test_the_two_strong_views_are_made_of_the_weak_view_one_after_the_other() -> None:
    seen: list[Tensor] = []

    def strong(images: Tensor) -> Tensor:
        seen.append(images)
        return images + 10 * len(seen)

    images = torch.randn(4, 2, 3, 3)
    views = UniMatch(lambda x: x + 1, strong, cutmix=NO_BOXES).prepare(Sure(), Batch(images))
    assert all(torch.equal(given, images + 1) for given in seen)
    assert torch.equal(views.inputs[0], images[:2] + 1)
    assert torch.equal(views.inputs[1], torch.cat([images[:2] + 1 + 10, images[:2] + 1 + 20]))


def test_which_views_need_logits_of_perturbed_features() -> None:
    views = UniMatch(_identity, _identity).prepare(Sure(), Batch(_sure((4, 4))))
    assert views.attached == (True, False)


def test_without_boxes_and_features_it_is_the_mean_of_two_fixmatches() -> None:
    images, model = torch.randn(4, 3, 6, 6), Sure()
    unimatch, fixmatch = UniMatch(_identity, _identity, 0.5, NO_BOXES), FixMatch(_identity, _identity, 0.5)
    fixmatch.criterion = unimatch.criterion
    views = unimatch.prepare(model, Batch(images))
    ours = unimatch.compare(((images[:2], images[:2]), model(views.inputs[1])), views)
    theirs = fixmatch.loss(model, fixmatch.prepare(model, Batch(images[:2])))
    torch.testing.assert_close(ours, theirs)


class Watched(nn.Module):
    """Notes the flags of batch norm and dropout, and what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm2d(2), nn.Dropout(0.5)
        self.seen: list[tuple[bool, bool, Tensor]] = []

    def forward(self, images: Tensor) -> Any:
        self.seen.append((self.norm.training, self.dropout.training, images))
        logits = self.dropout(self.norm(images))
        return (logits, logits) if self.training else logits


@pytest.mark.parametrize(("mode", "flags"), [("train", (True, True)), ("batch", (True, False)), ("eval", (False,) * 2)])
def test_the_first_half_is_predicted_in_the_mode_the_partners_in_eval_and_nothing_moves(mode: Any, flags: Any) -> None:
    model, images = Watched(), torch.randn(6, 2, 4, 4) + 3
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    UniMatch(_identity, _identity, mode=mode).prepare(model, Batch(images))
    (*own_flags, own), (*partner_flags, partners) = model.seen
    assert tuple(own_flags) == flags
    assert partner_flags == [False, False]
    assert torch.equal(own, images[:3])
    assert torch.equal(partners, images[3:])
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(module.training for module in model.modules())


def test_the_losses_two_passes_move_the_statistics() -> None:
    model = Watched()
    method = UniMatch(_identity, _identity)
    method.loss(model, method.prepare(model, Batch(torch.randn(6, 2, 4, 4))))
    assert [len(images) for *_, images in model.seen[2:]] == [3, 6]
    assert model.norm.num_batches_tracked == 2


class Counting(Threshold):
    """Notes how many samples it judges."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, probabilities: Tensor) -> Tensor:
        self.batches.append(len(probabilities))
        return probabilities.amax(1) > 0.5


def test_a_threshold_that_adapts_judges_once_and_all() -> None:
    threshold = Counting()
    UniMatch(_identity, _identity, threshold).prepare(Sure(), Batch(_sure((4, 4))))
    assert threshold.batches == [6]


def test_an_odd_number_of_images_is_refused() -> None:
    with pytest.raises(ValueError, match=r"even number of unlabelled images.*got 5"):
        UniMatch(_identity, _identity).prepare(Sure(), Batch(torch.randn(5, 2, 4, 4)))


def test_a_model_without_perturbed_features_is_refused() -> None:
    method, model, images = UniMatch(_identity, _identity), nn.Identity(), torch.randn(4, 2, 4, 4)
    with pytest.raises(ValueError, match="no auxiliary logits"):
        method.loss(model, method.prepare(model, Batch(images)))


@pytest.mark.parametrize("outputs", [torch.zeros(2, 2, 1, 1), (torch.zeros(1, 2, 1, 1),)])
def test_outputs_that_are_not_of_two_views_are_refused(outputs: Any) -> None:
    with pytest.raises(TypeError, match=r"here of 2, got .*; write compare\(\(outputs_1, outputs_2\), views\)"):
        UniMatch(_identity, _identity).compare(outputs, _views([1, 0], [True, True], [1], [True]))


@pytest.mark.parametrize("bad", [{"tau": -0.1}, {"tau": 1.1}, {"mode": "test"}])
def test_bad_arguments_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        UniMatch(_identity, _identity, **bad)
