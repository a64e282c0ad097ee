"""What a check has found, as text."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch.distributed as dist


class Finding(NamedTuple):
    """Something that is wrong, or worth knowing (a note).

    Examples:
        >>> from gap_torch.checking import Finding
        >>> finding = Finding("leftover", "train.py:12", ".grad was not empty.", "call zero_grad()")
        >>> finding.kind, finding.where
        ('leftover', 'train.py:12')
    """

    kind: str
    """Name of the kind: "other batch", "leftover", ... (the table of docs/check.md)."""
    where: str
    """The line of the user's code, as "file:line"."""
    what: str
    """What has been seen."""
    fix: str = ""
    """How to mend it."""


RESERVES = {"not told", "features", "no gradient", "one pass", "no g_l"}
"""Kinds of notes that leave open whether all is right."""


@dataclass
class Report:
    """What is right, what is wrong, where, and what to do about it.

    `print(report)` shows it; `report.ok` is for tests.

    Examples:
        >>> from gap_torch.checking import Report
        >>> report = Report()  # as `gap_torch.check` makes it, before it has seen an update
        >>> report.ok
        False
        >>> print(report)
        gap_torch.check: no update was watched to its end, so nothing is known.
    """

    updates: int = 0
    """Number of updates that were watched to their end; updates in which nothing moved do not count."""
    problems: list[Finding] = field(default_factory=list)
    """Findings about what is wrong."""
    notes: list[Finding] = field(default_factory=list)
    """Findings about what is not wrong but worth knowing, or could not be told."""
    right: list[str] = field(default_factory=list)
    """What has been verified, a sentence each."""
    timeline: list[tuple[str, str]] = field(default_factory=list)
    """What was called in the last update that was watched, and where ("file:line")."""
    losses: dict[str, float] = field(default_factory=dict)
    """Losses of the passes "g1", "g2" and "g_l" in the last update: for each the sum of what `backward` was called on,
    as far as that can be told. In a GradScaler's units if one is used."""
    norms: dict[str, float] = field(default_factory=dict)
    """L2 norms of the gradients g1, g2 and g_l (with what was set aside) in the last update, each over all parameters,
    in float64. In a GradScaler's units if one is used; empty where parameters are spread over processes."""
    stopped: str = ""
    """The exception of the user's own code, or whatever else has ended the check before its time."""

    @property
    def ok(self) -> bool:
        """Whether an update was watched to its end, the parameters moved in it, and nothing was wrong."""
        return self.updates > 0 and not self.problems

    def add(self, problems: Iterable[Finding], notes: Iterable[Finding] = (), right: Iterable[str] = ()) -> None:
        """Add findings and lines, each once."""
        self.problems = list(dict.fromkeys([*self.problems, *problems]))
        self.notes = list(dict.fromkeys([*self.notes, *notes]))
        self.right = list(dict.fromkeys([*self.right, *right]))

    def __str__(self) -> str:
        lines = [*self._calls(), *self._passes(), *self._lines()]
        return "\n".join([f"gap_torch.check: {self._verdict()}", *lines])

    def _verdict(self) -> str:
        stopped = f" (Stopped by {self.stopped}.)" if self.stopped else ""
        watched = "this update" if self.updates < 2 else f"these {self.updates} updates"
        if self.problems:
            count = len(self.problems)
            return f"{count} thing{'s are' if count > 1 else ' is'} WRONG in {watched}.{stopped}"
        kinds = {note.kind for note in self.notes}
        if not self.updates and "no move" in kinds:
            return f"nothing moved in this update, so GAP was not checked: check again later.{stopped}"
        if not self.updates:
            return f"no update was watched to its end, so nothing is known.{stopped}"
        reserve = ", as far as can be told" if kinds & RESERVES else ""
        return f"GAP ran as Algorithm 1 in {watched}{reserve}.{stopped}"

    def _calls(self) -> Iterable[str]:
        for (name, where), run in groupby(self.timeline):
            times = len(list(run))
            yield f"    {name:<12} {where}" + (f"  x {times}" if times > 1 else "")

    def _passes(self) -> Iterable[str]:
        for name, numbers in (("loss", self.losses), ("norm", self.norms)):
            if numbers:
                yield f"    {name:<12} " + ", ".join(f"{key} {number:.4g}" for key, number in sorted(numbers.items()))

    def _lines(self) -> Iterable[str]:
        for problem in self.problems:
            yield f"  WRONG  {problem.where}: {problem.what}"
            yield f"         To mend it: {problem.fix}"
        for line in self.right:
            yield f"  right  {line}"
        for note in self.notes:
            yield f"  note   {note.where}: {note.what} {note.fix}".rstrip()


def print_once(report: Report) -> None:
    """Print `report` on rank 0, and on any other rank where something is wrong."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not several or dist.get_rank() == 0 or not report.ok:
        print((f"rank {dist.get_rank()}: " if several else "") + str(report))


def shown(names: list[str]) -> str:
    """The first two of `names`, and how many more there are."""
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
