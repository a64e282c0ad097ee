"""What the watch has to remember of an update that is under way, and no rule asks for."""

from dataclasses import dataclass, field

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .update import Flow, Forward
from .values import Copies


@dataclass
class Gradients:
    """What is known of the gradients in `.grad`. Made anew when these gradients are gone."""

    filled: bool = False
    """Whether the gradients held anything but zeros at the last look."""
    unscaled_at: str = ""
    """Line of a GradScaler's unscale_()."""
    scaled_again: bool = False
    """Whether a loss has been scaled since."""


@dataclass
class Marks:
    """Notes on one update. They are made anew when another update begins, which frees the copies."""

    grad_norm: Tensor | None
    """The wrapper's ||g1||, the last that is accounted for."""
    gradients: Gradients = field(default_factory=Gradients)
    zeroed_at: str = ""
    """Line of the last zero_grad() since the last backward."""
    separate: bool = False
    """Whether first_step() was told to keep g1 apart."""
    outputs: dict[StorageWeakRef, Forward] = field(default_factory=dict)
    """Memory of an output -> the forward pass that made it."""
    theta: Copies = field(default_factory=dict)
    theta_star: Copies = field(default_factory=dict)
    last: Copies = field(default_factory=dict)
    """`.grad` as it was left by the last call that may change it at theta*."""
    before_g2: Copies = field(default_factory=dict)
    """`.grad` as first_step() left it."""
    before_g_l: Copies = field(default_factory=dict)
    """`.grad` as second_step() left it, with what was set aside."""
    aside: Copies = field(default_factory=dict)
    """Gradients that were set aside."""


@dataclass
class Backward:
    """A backward call that is under way."""

    where: str
    touched: list[tuple[Forward, Flow]] = field(default_factory=list)
    """The forward passes that the call has come to."""
