"""The UNet's size and shapes."""

import pytest
import torch
from torch import nn

from segmentation.networks.dropout import Dropout, dropout_mask
from segmentation.networks.unet import UNet


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.05, 0.5])
def test_a_cheap_mask_keeps_as_many_as_it_should(dtype: torch.dtype, p: float) -> None:
    like = torch.empty(3, 5, 101, 103, dtype=dtype).to(memory_format=torch.channels_last)
    mask = dropout_mask(like, p)
    assert mask.dtype == dtype
    assert mask.stride() == like.stride()
    assert mask.unique().tolist() == [0, torch.tensor(1 / (1 - p), dtype=dtype).item()]
    spread = (p * (1 - p) / like.numel()) ** 0.5
    assert (mask == 0).double().mean().item() == pytest.approx(p, abs=5 * spread)
    by_place = (mask == 0).permute(0, 2, 3, 1).flatten()  # each of the four numbers in a word is as random
    assert all((by_place[place::4]).double().mean().item() == pytest.approx(p, abs=10 * spread) for place in range(4))


def test_masks_follow_the_seed_and_differ_from_one_to_the_next() -> None:
    x = torch.ones(2, 3, 8, 8, dtype=torch.bfloat16)
    dropout = Dropout(0.5)
    torch.manual_seed(0)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(0)
    assert torch.equal(dropout(x), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_in_float32_it_is_pytorchs_dropout(p: float) -> None:
    x = torch.rand(2, 3, 8, 8)
    outputs = []
    for layer in (Dropout(p), nn.Dropout(p)):
        torch.manual_seed(0)
        outputs.append(layer(x))
    assert torch.equal(*outputs)
    assert torch.equal(Dropout(p).eval()(x.bfloat16()), x.bfloat16())


def test_the_gradient_goes_through_the_mask() -> None:
    x = torch.rand(2, 3, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    output = Dropout(0.5)(x)
    output.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad * x, output)
