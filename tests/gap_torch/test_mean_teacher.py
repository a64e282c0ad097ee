"""Mean Teacher: a clean target, a noisy student, and a teacher that follows."""

import pytest
import torch
from torch import Tensor, nn

from gap_torch.consistency import Batch, MeanTeacher, Teacher, Views
from gap_torch.losses import soft_cross_entropy


def _identity(images: Tensor) -> Tensor:
    return images


def _network(classes: int = 3, dims: int = 2) -> nn.Sequential:
    conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
    return nn.Sequential(conv(1, 4, 3, padding=1), norm(4), nn.ReLU(), conv(4, classes, 1))


@pytest.mark.parametrize(("classes", "spatial"), [(2, (6, 7)), (5, (4, 5, 6))])
def test_the_target_is_the_teachers_prediction_on_the_clean_weak_view(classes: int, spatial: tuple[int, ...]) -> None:
    model, averaged = (_network(classes, len(spatial)) for _ in range(2))
    images = torch.randn(3, 1, *spatial)
    views = MeanTeacher(Teacher(averaged), lambda x: x.flip(-1)).prepare(model.train(), Batch(images))
    with torch.no_grad():
        torch.testing.assert_close(views.target, averaged.eval()(images.flip(-1)).softmax(1))


def test_the_noise_is_gaussian_and_cut_off_at_two_deviations() -> None:
    images = torch.rand(4, 1, 64, 64)
    noise = MeanTeacher(Teacher(_network()), _identity, noise=0.1).prepare(_network(), Batch(images)).inputs[0] - images
    assert noise.abs().max().item() == pytest.approx(0.2, abs=1e-6)
    assert (noise.abs() > 0.2 - 1e-5).float().mean().item() == pytest.approx(0.0455, abs=0.006)
    assert noise.mean().item() == pytest.approx(0, abs=0.003)
    assert (noise.abs() < 0.1).float().mean().item() == pytest.approx(0.6827, abs=0.015)


def test_the_loss_is_the_one_that_was_given() -> None:
    model, images = _network().eval(), torch.randn(2, 1, 5, 5)
    target = torch.rand(2, 3, 5, 5).softmax(1)
    loss = MeanTeacher(Teacher(model), _identity, loss=soft_cross_entropy).loss(model, Views((images,), target))
    torch.testing.assert_close(loss, soft_cross_entropy(model(images), target))


def test_a_student_that_agrees_with_its_teacher_has_no_loss() -> None:
    model = _network().eval()
    method = MeanTeacher(Teacher(model), _identity, noise=0.0)
    assert method.loss(model, method.prepare(model, Batch(torch.randn(2, 1, 5, 5)))).item() < 1e-12


@pytest.mark.parametrize("bad", [{"noise": -0.1}, {"noise": float("nan")}, {"noise": float("inf")}, {"mode": "test"}])
def test_bad_arguments_are_named(bad) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        MeanTeacher(Teacher(_network()), _identity, **bad)
