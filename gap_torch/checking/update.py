"""What was seen during one update: the record that the rules are about."""

import math
from dataclasses import dataclass, field
from typing import Literal

from .report import Finding
from .values import Move

Pass = Literal["g1", "aside", "g2", "g_l"]
"""What a backward call adds to: the direction, what is set aside, the perturbed gradient, the labelled one."""


@dataclass
class Flow:
    """What the backward calls of a pass brought to the outputs of a forward pass."""

    where: str
    """Line of the first backward call."""
    samples: set[int] = field(default_factory=set)
    """Samples that got a gradient other than zero."""
    clearly: set[int] = field(default_factory=set)
    """Samples whose gradient is not small beside the gradients of others."""
    by_hand: dict[bool, str] = field(default_factory=dict)
    """Whether the parameters had been moved by something else than `first_step` -> line of the first call that saw
    that."""

    def take_up(self, later: "Flow", by_hand: bool) -> None:
        """Add what a later backward call brought, which saw `by_hand`."""
        self.samples |= later.samples
        self.clearly |= later.clearly
        self.by_hand.setdefault(by_hand, later.where)


@dataclass
class Forward:
    """A call of the model, or of a part of it that is called by itself."""

    where: str
    part: str
    """The name of the module in the model; empty for the model itself."""
    at: Pass
    """The pass whose gradient a backward call would have added to by then."""
    by_hand: bool
    """Whether the parameters had been moved by something else than `first_step`."""
    with_grad: bool
    """Whether autograd was on."""
    samples: list[int]
    """A fingerprint of each sample; empty where samples can't be told."""
    adversarial: bool
    """Whether an input wants a gradient itself, as in the search of an adversarial example."""
    training: frozenset[str] = frozenset()
    """The names of the modules that were in training mode."""
    batch_norm: bool = False
    """Whether some layer normalised by the batch."""
    flows: dict[Pass, Flow] = field(default_factory=dict)
    """Flows of gradients, by the pass that they were part of."""
    tracked: bool = False
    """Whether the call returned tensors that a gradient can reach."""
    reached: bool = False
    """Whether any gradient has reached them, by torch.autograd.grad too."""
    fed: bool = False
    """Whether another forward pass took its output as input, detached perhaps."""
    moved: list[str] = field(default_factory=list)
    """Buffers that the call has moved at theta*."""

    @property
    def for_nothing(self) -> bool:
        """Whether no gradient has come through it, though it might have, or was not meant to."""
        return not (self.reached or self.fed) and (self.tracked or not self.with_grad)

    @property
    def stale_at(self) -> str:
        """The line of a backward at which the parameters were elsewhere; empty if there was none."""
        for adds_to, flow in self.flows.items():
            if (self.at == "g2") != (adds_to == "g2"):
                return flow.where
            if elsewhere := flow.by_hand.get(not self.by_hand):
                return elsewhere
        return ""


@dataclass
class Update:
    """Record of one update, from its first gradients to its step."""

    forwards: list[Forward] = field(default_factory=list)
    timeline: list[tuple[str, str]] = field(default_factory=list)
    """The calls and their lines: a `Pass` for a backward, "first_step", "second_step", "step", "zero_grad"."""
    seen: list[Finding] = field(default_factory=list)
    """What was wrong at sight."""
    due: bool = True
    """Whether the update is to have a perturbed pass (`interval`)."""
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
    grad_norm: float = 0.0
    """The wrapper's ||g1||."""
    losses: dict[Pass, float | None] = field(default_factory=dict)
    """Pass -> the sum of what its backward calls were called on; None where one of these was no number."""
    norms: dict[str, float] = field(default_factory=dict)
    """L2 norms of g1, g2 and g_l (with what was set aside); empty for sharded parameters."""

    def call(self, name: str, where: str) -> None:
        """Add a line to the timeline."""
        self.timeline.append((name, where))

    def where(self, name: str) -> str:
        """Line of the last call of that name; empty if there was none."""
        return next((line for call, line in reversed(self.timeline) if call == name), "")

    def add_loss(self, adds_to: Pass, loss: float | None) -> None:
        """Add the loss of a backward call."""
        so_far = self.losses.get(adds_to, 0.0)
        self.losses[adds_to] = None if loss is None or so_far is None else so_far + loss

    def told_losses(self) -> dict[str, float]:
        """Losses of the passes of g1, g2 and g_l, as far as they are known."""
        if not self.where("first_step"):
            return {}
        parts: dict[str, list[Pass]] = {"g1": ["g1"], "g2": ["g2"], "g_l": ["aside", "g_l"]}
        found = {name: [self.losses[part] for part in of if part in self.losses] for name, of in parts.items()}
        return {name: sum(losses) for name, losses in found.items() if losses and None not in losses}  # type: ignore[arg-type]

    @property
    def stood_still(self) -> bool:
        """Whether there was a perturbed pass and theta* was theta in it."""
        if not self.where("first_step"):
            return False
        return self.move.wanted == 0 if self.move else not 0 < self.grad_norm < math.inf

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
        self.losses.clear()
        self.norms.clear()
        self.seen.clear()
