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
"""Logits (B, K, *spatial); with auxiliary ones behind them where a method asks for those."""


@dataclass(frozen=True)
class Batch:
    """What one iteration hands a method. Most need the unlabelled images alone: `Batch(unlabelled)`."""

    unlabelled: Tensor
    """(B, C, *spatial), not augmented."""
    labelled: Tensor | None = None
    """(B', C, *spatial), weakly augmented."""
    labels: Tensor | None = None
    """Of those, (B', *spatial), int64."""
    progress: float | Tensor = 0.0
    """How far the run has come, in [0, 1): a number, or 0-dim on the images' device, which a captured step needs."""


@dataclass(frozen=True)
class Views:
    """What `prepare` fixes at theta, for any number of passes."""

    inputs: tuple[Tensor, ...]
    """What the model predicts on, one training pass each, (B, C, *spatial); none where a method has but its
    `labelled_loss`. Every pass reads them, so a model must not
    write to them: a first layer that works in place (`nn.ReLU(inplace=True)`) would hand the next pass something else.
    """
    target: Tensor | None = None
    """Class indices (B, *spatial), int64, or probabilities (B, K, *spatial); None where a loss needs none."""
    mask: Tensor | None = None
    """Where the target counts, (B, *spatial), bool; None for everywhere."""
    fixed: Any = None
    """What else `compare` reads: a method's own, of any type."""
    labelled: Tensor | None = None
    """Images for the labelled pass in place of `Batch.labelled`; None for those themselves."""
    mixed: bool = False
    """Whether `labelled` is `inputs`, one behind the other. A loop that has their outputs may hand those to
    `labelled_loss`, in that order, and spare a pass."""
    attached: tuple[bool, ...] | None = None
    """Of each of `inputs`, whether `compare` reads auxiliary logits of it; None for all. Where it does not, a loop may
    spare the model what makes them; the outputs may be a tuple all the same."""


class Method(nn.Module, ABC):
    """A consistency method. One training step is `prepare`, `loss` at theta, `loss` at theta* with GAP, `update`.

    A method that needs more of the network than its logits takes them as auxiliary ones: in training mode the model
    returns (logits, *auxiliary), in eval mode logits alone.

    A module, so that whatever state a method has (a teacher, thresholds) is in its `state_dict` and follows `to`.
    None of it is trained by the run's optimizer: parameters for that belong to the model.
    """

    @abstractmethod
    def prepare(self, model: nn.Module, batch: Batch) -> Views:
        """Views of `batch` and their targets, made at theta; no gradient reaches `model`."""

    @abstractmethod
    def compare(self, outputs: tuple[Outputs, ...], views: Views) -> Tensor:
        """The loss of what the model made of each of `views.inputs`, 0-dim. Nothing changes: GAP calls it twice."""

    def loss(self, model: nn.Module, views: Views) -> Tensor:
        """The consistency loss of `model` on `views`, 0-dim: at theta for g1, at theta* for g2."""
        return self.compare(tuple(model(images) for images in views.inputs), views)

    def weight(self, progress: float) -> float:
        """What the loss counts beside the labelled one's, `progress` being in [0, 1): 1, unless a method ramps up."""
        return 1.0

    def labelled_loss(
        self, criterion: Criterion, outputs: Outputs, target: Tensor, views: Views | None = None
    ) -> Tensor:
        """`criterion` of labelled images' logits: of the model's own alone, unless a method trains auxiliary ones.

        `views` are the iteration's, for a method that has other labelled images in them (`Views.labelled`); None before
        the method joins, as in a warm-up.
        """
        return criterion(logits_of(outputs), target)

    def update(self, model: nn.Module, batch: Batch) -> None:
        """To be called after each optimizer step; a teacher follows `model` here, an adversary takes its own step."""

    def logged(self) -> dict[str, Tensor]:
        """How the method's own parts fare, after `update`: name -> 0-dim, on the device; nothing by default."""
        return {}


def unlabelled_of(batch: Batch) -> Tensor:
    """The unlabelled images of `batch`.

    Raises:
        TypeError: it is no `Batch`; a tensor would be what `prepare` took before there were batches.
    """
    if not isinstance(batch, Batch):
        raise TypeError(f"prepare takes a Batch, got {type(batch).__name__}; write Batch(unlabelled).")
    return batch.unlabelled


def labelled_of(batch: Batch) -> tuple[Tensor, Tensor]:
    """The labelled images of `batch`, and their labels.

    Raises:
        ValueError: there are none.
    """
    if batch.labelled is None or batch.labels is None:
        raise ValueError("this method needs labelled images too; write Batch(unlabelled, labelled, labels).")
    return batch.labelled, batch.labels


def all_images(batch: Batch, unlabelled: Tensor) -> Tensor:
    """The labelled images of `batch`, if it has any, and behind them `unlabelled`, views of the unlabelled ones."""
    return unlabelled if batch.labelled is None else torch.cat([batch.labelled, unlabelled])


def only(outputs: tuple[Outputs, ...]) -> Outputs:
    """What the model made of the one view of a method that has no other. Raises as `one_each`."""
    return one_each(outputs, 1)[0]


def one_each(outputs: tuple[Outputs, ...], views: int) -> tuple[Outputs, ...]:
    """`outputs`, if they are of so many views.

    Raises:
        TypeError: `outputs` is no tuple or list, or has not as many entries. A tensor's first sample, or the logits
            before auxiliary ones, would give a number all the same, and a wrong one.
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
    """The model's own logits and the auxiliary ones behind them.

    Raises:
        TypeError: neither a tensor nor a tuple or list of them.
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
    """The model's own logits, without auxiliary ones.

    Raises:
        TypeError: neither a tensor nor a tuple or list of them.
    """
    return all_logits(outputs)[0]


def with_auxiliary_logits(outputs: Outputs) -> tuple[Tensor, ...]:
    """The model's own logits and the auxiliary ones behind them. Raises as `auxiliary_logits`, where there are none."""
    return logits_of(outputs), *auxiliary_logits(outputs)


def auxiliary_logits(outputs: Outputs) -> tuple[Tensor, ...]:
    """The auxiliary logits behind the model's own.

    Raises:
        ValueError: there are none.
        TypeError: neither a tensor nor a tuple or list of them.
    """
    auxiliary = all_logits(outputs)[1:]
    if not auxiliary:
        raise ValueError(
            "this method needs a model that returns (logits, *auxiliary) in training mode, but its outputs have no "
            "auxiliary logits. Is it in eval mode?"
        )
    return auxiliary
