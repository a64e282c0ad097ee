"""What is to be done, with which data, and where."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from segmentation.recipe import Recipe
from segmentation.task import Scores, Task

OldRuns = Literal["refuse", "resume", "replace"]
Goal = Literal["training", "scores", "pictures"]


@dataclass(frozen=True)
class Job:
    """What to do, with which data, and where.

    Attributes:
        task: the data set.
        data: root of its files.
        patients: how many of the training patients count as labelled.
        patients_seed: draws them at random; None takes the first, as the field does.
        recipes: one run each, in this order; they share everything but the method.
        device: where to train.
        amp: autocast dtype, or None for float32.
        out: folder for one folder a run, and the table and pictures of all.
        old_runs: what to do about runs found in `out`.
        title: above the table.
        stride: of the sliding window, if the task has one.
        largest_component: whether of each predicted class only the largest connected component is kept.
        compiled: whether `torch.compile` makes the training passes; one process alone.
        graph: whether the training step is captured as a CUDA graph.
        published: scores to print below ours: method -> (Dice in percent, ASD in voxels).
        log_name: what log lines call a run; None for the name of its method.
        goal: how far to go, each including what comes before: "training" chooses on validation and never reads the
            test volumes, "scores" is without table and pictures.
    """

    task: Task
    data: Path
    patients: int
    recipes: Sequence[Recipe]
    device: torch.device
    amp: torch.dtype | None
    out: Path
    old_runs: OldRuns
    title: str
    patients_seed: int | None = None
    stride: tuple[int, ...] | None = None
    largest_component: bool = False
    compiled: bool = False
    graph: bool = False
    published: Mapping[str, Scores] = field(default_factory=dict)
    log_name: str | None = None
    goal: Goal = "pictures"

    @property
    def runs(self) -> list[Recipe]:
        """All that are trained, each behind the one that it starts from, and none twice."""
        return list(dict.fromkeys(stage for recipe in self.recipes for stage in recipe.stages))

    def folder(self, recipe: Recipe) -> Path:
        """Where the run of `recipe` has its checkpoints, logs and `result.json`."""
        return self.out / recipe.name

    def logged_as(self, recipe: Recipe) -> str:
        """What log lines call the run of `recipe`, which `log_name` is not of where it is another's phase."""
        return recipe.name if self.log_name is None or recipe not in self.recipes else self.log_name
