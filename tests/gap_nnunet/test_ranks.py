"""nnU-Net's DDP in two gloo processes on the CPU, where it knows GPUs alone: the device is the one thing changed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("nnunetv2", reason="pip install 'gap-torch[nnunet]'")

KINDS = ("GapMatchTrainer", "MeanTeacherGAPTrainer", "UniMatchGAPTrainer")


def _worker(rank: int, folder: str, roots: dict[str, str]) -> dict[str, Any]:
    import os

    os.environ.update(roots, nnUNet_n_proc_DA="0", nnUNet_def_n_proc="1")
    return {name: _steps(Path(folder), name) for name in KINDS}


def _steps(folder: Path, name: str) -> dict[str, Any]:
    from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as module
    from torch.nn.parallel import DistributedDataParallel

    from gap_nnunet.trainers import gap_nnunet_trainers

    module.DDP = lambda network, device_ids: DistributedDataParallel(network)
    module.GradScaler = lambda *device: None
    kind = getattr(gap_nnunet_trainers, name)
    knobs = {"__module__": kind.__module__, "tau": 0.5, "warm_up": 0, "ramp_up": 0.0}
    plans = json.loads((folder / "nnUNetPlans.json").read_text()) | {"continue_training": False}
    described = json.loads((folder / "dataset.json").read_text())
    trainer = type(name, (kind,), knobs)(plans, "2d", 0, described, torch.device("cpu"))
    trainer.device, trainer.grad_scaler = torch.device("cpu"), None
    torch.manual_seed(0)
    trainer.on_train_start()
    assert type(trainer.network).__name__ == "DistributedDataParallel"
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    seen = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(2)]
    trainer.on_train_epoch_end(seen)
    return {
        "batch": trainer.batch_size,
        "losses": [[float(value) for value in step.values()] for step in seen],
        "weights": torch.cat([p.detach().flatten() for p in trainer.network.parameters()]),
        "teacher": torch.cat([p.flatten() for p in trainer.method.parameters()] or [torch.zeros(0)]),
    }


def test_two_processes_take_the_same_step(heart: Path, on_two_ranks: Any) -> None:
    from .conftest import PREPROCESSED, RAW, RESULTS

    roots = {f"nnUNet_{path.name}": str(path) for path in (RAW, PREPROCESSED, RESULTS)}
    first, second = on_two_ranks(_worker, str(heart), roots)
    for name in KINDS:
        assert first[name]["batch"] == second[name]["batch"] == 1
        assert first[name]["losses"] != second[name]["losses"]  # of other patches
        for tensors in ("weights", "teacher"):
            assert torch.isfinite(first[name][tensors]).all()
            torch.testing.assert_close(first[name][tensors], second[name][tensors], rtol=0, atol=0)
    assert len(first["MeanTeacherGAPTrainer"]["teacher"]) == len(first["MeanTeacherGAPTrainer"]["weights"])
