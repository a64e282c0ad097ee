"""CutMix for segmentation: the mix of the predictions is the target of the mixed image, a teacher's if there is one."""

import pytest
import torch
from torch import Tensor, nn

from gap_torch.consistency import Batch, CutMix, CutMixSeg, Teacher


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
