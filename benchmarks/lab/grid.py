"""The grid of the lab: which runs are to be made, in which order. `reproduce.py` makes them.

A run is a `Cell`. BLOCKS is the whole grid, the most urgent part first; a cell that is in two groups is one cell.
To add runs, add a block, or a value to a sweep. A cell's name tells it from all others, and is that of its JSON file.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, product
from typing import Any, NamedTuple

from segmentation.acdc import ACDC
from segmentation.la import LA
from segmentation.recipe import GAP_FIELDS, METHOD_FIELDS, Recipe, Run, run_name
from segmentation.task import Task

TASKS: dict[str, Task] = {"ACDC": ACDC, "LA": LA}
FULL_SCALE = "paper"
"""The preset that is not reduced."""

SUPERVISED, FIXMATCH, GAPMATCH = ("supervised", False), ("fixmatch", False), ("fixmatch", True)
INSTANCE_PERTURBATIONS = ("em", "pseudo_label", "ict", "mixup", "cutmix", "vat")
MODEL_PERTURBATIONS = ("mean_teacher", "urpc", "cct")
TABLE_1: tuple[Run, ...] = (SUPERVISED, FIXMATCH, GAPMATCH)
TABLE_2: tuple[Run, ...] = tuple((method, gap) for method in INSTANCE_PERTURBATIONS for gap in (False, True))
TABLE_3: tuple[Run, ...] = (
    SUPERVISED,
    *((method, False) for method in MODEL_PERTURBATIONS),
    ("ict", False),
    ("ict", True),
)
THRESHOLDS: tuple[Run, ...] = tuple((method, gap) for method in ("flexmatch", "freematch") for gap in (False, True))
SYSTEMS: tuple[Run, ...] = tuple(
    (method, gap) for method in ("dan", "dtc", "dct", "uamt", "sassnet", "cps", "mcnet", "bcp") for gap in (False, True)
)
"""Those of table 1 that are not among the methods of tables 2 and 3, in its order."""
SHARES = (1, 5, 10)

EPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
# Recipe fields that are varied for GapMatch, one value set at a time.
SWEEPS: dict[str, tuple[dict[str, Any], ...]] = {
    "weight": ({"weight": 0.5}, {"weight": 1.0}),
    "tau": tuple({"tau": tau} for tau in (0.7, 0.8, 0.9, 0.95, 0.99)),
    # Where statistics are taken anew before scoring, nobody sees the running ones: here they are what is scored.
    "freeze_statistics": tuple(
        {"freeze_statistics": frozen, "average_decay": 0.0, "statistics_samples": 0} for frozen in (True, False)
    ),
    "replay_dropout": ({"replay_dropout": False}, {"replay_dropout": True}),
    "aligned": ({"aligned": "targets"}, {"aligned": "predictions"}),
    "eps and alpha": tuple({"eps": eps, "alpha": alpha} for alpha in (1.0, 0.5, 2.0) for eps in EPS),
}
# The same for FixMatch. g1 + alpha g2 weighs the unlabelled images 1 + alpha times, whatever GAP moves: as much of them
# without GAP. And the threshold that suits GapMatch may be one that suits FixMatch.
CONTROLS: dict[str, tuple[dict[str, Any], ...]] = {
    "weight": ({"weight": 0.5}, {"weight": 1.0}, {"weight": 2.0}),
    "tau": SWEEPS["tau"],
}
# FixMatch against GapMatch, over so many seeds and labelled patients that a gain of a few points can be told from none.
MEDIUM, POWER = "medium", "power"
DRAWS = (None, 1, 3, 4, 5)  # of ACDC's 70 patients a seed of 2 takes the first again
FLOAT32 = (MEDIUM,)
"""Presets without autocast: in bfloat16 a network sees rounding noise of a small radius more than its direction."""
POWER_CHANGES = tuple({"weight": 0.5, "eps": eps} for eps in (0.02, 0.1))

Repeat = tuple[int, int | None]
"""Seed and draw: what two runs have in common that make a pair."""


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        data_set: key of TASKS.
        preset: of the data set's.
        method: as in the recipe.
        gap: whether GAP is on it.
        share: labelled part of the training patients, percent.
        seed: of the run.
        changes: recipe fields in which it differs from the preset, as pairs in the recipe's order; `cell` sees to that.
        draw: seed by which the labelled patients are drawn; None for the first of the list.
    """

    data_set: str
    preset: str
    method: str
    gap: bool
    share: int
    seed: int
    changes: tuple[tuple[str, Any], ...] = ()
    draw: int | None = None

    @property
    def name(self) -> str:
        """Such as `acdc_1pct_study_gapmatch_eps0.2_alpha2_draw3_seed1`."""
        data = [self.data_set.lower(), f"{self.share}pct", self.preset]
        changes = [_change(name, value) for name, value in self.changes]
        draw = [] if self.draw is None else [f"draw{self.draw}"]
        return "_".join([*data, run_name(self.method, self.gap), *changes, *draw, f"seed{self.seed}"])

    @property
    def repeat(self) -> Repeat:
        """In what it differs from the runs that are averaged with it."""
        return self.seed, self.draw

    @property
    def tested(self) -> bool:
        """Whether the test volumes are scored: not where recipes are compared, which is validation's part."""
        return not self.changes or self.preset == MEDIUM

    @property
    def recipe(self) -> Recipe:
        """All of what is run."""
        preset = TASKS[self.data_set].presets[self.preset]
        return Recipe(method=self.method, gap=self.gap, seed=self.seed, **{**preset, **dict(self.changes)})


def title(method: Run) -> str:
    """What tables and pictures call a method."""
    name, gap = method
    return Recipe(method=name, gap=gap).label


def idle(method: Run) -> set[str]:
    """Recipe fields that mean nothing to it."""
    name, gap = method
    return {*GAP_FIELDS * (not gap), *METHOD_FIELDS * (name == "supervised")}


def cell(
    data_set: str,
    preset: str,
    method: Run,
    share: int,
    seed: int,
    changes: Mapping[str, Any] | None = None,
    draw: int | None = None,
) -> Cell:
    """A cell of the grid. Changes that change nothing are left out, so that one recipe has one name.

    Raises:
        TypeError: a change is of no field of the recipe.
        InputError: a value is not one, or the method has no such option.
    """
    plain = Cell(data_set, preset, *method, share, seed, draw=draw)
    if not changes:
        return plain
    recipe, changed = plain.recipe, replace(plain.recipe, **changes)
    now, then = changed.to_dict(), recipe.to_dict()
    differing = [name for name in now if now[name] != then[name] and name not in idle(method)]
    return replace(plain, changes=tuple((name, getattr(changed, name)) for name in differing))


class Block(NamedTuple):
    """Cells that belong together: all runs of one seed and draw before the next draw, and all draws before the next
    seed."""

    group: str
    data_set: str
    preset: str
    methods: Collection[Run]
    shares: Collection[int]
    seeds: Collection[int]
    changes: Collection[Mapping[str, Any]] = ({},)
    draws: Collection[int | None] = (None,)

    def cells(self) -> Iterator[Cell]:
        inner = product(self.seeds, self.draws, self.shares, self.methods, self.changes)
        for seed, draw, share, method, changes in inner:
            yield cell(self.data_set, self.preset, method, share, seed, changes, draw)


BLOCKS = (
    # full scale, on a GPU
    Block("table 1", "ACDC", "paper", (GAPMATCH, FIXMATCH), SHARES, (0,)),
    Block("table 1", "ACDC", "paper", (SUPERVISED,), SHARES, (0,)),
    Block("table 2", "ACDC", "paper", TABLE_2, (1,), (0,)),
    Block("table 3", "ACDC", "paper", TABLE_3, (1,), (0,)),
    Block("table 1", "LA", "paper", (GAPMATCH, FIXMATCH, SUPERVISED), SHARES, (0,)),
    Block("table 2", "ACDC", "paper", TABLE_2, (5, 10), (0,)),
    Block("table 3", "ACDC", "paper", TABLE_3, (5, 10), (0,)),
    Block("systems", "ACDC", "paper", SYSTEMS, SHARES, (0,)),
    # reduced scale, on a CPU
    *(
        Block(POWER, "ACDC", MEDIUM, (FIXMATCH, GAPMATCH), (1,), range(5), [changes], DRAWS)
        for changes in POWER_CHANGES
    ),
    Block("systems", "ACDC", "short", (*TABLE_1, *SYSTEMS), (1,), (0, 1)),
    # more reduced; first what the runs with GAP depend on
    *(Block("hyper-parameters", "ACDC", "study", (FIXMATCH,), (1,), (0, 1), sweep) for sweep in CONTROLS.values()),
    Block("hyper-parameters", "ACDC", "study", (GAPMATCH,), (1,), (0, 1), SWEEPS["eps and alpha"][: len(EPS)]),
    Block("table 1", "ACDC", "study", TABLE_1, SHARES, (0, 1, 2)),
    Block("table 2", "ACDC", "study", TABLE_2, (1,), (0, 1)),
    Block("table 3", "ACDC", "study", TABLE_3, (1,), (0, 1)),
    Block("thresholds", "ACDC", "study", THRESHOLDS, (1,), (0, 1)),
    *(Block("hyper-parameters", "ACDC", "study", (GAPMATCH,), (1,), (0, 1), sweep) for sweep in SWEEPS.values()),
    Block("table 2", "ACDC", "study", TABLE_2, (1,), (2,)),
    Block("table 3", "ACDC", "study", TABLE_3, (1,), (2,)),
    Block("table 2", "ACDC", "study", TABLE_2, (5, 10), (0, 1, 2)),
    Block("table 3", "ACDC", "study", TABLE_3, (5, 10), (0, 1, 2)),
)
GROUPS = tuple(dict.fromkeys(block.group for block in BLOCKS))
PRESETS = tuple(dict.fromkeys(block.preset for block in BLOCKS))


def cells(groups: Collection[str] | None = None, presets: Collection[str] | None = None) -> list[Cell]:
    """The cells of these groups at these presets (None: all), each once, in the order in which they should be run."""
    of_groups = [block for block in BLOCKS if groups is None or block.group in groups]
    chosen = [block for block in of_groups if presets is None or block.preset in presets]
    return list(dict.fromkeys(chain.from_iterable(block.cells() for block in chosen)))


def repeats(wanted: Cell, groups: Collection[str] | None = None) -> list[Cell]:
    """The cells of these groups (None: all) that differ from `wanted` in nothing but their seed and draw."""
    method = wanted.method, wanted.gap
    alike = [
        block._replace(methods=[method], shares=[wanted.share])
        for block in BLOCKS
        if (groups is None or block.group in groups)
        and (block.data_set, block.preset) == (wanted.data_set, wanted.preset)
        and (method in block.methods and wanted.share in block.shares)
    ]
    found = dict.fromkeys(chain.from_iterable(block.cells() for block in alike))
    return [cell for cell in found if replace(cell, seed=wanted.seed, draw=wanted.draw) == wanted]


def _change(name: str, value: Any) -> str:
    if name == "options":
        return "_".join(f"option_{_change(*option)}" for option in value)
    if isinstance(value, bool):
        return name if value else f"no_{name}"
    return f"{name}{value:g}" if isinstance(value, float | int) else f"{name}_{value}"
