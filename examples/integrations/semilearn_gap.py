"""GAP in USB (semilearn): a mix-in for its algorithms, and the hook that takes the step.

    import semilearn_gap  # registers "gapmatch": FixMatch with GAP; then --algorithm gapmatch, as any other

What is particular, and which algorithms it fits: docs/recipes/usb.md.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from semilearn.algorithms.fixmatch import FixMatch
from semilearn.core.criterions import ConsistencyLoss
from semilearn.core.hooks import ParamUpdateHook
from semilearn.core.utils import ALGORITHMS
from torch import Tensor

from gap_torch import GAPWrapper

EPS, ALPHA = 0.1, 1.0  # where the configuration has no gap_eps and gap_alpha


class KeptApart(ConsistencyLoss):
    """The consistency loss, whose graph it keeps to itself: what it returns adds to a total in value alone."""

    def __init__(self) -> None:
        super().__init__()
        self.loss: Tensor | None = None
        self.again: Callable[[Tensor], Tensor] | None = None
        """The same loss of other logits: targets and mask stay those of theta."""

    def forward(self, logits: Tensor, targets: Tensor, name: str = "ce", mask: Tensor | None = None) -> Tensor:
        self.again = partial(super().forward, targets=targets, name=name, mask=mask)
        self.loss = self.again(logits)
        return self.loss.detach()


class GAPUpdateHook(ParamUpdateHook):
    """The update of `ParamUpdateHook`, with the perturbed pass before it."""

    def after_train_step(self, algorithm: Any) -> None:
        kept, rest, scale = algorithm.consistency_loss, algorithm.out_dict["loss"], self._scale(algorithm)
        optimizer, model, weight = algorithm.optimizer, algorithm.model, algorithm.lambda_u
        with optimizer.set_aside():  # the labelled loss; the forward pass may be shared
            scale(rest).backward(retain_graph=True)
        scale(weight * kept.loss).backward()
        with optimizer.perturbed(model):
            with algorithm.amp_cm():
                loss = kept.again(algorithm.strong_logits())
            scale(weight * loss).backward()
        # The sum is in .grad: of semilearn's own update, the backward has nothing left to do.
        algorithm.out_dict["loss"] = rest.detach().requires_grad_()
        super().after_train_step(algorithm)

    @staticmethod
    def _scale(algorithm: Any) -> Callable[[Tensor], Tensor]:
        return algorithm.loss_scaler.scale if algorithm.use_amp else lambda loss: loss


class GAP:
    """For an algorithm that compares `self.model(x_ulb_s)` by one call of `self.consistency_loss`, times `lambda_u`.

    class GapFlexMatch(GAP, FlexMatch): ...
    """

    batch: dict[str, Any]
    """The present step's, which the perturbed pass predicts on again."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.consistency_loss = KeptApart()

    def set_optimizer(self) -> tuple[GAPWrapper, Any]:
        optimizer, scheduler = super().set_optimizer()  # type: ignore[misc]
        args: Any = self.args  # type: ignore[attr-defined]
        return GAPWrapper(optimizer, getattr(args, "gap_eps", EPS), getattr(args, "gap_alpha", ALPHA)), scheduler

    def set_hooks(self) -> None:
        super().set_hooks()  # type: ignore[misc]
        # under the name of the hook whose place it takes
        self.register_hook(GAPUpdateHook(), "ParamUpdateHook", "HIGHEST")  # type: ignore[attr-defined]
        hooks: Any = self._hooks  # type: ignore[has-type]
        self._hooks = [hook for hook in hooks if type(hook) is not ParamUpdateHook]

    def process_batch(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.batch = super().process_batch(*args, **kwargs)  # type: ignore[misc]
        return self.batch

    def strong_logits(self) -> Tensor:
        """Of the strong views, beside what they went through the model with at theta, as batch norm sees all of it."""
        model, use_cat, strong = self.model, self.use_cat, self.batch["x_ulb_s"]  # type: ignore[attr-defined]
        if not use_cat:
            return model(strong)["logits"]
        everything = torch.cat([self.batch[name] for name in ("x_lb", "x_ulb_w", "x_ulb_s")])
        return model(everything)["logits"][-len(strong) :]


@ALGORITHMS.register("gapmatch")
class GapMatch(GAP, FixMatch):
    """FixMatch with GAP."""
