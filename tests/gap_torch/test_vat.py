"""VAT: the direction against one worked out by hand, its length, and that looking for it leaves no trace."""

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gap_torch import GAPWrapper
from gap_torch.consistency import VAT, Batch, DiceVAT, Views
from gap_torch.consistency.vat import _normalised
from gap_torch.losses import soft_dice_loss


def _identity(images: Tensor) -> Tensor:
    return images


def _network(classes: int = 3, dims: int = 2) -> nn.Sequential:
    conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
    return nn.Sequential(conv(1, 4, 3, padding=1), norm(4), nn.Tanh(), nn.Dropout(0.3), conv(4, classes, 1))


def _size(perturbation: Tensor) -> Tensor:
    """Root mean square of each sample."""
    return perturbation.flatten(1).square().mean(1).sqrt()


class OneChannelCounts(nn.Module):
    """Logits (w x_0, 0) of each pixel: at the logit's steepest, KL(f(u) || f(u + r)) is about (w r_0)^2 / 8."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        first = self.weight * images[:, :1]
        return torch.cat([first, torch.zeros_like(first)], dim=1)


def test_one_iteration_by_hand() -> None:
    """At u = 0 the Hessian is the same everywhere on channel 0 and zero on channel 1: d loses its channel 1."""
    u = torch.zeros(3, 2, 8, 9, dtype=torch.float64)
    method = VAT(_identity, radius=0.05, xi=1e-4)
    torch.manual_seed(3)
    inputs = method.prepare(OneChannelCounts(), Batch(u)).inputs[0]
    torch.manual_seed(3)
    random = torch.randn_like(u)
    random[:, 1] = 0
    expected = random * (0.05 * math.sqrt(2 * 8 * 9) / random.flatten(1).norm(dim=1).view(3, 1, 1, 1))
    torch.testing.assert_close(inputs, expected, rtol=1e-5, atol=1e-9)


def test_more_iterations_find_the_dominant_direction() -> None:
    """The steepest pixel, by far, is the one whose prediction is undecided."""
    u = torch.full((1, 2, 5, 5), 3.0, dtype=torch.float64)
    u[0, 0, 2, 3] = 0
    r = VAT(_identity, radius=1.0, xi=1e-3, iterations=8).prepare(OneChannelCounts(), Batch(u)).inputs[0] - u
    assert r[0, 0, 2, 3].abs().item() == pytest.approx(math.sqrt(50), rel=1e-6)


@pytest.mark.parametrize("iterations", [1, 3])
def test_it_is_worse_than_a_random_direction(iterations: int) -> None:
    model, images = _network().eval(), torch.randn(6, 1, 12, 12)
    method = VAT(_identity, radius=0.1, iterations=iterations)
    views = method.prepare(model, Batch(images))
    random = Views((images + 0.1 * _normalised(torch.randn_like(images)),), views.target)
    assert method.loss(model, views) > 1.5 * method.loss(model, random) > 0


@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (3, 2, 40, 30), (2, 1, 6, 7, 8)])
@pytest.mark.parametrize("iterations", [1, 2])
def test_the_radius_is_a_root_mean_square_whatever_the_size(shape: tuple[int, ...], iterations: int) -> None:
    conv = nn.Conv2d if len(shape) == 4 else nn.Conv3d
    model, images = conv(shape[1], 3, 3, padding=1), torch.rand(shape)
    r = VAT(_identity, radius=0.03, iterations=iterations).prepare(model, Batch(images)).inputs[0] - images
    torch.testing.assert_close(_size(r), torch.full((shape[0],), 0.03), rtol=1e-4, atol=0)


def test_a_flat_model_gives_no_direction_and_no_nan() -> None:
    model = nn.Conv2d(1, 3, 1)
    nn.init.zeros_(model.weight)
    images = torch.rand(2, 1, 4, 4)
    assert torch.equal(VAT(_identity).prepare(model, Batch(images)).inputs[0], images)


@pytest.mark.parametrize("size", [1e-30, 1e-26, 1.0, 1e30])
def test_gradients_whose_squares_float32_does_not_have(size: float) -> None:
    d = torch.randn(3, 2, 5, 5)
    expected = d / _size(d).view(3, 1, 1, 1)
    torch.testing.assert_close(_normalised(size * d), expected)


@pytest.mark.parametrize(("classes", "spatial"), [(2, (6, 7)), (5, (4, 5, 6))])
def test_the_loss_is_the_divergence_from_the_clean_prediction(classes: int, spatial: tuple[int, ...]) -> None:
    model = _network(classes, len(spatial)).double().eval()
    method, images = VAT(lambda x: x.flip(-1), radius=0.5), torch.randn(2, 1, *spatial, dtype=torch.float64)
    views = method.prepare(model, Batch(images))
    p, q = model(images.flip(-1)).softmax(1), model(views.inputs[0]).softmax(1)
    torch.testing.assert_close(views.target, p)
    torch.testing.assert_close(method.loss(model, views), (p * (p / q).log()).sum(1).mean())


def test_unconfident_pixels_count_as_zeros() -> None:
    model, images = _network().eval(), torch.randn(2, 1, 9, 9)
    method = VAT(_identity, tau=0.4)
    views = method.prepare(model, Batch(images))
    assert torch.equal(views.mask, views.target.amax(1) >= 0.4)
    assert 0 < views.mask.sum() < views.mask.numel()
    logits = model(views.inputs[0])
    each = (views.target * (views.target.log() - logits.log_softmax(1))).sum(1)
    torch.testing.assert_close(method.compare((logits,), views), each[views.mask].sum() / each.numel())


def test_agreement_costs_nothing() -> None:
    logits = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    loss = VAT(_identity).compare((logits,), Views((logits,), logits.detach().softmax(1)))
    loss.backward()
    assert abs(loss.item()) < 1e-12
    assert logits.grad.abs().max() < 1e-12


def test_views_without_a_target_are_refused() -> None:
    logits = torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match="probabilities"):
        VAT(_identity).compare((logits,), Views((logits,)))


def test_the_direction_is_looked_for_in_the_asked_mode() -> None:
    """Of a model in training, dropout would have a say in it."""
    model, images = _network(), torch.randn(4, 1, 6, 6)
    found = []
    for training in (True, False):
        torch.manual_seed(1)
        found.append(VAT(_identity, iterations=2).prepare(model.train(training), Batch(images)).inputs[0])
    assert torch.equal(*found)
    torch.manual_seed(1)
    assert not torch.equal(
        VAT(_identity, iterations=2, mode="train").prepare(model.train(), Batch(images)).inputs[0], found[0]
    )


@pytest.mark.parametrize("mode", ["eval", "batch", "train"])
def test_prepare_leaves_no_trace(mode) -> None:
    """No gradient in a parameter or a view, the mode as it was, one update of running statistics at most."""
    model, images = _network().train(), torch.randn(4, 1, 6, 6)
    once = copy.deepcopy(model)
    fired: list[Tensor] = []
    for p in model.parameters():
        p.register_hook(fired.append)
    views = VAT(_identity, iterations=3, mode=mode).prepare(model, Batch(images))
    assert not fired
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not views.inputs[0].requires_grad
    assert not views.target.requires_grad
    assert all(module.training for module in model.modules())
    once.train(mode != "eval")(images)
    for ours, expected in zip(model.buffers(), once.buffers(), strict=True):
        torch.testing.assert_close(ours, expected)


def test_a_gradient_that_is_there_stays() -> None:
    model = _network()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    VAT(_identity).prepare(model, Batch(torch.randn(2, 1, 6, 6)))
    assert all((p.grad == 1).all() for p in model.parameters())


def test_a_frozen_model_will_do() -> None:
    model, images = _network().requires_grad_(False), torch.randn(2, 1, 6, 6)
    assert _size(VAT(_identity).prepare(model, Batch(images)).inputs[0] - images).min() > 0


@pytest.mark.parametrize("iterations", [1, 2])
def test_an_autocast_region_around_prepare_and_both_losses(iterations: int) -> None:
    """Its cache of casts, which the power iteration fills anew, doesn't change the loss's gradient."""
    model, images = _network().eval(), torch.randn(2, 1, 8, 8)
    method = VAT(_identity, iterations=iterations)
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1), alpha=1.0)

    def gradients(region: Callable[[], AbstractContextManager]) -> list[Tensor]:
        """After both passes, each in a `region` of its own."""
        optimizer.zero_grad()
        with region():
            method.loss(model, views).backward()
        with optimizer.perturbed(model), region():
            method.loss(model, views).backward()
        return [p.grad for p in model.parameters()]

    with torch.autocast("cpu", torch.bfloat16):
        views = method.prepare(model, Batch(images))
        around = gradients(nullcontext)
    assert views.inputs[0].dtype == views.target.dtype == torch.float32
    expected = gradients(lambda: torch.autocast("cpu", torch.bfloat16))
    assert all(map(torch.equal, around, expected))


def test_float16_finds_the_direction_of_float32() -> None:
    """Over so many pixels, the gradient of a mean would not be in its range."""
    model, images, method = _network().eval(), torch.randn(4, 1, 96, 96), VAT(_identity, radius=1.0)
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            found.append(method.prepare(model, Batch(images)).inputs[0] - images)
    assert torch.cosine_similarity(*(r.flatten(1) for r in found)).min() > 0.95


def _ddp_worker(rank: int) -> dict[str, Tensor]:
    """Prepare, loss and a perturbed pass, twice, through DDP; each rank has images of its own."""
    torch.manual_seed(0)
    network = _network().double()
    model = DistributedDataParallel(network)
    method = VAT(_identity, radius=0.1)
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1))
    images = torch.randn(2, 2, 1, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)[rank]
    for _ in range(2):
        alone = copy.deepcopy(network)
        torch.manual_seed(rank)
        expected = method.prepare(alone, Batch(images)).inputs[0]
        torch.manual_seed(rank)
        views = method.prepare(model, Batch(images))
        method.loss(model, views).backward()
        with optimizer.perturbed(model):
            method.loss(model, views).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"inputs": views.inputs[0], "expected": expected, "weight": network[0].weight.detach()}


def test_through_ddp_every_rank_has_its_own_direction(on_two_ranks) -> None:
    first, second = on_two_ranks(_ddp_worker)
    for each in (first, second):
        torch.testing.assert_close(each["inputs"], each["expected"])
    torch.testing.assert_close(first["weight"], second["weight"])


@pytest.mark.parametrize(
    "bad",
    [
        *({"radius": value} for value in (-1.0, math.nan, math.inf)),
        *({"xi": value} for value in (0.0, math.nan, math.inf)),
        *({"iterations": value} for value in (0, 1.0, math.nan)),
        {"tau": 1.1},
        {"mode": "test"},
    ],
    ids=str,
)
def test_bad_arguments_are_named(bad) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        VAT(_identity, **bad)


@pytest.mark.parametrize(("spatial", "length"), [((12, 15), 6.0), ((8, 6, 7), 10.0)])
@pytest.mark.parametrize("radius", [None, 0.5])
def test_the_radius_of_dice_vat_is_an_l2_norm_of_a_whole_image(
    spatial: tuple[int, ...], length: float, radius: float | None
) -> None:
    model, images = _network(dims=len(spatial)), torch.rand(3, 1, *spatial)
    r = DiceVAT(_identity, radius).prepare(model, Batch(images)).inputs[0] - images
    torch.testing.assert_close(
        r.flatten(1).norm(dim=1), torch.full((3,), radius or length, dtype=torch.float32), rtol=1e-4, atol=0
    )


def test_a_direction_of_dice_vat_by_hand() -> None:
    """The gradient of a soft Dice at u + xi d, d uniform in each value and of L2 norm 1."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1)).double()
    u = torch.randn(2, 1, 6, 7, dtype=torch.float64)
    target = model(u).softmax(1).detach()
    torch.manual_seed(1)
    views = DiceVAT(_identity, radius=0.3, xi=0.2).prepare(model, Batch(u))
    torch.manual_seed(1)
    d = torch.rand_like(u) - 0.5
    d = d / d.flatten(1).norm(dim=1).view(2, 1, 1, 1)
    at = (u + 0.2 * d).requires_grad_()
    (g,) = torch.autograd.grad(soft_dice_loss(model(at), target), at)
    torch.testing.assert_close(views.inputs[0], u + 0.3 * g / g.flatten(1).norm(dim=1).view(2, 1, 1, 1))
    torch.testing.assert_close(views.target, target)
    loss = DiceVAT(_identity).compare((model(views.inputs[0]),), views)
    torch.testing.assert_close(loss, soft_dice_loss(model(views.inputs[0]), target))


def test_dice_vat_sees_the_model_as_it_trains() -> None:
    modes: list[bool] = []
    model = _network()
    model[3].register_forward_hook(lambda module, *_: modes.append(module.training))
    DiceVAT(_identity, iterations=2).prepare(model, Batch(torch.randn(2, 1, 6, 6)))
    assert modes == [True] * 3


def test_a_small_organ_counts_as_much_as_the_background_in_dice_vat() -> None:
    """One pixel of a hundred that changes its class: KL's mean hardly sees it."""
    clean = torch.zeros(1, 2, 10, 10)
    clean[:, 0] = 9
    clean[:, :, 0, 0] = torch.tensor([0.0, 9.0])
    changed = clean.clone()
    changed[:, :, 0, 0] = torch.tensor([9.0, 0.0])
    views = Views((clean,), clean.softmax(1))
    assert VAT(_identity).compare((changed,), views) < 0.1
    assert DiceVAT(_identity).compare((changed,), views) > 0.4


@pytest.mark.parametrize("bad", [{"radius": -1.0}, {"xi": 0.0}, {"iterations": 0}, {"mode": "test"}])
def test_bad_arguments_of_dice_vat_are_named(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        DiceVAT(_identity, **bad)
