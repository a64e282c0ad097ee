"""The V-Net's size, shapes and dropout."""

import pytest
import torch
from torch import nn

from segmentation.networks.dropout import Dropout3d, channel_mask
from segmentation.networks.vnet import VNet


def test_parameter_count_of_the_fields_vnet() -> None:
    assert sum(p.numel() for p in VNet(1, 2).parameters()) == 9_448_866


@pytest.mark.parametrize(("channels", "classes", "width"), [(1, 2, 16), (3, 4, 5)])
def test_parameter_count_from_the_list_of_layers(channels: int, classes: int, width: int) -> None:
    c = [width * n for n in (1, 2, 4, 8, 16)]
    encoder = [(27, channels, c[0])] + [(27, c[1], c[1])] * 2 + [(27, c[2], c[2])] * 3
    encoder += [(27, c[3], c[3])] * 3 + [(27, c[4], c[4])] * 3
    down = [(8, c[level], c[level + 1]) for level in range(4)]
    up = [(8, c[level + 1], c[level]) for level in range(4)]
    decoder = [(27, c[3], c[3])] * 3 + [(27, c[2], c[2])] * 3 + [(27, c[1], c[1])] * 2 + [(27, c[0], c[0])]
    normed = sum(taps * i * o + o + 2 * o for taps, i, o in encoder + down + up + decoder)
    expected = normed + width * classes + classes
    assert sum(p.numel() for p in VNet(channels, classes, width).parameters()) == expected


@pytest.mark.parametrize(("channels", "classes", "sides"), [(1, 2, (16, 32, 48)), (3, 4, (32, 16, 16))])
def test_logits_have_the_images_shape(channels: int, classes: int, sides: tuple[int, ...]) -> None:
    logits = VNet(channels, classes, width=2)(torch.rand(2, channels, *sides))
    assert logits.shape == (2, classes, *sides)


def test_every_parameter_gets_a_gradient() -> None:
    torch.manual_seed(0)
    network = VNet(width=2, dropout=0.0)
    network(torch.rand(2, 1, 32, 32, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters() if p.ndim > 1)


def test_skips_add() -> None:
    torch.manual_seed(1)
    network, image = VNet(width=2).eval(), torch.rand(1, 1, 16, 16, 16)
    norm = next(m for m in network.up[-1] if isinstance(m, nn.BatchNorm3d))
    nn.init.zeros_(norm.weight)
    shallow = network.head(network.decoder[-1](network.encoder[0](image)))
    assert torch.equal(network(image), shallow)


def test_dropout_after_the_bottleneck_and_before_the_output() -> None:
    network = VNet(width=2)
    seen = []
    layers = [m for m in network.modules() if isinstance(m, nn.Dropout3d)]
    for layer in layers:
        layer.register_forward_hook(lambda layer, args, output: seen.append((layer.p, tuple(args[0].shape))))
    network(torch.rand(3, 1, 32, 32, 16))
    assert seen == [(0.5, (3, 32, 2, 2, 1)), (0.5, (3, 2, 32, 32, 16))]


def test_nothing_is_left_but_the_bias_where_every_channel_is_dropped() -> None:
    network = VNet(width=2, dropout=1.0)
    logits = network(torch.rand(2, 1, 16, 16, 16))
    assert network.head.bias is not None
    assert torch.equal(logits, network.head.bias.view(1, 2, 1, 1, 1).expand_as(logits))


def test_dropout_is_random_in_training_alone() -> None:
    torch.manual_seed(2)
    network, image = VNet(width=4), torch.rand(2, 1, 16, 16, 16)
    assert not torch.equal(network(image), network(image))
    network.eval()
    assert torch.equal(network(image), network(image))


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_pytorchs_dropout_of_channels(p: float, dtype: torch.dtype) -> None:
    x = torch.rand(4, 6, 2, 3, 4, dtype=dtype).to(memory_format=torch.channels_last_3d)
    outputs = []
    for layer in (Dropout3d(p), nn.Dropout3d(p)):
        torch.manual_seed(0)
        outputs.append(layer(x))
    assert torch.equal(*outputs)
    assert outputs[0].stride() == x.stride()
    assert torch.equal(Dropout3d(p).eval()(x), x)


def test_a_mask_drops_as_many_channels_as_it_should() -> None:
    torch.manual_seed(3)
    like = torch.empty(100, 80, 1, 2, 1, dtype=torch.float64)
    mask = channel_mask(like, 0.25)
    assert (mask.shape, mask.dtype) == ((100, 80, 1, 1, 1), torch.float64)
    assert mask.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (mask == 0).double().mean().item() == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / mask.numel()) ** 0.5)


def test_a_joint_batchs_mask_is_drawn_without_its_activations() -> None:
    x = torch.rand(4, 6, 2, 3, 4)
    torch.manual_seed(0)
    whole = Dropout3d(0.5)(x)
    torch.manual_seed(0)
    own = x[2:] * channel_mask(x.new_empty(4, 6), 0.5)[2:]
    assert torch.equal(own, whole[2:])


def test_the_gradient_goes_through_the_mask() -> None:
    x = torch.rand(2, 8, 2, 2, 2, requires_grad=True)
    output = Dropout3d(0.5)(x)
    output.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad * x, output)
