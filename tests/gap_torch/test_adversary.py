"""The discriminator: its layers, its own Adam, that it learns, and that neither side leaks into the other."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from gap_torch.consistency import DAN, Adversary, Batch, Discriminator


@pytest.mark.parametrize(("arguments", "count"), [((4, 1, 2), 2_762_754), ((1, 1, 3), 11_020_290)])
def test_it_has_as_many_parameters_as_the_public_ones(arguments: tuple[int, ...], count: int) -> None:
    assert sum(p.numel() for p in Discriminator(*arguments).parameters()) == count


@pytest.mark.parametrize("size", [(16, 16), (32, 48), (256, 256), (16, 32, 16), (112, 112, 80)], ids=str)
def test_any_size_from_16_on_gives_two_logits(size: tuple[int, ...]) -> None:
    maps, images = torch.rand(1, 3, *size, device="meta"), torch.rand(1, 2, *size, device="meta")
    assert Discriminator(3, 2, len(size)).to("meta")(maps, images).shape == (1, 2)


def test_at_256_it_is_the_public_one_but_for_the_windows_of_the_average() -> None:
    """Layer by layer. There two windows of 7 pixels leave out the last two of 16."""
    discriminator = Discriminator(4).eval()
    maps, images = torch.rand(1, 4, 256, 256), torch.rand(1, 1, 256, 256)
    convolutions = [m for m in discriminator.judge if isinstance(m, nn.Conv2d)]
    linear = discriminator.judge[-1]
    x = discriminator.of_map(maps) + discriminator.of_image(images)
    for convolution in convolutions:
        x = nn.functional.leaky_relu(convolution(x), 0.2)
    assert x.shape == (1, 512, 16, 16)
    pooled = nn.functional.avg_pool2d(x, 8)
    torch.testing.assert_close(discriminator(maps, images), linear(pooled.flatten(1)))


def test_in_space_the_sum_is_activated_too() -> None:
    kinds = [type(m).__name__ for m in Discriminator(1, 1, 3).judge]
    activated = ["LeakyReLU", "Dropout3d"]
    assert kinds[:-3] == [*activated, "Conv3d", *activated, "Conv3d", *activated, "Conv3d", "LeakyReLU"]
    assert [type(m).__name__ for m in Discriminator(1).judge][:2] == ["Conv2d", "LeakyReLU"]


def test_errors() -> None:
    with pytest.raises(ValueError, match="dimensions must be 2 or 3, got 1"):
        Discriminator(2, 1, 1)
    with pytest.raises(ValueError, match=r"at least 16, got \(16, 8\)"):
        Discriminator(2)(torch.rand(1, 2, 16, 8), torch.rand(1, 1, 16, 8))
    for labelled in (0, 2):
        with pytest.raises(ValueError, match=f"{labelled} of 2 are labelled"):
            _small().step(torch.rand(2, 1), torch.rand(2, 1), labelled)


class Linear(nn.Module):
    """Of map and image; quicker than convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2))

    def forward(self, maps: Tensor, images: Tensor) -> Tensor:
        return self.layers(torch.cat([maps, images], dim=1))


def _small() -> Adversary:
    return Adversary(Linear(), lr=0.01)


def test_its_step_is_that_of_torchs_adam() -> None:
    adversary, maps, images = _small(), torch.rand(5, 1), torch.rand(5, 1)
    twin = copy.deepcopy(adversary.discriminator).requires_grad_(True).train()
    adam = torch.optim.Adam(twin.parameters(), lr=0.01, betas=(0.9, 0.99))
    for seed in range(5):
        torch.manual_seed(seed)
        adversary.step(maps, images, labelled=2)
        torch.manual_seed(seed)
        adam.zero_grad()
        verdicts = twin(maps, images)
        nn.functional.cross_entropy(verdicts, torch.tensor([1, 1, 0, 0, 0])).backward()
        adam.step()
    for ours, theirs in zip(adversary.discriminator.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), atol=1e-6, rtol=1e-5)
    right = verdicts.argmax(1) == torch.tensor([1, 1, 0, 0, 0])
    assert adversary.accuracy.item() == pytest.approx((right[:2].float().mean() + right[2:].float().mean()).item() / 2)


def test_it_goes_on_from_its_state() -> None:
    maps, images = torch.rand(4, 1), torch.rand(4, 1)
    whole, resumed = _small(), _small()
    whole.step(maps, images, 2)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    for adversary in (whole, resumed):
        torch.manual_seed(3)
        adversary.step(maps, images, 2)
    ours, theirs = resumed.state_dict(), whole.state_dict()
    assert list(ours) == list(theirs)
    assert all(map(torch.equal, ours.values(), theirs.values()))
    assert resumed.steps == 2


def test_it_judges_without_dropout_whatever_mode_it_is_put_in() -> None:
    adversary, maps, images = _small(), torch.rand(6, 1), torch.rand(6, 1)
    before = adversary(maps, images)
    adversary.train()
    adversary.step(maps, images, 3)
    assert not any(module.training for module in adversary.modules())
    assert not any(p.requires_grad for p in adversary.parameters())
    assert torch.equal(adversary(maps, images), adversary(maps, images))
    assert not torch.equal(adversary(maps, images), before)


def test_undecided_it_costs_ln_2() -> None:
    adversary = Adversary(Discriminator(2))
    nn.init.zeros_(adversary.discriminator.judge[-1].weight)
    nn.init.zeros_(adversary.discriminator.judge[-1].bias)
    assert adversary.loss(torch.rand(3, 2, 16, 16), torch.rand(3, 1, 16, 16)).item() == pytest.approx(math.log(2))


def test_the_loss_is_the_surprise_at_labelled() -> None:
    adversary, maps, images = _small(), torch.rand(4, 1), torch.rand(4, 1)
    verdicts = adversary(maps, images).tolist()
    expected = sum(-(b - math.log(math.exp(a) + math.exp(b))) for a, b in verdicts) / 4
    assert adversary.loss(maps, images).item() == pytest.approx(expected, rel=1e-5)


def test_it_learns_to_tell_two_constant_maps_apart() -> None:
    adversary, maps, images = Adversary(Discriminator(2)), torch.zeros(2, 2, 16, 16), torch.rand(1, 1, 16, 16)
    maps[0, 0] = maps[1, 1] = 1  # all background, all foreground
    images = images.expand(2, 1, 16, 16)
    for _ in range(60):  # half of them are enough
        adversary.step(maps, images, labelled=1)
    right = adversary(maps, images).softmax(1)[[0, 1], [1, 0]]
    assert (right > 0.9).all()
    assert adversary.accuracy == 1


def test_half_precision_is_left_at_its_door() -> None:
    adversary, maps, images = Adversary(Discriminator(2)), torch.rand(2, 2, 16, 16), torch.rand(2, 1, 16, 16)
    expected = adversary.loss(maps, images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(adversary.loss(maps, images), expected)
        adversary.step(maps, images, 1)
    assert adversary.loss(maps.double(), images.double()).dtype == torch.float32


class Segmenter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 3, 1)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def _state(module: nn.Module) -> list[Tensor]:
    return [value.clone() for value in module.state_dict().values()]


def test_the_segmenters_step_leaves_the_discriminator_as_it_was() -> None:
    model, method = Segmenter(), DAN(Adversary(Discriminator(3)), lambda x: x)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before, batch = _state(method), Batch(torch.rand(2, 1, 16, 16), torch.rand(2, 1, 16, 16))
    method.loss(model, method.prepare(model, batch)).backward()
    optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in model.layers[0].parameters())
    assert all(map(torch.equal, _state(method), before))
    assert all(p.grad is None for p in method.parameters())


def test_the_discriminators_step_leaves_the_segmenter_as_it_was() -> None:
    model, method = Segmenter(), DAN(Adversary(Discriminator(3)), lambda x: x)
    batch = Batch(torch.rand(2, 1, 16, 16), torch.rand(2, 1, 16, 16))
    model(batch.unlabelled).sum().backward()
    before, flags = _state(model), [m.training for m in model.modules()]
    gradients, own = [p.grad.clone() for p in model.parameters()], _state(method)
    method.update(model, batch)
    assert all(map(torch.equal, _state(model), before))
    assert all(map(torch.equal, [p.grad for p in model.parameters()], gradients))
    assert [m.training for m in model.modules()] == flags
    assert all(p.grad is None for p in method.parameters())
    assert not any(map(torch.equal, _state(method.adversary.discriminator), own))
