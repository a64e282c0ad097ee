"""What a check has found, as text."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch.distributed as dist


class Finding(NamedTuple):
    """Something that is wrong, or worth knowing (a note)."""

    kind: str
    """In a few words, always the same: "other batch", "leftover", ... (the table of docs/check.md)."""
    where: str
    """The line of the user's code, as "file:line"."""
    what: str
    fix: str = ""


@dataclass
class Report:
    """What is right, what is wrong, where, and what to do about it.

    `print(report)` shows it; `report.ok` is for tests.
    """

    updates: int = 0
    """How many were watched to their end."""
    problems: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)
    right: list[str] = field(default_factory=list)
    timeline: list[tuple[str, str]] = field(default_factory=list)
    """What was called where in the last update that was watched."""
    stopped: str = ""
    """The exception of the user's own code, or whatever else has ended the check before its time."""

    @property
    def ok(self) -> bool:
        """Whether an update was watched to its end, and nothing was wrong with it."""
        return self.updates > 0 and not self.problems

    def add(self, problems: Iterable[Finding], notes: Iterable[Finding]) -> None:
        """Take these up, each once."""
        self.problems = list(dict.fromkeys([*self.problems, *problems]))
        self.notes = list(dict.fromkeys([*self.notes, *notes]))

    def __str__(self) -> str:
        return "\n".join([f"gap_torch.check: {self._verdict()}", *self._steps(), *self._lines()])

    def _verdict(self) -> str:
        watched = f"{self.updates} update{'s' * (self.updates != 1)} watched"
        stopped = f", stopped by {self.stopped}" if self.stopped else ""
        if self.problems:
            return f"{watched}{stopped}, {len(self.problems)} thing{'s' * (len(self.problems) != 1)} WRONG"
        return f"{watched}{stopped}, {'all that can be told is right' if self.updates else 'so nothing is known'}"

    def _steps(self) -> Iterable[str]:
        runs: list[tuple[tuple[str, str], int]] = []
        for call in self.timeline:
            same = bool(runs) and runs[-1][0] == call
            runs[-1 if same else len(runs) :] = [(call, runs[-1][1] + 1 if same else 1)]
        return [f"    {name:<12} {where}{f'  x {n}' if n > 1 else ''}" for (name, where), n in runs]

    def _lines(self) -> Iterable[str]:
        for problem in self.problems:
            yield f"  WRONG  {problem.where}: {problem.what}"
            yield f"         What to do: {problem.fix}"
        for line in self.right:
            yield f"  right  {line}"
        for note in self.notes:
            yield f"  note   {note.where}: {note.what} {note.fix}".rstrip()


def print_once(report: Report) -> None:
    """Print `report`, but not what rank 0 says as well."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not several or dist.get_rank() == 0 or not report.ok:
        print((f"rank {dist.get_rank()}: " if several else "") + str(report))
