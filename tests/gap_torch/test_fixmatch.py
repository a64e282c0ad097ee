"""FixMatch: equations 4-7, and that nothing but the student's strong pass carries a gradient."""

import pytest
import torch
from torch import Tensor, nn

from gap_torch.consistency import Batch, CutMix, FixMatch, Views
from gap_torch.losses import ce_dice_loss


def _identity(images: Tensor) -> Tensor:
    return images


class Fixed(nn.Module):
    """Logits that are the image itself times one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        return images * self.weight


def test_pseudo_labels_are_the_weak_views_confident_classes() -> None:
    probabilities = torch.tensor([[0.96, 0.94, 0.01], [0.02, 0.05, 0.98], [0.02, 0.01, 0.01]])
    images = probabilities.log()[None, :, None, :].double()
    views = FixMatch(_identity, _identity, tau=0.95).prepare(Fixed(), Batch(images))
    assert views.target.tolist() == [[[0, 0, 1]]]
    assert views.mask.tolist() == [[[True, False, True]]]


@pytest.mark.parametrize("mirrored", [False, True])
def test_pseudo_labels_lie_where_the_strong_view_shows_them(mirrored: bool) -> None:
    """Labels of the images as they came would lie elsewhere, once the weak view has moved these."""
    images = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    weak = (lambda x: x.flip(-1)) if mirrored else _identity
    views = FixMatch(weak, _identity, tau=0.6).prepare(Fixed(), Batch(images))
    assert torch.equal(views.target, views.inputs[0].argmax(1))
    assert torch.equal(views.mask, views.inputs[0].softmax(1).amax(1) >= 0.6)


def test_tau_itself_is_confident() -> None:
    images = torch.zeros(1, 2, 1, 1, dtype=torch.float64)
    assert FixMatch(_identity, _identity, tau=0.5).prepare(Fixed(), Batch(images)).mask.all()


def test_the_strong_view_is_made_of_the_weak_one() -> None:
    seen: list[Tensor] = []
    method = FixMatch(lambda x: x + 1, lambda x: seen.append(x) or 10 * x, tau=0)
    views = method.prepare(Fixed(), Batch(torch.zeros(2, 3, 4, 4, dtype=torch.float64)))
    assert torch.equal(seen[0], torch.ones(2, 3, 4, 4, dtype=torch.float64))
    assert torch.equal(views.inputs[0], 10 * seen[0])


@pytest.mark.parametrize("spatial", [(6, 7), (4, 5, 6)])
def test_the_loss_is_r_of_equation_7(spatial: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    views = Views(
        (torch.randn(2, 3, *spatial, dtype=torch.float64),),
        torch.randint(3, (2, *spatial)),
        torch.rand(2, *spatial) < 0.5,
    )
    loss = FixMatch(_identity, _identity).loss(Fixed(), views)
    torch.testing.assert_close(loss, ce_dice_loss(views.inputs[0], views.target, views.mask))


def test_cutmix_pastes_targets_along() -> None:
    torch.manual_seed(0)
    classes = torch.arange(4).view(4, 1, 1).expand(4, 16, 16)
    images = 20.0 * nn.functional.one_hot(classes, 4).movedim(-1, 1).double()
    views = FixMatch(_identity, _identity, cutmix=CutMix(p=1.0)).prepare(Fixed(), Batch(images))
    assert torch.equal(views.inputs[0].argmax(1), views.target)
    assert (views.target != classes).any()


@pytest.mark.parametrize(
    ("mode", "convolution", "batchnorm", "dropout"),
    [("eval", False, False, False), ("batch", False, True, False), ("train", True, True, True)],
)
def test_the_mode_of_the_model_and_back(mode, convolution: bool, batchnorm: bool, dropout: bool) -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5)).train()
    modes: list[list[bool]] = []
    model.register_forward_hook(lambda module, *_: modes.append([m.training for m in module]))
    before = model[1].running_mean.clone()
    FixMatch(_identity, _identity, mode=mode).prepare(model, Batch(torch.randn(4, 1, 5, 5)))
    assert modes == [[convolution, batchnorm, dropout]]
    assert [m.training for m in model] == [True, True, True]
    assert torch.equal(before, model[1].running_mean) is not batchnorm


@pytest.mark.parametrize("mode", ["batch", "train"])
def test_a_frozen_batch_norm_stays_frozen(mode) -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3)).train()
    model[1].eval()
    before = model[1].running_mean.clone()
    FixMatch(_identity, _identity, mode=mode).prepare(model, Batch(torch.randn(4, 1, 5, 5)))
    assert torch.equal(before, model[1].running_mean)
    assert [m.training for m in model] == [True, False]


class OwnBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, training=self.training)


@pytest.mark.parametrize("mode", ["eval", "batch", "train"])
def test_the_mode_reaches_a_batch_norm_of_ones_own(mode) -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), OwnBatchNorm()).train()
    FixMatch(_identity, _identity, mode=mode).prepare(model, Batch(torch.randn(4, 1, 5, 5)))
    assert (model[1].running_mean == 0).all() == (mode == "eval")


@pytest.mark.parametrize("bad", [{"tau": -0.1}, {"tau": 1.1}, {"mode": "test"}])
def test_bad_arguments_are_named(bad) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        FixMatch(_identity, _identity, **bad)
