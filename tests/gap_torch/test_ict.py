"""ICT: the mix of the teacher's predictions is what is learnt on the mix of images."""

import pytest
import torch
from torch import Tensor, nn

from gap_torch.consistency import ICT, Batch, Teacher, Views
from gap_torch.losses import soft_cross_entropy


def _identity(images: Tensor) -> Tensor:
    return images


def _network(classes: int = 3, dims: int = 2) -> nn.Sequential:
    conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
    return nn.Sequential(conv(1, 4, 3, padding=1), norm(4), nn.ReLU(), conv(4, classes, 1))


@pytest.mark.parametrize(("classes", "spatial"), [(2, (6, 7)), (5, (4, 5, 6))])
def test_inputs_and_target_are_the_same_mix(classes: int, spatial: tuple[int, ...]) -> None:
    """Images of one grey value each give the share away: of the sample itself, the rest of the one before."""
    averaged, model = _network(classes, len(spatial)), _network(classes, len(spatial))
    grey = torch.tensor([0.0, 1.0, 5.0, -3.0]).view(4, 1, *[1] * len(spatial)).expand(4, 1, *spatial).contiguous()
    views = ICT(Teacher(averaged), _identity, beta=1.0).prepare(model, Batch(grey))
    partner = grey.roll(1, 0)
    share = ((views.inputs[0] - partner) / (grey - partner)).flatten(1)
    assert share.std(dim=1).max() < 1e-5
    assert 0 < share.min() < share.max() < 1
    with torch.no_grad():
        p = averaged.eval()(grey).softmax(1)
    weight = share[:, 0].view(4, 1, *[1] * len(spatial))
    torch.testing.assert_close(views.target, weight * p + (1 - weight) * p.roll(1, 0))


def test_the_weak_view_comes_before_the_mix() -> None:
    views = ICT(Teacher(_network()), lambda x: x + 7).prepare(_network(), Batch(torch.zeros(3, 1, 4, 4)))
    torch.testing.assert_close(views.inputs[0], torch.full((3, 1, 4, 4), 7.0))


def test_the_loss_is_the_one_that_was_given() -> None:
    model, images = _network().eval(), torch.randn(2, 1, 5, 5)
    target = torch.rand(2, 3, 5, 5).softmax(1)
    loss = ICT(Teacher(model), _identity, loss=soft_cross_entropy).loss(model, Views((images,), target))
    torch.testing.assert_close(loss, soft_cross_entropy(model(images), target))


def test_equal_images_and_equal_networks_have_no_loss() -> None:
    model = _network().eval()
    method, images = ICT(Teacher(model), _identity), torch.randn(1, 1, 5, 5).expand(3, -1, -1, -1)
    assert method.loss(model, method.prepare(model, Batch(images))).item() < 1e-12


def test_a_generator_decides_the_mix() -> None:
    model, images = _network(), torch.randn(3, 1, 5, 5)

    def inputs(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return ICT(Teacher(model), _identity, generator=generator).prepare(model, Batch(images)).inputs[0]

    assert torch.equal(inputs(0), inputs(0))
    assert not torch.equal(inputs(0), inputs(1))


@pytest.mark.parametrize("bad", [{"beta": 0.0}, {"mode": "test"}])
def test_bad_arguments_are_named(bad) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        ICT(Teacher(_network()), _identity, **bad)
