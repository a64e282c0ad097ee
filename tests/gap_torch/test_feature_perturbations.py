"""CCT's feature perturbations: what they multiply with, in any number of dimensions, and their replay."""

import pytest
import torch
from torch import Tensor

from gap_torch import RNGState
from gap_torch.consistency import ChannelDropout, FeatureDrop, FeatureNoise
from gap_torch.rng import replayed

PERTURBATIONS = [FeatureNoise(), FeatureDrop(), ChannelDropout()]
SPATIAL = [(32,), (12, 13), (6, 5, 7)]
EACH = pytest.mark.parametrize("perturb", PERTURBATIONS, ids=lambda p: type(p).__name__)
SIZES = pytest.mark.parametrize("spatial", SPATIAL, ids=lambda s: f"{len(s)}D")


@SIZES
def test_noise_is_uniform_within_its_bound_for_every_value(spatial: tuple[int, ...]) -> None:
    factor = FeatureNoise(0.3)(torch.ones(16, 8, *spatial))
    assert 0.7 <= factor.min() < 0.71
    assert 1.29 < factor.max() <= 1.3
    assert factor.mean().item() == pytest.approx(1, abs=0.02)
    assert factor.var().item() == pytest.approx(0.6**2 / 12, rel=0.1)
    assert len(factor.unique()) > 0.99 * factor.numel()


def test_noise_of_nothing_is_nothing() -> None:
    features = torch.randn(2, 3, 4, 4)
    assert torch.equal(FeatureNoise(0.0)(features), features)


@SIZES
def test_drop_takes_the_most_active_positions_of_each_sample(spatial: tuple[int, ...]) -> None:
    """With gamma = 0.8 for all, against a loop; samples of different sizes, one all negative."""
    features = torch.randn(4, 6, *spatial) * torch.tensor([1.0, 10.0, 100.0, 1.0]).view(4, *[1] * (len(spatial) + 1))
    features[3] = -features[3].abs()
    dropped = FeatureDrop(0.8, 0.8)(features)
    for before, after in zip(features.flatten(2), dropped.flatten(2), strict=True):
        attention = before.sum(0) / 6
        for position in range(attention.numel()):
            gone = attention[position] >= 0.8 * attention.max()
            expected = torch.zeros(6) if gone else before[:, position]
            assert torch.equal(after[:, position], expected)
    assert torch.equal(dropped[3], features[3])  # which has no activity to speak of


def test_drop_draws_gamma_for_each_sample() -> None:
    """On a ramp from 0 to 1 the share that is dropped is 1 - gamma: between 10 and 30 %."""
    ramp = torch.linspace(0, 1, 1001).expand(500, 2, 1001)
    share = 1 - FeatureDrop()(ramp)[:, 0].count_nonzero(dim=1) / 1000
    assert 0.098 <= share.min() < 0.11
    assert 0.29 < share.max() <= 0.302
    assert len(share.unique()) > 50


@SIZES
def test_dropout_takes_whole_channels(spatial: tuple[int, ...]) -> None:
    factor = ChannelDropout(0.25)(torch.ones(64, 32, *spatial)).flatten(2)
    assert torch.equal(factor, factor[:, :, :1].expand_as(factor))
    torch.testing.assert_close(factor.unique(), torch.tensor([0.0, 4 / 3]))
    assert (factor == 0).float().mean().item() == pytest.approx(0.25, abs=0.05)
    assert (factor[0] != factor[1]).any()


@EACH
def test_in_eval_mode_nothing_happens(perturb) -> None:
    features = torch.randn(2, 3, 4, 4)
    state = torch.get_rng_state()
    perturb.eval()
    try:
        assert perturb(features) is features
    finally:
        perturb.train()
    assert torch.equal(torch.get_rng_state(), state)


@EACH
@SIZES
def test_a_replay_draws_the_same(perturb, spatial: tuple[int, ...], device: str) -> None:
    features = torch.rand(4, 16, *spatial, device=device)
    state = RNGState.now()
    first, other = perturb(features), perturb(features)
    with replayed(state):
        assert torch.equal(perturb(features), first)
    assert not torch.equal(first, other)


@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_memory_format_stay(perturb, dtype: torch.dtype) -> None:
    features = torch.rand(2, 4, 5, 6).to(dtype).to(memory_format=torch.channels_last)
    perturbed = perturb(features)
    assert perturbed.dtype == dtype
    assert perturbed.stride() == features.stride()


@EACH
def test_the_gradient_is_the_factor(perturb) -> None:
    features = torch.rand(2, 8, 5, 6, dtype=torch.float64, requires_grad=True)
    perturbed: Tensor = perturb(features)
    perturbed.sum().backward()
    torch.testing.assert_close(features.grad, (perturbed / features).detach())


@pytest.mark.parametrize(
    ("perturbation", "bad"),
    [
        (FeatureNoise, {"bound": -0.1}),
        (FeatureNoise, {"bound": float("nan")}),
        (FeatureNoise, {"bound": float("inf")}),
        (FeatureDrop, {"low": 0.9, "high": 0.7}),
        (FeatureDrop, {"high": 1.1}),
        (ChannelDropout, {"p": 1.0}),
        (ChannelDropout, {"p": -0.1}),
    ],
)
def test_bad_arguments_are_named(perturbation, bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        perturbation(**bad)
