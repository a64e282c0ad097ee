"""The plain example trains, reads and scores as the Trainer does, which has the same recipe."""

import shutil
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch import Tensor

import acdc_plain
from segmentation.acdc import ACDC
from segmentation.data.files import read_list, split_by_patients
from segmentation.data.slices import Slices, load_slices, load_unlabelled, load_volumes
from segmentation.networks.unet import UNet
from segmentation.recipe import Recipe
from segmentation.scoring.evaluate import evaluate
from segmentation.scoring.slicewise import predict_volume
from segmentation.training.batches import mix
from segmentation.training.step import Trainer

T = TypeVar("T")
CPU = torch.device("cpu")
ITERATIONS = 5
RECIPE = Recipe(size=(32, 32), width=2, labelled_batch=3, unlabelled_batch=3, iterations=ITERATIONS, tau=0.3)
"""Beyond its size all is the recipe's default; some pixels are confident, and some are not."""
SIZE = 32


@pytest.fixture(scope="module")
def pools(tiny_data: Path) -> tuple[Slices, Slices]:
    labelled, unlabelled = split_by_patients(read_list(tiny_data / "train_slices.list"), 1)
    return load_slices(tiny_data, labelled, RECIPE.size), load_unlabelled(tiny_data, unlabelled, RECIPE.size)


@pytest.mark.parametrize("method", ["fixmatch", "gapmatch"])
def test_losses_and_weights_are_those_of_the_trainer(method, pools, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, over several iterations."""
    trainer = Trainer(ACDC, RECIPE.for_run(method), *pools, CPU, None)
    model, steps = _network(RECIPE.seed), range(ITERATIONS)
    labelled = [(images, labels.long()) for images, labels in map(trainer.labelled_batch, steps)]
    unlabelled = [(trainer.unlabelled_batch(t),) for t in steps]
    losses: list[Tensor] = []
    loss = acdc_plain.ce_dice_loss
    monkeypatch.setattr(acdc_plain, "ce_dice_loss", lambda *arguments: _noted(losses, loss(*arguments)))
    monkeypatch.setattr(acdc_plain, "TAU", RECIPE.tau)
    acdc_plain.train(model, labelled, _seeded(unlabelled), ITERATIONS, gap=method == "gapmatch")

    logged = [trainer.step(t) for t in steps]
    assert all(0 < values["confident"] < 1 for values in logged)
    passes = [f"loss_{name}" for name in ("unlabelled", "perturbed", "labelled") if f"loss_{name}" in logged[0]]
    assert len(passes) == (3 if method == "gapmatch" else 2)
    assert losses == [values[name] for values in logged for name in passes]
    for ours, theirs in zip(model.state_dict().values(), trainer.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_constants_are_the_recipes() -> None:
    recipe = Recipe()
    assert (recipe.labelled_batch, recipe.unlabelled_batch) == (acdc_plain.BATCH, acdc_plain.BATCH)
    assert (recipe.lr, recipe.momentum) == (acdc_plain.LR, acdc_plain.MOMENTUM)
    assert (recipe.weight_decay, recipe.power) == (acdc_plain.WEIGHT_DECAY, acdc_plain.POWER)
    assert (recipe.tau, recipe.eps, recipe.alpha) == (acdc_plain.TAU, acdc_plain.EPS, acdc_plain.ALPHA)
    assert recipe.lr_schedule == "poly"
    assert ACDC.classes == acdc_plain.CLASSES


def test_slices_are_those_of_the_trainer(tiny_data: Path) -> None:
    names = read_list(tiny_data / "train_slices.list")
    expected = load_slices(tiny_data, names, (48, 48))
    images, labels = acdc_plain.slices(tiny_data, names, 48, "image", "label").tensors
    assert torch.equal(images, expected.images)
    assert torch.equal(labels, expected.labels.long())
    (images,) = acdc_plain.slices(tiny_data, names, 48, "image").tensors
    assert torch.equal(images, expected.images)


def test_batches_are_as_many_as_asked_for_and_leave_no_sample_out() -> None:
    torch.manual_seed(0)
    samples = torch.utils.data.TensorDataset(torch.arange(20))
    drawn = [batch.tolist() for (batch,) in acdc_plain.batches(samples, iterations=5)]
    assert [len(batch) for batch in drawn] == [acdc_plain.BATCH] * 5
    order = [*chain(*drawn)]
    assert [sorted(order[i : i + 20]) for i in (0, 20, 40)] == [list(range(20))] * 3
    assert order[:20] != order[20:40]


def test_scores_are_those_of_the_trainers_evaluation(tiny_data: Path) -> None:
    model, names = _network(seed=3), read_list(tiny_data / "val.list")
    dice, distance = acdc_plain.score(model, tiny_data, names, size=SIZE)
    volumes = load_volumes(tiny_data, names)
    expected = evaluate(lambda image: predict_volume(model, image, (SIZE, SIZE), CPU)[0], volumes, ACDC.num_classes)
    assert 0 < expected.dice < 100
    torch.testing.assert_close(dice.mean(dim=0).tolist(), list(expected.class_dice), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(distance.mean(dim=0).tolist(), list(expected.class_asd), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("predicted", [0, 1])
def test_distances_that_do_not_exist_count_0(predicted: int, tiny_data: Path) -> None:
    """Prediction and reference are empty in turn, as `segmentation.scoring.metrics.score` takes them."""

    class Everywhere(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = torch.nn.Parameter(torch.eye(4)[predicted])

        def forward(self, images: Tensor) -> Tensor:
            return self.logits.view(1, 4, 1, 1).expand(len(images), 4, *images.shape[2:])

    names = read_list(tiny_data / "val.list")
    dice, distance = acdc_plain.score(Everywhere(), tiny_data, names, size=SIZE)
    assert torch.isfinite(distance).all()
    assert (distance[:, 1:] == 0).all()
    assert (dice[:, 1:] == 0).all()


@pytest.mark.parametrize("on_a_phantom", [False, True])
def test_it_runs_and_prints_a_line_a_method(
    on_a_phantom: bool, tiny_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(acdc_plain, "write_phantom", partial(shutil.copytree, tiny_data, dirs_exist_ok=True))
    data = [] if on_a_phantom else ["--data", str(tiny_data), "--labelled", "50"]
    acdc_plain.main([*data, "--iterations", "1", "--size", "32"])
    results = [line for line in capsys.readouterr().out.splitlines() if "Dice" in line]
    assert [line.split(":")[0] for line in results] == ["fixmatch", "gapmatch"]


def _network(seed: int) -> UNet:
    torch.manual_seed(seed)
    return UNet(1, ACDC.num_classes, width=RECIPE.width).to(memory_format=torch.channels_last)


def _seeded(batches: Iterable[T]) -> Iterator[T]:
    """`batches`, and before each the seed that the Trainer sets for its iteration."""
    for iteration, batch in enumerate(batches):
        torch.manual_seed(mix(RECIPE.seed, iteration))
        yield batch


def _noted(values: list[Tensor], value: Tensor) -> Tensor:
    values.append(value.detach())
    return value
