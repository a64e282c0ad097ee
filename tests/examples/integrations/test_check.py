"""The self-check in every framework: from the outside, around `fit` or `run`, and from inside. No finding."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
from tiny import network

import gap_torch
from gap_torch import GAPWrapper
from gap_torch.checking import Report

NEEDS = {
    "plain_pytorch": "torch",
    "lightning_module": "lightning",
    "accelerate_loop": "accelerate",
    "monai_engine": "ignite",
}
LINES = ["g1", "first_step", "g2", "second_step", "g_l", "step"]


def _script(name: str) -> Any:
    pytest.importorskip(NEEDS[name])
    return importlib.import_module(name)


@pytest.fixture
def checked_when_made(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, Any], list[Report]]:
    """`checked_when_made(script, model)`: one line after the optimizer is made, wherever the script does that."""

    def install(script: Any, model: Any) -> list[Report]:
        shown: list[Report] = []

        def make(*args: Any, **options: Any) -> GAPWrapper:
            optimizer = GAPWrapper(*args, **options)
            gap_torch.check(optimizer, model, show=shown.append)
            return optimizer

        monkeypatch.setattr(script, "GAPWrapper", make)
        return shown

    return install


@pytest.mark.parametrize("name", NEEDS)
def test_no_finding_in_the_examples(name: str, checked_when_made: Callable[[Any, Any], list[Report]]) -> None:
    script, model = _script(name), network()
    shown = checked_when_made(script, model)
    script.train(model)
    (report,) = shown
    assert report.ok, str(report)
    assert list(dict.fromkeys(line for line, _ in report.timeline if line != "zero_grad")) == LINES
    assert all(f"{name}.py:" in where for line, where in report.timeline), str(report)
    assert report.losses.keys() == report.norms.keys() == {"g1", "g2", "g_l"}, str(report)


def test_accelerates_own_optimizer_will_do() -> None:
    accelerate = pytest.importorskip("accelerate")
    import torch

    model = network()
    wrapper = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1), eps=0.1)
    prepared = accelerate.Accelerator(cpu=True).prepare(wrapper)
    check = gap_torch.check(prepared, model, show=None)
    assert check._watch.wrapper is wrapper
    check.stop()


def test_around_lightnings_fit() -> None:
    """With an optimizer that is made outside; `with` works around a whole run, of which it sees one update."""
    L = pytest.importorskip("lightning")
    from tiny import BATCH, Discs
    from torch.utils.data import DataLoader

    module = _script("lightning_module").GapMatch(network())
    optimizer = module.configure_optimizers()
    module.configure_optimizers = lambda: optimizer
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(accelerator="cpu", max_steps=2, **quiet)
    with gap_torch.check(optimizer, module, show=None) as report:
        trainer.fit(module, DataLoader(Discs(), BATCH))
    assert report.ok, str(report)
    assert report.updates == 1
