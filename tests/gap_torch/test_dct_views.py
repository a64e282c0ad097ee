"""Deep co-training of two networks: divergence and adversaries by hand, and who learns from whose."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gap_torch.consistency import Batch, ViewsDCT
from gap_torch.consistency.dct_views import jensen_shannon
from gap_torch.losses import ce_dice_loss, soft_cross_entropy


def _identity(images: Tensor) -> Tensor:
    return images


class Twins(nn.Module):
    """Two networks with batch norm and dropout; the second answers in training mode alone."""

    def __init__(self, classes: int = 3, dims: int = 2, dropout: float = 0.5) -> None:
        super().__init__()
        conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
        self.first, self.second = (
            nn.Sequential(conv(1, 4, 3, padding=1), norm(4), nn.ReLU(), nn.Dropout(dropout), conv(4, classes, 1))
            for _ in range(2)
        )
        self.dropped: list[bool] = []

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        self.dropped.append(self.first[3].training)
        return (self.first(images), self.second(images)) if self.training else self.first(images)


class Line(nn.Module):
    """Per pixel: f_1 sees class 1 where x > 0, f_2 where x < 0."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rise = self.slope * x
        return torch.cat([-rise, rise], dim=1), torch.cat([rise, -rise], dim=1)


def _pixel(*p: float) -> Tensor:
    return torch.tensor(p).log().view(1, -1, 1, 1)


@pytest.mark.parametrize(
    ("p", "q", "expected"),
    [((0.9, 0.1), (0.1, 0.9), 0.36806), ((0.9, 0.1), (0.6, 0.4), 0.06329), ((0.9, 0.1),) * 2 + (0,)],
)
def test_the_divergence_by_hand(p: tuple[float, ...], q: tuple[float, ...], expected: float) -> None:
    assert jensen_shannon(_pixel(*p), _pixel(*q)).item() == pytest.approx(expected, abs=1e-5)


def test_the_divergence_is_entropys_and_at_most_log_2() -> None:
    first, second = torch.randn(2, 2, 4, 3, 3, dtype=torch.float64)
    p, q = first.softmax(1), second.softmax(1)

    def entropy(p: Tensor) -> Tensor:
        return -(p * p.log()).sum(1).mean()

    torch.testing.assert_close(jensen_shannon(first, second), entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2)
    logits = torch.tensor([500.0, -500.0]).view(1, 2, 1, 1).half().requires_grad_()
    loss = jensen_shannon(logits, -logits)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert logits.grad.isfinite().all()


def test_adversaries_go_against_labels_and_where_there_are_none_against_ones_own_class() -> None:
    """f_1 says 1 of x > 0: there a smaller x is harder for it, but where the label is 0 a larger one."""
    images, labels = torch.full((1, 1, 1, 2), 0.5), torch.tensor([[[1, 0]]])
    unlabelled = torch.tensor([0.3, -0.3]).view(1, 1, 1, 2)
    method = ViewsDCT(_identity, radius=0.1)
    u, of_first, of_second = method.prepare(Line(), Batch(unlabelled, images, labels)).inputs
    assert torch.equal(u, unlabelled)
    assert of_first.flatten().tolist() == pytest.approx([0.4, 0.6, 0.2, -0.2])
    assert of_second.flatten().tolist() == pytest.approx([0.6, 0.4, 0.2, -0.2])


def test_the_log_has_where_the_networks_disagree_on_unlabelled_images() -> None:
    """`Line`'s say the opposite of each other but where x is 0."""
    method, unlabelled = ViewsDCT(_identity), torch.tensor([0.3, 0.0, -0.3, 0.0]).view(1, 1, 1, 4)
    assert not method.logged()
    method.prepare(Line(), Batch(unlabelled, torch.full((1, 1, 1, 4), 0.5), torch.ones(1, 1, 4, dtype=torch.int64)))
    assert method.logged()["disagreement"].item() == 0.5


def test_the_loss_by_hand() -> None:
    model, x = Line(), torch.tensor([0.3, -0.1]).view(1, 1, 1, 2)
    method = ViewsDCT(_identity, radius=0.1, cot=3.0, dif=0.7)
    loss = method.loss(model, method.prepare(model, Batch(x)))

    def p(x: float) -> float:
        """Of class 1 by f_1."""
        return 1 / (1 + math.exp(-4 * x))

    def entropy(*p: float) -> float:
        return -sum(q * math.log(q) for q in p)

    cot = dif = 0.0
    for value, weaker in ((0.3, 0.2), (-0.1, 0.0)):
        cot += math.log(2) - entropy(p(value), 1 - p(value))  # the mean of f_1 and f_2 is 1/2
        of_second = p(value) * math.log(1 - p(weaker)) + (1 - p(value)) * math.log(p(weaker))
        dif -= 2 * of_second  # f_1 on g_2 is the mirror image of f_2 on g_1
    assert loss.item() == pytest.approx((3.0 * cot + 0.7 * dif) / 2, rel=1e-5)


def test_each_network_learns_on_the_others_adversary_alone() -> None:
    """With L_dif alone; the targets are fixed."""
    first, second, mine, other = torch.randn(4, 2, 3, 4, 4, dtype=torch.float64).requires_grad_()
    method = ViewsDCT(_identity, cot=0.0, dif=1.0)
    model = Twins()
    views = method.prepare(model, Batch(torch.randn(2, 1, 4, 4)))
    unused = torch.randn(2, 3, 4, 4)
    loss = method.compare(((unused, unused), (first, second), (mine, other)), views)
    ours = torch.autograd.grad(loss, (first, second, mine, other), allow_unused=True)
    expected = soft_cross_entropy(second, views.fixed[0]) + soft_cross_entropy(mine, views.fixed[1])
    theirs = torch.autograd.grad(expected, (second, mine))
    assert ours[0] is None
    assert ours[3] is None
    torch.testing.assert_close(ours[1], theirs[0])
    torch.testing.assert_close(ours[2], theirs[1])


@pytest.mark.parametrize(("classes", "spatial"), [(2, (6, 7)), (5, (4, 5, 6))])
def test_targets_are_made_without_dropout_and_move_nothing(classes: int, spatial: tuple[int, ...]) -> None:
    model = Twins(classes, len(spatial))
    model.second[3].eval()
    labelled, unlabelled = torch.randn(3, 1, *spatial), torch.randn(2, 1, *spatial)
    batch = Batch(unlabelled, labelled, torch.randint(classes, (3, *spatial)))
    before, flags = [b.clone() for b in model.buffers()], [m.training for m in model.modules()]
    views = ViewsDCT(lambda x: x.flip(-1)).prepare(model, batch)
    assert model.dropped == [False]
    assert flags == [m.training for m in model.modules()]
    assert all(map(torch.equal, model.buffers(), before))
    assert all(p.grad is None for p in model.parameters())
    assert [len(images) for images in views.inputs] == [2, 5, 5]
    assert views.attached == (True, True, False)
    still = Twins(classes, len(spatial), dropout=0.0)
    still.load_state_dict(model.state_dict())
    logits = still(torch.cat([labelled, unlabelled.flip(-1)]))
    for ours, theirs in zip(views.fixed, logits, strict=True):
        torch.testing.assert_close(ours, theirs.softmax(1).detach())
    for images in views.inputs[1:]:
        moved = images - torch.cat([labelled, unlabelled.flip(-1)])
        assert moved.abs().max().item() == pytest.approx(0.02, abs=1e-6)


def test_labels_supervise_both_networks() -> None:
    model, labels = Twins(), torch.randint(3, (2, 6, 6))
    outputs = model(torch.randn(2, 1, 6, 6))
    loss = ViewsDCT(_identity).labelled_loss(ce_dice_loss, outputs, labels)
    torch.testing.assert_close(loss, ce_dice_loss(outputs[0], labels) + ce_dice_loss(outputs[1], labels))


def test_a_model_without_a_second_network_is_an_error() -> None:
    with pytest.raises(ValueError, match="auxiliary"):
        ViewsDCT(_identity).prepare(nn.Conv2d(1, 3, 1), Batch(torch.randn(2, 1, 4, 4)))


@pytest.mark.parametrize("bad", [{"radius": -0.1}, {"cot": math.nan}, {"dif": math.inf}])
def test_bad_arguments_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        ViewsDCT(_identity, **bad)
