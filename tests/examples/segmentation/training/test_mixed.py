"""A step whose views have labelled images in them: Algorithm 1, in as few passes as there are views."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gap_torch.consistency import Batch, Views
from gap_torch.losses import ce_dice_loss
from gap_torch.reference import algorithm_1
from segmentation import ranks
from segmentation.errors import InputError
from segmentation.networks.dropout import Dropout3d
from segmentation.recipe import Recipe
from segmentation.training.joint import require_even_shares
from segmentation.training.step import Trainer

from ..problems import PROBLEMS, pools

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def _trainer(dims: str, run: str, **changes: Any) -> Trainer:
    """Without dropout, of which each pass draws another."""
    task, recipe = PROBLEMS[dims]
    plain = {"momentum": 0.0, "weight_decay": 0.0, "eps": 0.3, "alpha": 0.7, "weight": None, "batch": 4}
    plain |= changes
    batch = plain.pop("batch")
    recipe = replace(recipe.for_run(run), labelled_batch=batch, unlabelled_batch=batch, **plain)
    trainer = Trainer(task, recipe, *pools(recipe, task.num_classes), CPU, None)
    for layer in trainer.model.modules():
        if isinstance(layer, (nn.Dropout, Dropout3d)):
            layer.p = 0.0
    return trainer


@pytest.mark.parametrize("dims", PROBLEMS)
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("run", ["bcp", "bcp+gap"])
def test_a_step_is_algorithm_1(run: str, joint: bool, dims: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, twin = (_trainer(dims, run, joint=joint) for _ in range(2))
    made = {}
    prepare = trainer.method.prepare
    monkeypatch.setattr(trainer.method, "prepare", lambda *given: made.setdefault("views", prepare(*given)))
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.step(0)
    views, lr, model, method = made["views"], trainer.sgd.lr, twin.model, twin.method
    moved = [(old - new).detach() / lr for old, new in zip(before, trainer.model.parameters(), strict=True)]

    def consistency() -> Tensor:
        return 0.5 * method.compare(tuple(map(model, views.inputs)), views)

    def labelled() -> Tensor:
        logits = torch.cat([*map(model, views.inputs)]) if joint else model(views.labelled)
        return method.labelled_loss(ce_dice_loss, logits, torch.tensor(0), views)

    _require_gradient(moved, trainer.recipe.gap, model, consistency, labelled)


def _require_gradient(
    moved: list[Tensor], gap: bool, model: nn.Module, consistency: Callable[[], Tensor], labelled: Callable[[], Tensor]
) -> None:
    """That of Algorithm 1 with GAP, and of the two losses' sum without."""
    if gap:
        expected = algorithm_1(list(model.parameters()), consistency, labelled, eps=0.3, alpha=0.7)
    else:
        expected = torch.autograd.grad(consistency() + labelled(), list(model.parameters()))
    for ours, theirs in zip(moved, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "run", "expected"),
    [
        ({}, "bcp", [2, 2]),
        ({}, "bcp+gap", [2, 2, 2, 2]),
        ({"joint": False}, "bcp", [2, 2, 4]),
        ({"joint": False}, "bcp+gap", [2, 2, 2, 2, 4]),
        ({"batch": 3}, "bcp", [2, 2]),
        ({"warm_up": 1}, "bcp", [2, 2]),  # its pre-training is one
        ({"warm_up": 1, "pre_training": 0}, "bcp", [4]),
    ],
)
def test_how_many_passes_there_are(changes: dict[str, Any], run: str, expected: list[int]) -> None:
    trainer, seen = _trainer("2D", run, **changes), []
    trainer.model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    trainer.step(0)
    assert seen == expected


@pytest.mark.parametrize("dims", PROBLEMS)
@pytest.mark.parametrize("run", ["mcnet", "mcnet+gap", "dtc", "dtc+gap"])
def test_labelled_images_that_the_view_begins_with_are_in_the_joint_batch_once(
    run: str, dims: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"k": 15.0} if run.startswith("dtc") else {}  # its own multiplies rounding
    trainer, twin = (_trainer(dims, run, joint=True, options=options) for _ in range(2))
    batches: list[Batch] = []
    seen: list[Tensor] = []
    prepare = trainer.method.prepare
    monkeypatch.setattr(trainer.method, "prepare", lambda model, batch: prepare(model, batches.append(batch) or batch))
    trainer.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.step(0)
    (batch,), images, passes = batches, seen[0], 2 if trainer.recipe.gap else 1
    assert [len(each) for each in seen] == [4 + 4] * passes
    assert torch.equal(images[:4], batch.labelled)
    lr, model, method = trainer.sgd.lr, twin.model, twin.method
    moved = [(old - new).detach() / lr for old, new in zip(before, trainer.model.parameters(), strict=True)]

    def consistency() -> Tensor:
        return trainer.own.weight * method.compare((model(images),), Views((images,)))

    def labelled() -> Tensor:
        return method.labelled_loss(ce_dice_loss, tuple(output[:4] for output in model(images)), batch.labels)

    _require_gradient(moved, trainer.recipe.gap, model, consistency, labelled)


def test_labels_alone_are_learnt_from_where_pseudo_labels_weigh_nothing() -> None:
    trainer = _trainer("2D", "bcp", weight=0.0)
    other = _trainer("2D", "bcp", weight=0.0)
    other.method.clean = torch.zeros_like
    for each in (trainer, other):
        each.step(0)
    for a, b in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_batch_that_goes_by_halves_is_shared_out_by_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    bcp, fixmatch = (Recipe(method=m, gap=False, labelled_batch=6, unlabelled_batch=6) for m in ("bcp", "fixmatch"))
    require_even_shares(replace(bcp, labelled_batch=5, unlabelled_batch=5))  # one process has all of it
    monkeypatch.setattr(ranks, "world", lambda: 2)
    require_even_shares(fixmatch)
    require_even_shares(replace(bcp, labelled_batch=4, unlabelled_batch=8))
    with pytest.raises(InputError, match=r"6 samples .* 2 processes, of bcp each half; .* divides 3\."):
        require_even_shares(bcp)
