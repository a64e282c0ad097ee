"""What the watch has to remember of an update that is under way, and no rule asks for."""

from dataclasses import dataclass, field

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .update import Flow, Forward
from .values import Copies


@dataclass
class Gradients:
    """What is known of the gradients in `.grad`. Made anew when they are gone."""

    filled: bool = False
    """Whether they hold anything but zeros, by the last look."""
    unscaled_at: str = ""
    """A GradScaler's unscale_()."""
    scaled_again: bool = False
    """Whether a loss has been scaled since."""


@dataclass
class Marks:
    """Of one update. Made anew when another begins, and the copies of the last are free."""

    grad_norm: Tensor | None
    """The wrapper's, the last that is accounted for."""
    gradients: Gradients = field(default_factory=Gradients)
    zeroed_at: str = ""
    """The last zero_grad() since the last backward."""
    separate: bool = False
    """Whether first_step() was told to keep g1 apart."""
    outputs: dict[StorageWeakRef, Forward] = field(default_factory=dict)
    """What the forward passes have made, by its memory."""
    theta: Copies = field(default_factory=dict)
    theta_star: Copies = field(default_factory=dict)
    last: Copies = field(default_factory=dict)
    """`.grad` as it was left by the last call that may change it at theta*."""
    before_g2: Copies = field(default_factory=dict)
    """`.grad` as first_step() left it."""
    before_g_l: Copies = field(default_factory=dict)
    """`.grad` as second_step() left it, with what was set aside."""
    aside: Copies = field(default_factory=dict)
    """What was set aside."""


@dataclass
class Backward:
    """A backward call that is under way."""

    where: str
    touched: list[tuple[Forward, Flow]] = field(default_factory=list)
    """The forward passes that it has come to."""
