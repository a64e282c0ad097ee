"""Cross-entropy and Dice against MONAI, and what the mask does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.losses import DiceLoss

from gap_torch.losses import ce_dice_loss, cross_entropy, dice_loss, mean_squared, soft_cross_entropy

SHAPES = [(2, 4, 8, 8), (3, 2, 5, 6), (1, 3, 4, 5, 6)]


def _problem(shape: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    mask = torch.rand(target.shape, generator=generator) < 0.5
    return logits, target, mask


@pytest.mark.parametrize("shape", SHAPES)
def test_dice_is_monais_with_squared_denominator(shape: tuple[int, ...]) -> None:
    logits, target, _ = _problem(shape)
    monai = DiceLoss(softmax=True, to_onehot_y=True, squared_pred=True, batch=True, smooth_nr=1e-5, smooth_dr=1e-5)
    torch.testing.assert_close(dice_loss(logits, target), monai(logits, target[:, None]))


@pytest.mark.parametrize("shape", SHAPES)
def test_masked_pixels_have_no_say(shape: tuple[int, ...]) -> None:
    logits, target, mask = _problem(shape)
    other = torch.where(mask.unsqueeze(1), logits, torch.randn_like(logits))
    wrong = torch.where(mask, target, (target + 1) % shape[1])
    for loss in (cross_entropy, dice_loss, ce_dice_loss):
        torch.testing.assert_close(loss(logits, target, mask), loss(other, wrong, mask))


def test_masked_cross_entropy_divides_by_all_pixels() -> None:
    logits, target, mask = _problem(SHAPES[0])
    each = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(cross_entropy(logits, target, mask), each[mask].sum() / each.numel())


@pytest.mark.parametrize("loss", [cross_entropy, dice_loss, ce_dice_loss])
def test_an_empty_mask_gives_zero_and_no_gradient(loss) -> None:
    logits, target, mask = _problem(SHAPES[0])
    logits.requires_grad_()
    value = loss(logits, target, torch.zeros_like(mask))
    value.backward()
    assert value.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_a_class_that_no_confident_pixel_has_is_not_driven_out() -> None:
    """Near `smooth` the Dice loss of an absent class is a cliff, which ended in classes that nothing brought back."""
    target = torch.zeros(1, 8, 8, dtype=torch.int64)
    target[:, :4] = 1
    mask = torch.ones_like(target, dtype=torch.bool)
    logits = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[:, 2] -= 7  # of 64 pixels the sum of p^2 is of the order of 1e-5

    def pull(target: torch.Tensor, mask: torch.Tensor | None) -> float:
        leaf = logits.clone().requires_grad_()
        dice_loss(leaf, target, mask).backward()
        assert leaf.grad is not None
        return leaf.grad[:, 2].abs().sum().item()

    assert pull(target, mask) < 1e-3 < 0.05 < pull(target, None)
    unsure = target.clone()
    unsure[:, 6:] = 2
    assert pull(unsure, unsure != 2) < 1e-3  # unsure pixels have the class, and no say
    two_classes = dice_loss(logits.log_softmax(1)[:, :2], target, mask) * 2 / 3  # the third counts 0
    torch.testing.assert_close(dice_loss(logits, target, mask), two_classes, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_where_all_classes_are_there_a_mask_of_everything_changes_nothing(shape: tuple[int, ...]) -> None:
    logits, target, _ = _problem(shape)
    torch.testing.assert_close(
        dice_loss(logits, target, torch.ones_like(target, dtype=torch.bool)), dice_loss(logits, target)
    )


@pytest.mark.parametrize("loss", [cross_entropy, dice_loss, ce_dice_loss])
def test_certainty_of_the_truth_costs_nothing(loss) -> None:
    _, target, mask = _problem(SHAPES[0])
    logits = 100.0 * torch.nn.functional.one_hot(target, 4).movedim(-1, 1)
    assert loss(logits, target).item() < 1e-6
    assert loss(logits, target, mask).item() < 1e-6


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_the_order_of_the_batch_does_not_matter(seed: int) -> None:
    logits, target, mask = _problem((4, 3, 4, 4), seed)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        ce_dice_loss(logits, target, mask), ce_dice_loss(logits[order], target[order], mask[order])
    )


def test_half_precision_logits_are_widened() -> None:
    logits, target, mask = _problem(SHAPES[0])
    assert ce_dice_loss(logits.bfloat16(), target, mask).dtype == torch.float32


@pytest.mark.parametrize("loss", [cross_entropy, dice_loss, ce_dice_loss])
def test_a_masked_pixel_may_be_infinite(loss) -> None:
    logits, target, mask = _problem(SHAPES[0])
    spoilt = torch.where(mask.unsqueeze(1), logits, float("inf"))
    torch.testing.assert_close(loss(spoilt, target, mask), loss(logits, target, mask))


ALL = pytest.mark.parametrize("loss", [cross_entropy, dice_loss, ce_dice_loss])


@ALL
@pytest.mark.parametrize("wrong", [4, 255, -1, -100])
def test_a_class_out_of_range_is_an_error_on_the_cpu(loss, wrong: int) -> None:
    logits, target, _ = _problem(SHAPES[0])
    target[1, 2, 3] = wrong
    with pytest.raises(ValueError, match="target must hold classes from 0 to 3"):
        loss(logits, target)


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int32, torch.bool])
def test_targets_are_int64(loss, dtype: torch.dtype) -> None:
    logits, target, _ = _problem(SHAPES[0])
    with pytest.raises(ValueError, match=r"target must be of torch\.int64"):
        loss(logits, target.to(dtype))


@ALL
def test_targets_and_masks_have_the_shape_of_the_logits(loss) -> None:
    logits, target, mask = _problem(SHAPES[0])
    for wrong in (target[:1], target[:, None], target[0], torch.softmax(logits, 1).long()):
        with pytest.raises(ValueError, match="target must be of shape"):
            loss(logits, wrong)
    with pytest.raises(ValueError, match="mask must be of shape"):
        loss(logits, target, mask[:1])
    with pytest.raises(ValueError, match=r"mask must be of torch\.bool"):
        loss(logits, target, mask.float())


@ALL
def test_an_empty_batch_and_an_unknown_one_pass_the_checks(loss) -> None:
    logits, target, _ = _problem(SHAPES[0])
    assert loss(logits[:0], target[:0]).shape == ()
    assert loss(logits.to("meta"), target.to("meta")).shape == ()  # as on CUDA, nobody looks at the values


def test_the_losses_compile_in_one_graph() -> None:
    logits, target, mask = _problem(SHAPES[0])
    compiled = torch.compile(ce_dice_loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(logits, target, mask), ce_dice_loss(logits, target, mask))


@pytest.mark.parametrize("loss", [cross_entropy, dice_loss, ce_dice_loss, soft_cross_entropy, mean_squared])
def test_one_logit_is_refused(loss):
    """Softmax over one channel is 1 everywhere: a target of background alone would fit it at any weights."""
    soft = loss in (soft_cross_entropy, mean_squared)
    target = torch.ones(2, 1, 4, 4) if soft else torch.zeros(2, 4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"2 classes or more, got shape \(2, 1, 4, 4\)"):
        loss(torch.randn(2, 1, 4, 4), target)
