"""What is particular to Accelerate: the wrapper inside its optimizer, saving, mixed precision."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BATCH, CLIP, EPS, LR, Discs, method, network, supervised
from torch.utils.data import DataLoader

from gap_torch import GAPWrapper
from gap_torch.consistency import Batch

accelerate = pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """Accelerate keeps its settings in singletons."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def _prepared(**options: Any) -> tuple[Any, Any, Any, Any]:
    accelerator = accelerate.Accelerator(cpu=True, **options)
    model = network()
    optimizer = GAPWrapper(torch.optim.AdamW(model.parameters(), lr=LR), eps=EPS)
    return accelerator, *accelerator.prepare(model, optimizer, DataLoader(Discs(), BATCH))


def _epoch(accelerator: Any, model: Any, optimizer: Any, loader: Any) -> None:
    for batch in loader:
        views = method.prepare(model, Batch(batch["unlabelled"]))
        accelerator.backward(method.loss(model, views))
        with optimizer.optimizer.perturbed(model):
            accelerator.backward(method.loss(model, views))
        accelerator.backward(supervised(model(batch["image"]), batch["label"]))
        accelerator.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()


def test_the_wrapper_is_inside_accelerates_optimizer() -> None:
    _, model, optimizer, _ = _prepared()
    assert type(optimizer.optimizer) is GAPWrapper
    with pytest.raises(AttributeError, match="perturbed"):
        optimizer.perturbed(model)


def test_accelerates_step_is_refused_while_perturbed() -> None:
    accelerator, model, optimizer, loader = _prepared()
    loss = method.loss(model, method.prepare(model, Batch(next(iter(loader))["unlabelled"])))
    accelerator.backward(loss)
    with (
        pytest.raises(RuntimeError, match=r"step\(\) while the parameters are perturbed"),
        optimizer.optimizer.perturbed(model),
    ):
        optimizer.step()


def test_save_state_and_load_state_go_on_with_the_same_weights(tmp_path: Path) -> None:
    accelerator, *prepared = _prepared()
    _epoch(accelerator, *prepared)
    accelerator.save_state(str(tmp_path))
    _epoch(accelerator, *prepared)
    expected = {name: tensor.clone() for name, tensor in prepared[0].state_dict().items()}
    accelerator.load_state(str(tmp_path))
    _epoch(accelerator, *prepared)
    torch.testing.assert_close(prepared[0].state_dict(), expected, rtol=0, atol=0)
    assert prepared[1].param_groups[0]["gap_eps"] == EPS


def test_what_prepare_returned_is_not_to_be_wrapped() -> None:
    prepared = accelerate.Accelerator(cpu=True).prepare(torch.optim.AdamW(network().parameters(), lr=LR))
    with pytest.raises(TypeError, match=r"AcceleratedOptimizer is a proxy .* before prepare\(\)"):
        GAPWrapper(prepared, eps=EPS)


def test_zero_grad_of_a_base_that_takes_no_argument() -> None:
    """Accelerate looks for `set_to_none` in the wrapper's signature, and passes it."""

    class Old(torch.optim.SGD):
        def zero_grad(self) -> None:  # type: ignore[override]
            super().zero_grad()

    model = network()
    optimizer = accelerate.Accelerator(cpu=True).prepare(GAPWrapper(Old(model.parameters(), lr=LR)))
    next(model.parameters()).grad = torch.zeros_like(next(model.parameters()))
    optimizer.zero_grad()
    assert next(model.parameters()).grad is None


def test_bfloat16_autocast() -> None:
    accelerator, model, optimizer, loader = _prepared(mixed_precision="bf16")
    _epoch(accelerator, model, optimizer, loader)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    assert 0 < optimizer.optimizer.grad_norm < torch.inf


def test_a_scaler_inside_accelerates_optimizer_skips_an_overflow() -> None:
    """Accelerate has a scaler on GPUs alone, so here its optimizer is built with one by hand."""
    _prepared()
    model, image = network(), Discs()[0]["image"][None]
    gap = GAPWrapper(torch.optim.AdamW(model.parameters(), lr=LR), eps=EPS)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = accelerate.optimizer.AcceleratedOptimizer(gap, scaler=scaler)

    def updates(factor: float) -> bool:
        """Whether a step with losses of `factor` changes the parameters."""
        before = [p.detach().clone() for p in model.parameters()]
        scaler.scale(factor * model(image).square().mean()).backward()
        with gap.perturbed(model):
            scaler.scale(factor * model(image).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        return any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))

    assert not updates(torch.inf)
    assert optimizer.step_was_skipped
    assert updates(1.0)
    assert not optimizer.step_was_skipped
