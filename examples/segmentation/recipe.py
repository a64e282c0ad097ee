"""What a run is made of, in one frozen record."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from segmentation.errors import InputError
from segmentation.methods import ENTRIES, PHASES, TABLE, Own

Run = tuple[str, bool]
"""A method of the table, and whether GAP is on it."""
METHODS = tuple(TABLE)
SUPERVISED = "supervised"
GAPMATCH: Run = ("fixmatch", True)
NO_GAP: Run = (SUPERVISED, True)  # nothing to perturb by
METHOD_FIELDS = ("warm_up", "tau", "targets", "unlabelled_loss", "weight", "ramp_up", "joint", "pre_training")
"""Mean nothing without a method."""
GAP_FIELDS = ("eps", "alpha", "aligned", "freeze_statistics", "replay_dropout")
"""Mean nothing without GAP."""
WITH_GAP = "+gap"  # what a run's name ends with
AT_LEAST_ONE = ("iterations", "width", "labelled_batch", "unlabelled_batch", "validate_every", "log_every")
OWN = tuple(field.name for field in fields(Own))
"""Fields of which a method has values of its own, which None stands for."""
BEFORE = {
    "lr_schedule": "poly",
    "labelled_weight": 1.0,
    "blur": 1.0,
    "ramp_up": 0.0,
    "joint": False,
    "pre_training": 0.0,
}
"""What there was before fields that older checkpoints and records lack."""
HALVINGS = 4  # of the image on its way down the UNet and the V-Net


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run's weights but the data, the split and the hardware.

    Defaults are the field's common recipe for ACDC; presets say where they differ (`task.Task.presets`).
    """

    method: str = "fixmatch"
    """One of the table (`methods.TABLE`)."""
    gap: bool = True
    """The gradient at theta* too, on top of the method's own; with FixMatch this is GapMatch."""
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
    lr_schedule: Literal["poly", "constant", "step"] = "poly"
    """That of the field for ACDC, of the paper's first author, and of older codes for LA (`training.schedules`)."""
    power: float = 0.9
    """Of "poly"."""
    labelled_weight: float | None = None
    """Of the labelled loss. None, here and below: the method's own (`methods.Own`, which says what they mean)."""

    # the consistency method
    blur: float = 1.0
    """Scale of the strong view's blur, of 0.1 to 2 pixels: in smaller images as wide a blur takes more away."""
    tau: float = 0.95
    targets: Literal["eval", "batch", "train"] | None = None
    unlabelled_loss: Literal["ce_dice", "dice"] | None = None
    weight: float | None = None
    ramp_up: float | None = None
    joint: bool | None = None
    pre_training: float | None = None
    warm_up: int = 0
    """Iterations on labelled images alone, before the method joins; `own_warm_up` are those that there are."""
    options: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()
    """The method's own, by name; kept as sorted pairs, without those at their defaults (`methods.Entry.options`)."""

    # GAP
    eps: float = 0.1
    alpha: float = 1.0
    aligned: Literal["targets", "predictions", "pseudo_labels"] = "targets"
    """What the perturbed prediction is held to: the method's own targets, fixed at theta (equations 8-9), or the
    unperturbed prediction, softly or by its confident classes (`gap_torch.consistency.alignment`). The classes count
    with alpha alone, whatever the method's weight."""
    freeze_statistics: bool = True
    """Whether batch-norm running statistics stay still in the perturbed pass."""
    replay_dropout: bool = False
    """Whether the perturbed pass draws the random numbers of the first pass again."""

    # the weights that are scored
    average_decay: float = 0.0
    """Of an exponential moving average over iterations; 0 scores the trained weights themselves."""
    statistics_samples: int = 0
    """Slices or crops over which batch-norm statistics are taken anew before scoring; 0 keeps the running ones."""

    # bookkeeping
    validate_every: int = 500
    log_every: int = 20

    def __post_init__(self) -> None:
        if self.method not in ENTRIES:
            raise InputError(f"method must be one of {', '.join(METHODS)}, not {self.method!r}.")
        given, defaults = dict(self.options), ENTRIES[self.method].options
        for name in given:
            if name not in defaults:
                there_are = ", ".join(defaults) or "none"
                raise InputError(f"options: {self.method} has no {name!r}; its options: {there_are}.")
        changed = {name: value for name, value in given.items() if value != defaults[name]}
        object.__setattr__(self, "options", tuple(sorted(changed.items())))  # one recipe, one form; and a hash
        for name, choices in CHOICES.items():
            if getattr(self, name) not in (*choices, *(None,) * (name in OWN)):
                raise InputError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}.")
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
        if (self.method, self.gap) == NO_GAP or (self.gap and self.method in PHASES):
            name = self.method
            raise InputError(f"{name} with GAP: there is no consistency loss to perturb by; take a method that has.")
        if self.gap and self.aligned != "targets" and ENTRIES[self.method].beyond_logits:
            raise InputError(
                f"{self.name} with aligned={self.aligned}: its loss reads more than logits, which those readings of "
                "the loss at theta* compare; take aligned=targets."
            )
        if self.warm_up < 0:
            raise InputError(f"warm_up must not be negative, not {self.warm_up}.")
        if self.warm_up >= self.iterations:  # for supervised too: a preset is good for all methods or for none
            raise InputError(f"warm_up must be below iterations ({self.iterations}), not {self.warm_up}.")
        for name in ("lr", "eps", "alpha", "weight", "labelled_weight", "pre_training"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} must be finite and not negative, not {value}.")
        if not 0 < self.blur <= 1:
            raise InputError(f"blur must be above 0 and at most 1, not {self.blur}.")
        for name in ("tau", "ramp_up"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise InputError(f"{name} must be between 0 and 1, not {value}.")

    @property
    def name(self) -> str:
        """Of the run, in folders and on the command line; `method_of` reads it."""
        return run_name(self.method, self.gap)

    def for_run(self, name: str) -> "Recipe":
        """The same for the run called `name`. Raises InputError for an unknown one."""
        method, gap = method_of(name)
        return replace(self, method=method, gap=gap)

    @property
    def label(self) -> str:
        """Of the run, in tables and pictures."""
        entry = ENTRIES[self.method]
        return (entry.with_gap or f"{entry.label} + GAP") if self.gap else entry.label

    @property
    def own(self) -> Own:
        """The method's own, but what is given here."""
        given = {name: value for name in OWN if (value := getattr(self, name)) is not None}
        return replace(ENTRIES[self.method].own, **given)

    @property
    def phase(self) -> "Recipe | None":
        """The run that this one starts from, one of labelled images alone; None for random weights."""
        name, iterations = ENTRIES[self.method].phase, round(self.own.pre_training * self.iterations)
        if not name or not iterations:
            return None
        options = {option: value for option, value in dict(self.options).items() if option in ENTRIES[name].options}
        return replace(self, method=name, gap=False, iterations=iterations, warm_up=0, options=options)

    @property
    def own_warm_up(self) -> int:
        """That of this run: none where labelled images alone had a run of their own before."""
        return 0 if self.phase else self.warm_up

    @property
    def stages(self) -> tuple["Recipe", ...]:
        """This run behind those that it needs, each of which starts from the one before."""
        return (self,) if self.phase is None else (*self.phase.stages, self)

    @property
    def all_options(self) -> dict[str, Any]:
        """Of the method, by name, defaults among them."""
        return {**ENTRIES[self.method].options, **dict(self.options)}

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON and checkpoints, with all that is the method's own: that may change."""
        own = {**asdict(self.own), "warm_up": self.own_warm_up, "options": self.all_options}
        return {**asdict(self), **own}


def _choices(hint: Any) -> tuple[str, ...]:
    return (
        get_args(hint) if get_origin(hint) is Literal else tuple(c for part in get_args(hint) for c in _choices(part))
    )


CHOICES: dict[str, tuple[str, ...]] = {
    name: choices for name, hint in get_type_hints(Recipe).items() if (choices := _choices(hint))
}
"""Fields that are one of a few words -> those."""


def run_name(method: str, gap: bool) -> str:
    """METHOD, METHOD+gap, or gapmatch."""
    return "gapmatch" if (method, gap) == GAPMATCH else method + WITH_GAP * gap


RUNS = tuple(run_name(method, gap) for method in METHODS for gap in (False, True) if (method, gap) != NO_GAP)
"""Names of all runs."""


def method_of(name: str) -> Run:
    """Method, and whether with GAP, of the run called `name`. Raises InputError for an unknown one."""
    if name == run_name(*GAPMATCH):
        return GAPMATCH
    plain = name.removesuffix(WITH_GAP)
    for method in METHODS:
        if method == plain:
            return method, name != plain
    raise InputError(f"method {name!r}: not one of {', '.join(METHODS)} (each also as NAME{WITH_GAP}) and gapmatch.")


# For short runs, whose running statistics and single weights are too noisy to compare methods by (docs/acdc.md).
AVERAGED: dict[str, Any] = {"average_decay": 0.99, "statistics_samples": 240}
# The reduced recipe for a CPU. At this length cross-entropy on confident background threatens to win over the organ.
REDUCED: dict[str, Any] = {**AVERAGED, "unlabelled_loss": "dice"}
