"""Averaged weights and batch-norm statistics taken anew."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from segmentation.networks.unet import UNet
from segmentation.training.average import Average, with_statistics_of


def test_average_is_the_exponential_moving_average() -> None:
    model = nn.Linear(1, 1, bias=False)
    average, expected = Average(model, decay=0.9), None
    for value in (1.0, 2.0, 5.0):
        nn.init.constant_(model.weight, value)
        average.update(model)
        expected = value if expected is None else 0.9 * expected + 0.1 * value
    torch.testing.assert_close(average.module.weight.item(), expected)


def test_average_is_that_of_torch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3))
    ours, theirs = Average(model, 0.99), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    for _ in range(5):
        model(torch.rand(2, 1, 8, 8)).sum().backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
        ours.update(model), theirs.update_parameters(model)
    for name, value in theirs.module.state_dict().items():
        torch.testing.assert_close(ours.module.state_dict()[name], value, rtol=1e-6, atol=1e-7)


def test_an_average_goes_on_from_its_state() -> None:
    model = nn.Linear(2, 2)
    first, second = Average(model, 0.5), Average(nn.Linear(2, 2), 0.5)
    first.update(model)
    second.load_state_dict(first.state_dict())
    nn.init.ones_(model.weight)
    first.update(model), second.update(model)
    assert torch.equal(first.module.weight, second.module.weight)


def test_statistics_are_those_of_the_images_without_dropout() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3))
    images = torch.rand(12, 1, 8, 8)
    scored = with_statistics_of(model, images.split(4))
    expected = model[1](images).mean((0, 2, 3))
    torch.testing.assert_close(scored[2].running_mean, expected, atol=1e-6, rtol=0)


def test_the_model_and_the_random_numbers_are_left_alone() -> None:
    model = UNet(width=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, state = torch.rand(4, 1, 16, 16), torch.get_rng_state()
    scored = with_statistics_of(model, images.split(2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.p for m in scored.modules() if isinstance(m, nn.Dropout)] == [
        m.p for m in model.modules() if isinstance(m, nn.Dropout)
    ]
    assert not torch.equal(scored.encoder[0][1].running_mean, model.encoder[0][1].running_mean)
