"""What was seen during one update: the record that the rules are about."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from .report import Finding
from .values import Copies

Pass = Literal["g1", "aside", "g2", "g_l"]
"""What a backward call adds to: the direction, what is set aside, the perturbed gradient, the labelled one."""


@dataclass
class Flow:
    """What a backward call brought to the outputs of a forward pass."""

    where: str
    """The backward call."""
    samples: set[int] = field(default_factory=set)
    """Those that got a gradient other than zero."""


@dataclass
class Forward:
    """A call of the model, or of a part of it that is called by itself."""

    where: str
    perturbed: bool
    by_hand: bool
    """Whether the parameters had been moved by something else than `first_step`."""
    with_grad: bool
    """Whether autograd was on."""
    random_state: int
    samples: list[int] = field(default_factory=list)
    """A fingerprint of each; none where they can't be told."""
    flows: dict[Pass, Flow] = field(default_factory=dict)
    """By the pass that they were part of."""
    tracked: bool = False
    """Whether it returned tensors that a gradient can reach."""
    reached: bool = False
    """Whether any backward did, that of torch.autograd.grad included."""
    stale: bool = False
    """Whether the parameters were elsewhere by then."""
    statistics: list[str] = field(default_factory=list)
    """Layers whose running statistics it has moved."""

    @property
    def for_nothing(self) -> bool:
        """Whether no gradient has come through it, though it might have, or was not meant to."""
        return not self.reached and (self.tracked or not self.with_grad)


class Backward(NamedTuple):
    where: str
    adds_to: Pass


class Move(NamedTuple):
    """What `first_step` did."""

    radius: float
    wanted: float
    as_wanted: bool
    eps: list[float]
    """Of the groups."""


@dataclass
class Update:
    """From the gradients of one update to its step."""

    due: bool = True
    """Whether it is to have a perturbed pass (`interval`)."""
    forwards: list[Forward] = field(default_factory=list)
    backwards: list[Backward] = field(default_factory=list)
    first: str = ""
    """Where first_step() was called; empty if it was not. Likewise the next two."""
    second: str = ""
    step: str = ""
    step_by_hand: bool = False
    """Whether `step` came while the parameters were elsewhere."""
    zeroings: list[str] = field(default_factory=list)
    """zero_grad() since the parameters moved, or since they came back."""
    timeline: list[tuple[str, str]] = field(default_factory=list)
    seen: list[Finding] = field(default_factory=list)
    """What was wrong at sight."""
    notes: list[Finding] = field(default_factory=list)
    layers: int = 0
    """With running statistics."""
    dropout: str = ""
    """Name of a dropout layer in training mode."""
    hidden: bool = False
    """Whether first_step() ran where it can't be seen, as in a compiled step."""
    move: Move | None = None
    restored: bool | None = None
    sum_holds: bool | None = None
    """None where it can't be told, as with sharded parameters."""
    # ------------------------------------------------ copies, while they are needed
    theta: Copies = field(default_factory=dict)
    g1: Copies = field(default_factory=dict)
    g2: Copies = field(default_factory=dict)
    aside: Copies = field(default_factory=dict)
    last: Copies | None = None
    """`.grad` as it was left by the last call that may change it at theta*; None if none has."""

    def call(self, name: str, where: str) -> None:
        """Add a line to the timeline."""
        self.timeline.append((name, where))

    def at_theta_star(self) -> list[Forward]:
        """Forward passes with moved parameters."""
        return [f for f in self.forwards if (f.perturbed if self.first else f.by_hand)]

    def went_through(self, adds_to: Pass) -> list[Forward]:
        """The forward passes that the backward calls of that pass went through."""
        return [f for f in self.forwards if adds_to in f.flows]

    def has(self, adds_to: Pass) -> bool:
        """Whether there was a backward call for that."""
        return any(b.adds_to == adds_to for b in self.backwards)
