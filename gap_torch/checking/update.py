"""What was seen during one update: the record that the rules are about."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from .report import Finding
from .values import Copies, Move

Pass = Literal["g1", "aside", "g2", "g_l"]
"""What a backward call adds to: the direction, what is set aside, the perturbed gradient, the labelled one."""


class Flow(NamedTuple):
    """What the backward calls of a pass brought to the outputs of a forward pass."""

    where: str
    """The first of them."""
    samples: set[int]
    """Those that got a gradient other than zero."""


@dataclass
class Forward:
    """A call of the model, or of a part of it that is called by itself."""

    where: str
    at: Pass
    """What a backward call would have added to by then."""
    by_hand: bool
    """Whether the parameters had been moved by something else than `first_step`."""
    with_grad: bool
    """Whether autograd was on."""
    samples: list[int]
    """A fingerprint of each; none where they can't be told."""
    flows: dict[Pass, Flow] = field(default_factory=dict)
    """By the pass that they were part of."""
    tracked: bool = False
    """Whether it returned tensors that a gradient can reach."""
    reached: bool = False
    """Whether any backward did, that of torch.autograd.grad included."""
    moved: list[str] = field(default_factory=list)
    """Running statistics that it has moved, and should not have."""

    @property
    def for_nothing(self) -> bool:
        """Whether no gradient has come through it, though it might have, or was not meant to."""
        return not self.reached and (self.tracked or not self.with_grad)

    @property
    def stale(self) -> bool:
        """Whether the parameters were elsewhere by the time of a backward."""
        return any((self.at == "g2") != (flow == "g2") for flow in self.flows)


@dataclass
class Update:
    """From the gradients of one update to its step."""

    forwards: list[Forward] = field(default_factory=list)
    timeline: list[tuple[str, str]] = field(default_factory=list)
    """The calls and their lines: a `Pass` for a backward, "first_step", "second_step", "step", "zero_grad"."""
    seen: list[Finding] = field(default_factory=list)
    """What was wrong at sight."""
    due: bool = True
    """Whether it is to have a perturbed pass (`interval`)."""
    hidden: bool = False
    """Whether first_step() ran where it can't be seen, as in a compiled step."""
    dropped: str = ""
    """Where the gradients were zeroed that a perturbed pass before had made for a step."""
    step_by_hand: bool = False
    """Whether the step came while the parameters were elsewhere."""
    has_statistics: bool = False
    """Whether the model has running statistics."""
    move: Move | None = None
    """What first_step() did; None where it can't be told, as with sharded parameters."""
    overwritten: bool = False
    """Whether the parameters were changed while they were perturbed."""
    restored: bool = False
    # ------------------------------------------------ copies, while they are needed
    theta: Copies = field(default_factory=dict)
    theta_star: Copies = field(default_factory=dict)
    last: Copies = field(default_factory=dict)
    """`.grad` as it was left by the last call that may change it at theta*."""

    def call(self, name: str, where: str) -> None:
        """Add a line to the timeline."""
        self.timeline.append((name, where))

    def where(self, name: str) -> str:
        """The line of the last such call; empty if there was none."""
        return next((line for call, line in reversed(self.timeline) if call == name), "")

    def at_theta_star(self) -> list[Forward]:
        """Forward passes with moved parameters."""
        return [f for f in self.forwards if (f.at == "g2" if self.where("first_step") else f.by_hand)]

    def went_through(self, adds_to: Pass) -> list[Forward]:
        """The forward passes that the backward calls of that pass went through."""
        return [f for f in self.forwards if adds_to in f.flows]

    def forget(self) -> None:
        """The gradients are gone, and with them whatever made them."""
        self.forwards = [f for f in self.forwards if f.at != "g2"]
        for forward in self.forwards:
            forward.flows.clear()
        self.timeline.clear()
        self.seen.clear()
