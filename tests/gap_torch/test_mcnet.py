"""MC-Net: sharpening and loss by hand, that the sharpened side learns too, and which images are compared."""

from itertools import permutations

import pytest
import torch
from torch import Tensor, nn

from gap_torch.consistency import Batch, MCNet, Views
from gap_torch.consistency.mcnet import sharpen
from gap_torch.losses import dice_loss


def _identity(images: Tensor) -> Tensor:
    return images


def _pixel(*p: float) -> Tensor:
    return torch.tensor(p).log().view(1, -1, 1, 1)


@pytest.mark.parametrize(("p", "expected"), [(0.5, 0.5), (0.55, 0.8815), (0.6, 0.98295), (0.7, 0.99979)])
def test_sharpening_by_hand(p: float, expected: float) -> None:
    ours = sharpen(torch.tensor([p, 1 - p], dtype=torch.float64), 0.1)
    assert ours.tolist() == pytest.approx([expected, 1 - expected], abs=1e-5 if p == 0.6 else 5e-5)


def test_a_temperature_of_one_changes_nothing() -> None:
    p = torch.rand(20, dtype=torch.float64)
    torch.testing.assert_close(sharpen(p, 1.0), p)


def test_an_unsure_pixel_of_four_classes_is_pulled_towards_none() -> None:
    sharp = sharpen(torch.tensor([0.4, 0.3, 0.2, 0.1]), 0.1)
    assert sharp.tolist() == pytest.approx([0.0170, 2.1e-4, 9.5e-7, 2.9e-10], rel=0.02)
    assert sharp.sum().item() == pytest.approx(0.017, abs=5e-4)


def test_certainty_has_a_finite_gradient() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        logits = torch.tensor([100.0, -100.0, 1.0, 0.0]).to(dtype).view(1, 2, 2, 1).requires_grad_()
        MCNet(_identity).compare(((logits, logits.flip(1)),), Views(())).backward()
        assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("first", "second", "expected"), [((0.6, 0.4), (0.3, 0.7), 0.82618), ((0.6, 0.4), (0.6, 0.4), 2 * 0.14665)]
)
def test_the_loss_by_hand(first: tuple[float, ...], second: tuple[float, ...], expected: float) -> None:
    """At agreement it is not 0."""
    loss = MCNet(_identity).compare(((_pixel(*first), _pixel(*second)),), Views(()))
    assert loss.item() == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("decoders", [2, 3])
def test_the_loss_in_plain_python(decoders: int) -> None:
    logits = 0.3 * torch.randn(decoders, 2, 3, 4, 4, dtype=torch.float64)
    p = logits.softmax(2).tolist()
    total = 0.0
    for i, j in permutations(range(decoders), 2):
        for b in range(2):
            for k in range(3):
                for x in range(4):
                    for y in range(4):
                        q = p[j][b][k][x][y]
                        total += (p[i][b][k][x][y] - q**5 / (q**5 + (1 - q) ** 5)) ** 2
    loss = MCNet(_identity, temperature=0.2).compare((tuple(logits),), Views(()))
    assert loss.item() == pytest.approx(total / (2 * 3 * 4 * 4))


def test_the_gradient_goes_through_the_sharpened_side() -> None:
    first, second = (0.2 * torch.randn(2, 1, 2, 3, 3, dtype=torch.float64)).requires_grad_()
    (ours,) = torch.autograd.grad(MCNet(_identity).compare(((first, second),), Views(())), second)
    p, q = first.softmax(1), second.softmax(1)
    one, other = (p - sharpen(q, 0.1)).square().mean(), (q - sharpen(p, 0.1)).square().mean()
    through = torch.autograd.grad(one, second, retain_graph=True)[0]
    assert through.abs().max() > 1e-3
    torch.testing.assert_close(ours, through + torch.autograd.grad(other, second)[0])


def test_labelled_images_are_compared_too_and_come_first() -> None:
    labelled, unlabelled = torch.rand(3, 1, 4, 4), torch.rand(2, 1, 4, 4)
    method, labels = MCNet(lambda x: x.flip(-1)), torch.zeros(3, 4, 4, dtype=torch.int64)
    views = method.prepare(nn.Identity(), Batch(unlabelled, labelled, labels))
    assert torch.equal(views.inputs[0], torch.cat([labelled, unlabelled.flip(-1)]))
    assert views.labelled_first
    views = method.prepare(nn.Identity(), Batch(unlabelled))
    assert torch.equal(views.inputs[0], unlabelled.flip(-1))
    assert not views.labelled_first


def test_labels_supervise_all_decoders_by_half_of_dice() -> None:
    logits, labels = torch.randn(3, 2, 4, 5, 5).requires_grad_(), torch.randint(4, (2, 5, 5))
    loss = MCNet(_identity).labelled_loss(None, tuple(logits), labels)  # no criterion is asked
    torch.testing.assert_close(loss, sum(dice_loss(each, labels) for each in logits) / 2)


def test_a_model_of_one_decoder_is_an_error() -> None:
    method, logits = MCNet(_identity), torch.randn(2, 3, 4, 4)
    for ask in (
        lambda: method.compare((logits,), Views(())),
        lambda: method.labelled_loss(dice_loss, logits, logits.argmax(1)),
    ):
        with pytest.raises(ValueError, match="auxiliary"):
            ask()


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
def test_any_temperature_has_a_finite_gradient_for_any_prediction(temperature: float) -> None:
    """Where it is undecided both powers are least, and certainty is where a root would be steepest."""
    logits = torch.tensor([[0.0, 1e-3, 1.0, 100.0], [0.0] * 4]).view(1, 2, 4, 1).requires_grad_()
    loss = MCNet(_identity, temperature).compare(((logits, logits.flip(2)),), Views(()))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("bad", [0.0, -0.1, 0.005, 2.0, float("nan")])
def test_bad_arguments_are_named(bad: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        MCNet(_identity, temperature=bad)
