"""The methods that a recipe can name: how a table calls them, and how they are built.

Nothing else in the examples asks which method runs.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from gap_torch.consistency import (
    CCT,
    ICT,
    URPC,
    VAT,
    CurriculumThreshold,
    CutMix,
    CutMixSeg,
    EntropyMinimisation,
    FixMatch,
    MeanTeacher,
    Method,
    MixUp,
    PseudoLabel,
    SelfAdaptiveThreshold,
    Teacher,
    Threshold,
)
from gap_torch.consistency.method import Auxiliary
from gap_torch.losses import MaskedLoss, ce_dice_loss, dice_loss

from .recipe import Recipe
from .task import Task

R: dict[str, MaskedLoss] = {"ce_dice": ce_dice_loss, "dice": dice_loss}
"""Of equation 7."""
DECAY = 0.99  # of teachers


@dataclass(frozen=True)
class Entry:
    """One method."""

    label: str
    """In tables and pictures."""
    build: Callable[[Recipe, Task, nn.Module], Method] | None
    """From the recipe, the data set and the model at its start; None for labelled images alone."""
    auxiliary: Auxiliary | None = None
    """Further logits that it needs of the network."""
    tau: bool = False
    """Whether the recipe's tau says which of its pseudo-labels count."""
    with_gap: str = ""
    """Label with GAP, where it is not "LABEL + GAP"."""


def _fixmatch(recipe: Recipe, task: Task, tau: float | Threshold) -> Method:
    loss = R[recipe.unlabelled_loss]
    return FixMatch(task.weak(), task.strong(), tau, cutmix=CutMix(), loss=loss, mode=recipe.targets)


def _cutmix(recipe: Recipe, task: Task, model: nn.Module) -> Method:
    loss, teacher = R[recipe.unlabelled_loss], Teacher(model, DECAY)
    return CutMixSeg(task.weak(), tau=recipe.tau, loss=loss, mode=recipe.targets, teacher=teacher)


TABLE: dict[str, Entry] = {
    "supervised": Entry("Supervised", None),
    "em": Entry("EM", lambda r, t, m: EntropyMinimisation(t.weak())),
    "pseudo_label": Entry(
        "Pseudo Label", lambda r, t, m: PseudoLabel(t.weak(), r.tau, R[r.unlabelled_loss], mode=r.targets), tau=True
    ),
    "ict": Entry("ICT", lambda r, t, m: ICT(Teacher(m, DECAY), t.weak(), mode=r.targets)),
    "mixup": Entry("MixUp", lambda r, t, m: MixUp(t.weak(), mode=r.targets)),
    "cutmix": Entry("CutMix", _cutmix, tau=True),
    "vat": Entry("VAT", lambda r, t, m: VAT(t.weak(), mode=r.targets)),
    "fixmatch": Entry("FixMatch", lambda r, t, m: _fixmatch(r, t, r.tau), tau=True, with_gap="GapMatch"),
    "flexmatch": Entry(
        "FlexMatch", lambda r, t, m: _fixmatch(r, t, CurriculumThreshold(t.num_classes, r.tau)), tau=True
    ),
    "freematch": Entry("FreeMatch", lambda r, t, m: _fixmatch(r, t, SelfAdaptiveThreshold(t.num_classes))),
    "mean_teacher": Entry("Mean Teacher", lambda r, t, m: MeanTeacher(Teacher(m, DECAY), t.weak(), mode=r.targets)),
    "urpc": Entry("URPC", lambda r, t, m: URPC(t.weak()), URPC.auxiliary),
    "cct": Entry("CCT", lambda r, t, m: CCT(t.weak(), mode=r.targets), CCT.auxiliary),
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
