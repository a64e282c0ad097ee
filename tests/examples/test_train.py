"""The training step against Algorithm 1, and runs that go on as if they had not been interrupted."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from segmentation import train
from segmentation.data import Slices, Volume, load_slices, load_volumes, read_list, split_by_patients
from segmentation.errors import InputError
from segmentation.recipe import METHODS, Recipe
from segmentation.train import Trainer, fit

from gap_torch.losses import ce_dice_loss
from gap_torch.reference import algorithm_1

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def slices(tiny_data: Path) -> tuple[Slices, Slices]:
    names = split_by_patients(read_list(tiny_data / "train_slices.list"), 1)
    labelled, unlabelled = (load_slices(tiny_data, part, 32) for part in names)
    return labelled, unlabelled


@pytest.fixture(scope="session")
def validation(tiny_data: Path) -> list[Volume]:
    return load_volumes(tiny_data, read_list(tiny_data / "val.list"))


def _trainer(recipe: Recipe, slices: tuple[Slices, Slices]) -> Trainer:
    return Trainer(recipe, *slices, CPU, None)


def _weights(trainer: Trainer) -> list[torch.Tensor]:
    return [*trainer.model.state_dict().values(), *trainer.average.state_dict().values()]


def _assert_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_gapmatch_step_is_algorithm_1(slices, tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(tiny_recipe, alpha=0.5, eps=0.3, tau=0.25, momentum=0.0, weight_decay=0.0, targets="eval")
    trainer = _trainer(recipe, slices)
    trainer.model.double()
    for layer in trainer.model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0  # else each pass draws other masks
    trainer.images, trainer.unlabelled = trainer.images.double(), trainer.unlabelled.double()
    before = [p.detach().clone() for p in trainer.model.parameters()]
    views = {}
    prepare = trainer.method.prepare
    monkeypatch.setattr(trainer.method, "prepare", lambda *arguments: views.setdefault("views", prepare(*arguments)))
    labelled = {}
    with_labels = trainer.weak.with_labels
    monkeypatch.setattr(
        trainer.weak, "with_labels", lambda *arguments: labelled.setdefault("batch", with_labels(*arguments))
    )
    trainer.step(0)
    moved = [(old - new).detach() / recipe.lr for old, new in zip(before, trainer.model.parameters(), strict=True)]

    twin = _trainer(recipe, slices).model.double()
    for layer in twin.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    images, labels = labelled["batch"]
    expected = algorithm_1(
        list(twin.parameters()),
        lambda: trainer.method.loss(twin, views["views"]),
        lambda: ce_dice_loss(twin(images), labels.long()),
        eps=0.3,
        alpha=0.5,
    )
    assert views["views"].confident.any()
    for ours, theirs in zip(moved, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-6)


def test_methods_differ_in_the_consistency_alone(slices, tiny_recipe: Recipe) -> None:
    values = {method: _trainer(replace(tiny_recipe, method=method), slices).step(0) for method in METHODS}
    assert "loss_unlabelled" not in values["supervised"]
    assert set(values["gapmatch"]) - set(values["fixmatch"]) == {"loss_perturbed", "grad_norm"}
    assert torch.equal(values["fixmatch"]["loss_unlabelled"], values["gapmatch"]["loss_unlabelled"])


def test_unlabelled_labels_are_never_looked_at(slices, tiny_recipe: Recipe) -> None:
    labelled, unlabelled = slices
    spoilt = replace(unlabelled, labels=torch.randint_like(unlabelled.labels, 4))
    ours, theirs = _trainer(tiny_recipe, slices), _trainer(tiny_recipe, (labelled, spoilt))
    for t in range(2):
        ours.step(t), theirs.step(t)
    _assert_equal(_weights(ours), _weights(theirs))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_an_interrupted_run_goes_on_to_the_same_weights(
    slices, validation, tiny_recipe: Recipe, tmp_path: Path, method, amp, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(tiny_recipe, method=method)
    whole = Trainer(recipe, *slices, CPU, amp)
    uninterrupted = fit(whole, validation, _folder(tmp_path / "whole"), resume=False)

    folder = _folder(tmp_path / "parts")
    first = Trainer(recipe, *slices, CPU, amp)
    step = first.step

    def press_ctrl_c(iteration: int):
        if iteration == 2:  # in the middle of an interval
            os.kill(os.getpid(), signal.SIGINT)
        return step(iteration)

    monkeypatch.setattr(first, "step", press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        fit(first, validation, folder, resume=False)
    second = Trainer(recipe, *slices, CPU, amp)
    resumed = fit(second, validation, folder, resume=True)

    _assert_equal(_weights(second), _weights(whole))
    _assert_equal([*resumed.model.state_dict().values()], [*uninterrupted.model.state_dict().values()])
    assert resumed.progress.best_dice == uninterrupted.progress.best_dice
    for log in ("train.csv", "validation.csv"):
        rows = [(folder / log).read_text().splitlines() for folder in (tmp_path / "whole", tmp_path / "parts")]
        assert [row.split(",")[:-1] for row in rows[0]] == [row.split(",")[:-1] for row in rows[1]]


KILLED = """
import os, signal, sys, pickle
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from segmentation.train import Trainer, fit
recipe, slices, validation = pickle.loads(Path(sys.argv[2]).read_bytes())
trainer = Trainer(recipe, *slices, torch.device("cpu"), None)
step = trainer.step
def die(iteration):
    if iteration == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(iteration)
trainer.step = die
fit(trainer, validation, Path(sys.argv[3]), resume=True)
"""


def test_a_killed_run_goes_on_to_the_same_weights(slices, validation, tiny_recipe: Recipe, tmp_path: Path) -> None:
    import pickle

    problem = tmp_path / "problem.pickle"
    problem.write_bytes(pickle.dumps((tiny_recipe, slices, validation)))
    examples = Path(train.__file__).parents[1]
    folder = _folder(tmp_path / "killed")
    killed = subprocess.run([sys.executable, "-c", KILLED, examples, problem, folder, "5"], check=False)
    assert killed.returncode == -signal.SIGKILL
    resumed = _trainer(tiny_recipe, slices)
    fit(resumed, validation, folder, resume=True)
    whole = _trainer(tiny_recipe, slices)
    fit(whole, validation, _folder(tmp_path / "whole"), resume=False)
    _assert_equal(_weights(resumed), _weights(whole))


def test_a_finished_run_is_not_trained_again(slices, validation, tiny_recipe: Recipe, tmp_path: Path) -> None:
    fit(_trainer(tiny_recipe, slices), validation, _folder(tmp_path), resume=False)
    again = _trainer(tiny_recipe, slices)
    again.step = lambda iteration: pytest.fail("trained")  # type: ignore[method-assign]
    assert fit(again, validation, tmp_path, resume=True).progress.iteration == tiny_recipe.iterations


@pytest.mark.parametrize("change", [{"width": 4}, {"eps": 0.5}, {"iterations": 8}, {"method": "fixmatch"}])
def test_a_checkpoint_of_another_recipe_is_refused_by_name(
    slices, validation, tiny_recipe: Recipe, tmp_path: Path, change
) -> None:
    fit(_trainer(tiny_recipe, slices), validation, _folder(tmp_path), resume=False)
    other = _trainer(replace(tiny_recipe, **change), slices)
    with pytest.raises(InputError, match=rf"last\.pt.*{next(iter(change))}"):
        fit(other, validation, tmp_path, resume=True)


def test_the_second_ctrl_c_does_not_wait() -> None:
    with train.interruptible() as interrupted:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_best_iteration_is_the_one_with_the_highest_validation_dice(
    slices, validation, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    result = fit(_trainer(tiny_recipe, slices), validation, _folder(tmp_path), resume=False)
    rows = [line.split(",") for line in (tmp_path / "validation.csv").read_text().splitlines()[1:]]
    best = max(rows, key=lambda row: float(row[1]))
    assert int(best[0]) == result.progress.best_iteration
    assert [int(row[0]) for row in rows] == [2, 4, 6]


def _folder(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    return path
