"""The lines of docs/recipes/monai.md in an engine with an iteration update of somebody's own."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gap_torch
from gap_torch import GAPWrapper
from gap_torch.reference import algorithm_1

pytest.importorskip("ignite", reason="pip install 'gap-torch[integrations]'")
engines = pytest.importorskip("monai.engines", reason="pip install 'gap-torch[integrations]'")

IterationEvents = engines.utils.IterationEvents

EPS, ALPHA, WEIGHT = 0.1, 1.0, 0.7  # the page's, its default, ours


def _data(dtype: torch.dtype) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    image, unlabelled = torch.randn(2, 3, 2, 1, 6, 6, generator=generator, dtype=dtype)
    label = torch.randint(3, (3, 2, 6, 6), generator=generator)
    return [{"image": image[i], "label": label[i], "unlabelled": unlabelled[i]} for i in range(3)]


def _engine(network: nn.Module, optimizer: Any, data: list, **options: Any) -> Any:
    return engines.SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=data,
        network=network,
        optimizer=optimizer,
        loss_function=F.cross_entropy,
        **options,
    )


@pytest.mark.parametrize("scaled", [False, True])
def test_the_sum_at_backward_completed_is_that_of_gap(lines: Any, network: Any, scaled: bool) -> None:
    model, data, scaler = network(), _data(torch.float64)[:1], torch.amp.GradScaler("cpu", enabled=scaled)
    twin, batch = copy.deepcopy(model), data[0]
    with torch.no_grad():
        target = copy.deepcopy(model)(batch["unlabelled"] + 0.1).softmax(1)
    wrap, code = lines("monai", "Change these lines")
    names: dict[str, Any] = {"optimizer": torch.optim.SGD(model.parameters(), 0.1)}
    exec(wrap, names)
    names |= {"IterationEvents": IterationEvents, "scaler": scaler, "weight": WEIGHT}

    def update(engine: Any, batch: dict[str, Any]) -> dict[str, Any]:
        engine.network.train()
        consistency = lambda: F.mse_loss(engine.network(batch["unlabelled"]).softmax(1), target)  # noqa: E731
        supervised = lambda: engine.loss_function(engine.network(batch["image"]), batch["label"])  # noqa: E731
        exec(code, {**names, "engine": engine, "consistency": consistency, "supervised": supervised})
        return {}

    engine = _engine(model, names["optimizer"], data, iteration_update=update)
    seen: list = []

    @engine.on(IterationEvents.BACKWARD_COMPLETED)
    def _note() -> None:
        seen.extend(p.grad / scaler.get_scale() for p in model.parameters())

    with gap_torch.check(names["optimizer"], model, show=None) as report:
        engine.run()
    assert report.ok, report.problems
    expected = algorithm_1(
        list(twin.parameters()),
        lambda: WEIGHT * (twin(batch["unlabelled"]).softmax(1) - target).square().mean(),
        lambda: F.cross_entropy(twin(batch["image"]), batch["label"]),
        eps=EPS,
        alpha=ALPHA,
    )
    torch.testing.assert_close(seen, expected)


def test_the_wrapper_in_the_engines_own_iteration_is_the_bare_optimizer(network: Any) -> None:
    weights = []
    for wrap in (lambda base: base, GAPWrapper):
        model = network(0, torch.float32)
        _engine(model, wrap(torch.optim.SGD(model.parameters(), 0.1, 0.9)), _data(torch.float32)).run()
        weights.append(model.state_dict())
    torch.testing.assert_close(*weights, rtol=0, atol=0)
