"""CutMix for segmentation: the mix of the predictions is the target of the mixed image, a teacher's if there is one."""

import pytest
import torch
from torch import Tensor, nn

from gap_torch.consistency import Batch, CutMix, CutMixMeanTeacher, CutMixSeg, Teacher, Views


def _identity(images: Tensor) -> Tensor:
    return images


def _sure(spatial: tuple[int, ...]) -> Tensor:
    """Four images that are certain logits themselves: sample i shows class i everywhere."""
    classes = torch.arange(4).view(4, *[1] * len(spatial)).expand(4, *spatial)
    return 100.0 * nn.functional.one_hot(classes, 4).movedim(-1, 1)


@pytest.mark.parametrize("spatial", [(16, 16), (8, 8, 8)])
def test_labels_and_confidence_are_pasted_with_the_image(spatial: tuple[int, ...]) -> None:
    images = _sure(spatial)
    images[2] /= 1000  # unsure, and so is every pixel that is pasted from it
    views = CutMixSeg(_identity).prepare(nn.Identity(), Batch(images))
    for sample in range(4):
        assert set(views.target[sample].unique().tolist()) == {sample, (sample - 1) % 4}
    assert torch.equal(views.inputs[0].argmax(1), views.target)
    assert torch.equal(views.mask, views.target != 2)


@pytest.mark.parametrize("spatial", [(16, 16), (8, 8, 8)])
def test_a_model_that_looks_at_single_pixels_agrees(spatial: tuple[int, ...]) -> None:
    method = CutMixSeg(_identity)
    assert method.loss(nn.Identity(), method.prepare(nn.Identity(), Batch(_sure(spatial)))) < 1e-6


def test_boxes_are_the_ones_asked_for() -> None:
    views = CutMixSeg(_identity, cutmix=CutMix(p=0.0)).prepare(nn.Identity(), Batch(_sure((8, 8))))
    assert torch.equal(views.inputs[0], _sure((8, 8)))


class Scaled(nn.Module):
    """Logits that are the image times one weight."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, images: Tensor) -> Tensor:
        return images * self.weight


def test_the_teacher_makes_the_labels_and_follows() -> None:
    teacher, model, images = Teacher(Scaled(1.0), decay=0.5), Scaled(-1.0), torch.randn(4, 2, 8, 8)
    method = CutMixSeg(_identity, tau=0, teacher=teacher)
    views = method.prepare(model, Batch(images))
    assert torch.equal(views.target, views.inputs[0].argmax(1))  # the model itself says the opposite
    method.loss(model, views).backward()
    assert model.weight.grad.any()
    assert teacher.model.weight.grad is None
    method.update(model, Batch(images))  # its first update takes the model over
    views = method.prepare(model, Batch(images))
    assert torch.equal(views.target, views.inputs[0].argmin(1))


@pytest.mark.parametrize("bad", [{"tau": -0.1}, {"tau": 1.1}, {"mode": "test"}])
def test_bad_arguments_are_named(bad) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        CutMixSeg(_identity, **bad)


def test_the_squared_difference_by_hand() -> None:
    """Two pixels: squares of 0.2 and 0.2, and of 0.5 and 0.5, summed over the classes; a share of 3/4 is confident."""
    logits = torch.tensor([[0.8, 0.5], [0.2, 0.5]]).log().view(1, 2, 2)
    target = torch.tensor([[0.6, 1.0], [0.4, 0.0]]).view(1, 2, 2)
    method = CutMixMeanTeacher(Teacher(Scaled(1.0)), _identity)
    loss = method.compare((logits,), Views((logits,), target, fixed=torch.tensor(0.75)))
    assert loss.item() == pytest.approx(0.75 * (2 * 0.2**2 + 2 * 0.5**2) / 2)


def test_probabilities_are_pasted_and_confidence_is_one_number() -> None:
    torch.manual_seed(0)
    images = _sure((16, 16))
    images[2] /= 1000  # unsure, and so is every pixel that is pasted from it
    teacher, model = Teacher(Scaled(1.0)), Scaled(-1.0)
    views = CutMixMeanTeacher(teacher, _identity).prepare(model, Batch(images))
    torch.testing.assert_close(views.target, views.inputs[0].softmax(1))
    assert views.fixed.shape == ()
    assert views.fixed.item() == pytest.approx((views.target.amax(1) >= 0.97).float().mean().item())
    assert 0.5 < views.fixed.item() < 1
    assert views.mask is None


def test_its_boxes_are_half_of_the_image_with_sides_of_at_least_half_of_its_own() -> None:
    torch.manual_seed(0)
    views = CutMixMeanTeacher(Teacher(Scaled(1.0)), _identity).prepare(
        Scaled(1.0), Batch(_sure((64, 64)).repeat(8, 1, 1, 1))
    )
    own = torch.arange(32).view(32, 1, 1) % 4
    boxes = views.target.argmax(1) != own
    assert (boxes.flatten(1).double().mean(1) - 0.5).abs().max() < 0.05
    for axis in (1, 2):
        sides = boxes.any(axis).double().mean(1)
        assert sides.min() > 0.45
        assert sides.std() > 0.03


def test_its_teacher_has_dropout_and_follows() -> None:
    modes: list[bool] = []
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Dropout(0.5))
    teacher = Teacher(model, decay=0.5)
    teacher.model[1].register_forward_hook(lambda module, *_: modes.append(module.training))
    method, batch = CutMixMeanTeacher(teacher, _identity), Batch(torch.randn(4, 1, 8, 8))
    method.prepare(model, batch)
    assert modes == [True]
    nn.init.zeros_(model[0].weight)
    method.update(model, batch)
    assert not teacher.model[0].weight.any()


@pytest.mark.parametrize("bad", [{"tau": -0.1}, {"mode": "test"}])
def test_bad_arguments_of_the_mean_teacher_are_named(bad) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        CutMixMeanTeacher(Teacher(Scaled(1.0)), _identity, **bad)
