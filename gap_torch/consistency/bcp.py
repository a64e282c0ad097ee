"""Bidirectional copy-paste, BCP (Bai et al., CVPR 2023), and its pre-training."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..losses import Criterion, MaskedLoss, at_least_float32, check_target
from .method import Augmentation, Batch, Method, Outputs, Views, labelled_of, logits_of, one_each, unlabelled_of
from .targets import Mode, check_mode, probabilities
from .teacher import Teacher


class BCP(Method):
    """A labelled box in an unlabelled image and the reverse, learnt from labels and from a teacher's classes.

    The labelled images come in halves (a, b), the unlabelled images in halves (u, v). One box, of two thirds of each
    side, is used for all images: the mixtures are u with the box of a, and b with the box of v. U are the pixels of a
    mixture whose target is the teacher's class, cleaned; L are the other pixels, whose target is a label:

        l(S)           =  sum_S CE / |S|  +  Dice over S
        loss           =  [l(U) of the first mixture + l(U) of the second] / 2
        labelled loss  =  [l(L) of the first mixture + l(L) of the second] / 2

    The authors' code adds half of `loss` to the labelled loss, from two passes, one for each mixture: `Views.mixed`
    lets a loop do so. For GAP the part with pseudo-labels is the consistency loss; the part with labels is the labelled
    loss. Where a batch is odd, or has more images of one kind, some images are taken twice.

    Model and teacher start from the weights of a run of `BCPPreTraining`. The teacher is `Teacher(model, 0.99,
    warm_up=False)`.

    Args:
        teacher: makes the pseudo-labels; `update` lets it follow the model.
        weak: weak augmentation of unlabelled images (B, C, *spatial). Labelled images come augmented already.
        clean: function from the teacher's classes (B, *spatial), int64, to the pseudo-labels, of the same shape. The
            authors keep the largest connected piece of each class in a sample, where voxels that share a corner are
            connected, and make all else background.
        dice: called with logits (B, K, *spatial), target and region (B, *spatial). None for the Dice that the authors'
            code has for ACDC; for LA it has `linear_dice_loss`.
        mode: the teacher's mode (`targets.Mode`).

    Raises:
        ValueError: `mode` is unknown; from `prepare`, a batch without labelled images.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import BCP, Batch, Teacher
        >>> model = torch.nn.Conv2d(1, 3, kernel_size=1)
        >>> teacher = Teacher(model, decay=0.99, warm_up=False)
        >>> weak, clean = lambda images: images.flip(-1), lambda classes: classes
        >>> method = BCP(teacher, weak, clean)
        >>> images, labels = torch.rand(2, 1, 8, 8), torch.randint(3, (2, 8, 8))
        >>> views = method.prepare(model, Batch(torch.rand(2, 1, 8, 8), images, labels))
        >>> method.loss(model, views).backward()
        >>> method.labelled_loss(None, model(views.labelled), labels, views).backward()
    """

    def __init__(
        self,
        teacher: Teacher,
        weak: Augmentation,
        clean: Callable[[Tensor], Tensor],
        dice: MaskedLoss | None = None,
        mode: Mode = "train",
    ) -> None:
        super().__init__()
        check_mode(mode)
        self.teacher, self.weak, self.clean, self.mode = teacher, weak, clean, mode
        self.dice = dice or squared_dice_loss

    @torch.no_grad()
    def prepare(self, model: nn.Module, batch: Batch) -> Views:
        """Both mixtures; `target` holds labels and pseudo-labels, `fixed` says where it holds pseudo-labels."""
        unlabelled = self.weak(unlabelled_of(batch))
        images, labels = labelled_of(batch)
        count = max(len(images), len(unlabelled))
        (a, b), (label_a, label_b), (u, v) = (_halves(t, count) for t in (images, labels, unlabelled))
        pseudo_u, pseudo_v = (self.clean(probabilities(self.teacher, half, self.mode).argmax(dim=1)) for half in (u, v))
        box = random_box(a)
        inputs = torch.where(box, a, u), torch.where(box, v, b)
        target = torch.cat([torch.where(box, label_a, pseudo_u), torch.where(box, pseudo_v, label_b)])
        pseudo = torch.cat([(~box).expand_as(label_a), box.expand_as(label_b)])
        return Views(inputs, target, fixed=pseudo, labelled=torch.cat(inputs), mixed=True)

    def compare(self, outputs: tuple[Outputs, ...], views: Views) -> Tensor:
        """The loss over pixels whose target is a pseudo-label."""
        return self._loss([logits_of(output) for output in one_each(outputs, 2)], views, views.fixed)

    def labelled_loss(
        self, criterion: Criterion, outputs: Outputs, target: Tensor, views: Views | None = None
    ) -> Tensor:
        """The loss over pixels whose target is a label, for logits of `Views.labelled`; `criterion` without `views`."""
        logits = logits_of(outputs)
        if views is None:
            return criterion(logits, target)
        return self._loss(logits.split([len(images) for images in views.inputs]), views, ~views.fixed)

    def _loss(self, logits: Sequence[Tensor], views: Views, region: Tensor) -> Tensor:
        """Half of the sum of `region_loss` over the mixtures."""
        assert views.target is not None
        sizes = [len(images) for images in views.inputs]
        each = zip(logits, views.target.split(sizes), region.split(sizes), strict=True)
        first, second = (region_loss(*mixture, self.dice) for mixture in each)
        return (first + second) / 2

    def update(self, model: nn.Module, batch: Batch) -> None:
        """The teacher follows `model`."""
        self.teacher.update(model)


class BCPPreTraining(Method):
    """Training before BCP: boxes pasted between labelled images, learnt from labels. GAP has nothing to perturb by.

    The labelled images come in halves (a, b); the mixture is a with a box of b. The authors' loss for ACDC is half of
    l(box) + l(rest), with the l of `BCP`, and for LA half of l(all pixels).

    Args:
        by_region: whether box and surroundings count the same, as for ACDC, or every pixel does, as for LA.
        dice: as for `BCP`.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import Batch, BCPPreTraining
        >>> model, method = torch.nn.Conv2d(1, 3, kernel_size=1), BCPPreTraining()
        >>> images, labels = torch.rand(2, 1, 8, 8), torch.randint(3, (2, 8, 8))
        >>> views = method.prepare(model, Batch(torch.rand(2, 1, 8, 8), images, labels))
        >>> method.labelled_loss(None, model(views.labelled), labels, views).backward()
    """

    def __init__(self, by_region: bool = True, dice: MaskedLoss | None = None) -> None:
        super().__init__()
        self.by_region, self.dice = by_region, dice or squared_dice_loss

    @torch.no_grad()
    def prepare(self, model: nn.Module, batch: Batch) -> Views:
        """No views: `labelled` is the mixture, `target` its labels, `fixed` the box."""
        unlabelled_of(batch)
        images, labels = labelled_of(batch)
        (a, b), (label_a, label_b) = (_halves(t, len(images)) for t in (images, labels))
        box = random_box(a)
        target = torch.where(box, label_b, label_a)
        return Views((), target, fixed=box.expand_as(target), labelled=torch.where(box, b, a))

    def compare(self, outputs: tuple[Outputs, ...], views: Views) -> Tensor:
        """0: there are no views."""
        assert views.target is not None
        one_each(outputs, 0)
        return torch.zeros((), device=views.target.device)

    def labelled_loss(
        self, criterion: Criterion, outputs: Outputs, target: Tensor, views: Views | None = None
    ) -> Tensor:
        """The loss of the mixture; `criterion` without `views`."""
        logits = logits_of(outputs)
        if views is None:
            return criterion(logits, target)
        box = views.fixed
        regions = (box, ~box) if self.by_region else (torch.ones_like(box),)
        return torch.stack([region_loss(logits, views.target, region, self.dice) for region in regions]).sum() / 2


def random_box(images: Tensor) -> Tensor:
    """A box of two thirds of each side, rounded down, at a random place: bool (*spatial) of `images` (B, C, *spatial).

    As in the authors' code it never touches the far end of an axis.
    """
    box = torch.ones(images.shape[2:], dtype=torch.bool, device=images.device)
    for dim, size in enumerate(box.shape):
        side = 2 * size // 3
        start = (torch.rand((), device=images.device) * (size - side)).floor()
        place = torch.arange(size, device=images.device).view([-1 if d == dim else 1 for d in range(box.ndim)])
        box = box & (place >= start) & (place < start + side)
    return box


def region_loss(logits: Tensor, target: Any, region: Tensor, dice: MaskedLoss) -> Tensor:
    """Cross-entropy, mean over the pixels of `region`, plus `dice` over the same pixels.

    Args:
        logits: (B, K, *spatial), any floating dtype; computed in float32 at least.
        target: (B, *spatial), int64.
        region: (B, *spatial), bool.
        dice: called with logits, target and region.

    Returns:
        0-dim tensor.

    Raises:
        ValueError: as `losses.cross_entropy`.
    """
    check_target(logits, target, region)
    losses = F.cross_entropy(at_least_float32(logits), target, reduction="none")
    mean = torch.where(region, losses, 0.0).sum() / region.sum().clamp(min=1)
    return mean + dice(logits, target, region)


def squared_dice_loss(logits: Tensor, target: Any, region: Tensor) -> Tensor:
    """1 - (2 sum(p t) + 1e-10) / (sum(p^2) + sum(t^2) + 1e-10) over the pixels of `region`, mean over classes.

    The sums are over the batch too. Unlike in `losses.dice_loss` a class that is in no label of the region counts 1.

    Args:
        logits: as for `linear_dice_loss`.
        target: as for `linear_dice_loss`.
        region: as for `linear_dice_loss`.

    Returns:
        0-dim tensor.

    Raises:
        ValueError: as for `linear_dice_loss`.
    """
    p, t = _within(logits, target, region)
    over = (0, *range(2, logits.ndim))
    return 1 - ((2 * (p * t).sum(over) + 1e-10) / (p.square().sum(over) + t.sum(over) + 1e-10)).mean()


def linear_dice_loss(logits: Tensor, target: Any, region: Tensor) -> Tensor:
    """1 - (2 sum(p t) + 1e-5) / (sum(p) + sum(t) + 1e-5) over the pixels of `region`, mean over samples and classes.

    Args:
        logits: (B, K, *spatial), any floating dtype; computed in float32 at least.
        target: (B, *spatial), int64.
        region: (B, *spatial), bool.

    Returns:
        0-dim tensor.

    Raises:
        ValueError: as `losses.cross_entropy`.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import linear_dice_loss
        >>> target = torch.tensor([[0, 0, 1, 1]])
        >>> logits = 20 * torch.nn.functional.one_hot(target, 2).mT.float()  # sure and right
        >>> everywhere = torch.ones_like(target, dtype=torch.bool)
        >>> linear_dice_loss(logits, target, everywhere) < 1e-4
        tensor(True)
    """
    p, t = _within(logits, target, region)
    over = tuple(range(2, logits.ndim))
    return 1 - ((2 * (p * t).sum(over) + 1e-5) / (p.sum(over) + t.sum(over) + 1e-5)).mean()


def _within(logits: Tensor, target: Tensor, region: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax, and bool where a pixel is of a class, both (B, K, *spatial) and 0 beside `region`."""
    check_target(logits, target, region)
    probabilities = at_least_float32(logits).softmax(dim=1)
    classes = torch.arange(logits.shape[1], device=logits.device).view(-1, *[1] * (logits.ndim - 2))
    within = region.unsqueeze(1)
    return torch.where(within, probabilities, 0.0), (target.unsqueeze(1) == classes) & within


def _halves(tensor: Tensor, count: int) -> tuple[Tensor, ...]:
    """Two halves of one size, together of `count` rows or one more: those of `tensor`, repeated if too few."""
    half = -(-count // 2)
    rows = torch.arange(2 * half, device=tensor.device) % len(tensor)
    return tensor[rows].split(half)
