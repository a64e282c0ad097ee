"""MixUp: one lambda a sample for images and targets, from Beta(beta, beta), and the mix of predictions as target."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from gap_torch.consistency import Batch, MixUp
from gap_torch.consistency.mixup import mixed
from gap_torch.losses import mean_squared


def _identity(images: Tensor) -> Tensor:
    return images


@pytest.mark.parametrize("beta", [0.01, 0.2, 1.0, 5.0])
def test_lambda_is_beta_distributed(beta: float) -> None:
    (share,) = mixed(beta, torch.tensor([1.0, 0.0]).repeat(5000))  # lambda, 1 - lambda, alternating
    at = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    below = (share.double() < at.view(-1, 1)).double().mean(dim=1)
    torch.testing.assert_close(below, torch.from_numpy(stats.beta(beta, beta).cdf(at.numpy())), rtol=0, atol=0.025)


@settings(max_examples=30, deadline=None)
@given(
    beta=st.floats(1e-3, 1e3),
    batch=st.integers(1, 5),
    spatial=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_a_mix_lies_between_a_sample_and_the_one_before(beta: float, batch: int, spatial: list[int], dtype) -> None:
    image = torch.randn(batch, 3, *spatial, dtype=dtype)
    (mix,) = mixed(beta, image)
    before = image.roll(1, dims=0)
    slack = 4 * torch.finfo(dtype).eps * image.abs().max()
    assert mix.dtype == dtype
    assert (mix >= torch.minimum(image, before) - slack).all()
    assert (mix <= torch.maximum(image, before) + slack).all()


@settings(max_examples=30, deadline=None)
@given(beta=st.floats(0.01, 10), batch=st.integers(2, 5), seed=st.integers(0, 1000))
def test_all_tensors_get_the_same_lambda(beta: float, batch: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.arange(batch, dtype=torch.float64) ** 2
    image, target = mixed(beta, numbers.view(-1, 1, 1, 1).expand(-1, 2, 3, 4), numbers, generator=generator)
    torch.testing.assert_close(image, target.view(-1, 1, 1, 1).expand_as(image))


def test_a_generator_decides_every_lambda() -> None:
    def mix(seed: int) -> Tensor:
        return mixed(0.5, torch.arange(8.0), generator=torch.Generator().manual_seed(seed))[0]

    assert torch.equal(mix(0), mix(0))
    assert not torch.equal(mix(0), mix(1))


def test_each_sample_has_its_own_lambda() -> None:
    (share,) = mixed(1.0, torch.tensor([1.0, 0.0]).repeat(4))
    assert len({min(s, 1 - s) for s in share.double().tolist()}) > 4


@pytest.mark.parametrize("spatial", [(5, 6), (3, 4, 5)])
def test_the_target_is_the_mix_of_the_predictions(spatial: tuple[int, ...]) -> None:
    model, images = nn.Softplus(), torch.rand(4, 3, *spatial, dtype=torch.float64)
    views = MixUp(lambda x: x + 1).prepare(model, Batch(images))
    weak = images + 1
    before = weak.roll(1, dims=0)
    share = ((views.inputs[0] - before) / (weak - before)).flatten(1).median(dim=1).values
    share = share.view(-1, *[1] * (images.ndim - 1))
    expected = share * model(weak).softmax(1) + (1 - share) * model(before).softmax(1)
    torch.testing.assert_close(views.target, expected)
    loss = MixUp(_identity).loss(model, views)
    torch.testing.assert_close(loss, mean_squared(model(views.inputs[0]), expected))


def test_a_model_that_is_linear_in_probability_agrees() -> None:
    class Linear(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.log()  # softmax: the image itself, where its channels sum to 1

    method, images = MixUp(_identity), torch.randn(4, 3, 5, 5).double().softmax(1)
    assert method.loss(Linear(), method.prepare(Linear(), Batch(images))) < 1e-15


def test_a_batch_of_one_stays_as_it_is() -> None:
    image = torch.randn(1, 2, 4, 4)
    assert torch.equal(mixed(0.3, image)[0], image)


@pytest.mark.parametrize("beta", [1e-6, 1e6])
def test_the_utmost_betas_have_finite_lambdas(beta: float) -> None:
    (share,) = mixed(beta, torch.tensor([1.0, 0.0]).repeat(5000))
    near = share.round() if beta < 1 else torch.full_like(share, 0.5)
    torch.testing.assert_close(share, near, rtol=0, atol=0.01)


@pytest.mark.parametrize("beta", [0.0, -1.0, 1e-40, 1e40, float("nan"), float("inf")])
def test_a_beta_that_cannot_be_drawn_from_is_named(beta: float) -> None:
    with pytest.raises(ValueError, match="beta"):
        MixUp(_identity, beta=beta)


def test_an_unknown_mode_is_named() -> None:
    with pytest.raises(ValueError, match="mode"):
        MixUp(_identity, mode="test")
