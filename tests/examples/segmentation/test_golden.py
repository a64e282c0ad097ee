"""What the runs of the table compute, and their scores, are what they were, in the plane and in space.

    PYTHONPATH=examples python -m tests.examples.segmentation.test_golden

records golden.json anew, after a change that is meant to change a value; the file's diff says whose changed. In
float64: training multiplies float32's rounding, another one on each processor, by ten every few iterations.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from segmentation.data.files import Volume
from segmentation.methods import TABLE
from segmentation.recipe import RUNS
from segmentation.scoring.evaluate import evaluate
from segmentation.training.step import Trainer

from .problems import OPTIONS, PROBLEMS, pools, sample

GOLDEN = Path(__file__).with_name("golden.json")
CPU = torch.device("cpu")
STEPS = 3


def measured(dims: str, run: str) -> dict[str, list[float]]:
    """What is logged in each of STEPS iterations, where the weights go, and what they make of a volume.

    And the method's own options, some of which (a teacher's decay) have no effect in the first iterations.
    """
    task, recipe = PROBLEMS[dims][0], PROBLEMS[dims][1].for_run(run)
    recipe = replace(recipe, options=OPTIONS.get(recipe.method, ()))
    trainer = Trainer(task, recipe, *pools(recipe, task.num_classes), CPU, None)
    start = _flat(trainer.model)
    logged = [trainer.to_host(trainer.step(iteration)) for iteration in range(STEPS)]
    way = _flat(trainer.model) - start
    model, volume = trainer.scored_model().float(), _volume(task.num_classes)
    _, entropy = task.predict(model, volume.image, recipe, None, CPU)
    segment = partial(task.segment, model, recipe=recipe, stride=None, device=CPU)
    return {
        "options": [value for value in TABLE[recipe.method].options.values() if not isinstance(value, str)],
        **{name: [values[name] for values in logged] for name in logged[0]},
        "way": [way.norm().item(), (way @ torch.arange(len(way)).double().sin()).item()],
        "entropy": [float(entropy.mean(dtype=float))],
        "dice": list(evaluate(segment, [volume], task.num_classes).class_dice),
    }


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def _volume(classes: int) -> Volume:
    shape = (3, 40, 32) if classes == 4 else (34, 40, 18)
    image, label = sample(shape, classes, seed=7)
    return Volume("test", image.float().numpy(), label.numpy())


@contextmanager
def _in_float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("dims", PROBLEMS)
@pytest.mark.parametrize("run", RUNS)
def test_a_run_computes_what_it_did(run: str, dims: str, golden) -> None:
    with _in_float64():
        ours = measured(dims, run)
    theirs = golden[dims][run]
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert ours[name] == pytest.approx(values, rel=1e-5), name


def _lines(runs: dict[str, dict[str, list[float]]]) -> str:
    """A line a run, of as many digits as are compared and a few more."""
    rounded = {run: {n: [float(f"{v:.8g}") for v in vs] for n, vs in values.items()} for run, values in runs.items()}
    return ",".join(f"\n  {json.dumps(run)}: {json.dumps(values)}" for run, values in rounded.items())


if __name__ == "__main__":
    with _in_float64():
        recorded = {dims: {run: measured(dims, run) for run in RUNS if not print(dims, run)} for dims in PROBLEMS}
    GOLDEN.write_text("{" + ",".join(f'\n"{dims}": {{{_lines(runs)}\n}}' for dims, runs in recorded.items()) + "\n}\n")
