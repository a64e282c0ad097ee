"""What every consistency method is: views with fixed targets, and a loss that compares them with predictions."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..losses import Criterion

Augmentation = Callable[[Tensor], Tensor]
"""Images (B, C, *spatial) to images of the same shape."""
Outputs = Tensor | tuple[Tensor, ...]
"""Logits (B, K, *spatial); or a tuple of logits and the auxiliary logits that a method asks for."""


@dataclass(frozen=True)
class Batch:
    """The images of one iteration. Most methods need the unlabelled images alone: `Batch(unlabelled)`.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import Batch
        >>> images, labels = torch.rand(2, 1, 8, 8), torch.randint(3, (2, 8, 8))
        >>> batch = Batch(torch.rand(4, 1, 8, 8), images, labels, progress=0.1)
    """

    unlabelled: Tensor
    """Unlabelled images (B, C, *spatial), not augmented."""
    labelled: Tensor | None = None
    """Labelled images (B', C, *spatial), weakly augmented."""
    labels: Tensor | None = None
    """Labels of `labelled`, (B', *spatial), int64."""
    progress: float | Tensor = 0.0
    """How far the run has come, in [0, 1): a number, or 0-dim on the images' device, which a captured step needs."""


@dataclass(frozen=True)
class Views:
    """What `prepare` fixes at theta, for any number of passes.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import Views
        >>> strong, probabilities = torch.rand(2, 1, 8, 8), torch.rand(2, 3, 8, 8).softmax(dim=1)
        >>> confidence, pseudo_label = probabilities.max(dim=1)
        >>> views = Views((strong,), target=pseudo_label, mask=confidence > 0.4)
    """

    inputs: tuple[Tensor, ...]
    """Images (B, C, *spatial) that the model predicts on, one training pass each; empty where a method has nothing but
    its `labelled_loss`. Every pass reads these images, so a model must not write to them: a first layer that works in
    place (`nn.ReLU(inplace=True)`) would give other images to the next pass.
    """
    target: Tensor | None = None
    """Class indices (B, *spatial), int64, or probabilities (B, K, *spatial); None where a loss needs none."""
    mask: Tensor | None = None
    """Where the target counts, (B, *spatial), bool; None for everywhere."""
    fixed: Any = None
    """Anything else that `compare` reads, of any type."""
    labelled: Tensor | None = None
    """Images for the labelled pass in place of `Batch.labelled`; None for `Batch.labelled` itself."""
    mixed: bool = False
    """Whether `labelled` is `inputs`, one behind the other. A loop that has the outputs of `inputs` may give them to
    `labelled_loss`, in that order, and save a pass."""
    labelled_first: bool = False
    """Whether the first of `inputs` begins with `Batch.labelled`. A loop that puts labelled images into one batch with
    the first view need not add them, and may give the first rows of its outputs to `labelled_loss`."""
    attached: tuple[bool, ...] | None = None
    """For each of `inputs`, whether `compare` reads its auxiliary logits; None for all of them. Where it does not, a
    loop need not let the model compute auxiliary logits; the outputs may still be a tuple."""


class Method(nn.Module, ABC):
    """A consistency method. One training step is `prepare`, `loss` at theta, `loss` at theta* with GAP, `update`.

    A method that needs more of the network than its logits takes auxiliary logits: in training mode the model returns
    (logits, *auxiliary), in eval mode logits alone.

    It is a module, so that a method's state (a teacher, thresholds) is in its `state_dict` and follows `to`. The run's
    optimizer trains none of this state: trained parameters belong to the model.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import Batch, Method, Views, logits_of
        >>> class Agree(Method):  # the predictions on an image and on its mirror image are to agree
        ...     @torch.no_grad()
        ...     def prepare(self, model, batch):
        ...         images = batch.unlabelled
        ...         return Views((images,), target=model(images.flip(-1)).flip(-1))
        ...     def compare(self, outputs, views):
        ...         return (logits_of(outputs[0]) - views.target).square().mean()
        >>> model, method = torch.nn.Conv2d(1, 3, kernel_size=3), Agree()
        >>> views = method.prepare(model, Batch(torch.rand(2, 1, 8, 8)))
        >>> method.loss(model, views).backward()
    """

    @abstractmethod
    def prepare(self, model: nn.Module, batch: Batch) -> Views:
        """Views of `batch` and their targets, made at theta; no gradient reaches `model`."""

    @abstractmethod
    def compare(self, outputs: tuple[Outputs, ...], views: Views) -> Tensor:
        """The loss, 0-dim, of the model's outputs for each of `views.inputs`. No state changes: GAP calls it twice."""

    def loss(self, model: nn.Module, views: Views) -> Tensor:
        """The consistency loss of `model` on `views`, 0-dim: at theta for g1, at theta* for g2."""
        return self.compare(tuple(model(images) for images in views.inputs), views)

    def weight(self, progress: float) -> float:
        """Weight of the loss beside the labelled loss, at a `progress` in [0, 1): 1, unless a method ramps it up."""
        return 1.0

    def labelled_loss(
        self, criterion: Criterion, outputs: Outputs, target: Tensor, views: Views | None = None
    ) -> Tensor:
        """The labelled loss, 0-dim: `criterion` of the model's own logits, unless a method trains more than those.

        Args:
            criterion: called with logits (B', K, *spatial) and `target`.
            outputs: what the model returns for the labelled images.
            target: labels (B', *spatial), int64.
            views: the iteration's views, for a method that has other labelled images in them (`Views.labelled`); None
                before the method joins, as in a warm-up.
        """
        return criterion(logits_of(outputs), target)

    def update(self, model: nn.Module, batch: Batch) -> None:
        """To be called after each optimizer step: a teacher follows `model` here, an adversary takes its own step."""

    def logged(self) -> dict[str, Tensor]:
        """What to log of the method, after `update`: name -> 0-dim tensor on the device; by default nothing."""
        return {}


def unlabelled_of(batch: Batch) -> Tensor:
    """The unlabelled images of `batch`.

    Raises:
        TypeError: `batch` is no `Batch`, but a tensor, as `prepare` took before there were batches, or something else.
    """
    if not isinstance(batch, Batch):
        raise TypeError(f"prepare takes a Batch, got {type(batch).__name__}; write Batch(unlabelled).")
    return batch.unlabelled


def labelled_of(batch: Batch) -> tuple[Tensor, Tensor]:
    """The labelled images of `batch`, and their labels.

    Raises:
        ValueError: `batch` has no labelled images, or no labels.
    """
    if batch.labelled is None or batch.labels is None:
        raise ValueError("this method needs labelled images too; write Batch(unlabelled, labelled, labels).")
    return batch.labelled, batch.labels


def all_images(batch: Batch, unlabelled: Tensor) -> Tensor:
    """The labelled images of `batch`, if it has any, and behind them `unlabelled`, views of its unlabelled images."""
    return unlabelled if batch.labelled is None else torch.cat([batch.labelled, unlabelled])


def all_in_one_view(batch: Batch, weak: Augmentation) -> Views:
    """The labelled images of `batch`, if it has any, and behind them weak views of the unlabelled ones, in one view."""
    images = all_images(batch, weak(unlabelled_of(batch)))
    return Views((images,), labelled_first=batch.labelled is not None)


def only(outputs: tuple[Outputs, ...]) -> Outputs:
    """The model's outputs for the only view of a method. Raises as `one_each`."""
    return one_each(outputs, 1)[0]


def one_each(outputs: tuple[Outputs, ...], views: int) -> tuple[Outputs, ...]:
    """`outputs` as a tuple, if it has one entry for each of `views` views.

    Raises:
        TypeError: `outputs` is no tuple or list, or has another number of entries. Without this check a tensor's first
            sample, or the logits before auxiliary ones, would give a wrong number.
    """
    got = type(outputs).__name__
    if isinstance(outputs, (tuple, list)):
        if len(outputs) == views:
            return tuple(outputs)
        got += f" of {len(outputs)}"
    entries = "outputs," if views == 1 else ", ".join(f"outputs_{place + 1}" for place in range(views))
    raise TypeError(
        f"compare takes a tuple, what the model made of each of views.inputs, here of {views}, got a "
        f"{got}; write compare(({entries}), views), or loss(model, views)."
    )


def all_logits(outputs: Outputs) -> tuple[Tensor, ...]:
    """The model's own logits and the auxiliary logits behind them.

    Raises:
        TypeError: `outputs` is neither a tensor nor a tuple or list of tensors.
    """
    if isinstance(outputs, Tensor):
        return (outputs,)
    if not isinstance(outputs, (tuple, list)):
        raise TypeError(
            f"the model must return logits or a tuple (logits, *auxiliary), got {type(outputs).__name__}; wrap "
            'one that returns a dict (torchvision: model(images)["out"]) in a module that returns its logits.'
        )
    return tuple(outputs)


def logits_of(outputs: Outputs) -> Tensor:
    """The model's own logits, without auxiliary logits.

    Raises:
        TypeError: `outputs` is neither a tensor nor a tuple or list of tensors.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import logits_of
        >>> logits, auxiliary = torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
        >>> logits_of((logits, auxiliary)) is logits_of(logits) is logits
        True
    """
    return all_logits(outputs)[0]


def with_auxiliary_logits(outputs: Outputs) -> tuple[Tensor, ...]:
    """The model's own logits and the auxiliary logits behind them. Raises as `auxiliary_logits`."""
    return logits_of(outputs), *auxiliary_logits(outputs)


def auxiliary_logits(outputs: Outputs) -> tuple[Tensor, ...]:
    """The auxiliary logits behind the model's own.

    Raises:
        ValueError: `outputs` has no auxiliary logits.
        TypeError: `outputs` is neither a tensor nor a tuple or list of tensors.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import auxiliary_logits
        >>> logits, auxiliary = torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
        >>> auxiliary_logits((logits, auxiliary))[0] is auxiliary
        True
    """
    auxiliary = all_logits(outputs)[1:]
    if not auxiliary:
        raise ValueError(
            "this method needs a model that returns (logits, *auxiliary) in training mode, but its outputs have no "
            "auxiliary logits. Is it in eval mode?"
        )
    return auxiliary
