"""FixMatch against GapMatch over many seeds and draws of the labelled patients (the grid's group "power")."""

from statistics import mean, stdev

from benchmarks.lab import scores as lab_scores
from benchmarks.lab.grid import GAPMATCH, MEDIUM, POWER_CHANGES, Repeat
from benchmarks.lab.intervals import interval, pairs_needed
from benchmarks.lab.records import Record
from benchmarks.lab.scores import CHOSEN, LAST, Changes, Found, Iterate
from benchmarks.lab.tables import Table, bracketed, empty_share

GAIN = 3.0  # Dice, percentage points
ITERATES: dict[Iterate, str] = {CHOSEN: "chosen", LAST: "last"}
HEADER = (
    "GapMatch with",
    "Iterate",
    "FixMatch",
    "GapMatch",
    "Gain in Dice",
    "Deviation",
    "Gain in ASD",
    "Pairs",
    f"Pairs for {GAIN:g}",
)
TEXT = f"""\
FixMatch and GapMatch at 1 %, both at half the weight of the consistency loss, over seeds and draws of the labelled
patient: each pair shares both. Test Dice in percent and ASD in voxels, means over the pairs, at the iterate that
validation chose and at the last one. A gain is GapMatch's score less FixMatch's, with its 95 % interval; "deviation"
is the sample standard deviation of the gain in Dice over pairs, and "pairs for {GAIN:g}" how many such pairs a true
gain of {GAIN:g} would need for an interval above zero with 80 % power: (1.96 + 0.84)² deviation² / {GAIN:g}², as if
all pairs were independent.
"""


def table(found: Found) -> Table:
    """A row a setting of GapMatch and iterate."""
    rows = [_row(found, changes, iterate) for changes in POWER_CHANGES for iterate in ITERATES]
    return Table("FixMatch and GapMatch, in pairs", HEADER, rows)


def runs(found: Found, changes: Changes, iterate: Iterate = CHOSEN) -> dict[Repeat, tuple[Record, Record]]:
    """FixMatch's and GapMatch's, where both have scores."""
    return lab_scores.pairs(found, "ACDC", MEDIUM, "fixmatch", 1, iterate, changes)


def _row(found: Found, changes: Changes, iterate: Iterate) -> list[str]:
    pairs = runs(found, changes, iterate)
    name = f"eps {changes['eps']:g}"
    declared = len(lab_scores.repeats("ACDC", MEDIUM, GAPMATCH, 1, changes))
    if not pairs:
        return [name, ITERATES[iterate], *["open"] * 5, f"0 of {declared}", ""]
    tests = ([pair[index][iterate] for pair in pairs.values()] for index in (0, 1))
    gains = lab_scores.gains(pairs, iterate)
    dice, asd = ({repeat: gain[index] for repeat, gain in gains.items()} for index in (0, 1))
    deviation = stdev(dice.values()) if len(dice) > 1 else None
    return [
        name,
        ITERATES[iterate],
        *map(_mean, tests),
        _gain(dice, 1),
        "-" if deviation is None else f"{deviation:.1f}",
        _gain(asd, 2),
        f"{len(pairs)} of {declared}",
        "-" if deviation is None else f"{pairs_needed(deviation, GAIN)}",
    ]


def _mean(tests: list[Record]) -> str:
    dice, asd = (mean(test[name] for test in tests) for name in ("dice", "asd"))
    return f"{dice:.1f}\n{asd:.2f}{empty_share(tests)}"


def _gain(values: dict[Repeat, float], digits: int) -> str:
    return f"{mean(values.values()):+.{digits}f} {bracketed(interval(lab_scores.by_draw(values)), digits)}"
