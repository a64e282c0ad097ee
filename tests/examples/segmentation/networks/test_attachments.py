"""Attachments, heads and decoders: shapes, what a seed gives, and where the gradients of their methods go."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gap_torch.consistency import CCT, URPC, Batch, Views
from gap_torch.losses import ce_dice_loss
from segmentation.networks.attachments import Parts, PerturbedDecoders, Pyramid
from segmentation.networks.unet import UNet
from segmentation.networks.vnet import VNet

NETWORKS = {"UNet": (UNet, (32, 48)), "VNet": (VNet, (16, 32, 16))}
ATTACHMENTS = (Pyramid, PerturbedDecoders)
KINDS = [(name, kind) for name in NETWORKS for kind in ATTACHMENTS]


def _network(name: str, attachment: Any) -> tuple[nn.Module, Tensor]:
    make, size = NETWORKS[name]
    torch.manual_seed(0)
    network = make(1, 3, width=4, attachment=attachment)
    return network, torch.rand(2, 1, *size)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_their_logits_in_training_alone_and_in_full_size(name: str, kind: Any) -> None:
    network, images = _network(name, kind)
    outputs = network(images)
    assert isinstance(outputs, tuple)
    assert [logits.shape for logits in outputs] == [(2, 3, *images.shape[2:])] * 4
    assert network.eval()(images).shape == (2, 3, *images.shape[2:])


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_the_network_of_a_seed_is_the_one_without(name: str, kind: Any) -> None:
    (plain, images), (network, _) = _network(name, None), _network(name, kind)
    ours = network.state_dict()
    assert list(ours)[: len(plain.state_dict())] == list(plain.state_dict())
    assert all(torch.equal(ours[key], value) for key, value in plain.state_dict().items())
    torch.manual_seed(1)
    logits = plain(images)
    torch.manual_seed(1)
    assert torch.equal(network(images)[0], logits)
    assert type(plain(images)) is Tensor


@pytest.mark.parametrize("name", NETWORKS)
def test_a_pyramids_logits_are_those_of_its_levels(name: str) -> None:
    network, images = _network(name, Pyramid)
    seen: list[Tensor] = []
    for head in network.attachment.heads:
        head.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    _, *others = network(images)
    for level, (small, large) in enumerate(zip(seen, others, strict=True)):
        assert [side * 2 ** (3 - level) for side in small.shape[2:]] == [*images.shape[2:]]
        torch.testing.assert_close(large.mean(), small.mean(), atol=0.05, rtol=0)


def test_interpolation_keeps_the_corners_of_pixels_in_place() -> None:
    pyramid = Pyramid(Parts([1, 2, 4], lambda channels: nn.Identity(), nn.Identity))
    (large,) = pyramid(torch.empty(0), [], [torch.tensor([[[[0.0, 1.0]]]]), torch.zeros(1, 1, 2, 4)])
    assert large.tolist() == [[[[0, 0.25, 0.75, 1]] * 2]]


def test_each_decoder_sees_all_levels_perturbed() -> None:
    seen: list[list[Tensor]] = []

    class Seeing(nn.Module):
        def forward(self, features: list[Tensor]) -> Tensor:
            seen.append(features)
            return features[-1]

    torch.manual_seed(0)
    features = [torch.rand(2, 8, 8, 8), torch.rand(2, 16, 4, 4)]
    decoders = PerturbedDecoders(Parts([8, 16], nn.Identity, Seeing))
    assert len(decoders(features[0], features, [])) == len(seen) == 3
    for perturbed in seen:
        assert not any(torch.equal(ours, theirs) for ours, theirs in zip(perturbed, features, strict=True))
    decoders.eval()(features[0], features, [])
    for untouched in seen[3:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(untouched, features, strict=True))


def _reached(network: nn.Module) -> set[str]:
    """First parts of the names of parameters with a gradient."""
    return {n.partition(".")[0] for n, p in network.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("name", NETWORKS)
def test_ccts_consistency_does_not_reach_the_main_decoder(name: str) -> None:
    network, images = _network(name, PerturbedDecoders)
    method = CCT(lambda x: x, mode="batch")
    method.loss(network, method.prepare(network, Batch(images))).backward()
    assert _reached(network) == {"encoder", "attachment"} | ({"down"} if name == "VNet" else set())
    assert all(decoder.head.weight.grad.any() for decoder in network.attachment.decoders)
    network.zero_grad()
    method.labelled_loss(ce_dice_loss, network(images), torch.zeros(2, *images.shape[2:], dtype=torch.int64)).backward()
    assert "attachment" not in _reached(network)
    assert "head" in _reached(network)


@pytest.mark.parametrize("name", NETWORKS)
def test_urpc_reaches_all_heads(name: str) -> None:
    network, images = _network(name, Pyramid)
    method = URPC(lambda x: x)
    target = torch.zeros(2, *images.shape[2:], dtype=torch.int64)
    for loss in (
        method.compare((network(images),), Views((images,))),
        method.labelled_loss(ce_dice_loss, network(images), target),
    ):
        network.zero_grad()
        loss.backward()
        assert {"head", "attachment", "encoder"} <= _reached(network)
        assert all(head.weight.grad.any() for head in network.attachment.heads)
