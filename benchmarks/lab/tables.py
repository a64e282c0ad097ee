"""How the lab's tables say numbers."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import NamedTuple

from benchmarks.common import show
from benchmarks.lab.grid import Cell, Repeat
from benchmarks.lab.intervals import Interval, interval
from benchmarks.lab.records import Record
from benchmarks.lab.scores import by_draw
from presentation.markdown_table import markdown_table


class Table(NamedTuple):
    """Text, the header first."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        return f"### {self.title}\n\n{markdown_table(self.header, self.rows)}\n"

    def told(self) -> str:
        """Its Markdown, once it is on the screen."""
        show(self.title, self.header, self.rows)
        return self.markdown()


def mean_and_deviation(values: Sequence[float], digits: int, signed: bool = False) -> str:
    """Mean ± sample standard deviation; "-" for that of one value."""
    sign = "+" if signed else ""
    deviation = f"{stdev(values):.{digits}f}" if len(values) > 1 else "-"
    return f"{mean(values):{sign}.{digits}f} ± {deviation}"


def difference(values: Mapping[Repeat, float], digits: int) -> str:
    """Mean ± sample standard deviation of paired differences, and their mean's interval."""
    return (
        f"{mean_and_deviation([*values.values()], digits, signed=True)} {bracketed(interval(by_draw(values)), digits)}"
    )


def bracketed(ends: Interval | None, digits: int) -> str:
    """An interval; "-" where there is none."""
    return "[-]" if ends is None else f"[{ends[0]:+.{digits}f}, {ends[1]:+.{digits}f}]"


def number(done: int, declared: Sequence[Cell]) -> str:
    """How many of the declared runs a mean is of."""
    whole = _whole(declared)
    return f" (n = {whole})" if done == len(declared) else f" (n = {done} of {whole})"


def _whole(declared: Sequence[Cell]) -> str:
    seeds, draws = ({getattr(cell, name) for cell in declared} for name in ("seed", "draw"))
    crossed = len(draws) > 1 and len(declared) == len(seeds) * len(draws)
    return f"{len(seeds)} seeds x {len(draws)} draws" if crossed else str(len(declared))


def empty_share(tests: Sequence[Record]) -> str:
    """A line on predictions that were empty, if any."""
    empty, predictions = (sum(test[name] for test in tests) for name in ("empty", "predictions"))
    return f"\n{100 * empty / predictions:.1f} % empty" if empty else ""
