"""The lines of docs/recipes/monai.md in an engine with an iteration update of somebody's own."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gap_torch import GAPWrapper
from gap_torch.reference import algorithm_1

pytest.importorskip("ignite", reason="pip install 'gap-torch[integrations]'")
engines = pytest.importorskip("monai.engines", reason="pip install 'gap-torch[integrations]'")

IterationEvents = engines.utils.IterationEvents

EPS, ALPHA, WEIGHT = 0.3, 0.5, 0.7


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


def test_the_sum_at_backward_completed_is_that_of_gap(lines: Any, network: Any) -> None:
    model, data = network(), _data(torch.float64)[:1]
    twin, batch = copy.deepcopy(model), data[0]
    with torch.no_grad():
        target = copy.deepcopy(model)(batch["unlabelled"] + 0.1).softmax(1)
    code = lines("monai", "The lines")

    def update(engine: Any, batch: dict[str, Any]) -> dict[str, Any]:
        engine.network.train()
        names = {
            "engine": engine,
            "IterationEvents": IterationEvents,
            "scaler": torch.amp.GradScaler(enabled=False),
            "weight": WEIGHT,
            "consistency": lambda: F.mse_loss(engine.network(batch["unlabelled"]).softmax(1), target),
            "supervised": lambda: engine.loss_function(engine.network(batch["image"]), batch["label"]),
        }
        exec(code, names)
        return {}

    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1), EPS, ALPHA)
    engine = _engine(model, optimizer, data, iteration_update=update)
    seen: list = []
    engine.add_event_handler(
        IterationEvents.BACKWARD_COMPLETED, lambda _: seen.extend(p.grad.clone() for p in model.parameters())
    )
    engine.run()
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
