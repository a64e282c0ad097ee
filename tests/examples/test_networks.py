"""The UNet's size and shapes."""

import pytest
import torch
from segmentation.networks import UNet
from torch import nn


def test_parameter_count_of_the_fields_unet() -> None:
    assert sum(p.numel() for p in UNet(1, 4).parameters()) == 1_813_764


@pytest.mark.parametrize(("channels", "classes", "height", "width"), [(1, 4, 64, 64), (3, 2, 32, 48)])
def test_logits_have_the_images_shape(channels: int, classes: int, height: int, width: int) -> None:
    logits = UNet(channels, classes, width=4)(torch.rand(2, channels, height, width))
    assert logits.shape == (2, classes, height, width)


def test_dropout_by_level_and_in_the_encoder_alone() -> None:
    network = UNet()
    rates = [m.p for m in network.encoder.modules() if isinstance(m, nn.Dropout)]
    assert rates == [0.05, 0.1, 0.2, 0.3, 0.5]
    assert all(m.p == 0 for m in network.decoder.modules() if isinstance(m, nn.Dropout))


def test_every_parameter_gets_a_gradient() -> None:
    network = UNet(width=4)
    network(torch.rand(2, 1, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters() if p.ndim > 1)
