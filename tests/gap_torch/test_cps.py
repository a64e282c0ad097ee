"""CPS: its loss by hand, whose classes are learnt by whom, and that both networks are perturbed."""

import math

import pytest
import torch
from torch import Tensor, nn

from gap_torch import GAPWrapper
from gap_torch.consistency import CPS, Batch, Views
from gap_torch.losses import ce_dice_loss, cross_entropy


def _identity(images: Tensor) -> Tensor:
    return images


class Twins(nn.Module):
    """Two networks with batch norm and dropout; the second answers in training mode alone."""

    def __init__(self, classes: int = 3, dims: int = 2) -> None:
        super().__init__()
        conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
        self.first, self.second = (
            nn.Sequential(conv(1, 4, 3, padding=1), norm(4), nn.ReLU(), nn.Dropout(0.2), conv(4, classes, 1))
            for _ in range(2)
        )

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return (self.first(images), self.second(images)) if self.training else self.first(images)


def _logits(*pixels: tuple[float, ...]) -> Tensor:
    """(1, K, 1, pixels)."""
    return torch.tensor(pixels).T[None, :, None]


def _views(first: Tensor, second: Tensor) -> Views:
    return Views((), fixed=(first.argmax(1), second.argmax(1)))


def test_the_loss_by_hand() -> None:
    first, second = _logits((2.0, 0.0), (0.0, 2.0)), _logits((0.0, 2.0), (0.0, 2.0))
    loss = CPS(_identity).compare(((first, second),), _views(first, second))
    assert loss.item() == pytest.approx(2.25386, abs=1e-5)
    assert cross_entropy(first, second.argmax(1)).item() == pytest.approx(1.12693, abs=1e-5)


def test_agreement_still_costs_something() -> None:
    logits = _logits((2.0, 0.0))
    loss = CPS(_identity).compare(((logits, logits),), _views(logits, logits))
    assert loss.item() == pytest.approx(2 * 0.12693, abs=1e-5)


def test_swapping_the_networks_changes_nothing() -> None:
    first, second = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    method = CPS(_identity)
    loss = method.compare(((first, second),), _views(first, second))
    torch.testing.assert_close(method.compare(((second, first),), _views(second, first)), loss)


def test_the_loss_in_plain_python() -> None:
    first, second = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    views, total = _views(first, second), 0.0
    for b in range(2):
        for x in range(4):
            for y in range(4):
                for logits, label in ((first, views.fixed[1]), (second, views.fixed[0])):
                    values = logits[b, :, x, y].tolist()
                    total += math.log(sum(map(math.exp, values))) - values[label[b, x, y]]
    assert CPS(_identity).compare(((first, second),), views).item() == pytest.approx(total / 32)


def test_neither_networks_term_reaches_the_other() -> None:
    first, second = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64).requires_grad_()
    views = _views(first, second)
    (ours,) = torch.autograd.grad(CPS(_identity).compare(((first, second),), views), first)
    (alone,) = torch.autograd.grad(cross_entropy(first, views.fixed[1]), first)
    torch.testing.assert_close(ours, alone)


@pytest.mark.parametrize(("classes", "spatial"), [(2, (6, 7)), (5, (4, 5, 6))])
def test_the_classes_are_of_a_training_pass_that_moves_nothing(classes: int, spatial: tuple[int, ...]) -> None:
    model, images = Twins(classes, len(spatial)), torch.randn(3, 1, *spatial)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(1)
    views = CPS(lambda x: x.flip(-1)).prepare(model, Batch(images))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(module.training for module in model.modules())
    assert torch.equal(views.inputs[0], images.flip(-1))
    torch.manual_seed(1)
    expected = [logits.argmax(1) for logits in model(images.flip(-1))]
    assert all(map(torch.equal, views.fixed, expected))


def test_the_log_has_where_the_networks_disagree() -> None:
    """Of six pixels f_2 sees another class in two; before it has been asked there is nothing to tell."""
    first = torch.tensor([0, 1, 2, 0, 1, 2]).view(1, 2, 3)
    second = torch.tensor([0, 1, 2, 0, 2, 1]).view(1, 2, 3)
    method = CPS(_identity)
    assert not method.logged()
    logits = [nn.functional.one_hot(each, 3).movedim(-1, 1).float() for each in (first, second)]
    method.prepare(Fixed(logits), Batch(torch.rand(1, 1, 2, 3)))
    assert method.logged()["disagreement"].item() == pytest.approx(2 / 6)


class Fixed(nn.Module):
    """Says `outputs`, whatever it sees."""

    def __init__(self, outputs: list[Tensor]) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.outputs)


def test_labels_supervise_both_networks() -> None:
    model, images, labels = Twins(), torch.randn(2, 1, 6, 6), torch.randint(3, (2, 6, 6))
    outputs = model(images)
    loss = CPS(_identity).labelled_loss(ce_dice_loss, outputs, labels)
    torch.testing.assert_close(loss, ce_dice_loss(outputs[0], labels) + ce_dice_loss(outputs[1], labels))


def test_gap_moves_both_networks_by_one_norm_and_puts_them_back_bit_for_bit() -> None:
    model, method = Twins(), CPS(_identity)
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1), eps=0.3)
    views = method.prepare(model, Batch(torch.randn(3, 1, 6, 6)))
    method.loss(model, views).backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with optimizer.perturbed(model):
        moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
        method.loss(model, views).backward()
    assert torch.stack([move.norm() for move in moved.values()]).norm().item() == pytest.approx(0.3, rel=1e-4)
    assert {name.partition(".")[0] for name, move in moved.items() if move.any()} == {"first", "second"}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_model_without_a_second_network_is_an_error() -> None:
    method, model = CPS(_identity), nn.Conv2d(1, 3, 1)
    for ask in (
        lambda: method.prepare(model, Batch(torch.randn(2, 1, 4, 4))),
        lambda: method.compare((torch.randn(2, 3, 4, 4),), Views(())),
        lambda: method.labelled_loss(ce_dice_loss, torch.randn(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64)),
    ):
        with pytest.raises(ValueError, match="auxiliary"):
            ask()
