"""FixMatch (Sohn et al., 2020) for segmentation: equations 4-7 of the GapMatch paper.

With GAP around it (`GAPWrapper.perturbed`) it is GapMatch: `loss` at theta is equations 6-7, at theta* 8-9.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..losses import ce_dice_loss, wide
from .cutmix import CutMix

Augmentation = Callable[[Tensor], Tensor]
MaskedLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
Mode = Literal["eval", "batch", "train"]


@dataclass(frozen=True)
class Views:
    """Strong views and their fixed targets."""

    strong: Tensor
    """u^s, (B, C, *spatial)."""
    pseudo_label: Tensor
    """Class indices, (B, *spatial), int64."""
    confident: Tensor
    """Where the weak view's highest probability reaches tau, (B, *spatial), bool."""


class FixMatch:
    """Pseudo-labels from a weak view, learnt on a strong one where they are confident.

    Args:
        weak: weak augmentation of a batch (B, C, *spatial): geometry.
        strong: strong augmentation of the weak view: intensities alone, so that pseudo-labels stay in place.
        tau: least confidence of a pseudo-label that counts (equation 5).
        cutmix: paste boxes between the strong views, their pseudo-labels and confidence with them; None for none.
        loss: R of equation 7, called with logits (B, K, *spatial), pseudo-label and mask (B, *spatial).
        mode: the model's mode while it makes pseudo-labels. "eval": running statistics, no dropout. "batch": no
            dropout either, but batch norm takes its statistics from the weak views, and its running ones see them.
            "train": the model's own, as a rule with dropout too (as in UniMatch).

    Raises:
        ValueError: `tau` is outside [0, 1], or `mode` is unknown.
    """

    def __init__(
        self,
        weak: Augmentation,
        strong: Augmentation,
        tau: float = 0.95,
        cutmix: CutMix | None = None,
        loss: MaskedLoss = ce_dice_loss,
        mode: Mode = "eval",
    ) -> None:
        if not 0 <= tau <= 1:
            raise ValueError(f"tau must be between 0 and 1, got {tau}.")
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {get_args(Mode)}, got {mode!r}.")
        self.weak, self.strong, self.tau, self.cutmix = weak, strong, tau, cutmix
        self.criterion, self.mode = loss, mode

    @torch.no_grad()
    def prepare(self, model: nn.Module, unlabelled: Tensor) -> Views:
        """Both views of `unlabelled` (B, C, *spatial) and the pseudo-labels (equations 4 and 5)."""
        weak = self.weak(unlabelled)
        with _in_mode(model, self.mode):
            probabilities = wide(model(weak)).softmax(dim=1)
        torch.clear_autocast_cache()  # an autocast region around this and `loss` would reuse casts without gradient
        confidence, pseudo_label = probabilities.max(dim=1)
        confident = confidence >= self.tau
        strong = self.strong(weak)
        if self.cutmix is not None:
            strong, pseudo_label, confident = self.cutmix(strong, pseudo_label, confident)
        return Views(strong, pseudo_label, confident)

    def loss(self, model: nn.Module, views: Views) -> Tensor:
        """R between the pseudo-labels and the prediction on the strong view (equations 6-7; at theta*, 8-9)."""
        return self.criterion(model(views.strong), views.pseudo_label, views.confident)


@contextmanager
def _in_mode(model: nn.Module, mode: Mode) -> Iterator[None]:
    """`model` in `mode` for a while; then every sub-module has its own training flag again.

    No mode puts a layer into training that the user has frozen.
    """
    before = {module: module.training for module in model.modules()}
    for module in before:
        if mode == "eval" or (mode == "batch" and not isinstance(module, _BatchNorm)):
            module.training = False
    try:
        yield
    finally:
        for module, was_training in before.items():
            module.training = was_training
