"""The methods that a recipe can name: how a table calls them, and how they are built.

Nothing else in the examples asks which method runs.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from gap_torch.consistency import CutMix, FixMatch, Method, Threshold
from gap_torch.consistency.method import Auxiliary
from gap_torch.losses import MaskedLoss, ce_dice_loss, dice_loss

from .recipe import Recipe
from .task import Task

R: dict[str, MaskedLoss] = {"ce_dice": ce_dice_loss, "dice": dice_loss}
"""Of equation 7."""


@dataclass(frozen=True)
class Entry:
    """One method."""

    label: str
    """In tables and pictures."""
    build: Callable[[Recipe, Task, nn.Module], Method] | None
    """From the recipe, the data set and the model at its start; None for labelled images alone."""
    auxiliary: Auxiliary | None = None
    """Further logits that it needs of the network."""
    with_gap: str = ""
    """Label with GAP, where it is not "LABEL + GAP"."""


def _fixmatch(recipe: Recipe, task: Task, tau: float | Threshold) -> Method:
    loss = R[recipe.unlabelled_loss]
    return FixMatch(task.weak(), task.strong(), tau, cutmix=CutMix(), loss=loss, mode=recipe.targets)


TABLE: dict[str, Entry] = {
    "supervised": Entry("Supervised", None),
    "fixmatch": Entry("FixMatch", lambda r, t, _: _fixmatch(r, t, r.tau), with_gap="GapMatch"),
}


def label(recipe: Recipe) -> str:
    """What tables and pictures call a run."""
    entry = TABLE[recipe.method]
    return (entry.with_gap or f"{entry.label} + GAP") if recipe.gap else entry.label


def auxiliary(recipe: Recipe) -> Auxiliary | None:
    """Further logits that the recipe's method needs of the network."""
    return TABLE[recipe.method].auxiliary


def build(recipe: Recipe, task: Task, model: nn.Module) -> Method | None:
    """The recipe's method for `model`, on the model's device; None where labelled images are all there is."""
    make = TABLE[recipe.method].build
    return None if make is None else make(recipe, task, model).to(next(model.parameters()).device)
