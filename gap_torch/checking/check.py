"""`gap_torch.check`: watch one update of a training loop, and say what is right and what is wrong with it."""

import atexit
import sys
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import ClassVar

from torch import nn
from torch.optim import Optimizer

from ..sharding import reshard
from ..wrapper import GAPWrapper
from . import rules
from .notes import notes
from .places import from_library, raised
from .report import Finding, Report, print_once
from .update import Update
from .watch import Watch

Show = Callable[[Report], object]

STALE = ("modified by an inplace operation", "backward through the graph a second time")
"""What autograd says to a backward through a graph of other parameters."""


def check(optimizer: Optimizer, model: nn.Module, *, updates: int = 1, show: Show | None = print_once) -> "Check":
    """Watch the next update of your own training code, verify Algorithm 1 in it, and print a report.

    As a block (below) the check reports at the end of the block at the latest. As a plain statement,
    `gap_torch.check(optimizer, model)`, for training code that can't be reached (Lightning's `configure_optimizers`),
    it reports when the second update begins.

    An update slows down while it is watched, and the host takes some copies of the parameters; afterwards nothing of
    the check is left. One check runs at a time: a second check ends the first.

    Args:
        optimizer: the GAPWrapper, or what Accelerate or Lightning made of it. Of any other optimizer the report says
            that it is not wrapped, unless it is the base of a wrapper that the loop uses.
        model: the module that the loop calls, or a module that contains it.
        updates: how many updates to watch. Updates without GAP (`interval`) do not count.
        show: called with the report when it is complete; None for nothing. By default it is printed, on rank 0 and
            wherever something is wrong.

    Returns:
        A `Check`, whose `report` is filled while the loop runs.

    Raises:
        TypeError: `optimizer` is no optimizer.
        ValueError: no parameter of `model` is in `optimizer`; `updates` is less than 1.
        RuntimeError: the parameters are perturbed.

    Examples:
        >>> import torch
        >>> import gap_torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = gap_torch.GAPWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
        >>> unlabelled, labelled = torch.rand(4, 2), torch.rand(4, 2)
        >>> with gap_torch.check(optimizer, model, show=None) as report:
        ...     model(unlabelled).square().mean().backward()
        ...     with optimizer.perturbed(model):
        ...         model(unlabelled).square().mean().backward()
        ...     model(labelled).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> report.ok  # print(report) shows what was found
        True
    """
    return Check(_unwrapped(optimizer), model, updates, show)


class Check:
    """A check that is under way; made by `check`."""

    running: ClassVar["Check | None"] = None

    def __init__(self, optimizer: Optimizer, model: nn.Module, updates: int, show: Show | None) -> None:
        if updates < 1:
            raise ValueError(f"updates must be at least 1, got {updates}.")
        reshard(model)  # between a forward pass and the next, FSDP2 may show other parameters than the optimizer's
        held = {p for group in optimizer.param_groups for p in group["params"]}
        if not any(p in held for p in model.parameters()):
            raise ValueError("model: none of its parameters is in the optimizer, so there is nothing to watch.")
        if isinstance(optimizer, GAPWrapper):
            optimizer._forbid_while_perturbed("check()")
        self.report = Report()
        self._show, self._to_watch = show, updates
        self._watch = Watch(optimizer, model, self._done, self._begun)
        if Check.running is not None:
            Check.running.stop("another check")
        Check.running = self
        self._watch.start()
        self._shown_before = getattr(sys, "last_value", None)  # in a notebook, the error of another cell
        atexit.register(self._end_of_program)

    def __enter__(self) -> Report:
        return self.report

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if Check.running is not self:
            return
        if error is not None:
            self._explain(error, trace)
        elif self._to_watch:
            self._unfinished(self._watch.update)
        self.stop("the end of the block")

    def stop(self, by: str = "stop()") -> None:
        """End the check and show the report, however far it has come."""
        if Check.running is not self:
            return
        Check.running = None
        atexit.unregister(self._end_of_program)
        self._watch.stop()
        if not self.report.timeline and not self.report.stopped and not self.report.problems:
            self.report.stopped = f"{by}, before any update was complete"
        if self._show is not None:
            self._show(self.report)

    def _end_of_program(self) -> None:
        """Where an exception is the end, Python has shown it by now and kept it."""
        error = getattr(sys, "last_value", None)
        if error is not None and error is not self._shown_before:
            self._explain(error, error.__traceback__)
        self.stop("the end of the program")

    # ------------------------------------------------------------------ what the watch has to say

    def _done(self, update: Update) -> None:
        """An update is complete."""
        if not self._to_watch:
            return
        has_wrapper = self._watch.wrapper is not None
        verdicts = [verdict for verdict in rules.verdicts(update, has_wrapper) if verdict]
        self._add(update, [v for v in verdicts if isinstance(v, Finding)], [v for v in verdicts if isinstance(v, str)])
        if update.where("step") and (update.due or not has_wrapper):
            self.report.updates += not (update.hidden or update.stood_still)
            self._to_watch -= 1

    def _begun(self, update: Update) -> None:
        """Another update has begun: all that is left to see, once enough of them have been watched."""
        if not self._to_watch:
            self.report.add(update.seen)
            self.stop()

    def _add(self, update: Update, problems: Iterable[Finding], right: Iterable[str] = ()) -> None:
        self.report.timeline = update.timeline
        self.report.losses, self.report.norms = update.told_losses(), dict(update.norms)
        self.report.add([*update.seen, *problems], notes(update), right)

    # ------------------------------------------------------------------ ends before the step

    def _unfinished(self, update: Update) -> None:
        """The block is over."""
        if update.where("first_step"):
            self._done(update)
        elif update.timeline:
            what = "the block ended without first_step(), second_step() and step()."
            self._add(update, [Finding("no step", update.timeline[-1][1], what, rules.USE_PERTURBED)])

    def _explain(self, error: BaseException, trace: TracebackType | None) -> None:
        """An exception has ended the block, or the program."""
        update, where = self._watch.update, raised(trace)
        self.report.stopped = f"{type(error).__name__} at {where}"
        problems = []
        if from_library(trace) and not update.seen:
            problems = [Finding("refused", where, str(error), "as it says.")]
        elif any(words in str(error) for words in STALE) and (update.where("first_step") or update.at_theta_star()):
            what = "the backward of a loss that was computed before the parameters moved (or moved back)."
            problems = [Finding("stale graph", where, what, rules.ANEW)]
        self._add(update, problems)


def _unwrapped(optimizer: object) -> Optimizer:
    """The GAPWrapper inside what a framework made of it."""
    found, inner = optimizer, optimizer
    while inner is not None:
        found = inner if isinstance(inner, GAPWrapper) else found
        inner = getattr(inner, "optimizer", None)
    if not isinstance(found, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}.")
    return found
