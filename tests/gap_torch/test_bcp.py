"""BCP and its pre-training: boxes, mixtures, losses by hand and in plain Python, and who is asked in which mode."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gap_torch.consistency import BCP, Batch, BCPPreTraining, Teacher, Views, linear_dice_loss
from gap_torch.consistency.bcp import random_box, region_loss, squared_dice_loss
from gap_torch.losses import ce_dice_loss

SPATIAL = [(9, 12), (6, 9, 12)]


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _bcp(model: nn.Module | None = None, **options: Any) -> BCP:
    return BCP(Teacher(model or nn.Identity(), warm_up=False), _identity, _identity, **options)


def _batch(spatial: tuple[int, ...], labelled: int = 4, unlabelled: int = 4, classes: int = 3) -> Batch:
    """Labelled image i is 10 + i everywhere, its labels 1. Unlabelled ones are logits, sure of the last class."""
    shape = (1, *(1 for _ in spatial))
    images = torch.arange(10.0, 10 + labelled).view(-1, *shape).expand(-1, classes, *spatial)
    sure = torch.zeros(unlabelled, classes, *spatial)
    sure[:, -1] = torch.arange(20.0, 20 + unlabelled).view(-1, *shape[1:])
    return Batch(sure, images, torch.ones(labelled, *spatial, dtype=torch.int64))


@pytest.mark.parametrize(("spatial", "share"), [((256, 256), 0.44098), ((112, 112, 80), 0.28921)])
def test_the_box_has_the_authors_share(spatial: tuple[int, ...], share: float) -> None:
    assert random_box(torch.empty(1, 1, *spatial)).float().mean().item() == pytest.approx(share, abs=1e-5)


@pytest.mark.parametrize("spatial", SPATIAL)
def test_the_box_is_one_of_two_thirds_of_each_side_and_gets_about(spatial: tuple[int, ...]) -> None:
    starts = set()
    for _ in range(300):
        places = random_box(torch.empty(2, 1, *spatial)).nonzero()
        first, last = places.amin(0), places.amax(0)
        assert (last - first + 1).tolist() == [2 * side // 3 for side in spatial]
        assert len(places) == math.prod(2 * side // 3 for side in spatial)
        starts.add(tuple(first.tolist()))
    free = [side - 2 * side // 3 for side in spatial]
    assert {start[0] for start in starts} == set(range(free[0]))
    assert len(starts) == math.prod(free)


@pytest.mark.parametrize("spatial", SPATIAL)
def test_a_labelled_box_is_in_an_unlabelled_image_and_the_reverse(spatial: tuple[int, ...]) -> None:
    batch = _batch(spatial)
    views = _bcp().prepare(nn.Identity(), batch)
    labelled_box, unlabelled_box = views.inputs
    inside = ~views.fixed[0]
    assert inside.float().mean().item() == pytest.approx(math.prod(2 * side // 3 / side for side in spatial))
    assert torch.equal(views.fixed, torch.stack([~inside, ~inside, inside, inside]))
    for i in range(2):
        images, unlabelled = batch.labelled, batch.unlabelled
        assert torch.equal(labelled_box[i], torch.where(inside, images[i], unlabelled[i]))
        assert torch.equal(unlabelled_box[i], torch.where(inside, unlabelled[2 + i], images[2 + i]))
    assert torch.equal(views.target, torch.where(views.fixed, 2, 1))
    assert torch.equal(views.labelled, torch.cat(views.inputs))
    assert views.mixed


@pytest.mark.parametrize(("labelled", "unlabelled"), [(1, 1), (3, 3), (2, 5), (5, 2)])
def test_batches_of_any_size(labelled: int, unlabelled: int) -> None:
    batch = _batch((6, 6), labelled, unlabelled)
    views = _bcp().prepare(nn.Identity(), batch)
    assert [len(images) for images in views.inputs] == 2 * [math.ceil(max(labelled, unlabelled) / 2)]
    seen = torch.cat(views.inputs)
    for images in (batch.labelled[:, -1], batch.unlabelled[:, -1]):
        assert set(images.unique().tolist()) <= set(seen[:, -1].unique().tolist())
    assert torch.isfinite(_bcp().loss(nn.Identity(), views))


def test_no_labelled_images_are_named() -> None:
    for method in (_bcp(), BCPPreTraining()):
        with pytest.raises(ValueError, match=r"labelled images too; write Batch\(unlabelled, labelled, labels\)"):
            method.prepare(nn.Identity(), Batch(torch.randn(2, 3, 6, 6)))


def test_cross_entropy_of_equal_logits_is_one_and_a_half_ln_four_a_mixture() -> None:
    """Each region is normalised by its own area, and that of pseudo-labels counts half."""
    method = _bcp(dice=lambda *_: torch.zeros(()))
    views = method.prepare(nn.Identity(), _batch((12, 12), classes=4))
    logits = torch.zeros(2, 4, 12, 12)
    unlabelled = method.compare((logits, logits), views)
    labelled = method.labelled_loss(ce_dice_loss, torch.cat([logits, logits]), torch.tensor(0), views)
    assert (labelled + 0.5 * unlabelled).item() == pytest.approx(1.5 * math.log(4))


def _loss_in_plain_python(logits: Tensor, target: Tensor, region: Tensor, squared: bool) -> float:
    """Of samples (B, K, H, W), pixel by pixel."""
    samples, classes, height, width = logits.shape
    pixels = [(n, y, x) for n in range(samples) for y in range(height) for x in range(width) if region[n, y, x]]
    p = {}
    for n, y, x in pixels:
        e = [math.exp(logits[n, k, y, x].item()) for k in range(classes)]
        p[n, y, x] = [value / sum(e) for value in e]
    cross_entropy = -sum(math.log(p[place][int(target[place])]) for place in pixels) / len(pixels)
    groups = [pixels] if squared else [[place for place in pixels if place[0] == n] for n in range(samples)]
    power, smooth, terms = (2, 1e-10, []) if squared else (1, 1e-5, [])
    for group in groups:
        for k in range(classes):
            both = sum(p[place][k] for place in group if target[place] == k)
            total = sum(p[place][k] ** power for place in group) + sum(target[place] == k for place in group)
            terms.append(1 - (2 * both + smooth) / (float(total) + smooth))
    return cross_entropy + sum(terms) / len(terms)


@pytest.mark.parametrize("squared", [True, False])
def test_the_losses_are_those_of_plain_python(squared: bool) -> None:
    torch.manual_seed(0)
    method = _bcp(dice=None if squared else linear_dice_loss)
    views = method.prepare(nn.Identity(), _batch((4, 4)))
    first, second = (torch.randn(2, 3, 4, 4, dtype=torch.float64) for _ in range(2))
    pairs = [(first, views.target[:2], views.fixed[:2]), (second, views.target[2:], views.fixed[2:])]
    pseudo = sum(_loss_in_plain_python(*pair, squared) for pair in pairs) / 2
    labels = sum(_loss_in_plain_python(pair[0], pair[1], ~pair[2], squared) for pair in pairs) / 2
    assert method.compare((first, second), views).item() == pytest.approx(pseudo)
    both = torch.cat([first, second])
    assert method.labelled_loss(ce_dice_loss, both, torch.tensor(0), views).item() == pytest.approx(labels)
    assert pseudo != pytest.approx(labels)


@pytest.mark.parametrize("dice", [squared_dice_loss, linear_dice_loss])
def test_what_is_outside_of_the_region_counts_nothing(dice: Any) -> None:
    logits, target, region = torch.randn(2, 3, 5, 5), torch.randint(3, (2, 5, 5)), torch.rand(2, 5, 5) < 0.5
    other = torch.where(region.unsqueeze(1), logits, torch.randn(2, 3, 5, 5))
    wrong = torch.where(region, target, (target + 1) % 3)
    torch.testing.assert_close(region_loss(other, wrong, region, dice), region_loss(logits, target, region, dice))
    nowhere = region_loss(logits.requires_grad_(), target, torch.zeros_like(region), dice)
    nowhere.backward()
    assert nowhere.item() == pytest.approx(0)
    assert not logits.grad.any()


def test_labels_are_learnt_without_the_teacher() -> None:
    """With a weight of 0 the pseudo-labels' part leaves a gradient that knows no teacher."""
    batch, gradients = _batch((6, 6)), []
    for teacher in (nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)):
        torch.manual_seed(0)
        method = _bcp(teacher)
        views = method.prepare(nn.Identity(), batch)
        logits = (0.1 * views.labelled).requires_grad_()
        (method.labelled_loss(ce_dice_loss, logits, torch.tensor(0), views)).backward()
        gradients.append(logits.grad)
        assert gradients[-1].masked_select(~views.fixed.unsqueeze(1)).any()
        assert not gradients[-1].masked_select(views.fixed.unsqueeze(1)).any()
    assert torch.equal(*gradients)


def test_the_teacher_s_classes_are_cleaned_half_by_half() -> None:
    seen: list[Tensor] = []

    def clean(labels: Tensor) -> Tensor:
        seen.append(labels)
        return torch.zeros_like(labels)

    batch = _batch((6, 6), unlabelled=6)
    views = BCP(Teacher(nn.Identity()), _identity, clean).prepare(nn.Identity(), batch)
    assert [labels.shape for labels in seen] == [(3, 6, 6), (3, 6, 6)]
    assert all((labels == 2).all() and labels.dtype == torch.int64 for labels in seen)
    assert torch.equal(views.target, torch.where(views.fixed, 0, 1))


class Watched(nn.Module):
    """Notes the flags of batch norm and dropout, and how many images it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm2d(3), nn.Dropout(0.5)
        self.seen: list[tuple[bool, bool, int]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append((self.norm.training, self.dropout.training, len(images)))
        return self.dropout(self.norm(images))


@pytest.mark.parametrize(("mode", "flags"), [("train", (True, True)), ("batch", (True, False)), ("eval", (False,) * 2)])
def test_the_teacher_is_asked_in_its_mode_a_half_at_a_time_and_the_model_not_at_all(mode: Any, flags: Any) -> None:
    model = Watched()
    method = _bcp(model, mode=mode)
    method.prepare(model, _batch((6, 6)))
    assert method.teacher.model.seen == [(*flags, 2), (*flags, 2)]
    assert not model.seen


def test_the_teacher_has_no_warm_up() -> None:
    model = nn.Conv2d(3, 3, 1)
    teacher, start = Teacher(model, 0.75, warm_up=False), model.weight.detach().clone()
    nn.init.ones_(model.weight)
    method = BCP(teacher, _identity, _identity)
    for update in (1, 2):
        method.update(model, Batch(torch.empty(0)))
        torch.testing.assert_close(teacher.model.weight, 1 + 0.75**update * (start - 1))


def test_before_it_joins_labelled_images_are_learnt_from_as_they_are() -> None:
    logits, target = torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4))
    for method in (_bcp(), BCPPreTraining()):
        assert torch.equal(method.labelled_loss(ce_dice_loss, logits, target), ce_dice_loss(logits, target))


@pytest.mark.parametrize("spatial", SPATIAL)
@pytest.mark.parametrize("count", [1, 3, 4])
def test_pre_training_mixes_labelled_images(spatial: tuple[int, ...], count: int) -> None:
    batch = _batch(spatial, count)
    batch = Batch(
        batch.unlabelled, batch.labelled, torch.arange(count).view(-1, *(1,) * len(spatial)).expand(-1, *spatial)
    )
    views = BCPPreTraining().prepare(nn.Identity(), batch)
    half = math.ceil(count / 2)
    assert views.inputs == ()
    assert len(views.labelled) == half
    for i, (image, target, box) in enumerate(zip(views.labelled, views.target, views.fixed, strict=True)):
        other = (half + i) % count
        assert torch.equal(target, torch.where(box, other, i))
        assert torch.equal(image[0], torch.where(box, 10.0 + other, 10.0 + i))


def test_the_losses_of_pre_training_are_those_of_plain_python() -> None:
    torch.manual_seed(0)
    views = BCPPreTraining().prepare(nn.Identity(), _batch((4, 4)))
    logits, box = torch.randn(2, 3, 4, 4, dtype=torch.float64), views.fixed
    parts = [_loss_in_plain_python(logits, views.target, region, True) for region in (box, ~box)]
    loss = BCPPreTraining().labelled_loss(ce_dice_loss, logits, torch.tensor(0), views)
    assert loss.item() == pytest.approx(sum(parts) / 2)
    whole = _loss_in_plain_python(logits, views.target, torch.ones_like(box), False)
    method = BCPPreTraining(by_region=False, dice=linear_dice_loss)
    assert method.labelled_loss(ce_dice_loss, logits, torch.tensor(0), views).item() == pytest.approx(whole / 2)


def test_pre_training_has_no_consistency_loss() -> None:
    method = BCPPreTraining()
    views = method.prepare(nn.Identity(), _batch((4, 4)))
    loss = method.loss(nn.Identity(), views)
    assert loss.item() == 0
    assert not loss.requires_grad
    with pytest.raises(TypeError, match="here of 0, got a tuple of 1"):
        method.compare((torch.zeros(1),), views)


def test_one_logit_is_refused() -> None:
    views = Views((), torch.zeros(1, 4, 4, dtype=torch.int64), fixed=torch.ones(1, 4, 4, dtype=torch.bool))
    for method in (BCPPreTraining(), BCPPreTraining(by_region=False, dice=linear_dice_loss)):
        with pytest.raises(ValueError, match="logits must be of 2 classes or more"):
            method.labelled_loss(ce_dice_loss, torch.zeros(1, 1, 4, 4), torch.tensor(0), views)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (torch.zeros(4, 1, 6, 6, dtype=torch.int64), r"of shape \(2, 6, 6\)"),
        (torch.zeros(4, 6, 6), "of torch.int64"),
        (torch.full((4, 6, 6), 255), "values from "),
    ],
)
def test_bad_labels_are_named(wrong: Tensor, text: str) -> None:
    batch = _batch((6, 6))
    views = BCPPreTraining().prepare(nn.Identity(), Batch(batch.unlabelled, batch.labelled, wrong))
    logits = torch.randn(2, 3, 6, 6)
    for loss in (
        lambda: BCPPreTraining().labelled_loss(ce_dice_loss, logits, wrong, views),
        lambda: squared_dice_loss(logits, views.target, views.fixed),
        lambda: linear_dice_loss(logits, views.target, views.fixed),
    ):
        with pytest.raises(ValueError, match=f"target must .*{text}"):
            loss()


def test_an_unknown_mode_is_named() -> None:
    with pytest.raises(ValueError, match="mode"):
        _bcp(mode="test")
