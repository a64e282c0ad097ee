"""What a check has found, as text."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch.distributed as dist


class Finding(NamedTuple):
    """Something that is wrong, or worth knowing (a note)."""

    kind: str
    """In a few words, always the same: "other batch", "leftover", ... (the table of docs/check.md)."""
    where: str
    """The line of the user's code, as "file:line"."""
    what: str
    """What has been seen."""
    fix: str = ""
    """How to mend it."""


@dataclass
class Report:
    """What is right, what is wrong, where, and what to do about it.

    `print(report)` shows it; `report.ok` is for tests.
    """

    updates: int = 0
    """How many were watched to their end."""
    problems: list[Finding] = field(default_factory=list)
    """What is wrong."""
    notes: list[Finding] = field(default_factory=list)
    """What is worth knowing and not wrong, or could not be told."""
    right: list[str] = field(default_factory=list)
    """What has been verified, a sentence each."""
    timeline: list[tuple[str, str]] = field(default_factory=list)
    """What was called in the last update that was watched, and where ("file:line")."""
    stopped: str = ""
    """The exception of the user's own code, or whatever else has ended the check before its time."""

    @property
    def ok(self) -> bool:
        """Whether an update was watched to its end, and nothing was wrong with it."""
        return self.updates > 0 and not self.problems

    def add(self, problems: Iterable[Finding], notes: Iterable[Finding] = (), right: Iterable[str] = ()) -> None:
        """Take these up, each once."""
        self.problems = list(dict.fromkeys([*self.problems, *problems]))
        self.notes = list(dict.fromkeys([*self.notes, *notes]))
        self.right = list(dict.fromkeys([*self.right, *right]))

    def __str__(self) -> str:
        return "\n".join([f"gap_torch.check: {self._verdict()}", *self._calls(), *self._lines()])

    def _verdict(self) -> str:
        stopped = f" (Stopped by {self.stopped}.)" if self.stopped else ""
        watched = "this update" if self.updates < 2 else f"these {self.updates} updates"
        if self.problems:
            count = len(self.problems)
            return f"{count} thing{'s are' if count > 1 else ' is'} WRONG in {watched}.{stopped}"
        if not self.updates:
            return f"no update was watched to its end, so nothing is known.{stopped}"
        kinds = {note.kind for note in self.notes}
        reserve = ", as far as can be told" if kinds - {"no move"} else ", and nothing moved" if kinds else ""
        return f"GAP ran as Algorithm 1 in {watched}{reserve}.{stopped}"

    def _calls(self) -> Iterable[str]:
        for (name, where), run in groupby(self.timeline):
            times = len(list(run))
            yield f"    {name:<12} {where}" + (f"  x {times}" if times > 1 else "")

    def _lines(self) -> Iterable[str]:
        for problem in self.problems:
            yield f"  WRONG  {problem.where}: {problem.what}"
            yield f"         To mend it: {problem.fix}"
        for line in self.right:
            yield f"  right  {line}"
        for note in self.notes:
            yield f"  note   {note.where}: {note.what} {note.fix}".rstrip()


def print_once(report: Report) -> None:
    """Print `report`, but not what rank 0 says as well."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not several or dist.get_rank() == 0 or not report.ok:
        print((f"rank {dist.get_rank()}: " if several else "") + str(report))
