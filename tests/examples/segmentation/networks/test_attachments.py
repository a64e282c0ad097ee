"""Attachments, heads and decoders: shapes, what a seed gives, and where the gradients of their methods go."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from gap_torch import GAPWrapper
from gap_torch.consistency import CCT, CPS, DTC, URPC, Batch, MCNet, UniMatch, Views, ViewsDCT
from gap_torch.losses import ce_dice_loss
from segmentation.networks.attachments import (
    MedicalDecoders,
    Parts,
    PerturbedDecoders,
    PerturbedFeatures,
    PerturbedPyramid,
    Pyramid,
    SignedDistances,
    TwiceUpsampled,
    Twin,
    Upsampled,
    without_attachment,
)
from segmentation.networks.unet import UNet
from segmentation.networks.vnet import VNet
from segmentation.training.step import Autocast

NETWORKS = {"UNet": (UNet, (32, 48)), "VNet": (VNet, (16, 32, 16))}
ATTACHMENTS = {
    Pyramid: 4,
    PerturbedPyramid: 4,
    PerturbedDecoders: 4,
    MedicalDecoders: 4,
    PerturbedFeatures: 2,
    Upsampled: 2,
    TwiceUpsampled: 3,
    Twin: 2,
}
"""How many outputs there are, the network's own logits among them."""
MAPS = {SignedDistances: 2}
"""Channels of the one behind the network's own."""
KINDS = [(name, kind) for name in NETWORKS for kind in (*ATTACHMENTS, *MAPS)]


def _parts(
    channels: Sequence[int],
    head: Callable[[int], nn.Module] = nn.Identity,
    decoder: Callable[[], nn.Module] = nn.Identity,
) -> Parts:
    return Parts(channels, head, head, decoder, others=(), network=nn.Identity)


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
    channels = [3, MAPS[kind]] if kind in MAPS else [3] * ATTACHMENTS[kind]
    assert [output.shape for output in outputs] == [(2, c, *images.shape[2:]) for c in channels]
    assert network.eval()(images).shape == (2, 3, *images.shape[2:])


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_the_network_of_a_seed_is_the_one_without(name: str, kind: Any) -> None:
    (plain, images), (network, _) = _network(name, None), _network(name, kind)
    ours = network.state_dict()
    assert list(ours)[: len(plain.state_dict())] == list(plain.state_dict())
    assert all(torch.equal(ours[key], value) for key, value in plain.state_dict().items())
    torch.manual_seed(1)
    logits = plain(images)
    assert type(logits) is Tensor
    if kind is not PerturbedFeatures:  # batch norm sees both
        torch.manual_seed(1)
        assert torch.equal(network(images)[0], logits)


class Fails(nn.Module):
    def forward(self, *_: Any) -> Tensor:
        raise AssertionError("called")


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_without_an_attachment_a_training_pass_is_that_of_a_network_that_has_none(name: str, kind: Any) -> None:
    (plain, images), (network, _) = _network(name, None), _network(name, kind)
    model = Autocast(network, None)
    _assert_plain_without_its_attachment(model, network, plain, images)
    network.attachment.forward = Fails()
    with without_attachment(model):
        model(images)


def test_so_is_a_compiled_one() -> None:
    """With one kind for all: whether to call it is the network's choice, which is compiled anew."""
    (plain, images), (network, _) = _network("UNet", None), _network("UNet", Pyramid)
    torch._dynamo.reset()  # behind many others it would not be compiled at all
    counter = CompileCounter()
    model = torch.compile(Autocast(network, None), backend=counter, dynamic=False)
    _assert_plain_without_its_attachment(model, network, plain, images)
    assert counter.frame_count == 2


def _assert_plain_without_its_attachment(model: Any, network: nn.Module, plain: nn.Module, images: Tensor) -> None:
    assert isinstance(model(images), tuple)
    network.load_state_dict(plain.state_dict(), strict=False)  # statistics too
    flags = [module.training for module in network.modules()]
    plain_model = Autocast(plain, None)
    torch.manual_seed(1)
    expected = plain_model(images)
    torch.manual_seed(1)
    with without_attachment(model):
        logits = model(images)
    assert torch.equal(logits, expected)
    assert all(torch.equal(network.state_dict()[key], value) for key, value in plain.state_dict().items())
    assert [module.training for module in network.modules()] == flags
    assert isinstance(model(images), tuple)


def test_without_an_attachment_ends_with_an_error_too_and_leaves_a_frozen_one_frozen() -> None:
    network, images = _network("UNet", Pyramid)
    with pytest.raises(ZeroDivisionError), without_attachment(network):
        raise ZeroDivisionError
    assert isinstance(network(images), tuple)
    network.attachment.eval()
    with without_attachment(network):
        pass
    assert not network.attachment.training


@pytest.mark.parametrize("name", NETWORKS)
def test_half_of_the_channels_of_every_level_are_dropped_for_the_networks_own_decoder(name: str) -> None:
    network, images = _network(name, PerturbedFeatures)
    seen: list[list[Tensor]] = []
    own = network._decode
    network._decode = lambda features: seen.append(features) or own(features)
    network(images)
    (features,) = seen
    assert [level.shape[:2] for level in features] == [(4, 4 * 2**depth) for depth in range(5)]
    for level in features:
        clean, perturbed = level[::2], level[1::2]
        ratio = perturbed.flatten(2).sum(2) / clean.flatten(2).sum(2)
        factors = ratio[ratio.isfinite()].round(decimals=4).unique().tolist()  # a channel may be 0 as it is
        assert factors == [0, 2], factors
        torch.testing.assert_close(perturbed, clean * ratio.nan_to_num(0)[(...,) + (None,) * (clean.ndim - 2)])


def test_clean_and_perturbed_features_are_decoded_in_one_batch_and_told_apart() -> None:
    def decode(features: Any) -> tuple[list[Tensor], Tensor]:
        return [], features[0] - features[0].mean()  # as a batch norm, which sees all

    attachment, features = PerturbedFeatures(_parts([3])), torch.rand(2, 3, 4, 4) + 1
    torch.manual_seed(0)
    clean, perturbed = attachment(torch.empty(0), [features], decode)
    torch.manual_seed(0)
    factor = attachment.perturbation.factor(features)
    mean = (features + features * factor).mean() / 2
    assert {0, 2} == {*factor.flatten().tolist()}
    torch.testing.assert_close(clean, features - mean)
    torch.testing.assert_close(perturbed, features * factor - mean)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_both_keep_the_memory_format_of_the_features(layout: torch.memory_format) -> None:
    seen: list[Tensor] = []
    attachment = PerturbedFeatures(_parts([3]))
    features = torch.rand(2, 3, 4, 5).contiguous(memory_format=layout)
    attachment(features, [features], lambda both: (seen.extend(both), both[0]))
    assert seen[0].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("name", NETWORKS)
def test_unimatch_reaches_everything(name: str) -> None:
    network, images = _network(name, PerturbedFeatures)
    method = UniMatch(lambda x: x, lambda x: x, tau=0)
    views = method.prepare(network, Batch(torch.cat([images, images])))
    method.loss(network, views).backward()
    assert {"encoder", "up", "decoder", "head"} <= _reached(network)
    assert not [*network.attachment.parameters()]


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
    pyramid = Pyramid(_parts([1, 2, 4]))
    levels = [torch.tensor([[[[0.0, 1.0]]]]), torch.zeros(1, 1, 2, 4)]
    _, large = pyramid(torch.empty(0), [], lambda features: (levels, levels[-1]))
    assert large.tolist() == [[[[0, 0.25, 0.75, 1]] * 2]]


def test_the_perturbed_pyramid_has_a_perturbation_a_level_and_repeats_values() -> None:
    """Ones in, and 16 channels of them: what is left after each perturbation, summed over the channels."""
    pyramid = PerturbedPyramid(_parts([16] * 5, head=lambda channels: Sum()))
    levels = [torch.ones(2, 16, 4 * 2**depth, 4 * 2**depth) for depth in range(4)]
    levels[1] = torch.zeros_like(levels[1])
    levels[1][:, :, 3, 5] = 1  # FeatureDrop takes it away
    _, dropout, drop, noise = pyramid(torch.empty(0), [], lambda features: (levels, levels[-1]))
    for logits, side in ((dropout, 8), (drop, 4), (noise, 2)):
        assert logits.shape == (2, 1, 32, 32)
        blocks = logits.unfold(2, side, side).unfold(3, side, side).flatten(4)
        assert (blocks == blocks[..., :1]).all()  # each value is repeated, none is between two
    assert {value % 2 for value in dropout.flatten().tolist()} == {0}  # scaled by 2
    assert len(dropout.unique()) > 5  # of single values, not channels
    assert 12 < dropout.mean() < 20
    assert not drop.any()
    assert 16 * 0.7 <= noise.min() < noise.max() <= 16 * 1.3
    plain = pyramid.eval()(torch.empty(0), [], lambda features: (levels, levels[-1]))
    assert all(torch.equal(logits.unique(), torch.tensor([16.0])) for logits in (plain[1], plain[3]))


class Sum(nn.Module):
    """Over the channels."""

    def forward(self, features: Tensor) -> Tensor:
        return features.sum(1, keepdim=True)


def test_the_medical_decoders_drop_values_not_channels() -> None:
    attachment = MedicalDecoders(_parts([4], decoder=First))
    features = torch.ones(2, 4, 8, 8)
    *_, dropped = attachment(torch.empty(0), [features], lambda features: ([], features[0]))
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert 0.15 < (dropped == 0).double().mean() < 0.45
    assert (dropped.amax(dim=(2, 3)) > 0).all()


class First(nn.Module):
    """A decoder that returns the features of the first level."""

    def forward(self, features: list[Tensor]) -> Tensor:
        return features[0]


def test_each_decoder_sees_all_levels_perturbed() -> None:
    seen: list[list[Tensor]] = []

    class Seeing(nn.Module):
        def forward(self, features: list[Tensor]) -> Tensor:
            seen.append(features)
            return features[-1]

    torch.manual_seed(0)
    features = [torch.rand(2, 8, 8, 8), torch.rand(2, 16, 4, 4)]
    decoders = PerturbedDecoders(_parts([8, 16], decoder=Seeing))
    logits, *_ = outputs = decoders(features[0], features, lambda features: ([], features[-1]))
    assert logits is features[-1]
    assert len(outputs) - 1 == len(seen) == 3
    for perturbed in seen:
        assert not any(torch.equal(ours, theirs) for ours, theirs in zip(perturbed, features, strict=True))
    decoders.eval()(features[0], features, lambda features: ([], features[-1]))
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
def test_the_head_of_distances_sees_what_the_networks_own_does(name: str) -> None:
    network, images = _network(name, SignedDistances)
    seen: dict[str, Tensor] = {}
    for which, head in (("own", network.head), ("distances", network.attachment.head)):
        head.register_forward_pre_hook(lambda _module, inputs, which=which: seen.update({which: inputs[0]}))
    _, z = network(images)
    assert torch.equal(seen["own"], seen["distances"])  # the same dropout mask too
    torch.testing.assert_close(z, network.attachment.head(seen["own"]).tanh())
    with torch.autocast("cpu", torch.bfloat16):
        assert network(images)[1].dtype == torch.float32


@pytest.mark.parametrize("name", NETWORKS)
def test_dtc_reaches_both_heads_by_both_losses(name: str) -> None:
    network, images = _network(name, SignedDistances)
    for p in network.attachment.head.parameters():
        nn.init.normal_(p, std=1e-3)  # pixels are in the band of the surface
    method, labels = DTC(lambda x: x), torch.randint(3, (2, *images.shape[2:]))
    for loss in (
        method.loss(network, method.prepare(network, Batch(images, images, labels))),
        method.labelled_loss(ce_dice_loss, network(images), labels),
    ):
        network.zero_grad()
        loss.backward()
        assert {"head", "attachment", "encoder"} <= _reached(network)


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


@pytest.mark.parametrize("name", NETWORKS)
def test_a_twin_is_the_same_network_with_other_weights_and_has_nothing_of_the_first(name: str) -> None:
    network, images = _network(name, Twin)
    twin = network.attachment.network
    shapes = {key: value.shape for key, value in twin.state_dict().items()}
    assert shapes == {key: value.shape for key, value in _network(name, None)[0].state_dict().items()}
    weights = {key: p for key, p in twin.named_parameters() if p.ndim > 1}
    assert not any(torch.equal(p, network.get_parameter(key)) for key, p in weights.items())
    for module in [m for m in twin.modules() if hasattr(m, "p")]:
        module.p = 0.0
    torch.testing.assert_close(network(images)[1], twin(images))
    network.zero_grad()
    network(images)[1].square().mean().backward()
    assert _reached(network) == {"attachment"}
    network.zero_grad()
    network(images)[0].square().mean().backward()
    assert "attachment" not in _reached(network)


UPSAMPLED = {
    "UNet": [(nn.Conv2d, nn.Upsample), (nn.ConvTranspose2d,), (nn.Conv2d, nn.Upsample)],
    "VNet": [
        (nn.ConvTranspose3d, nn.BatchNorm3d, nn.ReLU),
        (nn.Upsample, nn.Conv3d, nn.BatchNorm3d, nn.ReLU),
        (nn.Upsample, nn.Conv3d, nn.BatchNorm3d, nn.ReLU),
    ],
}
MODES = {"UNet": ["bilinear", None, "nearest"], "VNet": [None, "trilinear", "nearest"]}
"""Of the network's own decoder, of MC-Net's second, of MC-Net+'s third."""


@pytest.mark.parametrize("name", NETWORKS)
def test_each_decoder_upsamples_in_its_own_way(name: str) -> None:
    network = _network(name, TwiceUpsampled)[0]
    decoders = [network, *network.attachment.decoders]
    for decoder, kinds, mode in zip(decoders, UPSAMPLED[name], MODES[name], strict=True):
        assert len(decoder.up) == 4
        for up in decoder.up:
            layers = [module for module in up.modules() if not [*module.children()]]
            assert tuple(map(type, layers)) == kinds or isinstance(up, kinds)
            assert [layer.mode for layer in layers if isinstance(layer, nn.Upsample)] == [mode] * (mode is not None)
    once = _network(name, Upsampled)[0]
    assert [type(up) for up in once.attachment.decoders[0].up] == [type(up) for up in decoders[1].up]
    assert len(once.attachment.decoders) == 1


@pytest.mark.parametrize("kind", [Upsampled, TwiceUpsampled])
@pytest.mark.parametrize("name", NETWORKS)
def test_mc_net_reaches_everything(name: str, kind: Any) -> None:
    network, images = _network(name, kind)
    labelled, labels = images.flip(-1), torch.zeros(2, *images.shape[2:], dtype=torch.int64)
    method = MCNet(lambda x: x)
    views = method.prepare(network, Batch(images, labelled, labels))
    for loss in (method.loss(network, views), method.labelled_loss(ce_dice_loss, network(labelled), labels)):
        network.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in network.parameters() if p.ndim > 1)


@pytest.mark.parametrize(("method", "kind"), [(CPS, Twin), (ViewsDCT, Twin), (MCNet, Upsampled)])
@pytest.mark.parametrize("name", NETWORKS)
def test_all_of_it_learns_and_is_perturbed_by_one_norm_and_put_back_bit_for_bit(
    name: str, method: Any, kind: Any
) -> None:
    network, images = _network(name, kind)
    method = method(lambda x: x)
    optimizer = GAPWrapper(torch.optim.SGD(network.parameters(), 0.1), eps=0.3)
    views = method.prepare(network, Batch(images))
    method.loss(network, views).backward()
    assert {"head", "attachment", "encoder"} <= _reached(network)
    assert all(p.grad.any() for p in network.attachment.parameters() if p.ndim > 1)
    before = [p.detach().clone() for p in network.parameters()]
    with optimizer.perturbed(network):
        moves = [(p.detach() - b).norm() for p, b in zip(network.parameters(), before, strict=True)]
        assert torch.stack(moves).norm().item() == pytest.approx(0.3, rel=1e-4)
        method.loss(network, views).backward()
    assert all(map(torch.equal, network.parameters(), before))
