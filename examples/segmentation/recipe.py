"""What a run is made of, in one frozen record."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .errors import InputError

Method = Literal["supervised", "fixmatch", "gapmatch"]
METHODS: tuple[Method, ...] = ("supervised", "fixmatch", "gapmatch")
AT_LEAST_ONE = ("iterations", "width", "labelled_batch", "unlabelled_batch", "validate_every", "log_every")
HALVINGS = 4  # of the image on its way down the UNet and the V-Net


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run's weights but the data, the split and the hardware.

    Defaults are the field's common recipe for ACDC; presets say where they differ (`task.Task.presets`).
    """

    method: Method = "gapmatch"
    seed: int = 0
    iterations: int = 30_000

    # data and network
    size: tuple[int, ...] = (256, 256)
    """Of the network's input in pixels or voxels."""
    width: int = 16
    """Channels of the network's first level."""
    labelled_batch: int = 12
    unlabelled_batch: int = 12

    # the base optimizer
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    power: float = 0.9
    """lr(t) = lr * (1 - t / iterations) ** power."""

    # FixMatch and GAP
    tau: float = 0.95
    eps: float = 0.1
    alpha: float = 1.0
    targets: Literal["eval", "batch", "train"] = "batch"
    """The model's mode while it makes pseudo-labels (`gap_torch.consistency.FixMatch`)."""
    unlabelled_loss: Literal["ce_dice", "dice"] = "ce_dice"
    """R of equation 7: cross-entropy and Dice as in the paper, or Dice alone as in UniMatch."""

    # the weights that are scored
    average_decay: float = 0.0
    """Of an exponential moving average over iterations; 0 scores the trained weights themselves."""
    statistics_samples: int = 0
    """Slices or crops over which batch-norm statistics are taken anew before scoring; 0 keeps the running ones."""

    # bookkeeping
    validate_every: int = 500
    log_every: int = 20

    def __post_init__(self) -> None:
        for name in AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if any(side < 1 or side % 2**HALVINGS for side in self.size):
            raise InputError(
                f"size must be multiples of {2**HALVINGS} (the network halves it {HALVINGS} times), not {self.size}."
            )
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed must be between 0 and 2**32 - 1, not {self.seed}.")
        if self.statistics_samples < 0:
            raise InputError(f"statistics_samples must not be negative, not {self.statistics_samples}.")
        if not 0 <= self.average_decay < 1:
            raise InputError(f"average_decay must be at least 0 and below 1, not {self.average_decay}.")
        for name in ("lr", "eps", "alpha"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise InputError(f"{name} must be finite and not negative, not {getattr(self, name)}.")
        if not 0 <= self.tau <= 1:
            raise InputError(f"tau must be between 0 and 1, not {self.tau}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON and checkpoints."""
        return asdict(self)


# The reduced recipe for a CPU. At this length cross-entropy on confident background threatens to win over the organ,
# and running statistics and single weights are too noisy to compare methods by (docs/acdc.md).
REDUCED: dict[str, Any] = {
    "unlabelled_loss": "dice",
    "average_decay": 0.99,
    "statistics_samples": 240,
}
