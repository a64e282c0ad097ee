"""A run that starts from another's weights: which, once for all that need it, and as if it had not been interrupted."""

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import acdc_gapmatch
import la_gapmatch
from gap_torch.consistency import BCP, BCPPreTraining
from segmentation import cli
from segmentation.data.phantoms.atrium import write_atrium
from segmentation.errors import InputError
from segmentation.job import Job
from segmentation.methods import PHASES, TABLE
from segmentation.recipe import Recipe
from segmentation.task import Task
from segmentation.training import checkpoint
from segmentation.training.step import Trainer

pytestmark = pytest.mark.usefixtures("undrawn")

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "iterations": 6,
    "width": 2,
    "labelled_batch": 2,
    "unlabelled_batch": 2,
    "validate_every": 2,
    "log_every": 1,
    "statistics_samples": 2,
    "average_decay": 0.5,
}
STEPS = 2 + 6  # a third as many before
TASKS: dict[str, tuple[Task, tuple[int, ...]]] = {
    "2D": (acdc_gapmatch.ACDC, (32, 32)),
    "3D": (la_gapmatch.LA, (32, 32, 16)),  # of half a batch, one sample, batch norm needs two voxels at the bottom
}


@pytest.fixture(autouse=True)
def tiny_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    for task, size in TASKS.values():
        monkeypatch.setitem(task.presets, "cpu", {**TINY, "size": size})


@pytest.fixture(scope="module")
def data(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    atria = tmp_path_factory.mktemp("atria")
    write_atrium(atria, cases=(3, 2), size=(24, 24, 18))
    return {"2D": tiny_data, "3D": atria}


def _command(root: Path, out: Path, *more: str) -> list[str]:
    places = ["--data", str(root), "--out", str(out)]
    return [*places, "--patients", "1", "--device", "cpu", "--preset", "cpu", "--amp", "off", *more]


def _run(dims: str, root: Path, out: Path, *more: str) -> int:
    return cli.main(TASKS[dims][0], "", _command(root, out, *more))


def _job(dims: str, root: Path, *more: str) -> Job:
    task = TASKS[dims][0]
    return cli.job(task, cli.parse(task, "", _command(root, root, *more)))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Name and iteration of every step that is made."""
    made: list[tuple[str, int]] = []
    step = Trainer.step

    def noting(trainer: Trainer, iteration: int) -> dict[str, torch.Tensor]:
        made.append((trainer.recipe.name, iteration))
        return step(trainer, iteration)

    monkeypatch.setattr(Trainer, "step", noting)
    return made


@pytest.mark.parametrize("dims", TASKS)
def test_the_run_starts_from_the_kept_weights_of_its_phase_and_its_teacher_too(
    dims: str, data, tmp_path: Path, steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Trainer] = []
    start_from = Trainer.start_from

    def noting(trainer: Trainer, weights: dict[str, torch.Tensor]) -> None:
        start_from(trainer, weights)
        kept = checkpoint.load(tmp_path / "bcp_pre_training" / "best.pt", CPU)["model"]
        for name, value in trainer.model.state_dict().items():
            assert torch.equal(value, kept[name])
            assert torch.equal(trainer.method.teacher.model.state_dict()[name], kept[name])
        started.append(trainer)

    monkeypatch.setattr(Trainer, "start_from", noting)
    assert _run(dims, data[dims], tmp_path, "--method", "bcp+gap") == 0
    assert steps == [*(("bcp_pre_training", t) for t in range(2)), *(("bcp+gap", t) for t in range(6))]
    assert [trainer.recipe.name for trainer in started] == ["bcp+gap"]
    assert isinstance(started[0].method, BCP)
    assert "BCP + GAP" in (table := (tmp_path / "table.md").read_text())
    assert "pre-training" not in table


@pytest.mark.parametrize(("dims", "deaths"), [("2D", (0, 1, 2, 5)), ("3D", (1, 5))])
def test_wherever_it_is_interrupted_it_ends_as_one_that_was_left_alone(
    dims: str, deaths: tuple[int, ...], data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = "bcp+gap"
    command = (dims, data[dims])
    assert _run(*command, tmp_path / "whole", "--method", run) == 0
    whole = _left(tmp_path / "whole", run)
    step = Trainer.step
    for death in deaths:
        left = [death]

        def press_ctrl_c(trainer: Trainer, iteration: int, left: list[int] = left) -> dict[str, torch.Tensor]:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGINT)
            left[0] -= 1
            return step(trainer, iteration)

        out = tmp_path / str(death)
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "step", press_ctrl_c)
            assert _run(*command, out, "--method", run) == 130
        assert _run(*command, out, "--method", run, "--resume") == 0
        _assert_equal(_left(out, run), whole)


def _left(out: Path, run: str) -> dict[str, Any]:
    """All that training leaves but its times."""
    left = {}
    for name in ("bcp_pre_training", run):
        left[name] = checkpoint.load(out / name / "last.pt", CPU)
        left[name]["progress"].pop("seconds")
        left[f"best {name}"] = checkpoint.load(out / name / "best.pt", CPU)
    return left


def _assert_equal(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            _assert_equal(ours[key], theirs[key])
    else:
        assert ours == theirs


def test_two_runs_share_a_phase_which_a_third_finds(data, tmp_path: Path, steps) -> None:
    assert _run("2D", data["2D"], tmp_path, "--method", "bcp", "bcp+gap") == 0
    assert len(steps) == 2 + 2 * 6
    first, second = (_first_loss(tmp_path / run) for run in ("bcp", "bcp+gap"))
    assert first == second  # from the same weights, on the same samples
    steps.clear()
    shutil.rmtree(tmp_path / "bcp")
    assert _run("2D", data["2D"], tmp_path, "--method", "bcp", "--resume") == 0
    assert [name for name, _ in steps] == ["bcp"] * 6
    assert _first_loss(tmp_path / "bcp") == first


def _first_loss(folder: Path) -> str:
    return (folder / "train.csv").read_text().splitlines()[1].split(",")[1]


def test_a_run_that_has_begun_needs_its_phase_no_more(data, tmp_path: Path, steps) -> None:
    assert _run("2D", data["2D"], tmp_path, "--method", "bcp") == 0
    steps.clear()
    shutil.rmtree(tmp_path / "bcp_pre_training")
    assert _run("2D", data["2D"], tmp_path, "--method", "bcp", "--resume") == 0
    assert not steps


def test_a_phase_of_another_recipe_is_refused(data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("2D", data["2D"], tmp_path, "--method", "bcp") == 0
    shutil.rmtree(tmp_path / "bcp")
    command = ("2D", data["2D"], tmp_path, "--method", "bcp", "--lr", "0.02")
    assert _run(*command) == 2
    assert "holds a bcp_pre_training run already; add --resume" in capsys.readouterr().err
    assert _run(*command, "--resume") == 2
    assert "bcp_pre_training/last.pt: was made with lr=0.01, this run has lr=0.02" in capsys.readouterr().err


@pytest.mark.parametrize(("share", "expected"), [("0", ["bcp"]), ("0.5", 3 * ["bcp_pre_training"] + ["bcp"])])
def test_how_long_the_phase_is(share: str, expected: list[str], data, tmp_path: Path, steps) -> None:
    assert _run("2D", data["2D"], tmp_path, "--method", "bcp", "--pre-training", share) == 0
    assert [name for name, _ in steps] == [*expected, *["bcp"] * 5]


def test_a_length_is_refused_where_there_is_no_phase(data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("2D", data["2D"], tmp_path, "--method", "em", "--pre-training", "0.5") == 2
    assert "--pre-training: means nothing to these methods; name one of bcp" in capsys.readouterr().err


def test_all_that_a_job_trains_and_what_it_calls_them(data) -> None:
    job = _job("2D", data["2D"], "--method", "bcp", "em", "bcp+gap", "--warm-up", "1", "--option", "script=la")
    assert [recipe.name for recipe in job.runs] == ["bcp_pre_training", "bcp", "em", "bcp+gap"]
    phase = job.runs[0]
    assert (phase.iterations, phase.warm_up, phase.gap, phase.all_options) == (2, 0, False, {"script": "la"})
    named = replace(job, log_name="cell")
    assert [named.logged_as(recipe) for recipe in job.runs] == ["bcp_pre_training", "cell", "cell", "cell"]
    with pytest.raises(InputError, match="bcp_pre_training with GAP: there is no consistency loss to perturb by"):
        replace(phase, gap=True)


def test_nobody_asks_for_a_phase_by_its_name(data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not set(PHASES) & set(TABLE)
    assert _run("2D", data["2D"], tmp_path, "--method", "bcp_pre_training") == 2
    assert "method 'bcp_pre_training': not one of" in capsys.readouterr().err


@pytest.mark.parametrize("dims", TASKS)
@pytest.mark.parametrize("script", ["acdc", "la"])
def test_both_scripts_of_the_authors_run_and_differ(script: str, dims: str, data) -> None:
    job = _job(dims, data[dims], "--method", "bcp", "--option", f"script={script}")
    phase, run = (_trainer(dims, recipe) for recipe in job.runs)
    assert isinstance(phase.method, BCPPreTraining)
    assert phase.method.by_region == (script == "acdc")
    assert phase.method.dice is run.method.dice
    logged = [trainer.to_host(trainer.step(0)) for trainer in (phase, run)]
    assert "loss_unlabelled" not in logged[0]
    other = _trainer(dims, replace(job.recipes[0], options={"script": {"acdc": "la", "la": "acdc"}[script]}))
    assert other.to_host(other.step(0))["loss_unlabelled"] != pytest.approx(logged[1]["loss_unlabelled"])


def _trainer(dims: str, recipe: Recipe) -> Trainer:
    from ..problems import pools

    task = TASKS[dims][0]
    return Trainer(task, recipe, *pools(recipe, task.num_classes), CPU, None)
