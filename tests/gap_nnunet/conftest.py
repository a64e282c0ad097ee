"""nnU-Net's folders, set before it is imported (before 2.8 it reads them once), and what it makes of tiny scans."""

import atexit
import copy
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(tempfile.mkdtemp(prefix="gap_nnunet"))
atexit.register(shutil.rmtree, ROOT, ignore_errors=True)
RAW, PREPROCESSED, RESULTS = (ROOT / name for name in ("raw", "preprocessed", "results"))
for path in (RAW, PREPROCESSED, RESULTS):
    os.environ[f"nnUNet_{path.name}"] = str(path)
    path.mkdir()
os.environ.update(nnUNet_def_n_proc="1")

Build = Callable[..., Any]


class ThreadContext:
    """In place of processes, each of which would take seconds to import nnU-Net."""

    Pool = ThreadPool


@contextmanager
def in_threads() -> Iterator[None]:
    """nnU-Net's pools; and its fingerprint from a thousandth of its samples, which would be 100 million."""
    pytest.importorskip("nnunetv2", reason="pip install 'gap-torch[nnunet]'")
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
    from nnunetv2.utilities import utils

    whole = DatasetFingerprintExtractor.__init__

    def of_few_samples(self: Any, *args: Any, **kwargs: Any) -> None:
        whole(self, *args, **kwargs)
        self.num_foreground_voxels_for_intensitystats //= 1000

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing, "get_context", lambda method: ThreadContext)
        patch.setattr(utils, "Pool", ThreadPool)
        patch.setattr(DatasetFingerprintExtractor, "__init__", of_few_samples)
        yield


@pytest.fixture
def in_one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Batches of nnU-Net too."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    with in_threads():
        yield


@pytest.fixture(scope="session")
def heart() -> Path:
    """Five labelled scans and three without labels, prepared in 2D and 3D: the folder in nnUNet_preprocessed."""
    return _prepared("Dataset005_Heart", ["2d", "3d_fullres"])


@pytest.fixture(scope="session")
def regions() -> Path:
    """The same in 2D, with two channels, and regions that overlap."""
    return _prepared("Dataset006_Regions", ["2d"], channels=2, regions=True)


def _prepared(name: str, configurations: list[str], **of_data: Any) -> Path:
    with in_threads(), pytest.MonkeyPatch.context() as patch:
        from gap_nnunet.prepare import prepare

        from .data import write_dataset

        patch.setenv("nnUNet_n_proc_DA", "1")  # the planner takes no 0

        write_dataset(RAW, name, **of_data)
        prepare(name, configurations, processes=1)
    _shrink(PREPROCESSED / name / "nnUNetPlans.json")
    return PREPROCESSED / name


def _shrink(file: Path) -> None:
    """A network of few channels, and a low resolution: the scans stay prepared for what there was."""
    plans = json.loads(file.read_text())
    configurations = plans["configurations"]
    for configuration in configurations.values():
        if "architecture" in configuration:
            configuration["architecture"]["arch_kwargs"]["features_per_stage"] = [4, 8, 8, 8]
    if "3d_fullres" in configurations:  # nnU-Net plans them for large scans alone
        configurations["3d_lowres"] = {**configurations["3d_fullres"], "next_stage": "3d_cascade_fullres"}
        configurations["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    file.write_text(json.dumps(plans))


@pytest.fixture
def build() -> Build:
    """`build(folder, kind, configuration, ...)`: a trainer of the class on the CPU, always with the same weights."""

    def make(folder: Path, kind: type, configuration: str = "2d", fold: Any = 0, **knobs: Any) -> Any:
        plans = json.loads((folder / "nnUNetPlans.json").read_text())
        described = json.loads((folder / "dataset.json").read_text())
        torch.manual_seed(0)
        np.random.seed(0)
        derived = type(kind.__name__, (kind,), {"__module__": kind.__module__, **knobs})
        plans = {**copy.deepcopy(plans), "continue_training": False}
        trainer = derived(plans, configuration, fold, described, torch.device("cpu"))
        trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 2, 2, 1
        return trainer

    return make
