"""DTC, DAN and SASSNet within the training step: who is perturbed, who steps, and that all of them learn."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gap_torch.consistency import signed_distances
from segmentation.training.step import Trainer

from ..problems import PROBLEMS, pools

CPU = torch.device("cpu")
SYSTEMS = ("dtc", "dan", "sassnet")
ADVERSARIAL = ("dan", "sassnet")


def _trainer(dims: str, run: str, amp: torch.dtype | None = None, **changes: Any) -> Trainer:
    task, recipe = PROBLEMS[dims]
    recipe = replace(recipe.for_run(run), **changes)
    return Trainer(task, recipe, *pools(recipe, task.num_classes), CPU, amp)


def _weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _state(module: torch.nn.Module) -> list[Tensor]:
    return [value.clone() for value in module.state_dict().values()]


@pytest.mark.parametrize("dims", PROBLEMS)
@pytest.mark.parametrize("method", SYSTEMS)
def test_the_perturbation_moves_both_heads_and_takes_it_back_bit_for_bit(
    method: str, dims: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But SASSNet's head of logits, which its loss does not reach; and never the discriminator."""
    trainer = _trainer(dims, f"{method}+gap")
    theta, adversary = _weights(trainer.model), _state(trainer.method)
    theta_star, back = {}, {}
    at_theta_star = trainer._alignment

    def look(*arguments: Any) -> Tensor:
        theta_star.update(_weights(trainer.model))
        assert all(map(torch.equal, _state(trainer.method), adversary))
        return at_theta_star(*arguments)

    monkeypatch.setattr(trainer, "_alignment", look)
    monkeypatch.setattr(trainer.sgd, "step", lambda *_: back.update(_weights(trainer.model)))
    trainer.step(0)
    assert all(torch.equal(back[name], theta[name]) for name in theta)
    moved = {name for name in theta if not torch.equal(theta_star[name], theta[name])}
    heads = {name for name in theta if ".head." in name}
    assert moved & heads == {name for name in heads if method != "sassnet" or "attachment" in name}
    assert "network.encoder.0.0.weight" in moved


@pytest.mark.parametrize("method", ADVERSARIAL)
def test_the_discriminator_steps_once_an_iteration_and_is_in_no_other_optimizer(method: str) -> None:
    trainer = _trainer("2D", f"{method}+gap", warm_up=1)
    adversary = trainer.method.adversary
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not any(id(p) in trained for p in adversary.parameters())
    for iteration in range(3):  # in the warm-up too, as a teacher follows in it
        before = _state(adversary.discriminator)
        values = trainer.step(iteration)
        assert adversary.steps == iteration + 1
        assert not any(map(torch.equal, _state(adversary.discriminator), before))
        assert values["discriminator"] == adversary.accuracy


@pytest.mark.parametrize("method", SYSTEMS)
@pytest.mark.parametrize("amp", [torch.float16, torch.bfloat16])
def test_half_precision_trains_them_too(method: str, amp: torch.dtype) -> None:
    trainer = _trainer("2D", f"{method}+gap", amp)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=amp == torch.float16)
    before = _state(trainer.model)
    for iteration in range(3):
        values = trainer.to_host(trainer.step(iteration))
        assert all(torch.tensor(value).isfinite() for value in values.values())
    assert not any(map(torch.equal, [p for p in trainer.model.parameters() if p.ndim > 1], before))


@pytest.mark.parametrize("method", ["dtc", "sassnet"])
def test_the_distances_are_learnt(method: str) -> None:
    """From labels, in the warm-up too: nearer to the true ones than zeros are."""
    trainer = _trainer("2D", method, iterations=60, warm_up=59, width=8)
    images, labels = trainer.labelled_batch(0)
    target = signed_distances(labels, trainer.task.num_classes)
    for iteration in range(60):
        trainer.step(iteration)
    _, z = trainer.model(images)
    assert (z - target).square().mean() < 0.5 * target.square().mean()


def _told_apart(trainer: Trainer, iterations: int) -> float:
    """Mean accuracy over the last half."""
    values = [trainer.to_host(trainer.step(t))["discriminator"] for t in range(iterations)]
    return sum(values[iterations // 2 :]) / len(values[iterations // 2 :])


@pytest.mark.parametrize("method", ADVERSARIAL)
def test_the_discriminator_learns_where_there_is_something_to_tell_apart(method: str) -> None:
    """Unlabelled images are brighter by a half: so is what it sees of them."""
    trainer = _trainer("2D", method, iterations=60)
    trainer.unlabelled = replace(trainer.unlabelled, images=trainer.unlabelled.images + 0.5)
    trainer.weak = trainer.method.weak = _Still()
    assert _told_apart(trainer, 60) > 0.9


class _Still:
    """Moves nothing."""

    def __call__(self, images: Tensor) -> Tensor:
        return images

    def with_labels(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return images, labels
