"""The lab's results beside the paper's: tables for the screen and for docs/results.md."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.common import save_plot
from benchmarks.lab import full_size, grid, power
from benchmarks.lab import plots as lab_plots
from benchmarks.lab import scores as lab_scores
from benchmarks.lab.grid import FIXMATCH, FULL_SCALE, GAPMATCH, MEDIUM, SHARES, SWEEPS, TASKS, Cell, cell, title
from benchmarks.lab.intervals import LEAST_PAIRS
from benchmarks.lab.published import FULLY_SUPERVISED, PUBLISHED, Scores
from benchmarks.lab.records import Records
from benchmarks.lab.scores import CHOSEN, LAST, Found, Iterate
from benchmarks.lab.tables import Table, difference, empty_share, mean_and_deviation, number
from segmentation.recipe import Recipe, Run

TABLES: dict[str, tuple[Run, ...]] = {
    "Table 1": grid.TABLE_1,
    "Table 2": grid.TABLE_2,
    "Table 3": grid.TABLE_3,
    "FixMatch with thresholds that adapt": grid.THRESHOLDS,
    "Systems of table 1": grid.SYSTEMS,
}

HEADER = ["Method", *(f"{share} %, {whose}" for share in SHARES for whose in ("ours", "ours, last", "paper"))]

PREAMBLE = f"""\
# Results: does GAP improve whatever it is added to?

Written by `python benchmarks/reproduce.py --report`; don't edit it by hand.

## Reproduce

```bash
python benchmarks/reproduce.py --plan  # done, open, estimated time
python benchmarks/reproduce.py --run --data-acdc data/ACDC --budget 60  # for an hour
python benchmarks/reproduce.py --report  # this page and its figures
```

The grid is declared in [`benchmarks/lab/grid.py`](../benchmarks/lab/grid.py). Every run leaves one JSON file in
[`benchmarks/results/cells`](../benchmarks/results/cells). `--run` stops when its budget is spent and goes on from there
the next time; on a GPU it takes the full-scale cells, on a CPU the reduced ones.

## How to read the tables

Numbers are Dice in percent and, below it, ASD in voxels, on the test volumes: mean ± sample standard deviation over n
runs ("-" with one). "ours" is at the iteration that was chosen on the validation volumes (LA has none: the last one),
"last" at the last iteration, "-" where it was not scored. Seeds differ in initial weights, batches and augmentation;
the labelled patients are the first of the list, unless n counts draws: those differ in the labelled patients. "open"
has not been run; where a table has begun, shares at which all is open are left out. "paper" is Huang et al., AAAI
2025, which prints no spread.

A gain is the score with GAP less that without, pair by pair of one seed and one draw: for the Dice more is better,
for the ASD less. Behind it stands the 95 % interval of its mean, by bootstrap over the pairs (10,000 resamples,
percentiles), of several draws over draws and the pairs within each. With fewer than {LEAST_PAIRS} pairs there is none
("-"); with few it is narrower than the truth, and with {LEAST_PAIRS} no more than their range.

A class that a run finds nowhere in a volume is an empty prediction. It counts as Dice 0 and ASD 0, so the ASD looks
better than it is. "% empty" is their share in the predictions of all runs, where there were any. † marks a mean or a
gain that has a run in which more than half were empty: there the ASD says nothing. ‡ marks one that has a run whose
chosen iteration was in the warm-up, before any unlabelled image was learnt from: the method did harm, and the numbers
are those of training on labels alone, for fewer iterations than the row "Supervised".
"""

HYPER_PARAMETERS = """\
## Hyper-parameters

GapMatch on ACDC, 1 % of the labels; as controls FixMatch with the same thresholds, and with other weights of its
loss: g1 + alpha g2 weighs the unlabelled images 1 + alpha times as much, so GapMatch's counterpart at alpha 1 is
FixMatch at twice the weight. The best Dice in percent on the validation volumes in the course of a run, and below it
that of the last iteration, mean ± sample standard deviation over n runs. "default" is the recipe of the tables above,
and its runs are those of table 1. Values are compared on the validation volumes alone; of the others' runs only those
of weight 1, once the default, were tested.
"""


def write(records: Records, page: Path, figures: Path) -> None:
    """Print all tables, and write `page` and its figures. Runs beside the grid lie next to the records' folder."""
    cells = grid.cells()
    found = records.of(cells)
    parts = [PREAMBLE, *_full_size(records.folder.parent, page, figures)]
    pictures = [_picture(path, page, lab_plots.CAPTIONS[path.stem]) for path in lab_plots.draw(found, figures)]
    parts += ["## The grid in pictures\n", *pictures] if pictures else []
    for data_set, preset in dict.fromkeys((batch.data_set, batch.preset) for batch in grid.BLOCKS):
        parts.append(_heading(found, data_set, preset))
        if any((cell.data_set, cell.preset) == (data_set, preset) for cell in found):
            parts += [table.told() for table in comparisons(found, data_set, preset)]
        parts += [power.TEXT, power.table(found).told()] if preset == MEDIUM else []
    parts += [HYPER_PARAMETERS, *(table.told() for table in sweeps(found))]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(parts), encoding="utf-8")
    stale = [cell.name for cell in cells if records.state(cell) == "stale"]
    print(f"{len(found)} of {len(cells)} cells are in {page}")
    if stale:
        print(f"left out, as their recipe has changed since: {', '.join(stale)}")


def _full_size(results: Path, page: Path, figures: Path) -> list[str]:
    """The section on runs beside the grid, if there are any."""
    studies = full_size.read(results)
    if not studies:
        return []
    path = figures / f"{full_size.PICTURE}.png"
    save_plot(full_size.picture(studies), path)
    made = "\n".join(map(full_size.provenance, studies))
    return [
        f"## Runs at full size on a GPU\n\n{full_size.TEXT}",
        _picture(path, page, full_size.CAPTION),
        full_size.table(studies).told(),
        f"How they were made:\n\n{made}\n",
    ]


# ---------------------------------------------------------------- tables


def comparisons(found: Found, data_set: str, preset: str) -> list[Table]:
    """The paper's tables for one data set, ours beside the paper's; only those that the grid has."""
    scale = "" if preset == FULL_SCALE else f", ours at reduced scale ({preset})"
    declared = {(cell.method, cell.gap) for cell in grid.cells(presets=[preset]) if cell.data_set == data_set}
    return [
        _telling(Table(f"{name} on {data_set}{scale}", HEADER, _rows(found, data_set, preset, methods)))
        for name, methods in TABLES.items()
        if declared.issuperset(methods)
    ]


def _telling(table: Table) -> Table:
    """Without shares at which nothing has run, once something has, and without columns of a share that are empty."""
    methods, *columns = zip(table.header, *table.rows, strict=True)
    shares = list(zip(columns[::3], columns[1::3], columns[2::3], strict=True))
    begun = [share for share in shares if any(text not in ("", "open") for text in share[0][1:])]
    shown = [column for share in begun or shares for column in share if any(column[1:])]
    header, *rows = zip(methods, *shown, strict=True)
    return Table(table.title, header, rows)


def _rows(found: Found, data_set: str, preset: str, methods: Sequence[Run]) -> list[list[str]]:
    """A row a method, and below each pair of a method without and with GAP its gain."""
    published = PUBLISHED[data_set]
    rows = []
    for method, gap in methods:
        ours = [
            [_ours(found, data_set, preset, (method, gap), share, iterate) for iterate in (CHOSEN, LAST)]
            for share in SHARES
        ]
        paper = [_scores(published.get((method, gap), {}).get(share)) for share in SHARES]
        rows.append([title((method, gap)), *_in_turn(ours, paper)])
        if gap and (method, False) in methods:
            gains = [
                [_gain(found, data_set, preset, method, share, iterate) for iterate in (CHOSEN, LAST)]
                for share in SHARES
            ]
            paper = [_scores(lab_scores.published_gain(data_set, method, share), signed=True) for share in SHARES]
            rows.append(["gain", *_in_turn(gains, paper)])
    if (methods, preset) == (grid.TABLE_1, FULL_SCALE):
        rows.append(["Supervised by all labels", *["", "", _scores(FULLY_SUPERVISED[data_set])] * len(SHARES)])
    return rows


def _ours(found: Found, data_set: str, preset: str, method: Run, share: int, iterate: Iterate) -> str:
    """Mean and spread over the repeats, and what is missing of them."""
    declared = lab_scores.repeats(data_set, preset, method, share)
    records = [*lab_scores.done(found, declared).values()]
    scored = [record for record in records if record.get(iterate)]
    if iterate == LAST and not scored:
        return "-" if records else ""
    tests = [record[iterate] for record in scored]
    text = _spread([test["dice"] for test in tests], [test["asd"] for test in tests])
    text += lab_scores.marks(scored, iterate)
    return text + _count(found, declared, len(tests)) + empty_share(tests)


def _gain(found: Found, data_set: str, preset: str, method: str, share: int, iterate: Iterate) -> str:
    declared = [lab_scores.repeats(data_set, preset, (method, gap), share) for gap in (False, True)]
    pairs = lab_scores.pairs(found, data_set, preset, method, share, iterate)
    if not pairs:
        begun = lab_scores.pairs(found, data_set, preset, method, share)
        return ("-" if begun else "") if iterate == LAST else _count(found, [*declared[0], *declared[1]], 0)
    gains = lab_scores.gains(pairs, iterate)
    dice, asd = ({repeat: gain[index] for repeat, gain in gains.items()} for index in (0, 1))
    marks = lab_scores.marks((record for pair in pairs.values() for record in pair), iterate)
    return f"{difference(dice, 1)}\n{difference(asd, 2)}{marks}{number(len(pairs), declared[1])}"


def _count(found: Found, declared: Sequence[Cell], done: int) -> str:
    """What to say after a mean of how many runs it is made of."""
    failed = sum(found[cell]["state"] == "failed" for cell in declared if cell in found)
    failures = f"{failed} failed" if failed else ""
    if not done:
        return failures or "open"
    return number(done, declared) + f", {failures}" * bool(failed)


def _spread(dice: Sequence[float], asd: Sequence[float]) -> str:
    return f"{mean_and_deviation(dice, 1)}\n{mean_and_deviation(asd, 2)}" if dice else ""


def _scores(scores: Scores | None, signed: bool = False) -> str:
    """With as many digits as the paper prints."""
    if scores is None:
        return ""
    (dice, asd), sign = scores, "+" if signed else ""
    return f"{dice:{sign}.1f}\n{asd:{sign}.{2 if abs(asd) < 10 else 1}f}"


def _in_turn(ours: Sequence[Sequence[str]], paper: Sequence[str]) -> list[str]:
    """Share by share."""
    return [text for texts, theirs in zip(ours, paper, strict=True) for text in (*texts, theirs)]


# ---------------------------------------------------------------- hyper-parameters


def sweeps(found: Found) -> list[Table]:
    """Validation Dice of GapMatch over each sweep of the grid, for every preset that has them."""
    presets = dict.fromkeys(batch.preset for batch in grid.BLOCKS if batch.group == "hyper-parameters")
    return [
        table
        for preset in presets
        for table in (_eps_alpha(found, preset), *_single_sweeps(found, preset), *_controls(found, preset))
    ]


def _eps_alpha(found: Found, preset: str) -> Table:
    sweep = SWEEPS["eps and alpha"]
    all_eps, all_alpha = (sorted({changes[name] for changes in sweep}) for name in ("eps", "alpha"))
    rows = [
        [f"{eps:g}", *(_validated(found, preset, {"eps": eps, "alpha": alpha}) for alpha in all_alpha)]
        for eps in all_eps
    ]
    return Table(f"eps and alpha ({preset}, 1 %)", ["eps", *(f"alpha {alpha:g}" for alpha in all_alpha)], rows)


def _single_sweeps(found: Found, preset: str) -> list[Table]:
    return [
        _sweep(found, preset, name, f"{name}{_common(name, sweep)}", sweep)
        for name, sweep in SWEEPS.items()
        if all(name in changes for changes in sweep)
    ]


def _controls(found: Found, preset: str) -> list[Table]:
    return [
        _sweep(found, preset, name, f"Control: {name} of FixMatch", sweep, FIXMATCH)
        for name, sweep in grid.CONTROLS.items()
    ]


def _sweep(
    found: Found, preset: str, name: str, heading: str, sweep: Sequence[Mapping[str, object]], method: Run = GAPMATCH
) -> Table:
    rows = [[str(changes[name]), _validated(found, preset, changes, method)] for changes in sweep]
    return Table(f"{heading} ({preset}, 1 %)", [name, "Dice %"], rows)


def _common(name: str, sweep: Sequence[Mapping[str, object]]) -> str:
    """In what all runs of a sweep of `name` differ from the preset."""
    others = [f"{key} {value:g}" for key, value in sweep[0].items() if key != name]
    return f", with {' and '.join(others)}" if others else ""


def _validated(found: Found, preset: str, changes: Mapping[str, object], method: Run = GAPMATCH) -> str:
    dice = [[*lab_scores.validations(found, preset, changes, method, iterate).values()] for iterate in (CHOSEN, LAST)]
    text = "\n".join(mean_and_deviation(values, 1) for values in dice if values)
    default = not cell("ACDC", preset, method, 1, 0, changes).changes
    declared = lab_scores.compared(preset, changes, method)
    return text + _count(found, declared, len(dice[0])) + ", default" * default


# ---------------------------------------------------------------- the rest of the page


def _heading(found: Found, data_set: str, preset: str) -> str:
    declared = [cell for cell in grid.cells(presets=[preset]) if cell.data_set == data_set]
    done = sum(cell in found and found[cell]["state"] == "done" for cell in declared)
    reduced = f"reduced scale: {preset} (not comparable with the paper's numbers)"
    scale = "full scale" if preset == FULL_SCALE else reduced
    return "\n".join(
        [
            f"## {data_set}, {scale}",
            "",
            f"{done} of {len(declared)} cells have run{_hardware(found, declared)}.",
            "",
            protocol(data_set, preset),
            "",
        ]
    )


def protocol(data_set: str, preset: str) -> str:
    """What all runs of a preset have in common."""
    recipe = Recipe(**TASKS[data_set].presets[preset])
    size = " x ".join(map(str, recipe.size))
    weights = "a moving average of the weights" if recipe.average_decay else "the trained weights"
    statistics = f"taken anew over {recipe.statistics_samples} samples" if recipe.statistics_samples else "running"
    weight = "is each method's own" if recipe.weight is None else f"{recipe.weight:g}"
    loss = "each method's own" if recipe.unlabelled_loss is None else f"`{recipe.unlabelled_loss}`"
    warm_up = f", the first {recipe.warm_up:,} of them on labelled images alone" if recipe.warm_up else ""
    lines = (
        f"Preset `{preset}`: input {size}, network width {recipe.width}, batch {recipe.labelled_batch} labelled + "
        f"{recipe.unlabelled_batch} unlabelled, {recipe.iterations:,} iterations of SGD (lr {recipe.lr:g}, momentum "
        f"{recipe.momentum:g}){warm_up}, validated every {recipe.validate_every:,}.",
        f"tau {recipe.tau:g}, eps {recipe.eps:g}, alpha {recipe.alpha:g}, the weight of the consistency loss "
        f"{weight}; R of equation 7: {loss}.",
        f"Scored: {weights}; batch-norm statistics: {statistics}.",
    )
    return "\n".join(f"- {line}" for line in lines)


def _hardware(found: Found, declared: Sequence[Cell]) -> str:
    kinds = {
        f"{record['device']}, {record['threads']} thread(s), torch {record['torch']}, {record.get('amp') or 'float32'}"
        for cell in declared
        if (record := found.get(cell))
    }
    return ", on " + "; ".join(sorted(kinds)) if kinds else ""


def _picture(path: Path, page: Path, caption: str) -> str:
    return f"![{caption}]({Path(os.path.relpath(path, page.parent)).as_posix()})\n\n{caption}\n"
