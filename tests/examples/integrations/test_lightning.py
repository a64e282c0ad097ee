"""What is particular to Lightning: its own optimizer object, mixed precision, clipping, resuming."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BATCH, Discs, method, network, supervised
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gap_torch import GAPWrapper
from gap_torch.consistency import Batch

L = pytest.importorskip("lightning")
example = pytest.importorskip("lightning_module")

QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


def _fit(kind: type, checkpoint: Path | None = None, **options: Any) -> Any:
    module = kind(network())
    trainer = L.Trainer(accelerator="cpu", **{"max_epochs": 1, **QUIET, **options})
    trainer.fit(module, DataLoader(Discs(), BATCH), ckpt_path=checkpoint)
    return module


class ThroughLightning(example.GapMatch):
    """All of GAP's calls to Lightning's optimizer, the labelled gradient set aside first."""

    def gap(self) -> Any:
        return self.optimizers()

    def training_step(self, batch: dict[str, Tensor], index: int) -> None:
        with self.gap().set_aside():
            self.manual_backward(supervised(self.network(batch["image"]), batch["label"]))
        views = method.prepare(self.network, Batch(batch["unlabelled"]))
        self.manual_backward(method.loss(self.network, views))
        with self.gap().perturbed(self.network):
            self.manual_backward(method.loss(self.network, views))
        self.optimizers().step()
        self.gap().zero_grad()


class ToTheWrapper(ThroughLightning):
    """The same to the wrapper inside."""

    def gap(self) -> Any:
        return self.optimizers().optimizer


def test_lightnings_optimizer_passes_gaps_calls_on() -> None:
    module, other = _fit(ThroughLightning), _fit(ToTheWrapper)
    torch.testing.assert_close(module.state_dict(), other.state_dict(), rtol=0, atol=0)
    assert type(module.optimizers().optimizer) is GAPWrapper
    assert module.optimizers().grad_norm is module.optimizers().optimizer.grad_norm
    assert module.trainer.global_step == len(Discs()) // BATCH


class StepsInside(example.GapMatch):
    def training_step(self, batch: dict[str, Tensor], index: int) -> None:
        self.manual_backward(self.network(batch["image"]).mean())
        with self.optimizers().perturbed(self.network):
            self.manual_backward(self.network(batch["image"]).mean())
            self.optimizers().step()


def test_a_step_inside_the_block_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"step\(\) while the parameters are perturbed"):
        _fit(StepsInside)


class Scheduled(example.GapMatch):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    def on_train_epoch_end(self) -> None:
        self.lr_schedulers().step()


def test_a_scheduler_is_built_on_the_wrapper() -> None:
    rate = _fit(Scheduled, max_epochs=2).optimizers().param_groups[0]["lr"]
    assert rate == pytest.approx(example.LR * 0.01)


class Watched(example.GapMatch):
    """Keeps the norms of the whole gradient: after the last backward, and around the hook that clips."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.after_backward = 0.0
        self.norms: list[tuple[float, float, float]] = []

    def norm(self) -> float:
        return nn.utils.get_total_norm([p.grad for p in self.parameters()]).item()

    def manual_backward(self, loss: Tensor, *args: Any, **options: Any) -> None:
        super().manual_backward(loss, *args, **options)
        self.after_backward = self.norm()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        before = self.norm()
        super().on_before_optimizer_step(optimizer)
        self.norms.append((self.after_backward, before, self.norm()))


def test_float16_gradients_are_unscaled_before_the_hook_that_clips() -> None:
    """In training_step they are still scaled: there the bound would bind for nothing."""
    from lightning.pytorch.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    module = _fit(Watched, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    assert len(module.norms) == len(Discs()) // BATCH
    for in_training_step, at_the_hook, clipped in module.norms:
        assert in_training_step == pytest.approx(1024 * at_the_hook, rel=1e-3)
        assert clipped == pytest.approx(min(at_the_hook, example.CLIP), rel=1e-3)


def test_bfloat16_autocast() -> None:
    module = _fit(example.GapMatch, precision="bf16-mixed")
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in module.parameters())
    assert 0 < module.optimizers().grad_norm < torch.inf


def test_resuming_from_a_checkpoint_gives_the_same_weights(tmp_path: Path) -> None:
    whole = _fit(example.GapMatch, max_epochs=2)
    _fit(example.GapMatch).trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed = _fit(example.GapMatch, tmp_path / "one.ckpt", max_epochs=2)
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert resumed.optimizers().param_groups[0]["gap_eps"] == example.EPS
