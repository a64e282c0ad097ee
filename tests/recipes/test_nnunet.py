"""examples/integrations/nnunet_gap.py in nnU-Net itself: its preprocessing, plans, loaders, network and loop."""

import copy
import json
import multiprocessing
import shutil
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("nnunetv2", reason="pip install 'gap-torch[recipes]'")

import nnunet_gap
import numpy as np
from nnunet_gap import GapMatchTrainer, TwoViews
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from PIL import Image

from gap_torch.reference import algorithm_1

LABELLED, UNLABELLED, SIZE = 4, 4, 32
SPLIT = {"train": ["case0", "case1", "case2"], "val": ["case3"], "unlabelled": [f"case{i}" for i in range(4, 8)]}
NAME = "Dataset001_Discs"


class ThreadContext:
    """In place of processes, each of which would take seconds to import nnU-Net."""

    Pool = ThreadPool


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict]:
    """What nnU-Net plans for eight noisy discs, four of which have a blank label map. It has preprocessed them, too."""
    root = tmp_path_factory.mktemp("nnunet")
    with pytest.MonkeyPatch.context() as patch:
        for folder in ("raw", "preprocessed", "results"):
            patch.setenv(f"nnUNet_{folder}", str(root / folder))
            (root / folder).mkdir()
        patch.setenv("nnUNet_n_proc_DA", "1")  # the planner does not take 0
        patch.setattr(multiprocessing, "get_context", lambda method: ThreadContext)
        _write_raw(root / "raw" / NAME)
        extract_fingerprints([1], num_processes=1, check_dataset_integrity=True)
        plan_experiments([1])
        preprocess([1], configurations=("2d",), num_processes=(1,))
        base = root / "preprocessed" / NAME
        (base / "splits_final.json").write_text(json.dumps([SPLIT]))
        plans = json.loads((base / "nnUNetPlans.json").read_text())
        plans["configurations"]["2d"]["batch_size"] = 2
        patch.setenv("nnUNet_n_proc_DA", "0")
        yield {**plans, "continue_training": False}


def _write_raw(folder: Path) -> None:
    generator = np.random.default_rng(0)
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for i in range(LABELLED + UNLABELLED):
        y, x = np.mgrid[:SIZE, :SIZE] - generator.uniform(10, 22, (2, 1, 1))
        disc = x**2 + y**2 < 36
        image = disc * 120 + generator.uniform(0, 80, disc.shape)
        label = disc if i < LABELLED else np.zeros_like(disc)
        Image.fromarray(image.astype(np.uint8)).save(folder / "imagesTr" / f"case{i}_0000.png")
        Image.fromarray(label.astype(np.uint8)).save(folder / "labelsTr" / f"case{i}.png")
    labels = {"background": 0, "disc": 1}
    described = {"channel_names": {"0": "gray"}, "labels": labels, "numTraining": 8, "file_ending": ".png"}
    (folder / "dataset.json").write_text(json.dumps(described))


class Short(GapMatchTrainer):
    """Everything confident, and a run of seconds."""

    tau, gap_eps, gap_alpha, warm_up = 0.5, 0.05, 0.5, 0

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 2, 1


def _trainer(plans: dict, kind: type = Short, fold: Any = 0) -> Any:
    described = {"channel_names": {"0": "gray"}, "labels": {"background": 0, "disc": 1}, "file_ending": ".png"}
    torch.manual_seed(0)
    np.random.seed(0)
    return kind(copy.deepcopy(plans), "2d", fold, described, torch.device("cpu"))


@pytest.fixture
def batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    both = torch.randn(2, 2, SIZE, SIZE, generator=generator)
    target = torch.randint(2, (2, 1, SIZE, SIZE), generator=generator)
    targets = [target[..., :: 2**i, :: 2**i] for i in range(8)]
    return {"data": torch.randn(2, 1, SIZE, SIZE, generator=generator), "target": targets, "unlabelled": both}


def test_a_run_is_right_and_ends_with_a_checkpoint_that_resumes(
    plans: dict, lines: Any, capsys: pytest.CaptureFixture
) -> None:
    names: dict[str, Any] = {"GapMatchTrainer": Short}
    exec(*lines("nnunet", "Check that it works"), names)
    trainer = _trainer(plans, names["CheckedTrainer"])
    trainer.run_training()
    assert "GAP ran as Algorithm 1 in this update" in capsys.readouterr().out
    resumed = _trainer(plans)
    resumed.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    torch.testing.assert_close(resumed.network.state_dict(), trainer.network.state_dict(), rtol=0, atol=0)
    assert resumed.optimizer.param_groups[0]["gap_alpha"] == Short.gap_alpha
    assert trainer.optimizer.grad_norm > 0


def test_the_step_is_that_of_gap(plans: dict, batch: dict, updated_with: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = _trainer(plans)
    trainer.initialize()
    trainer.network.double()
    batch = {"data": batch["data"].double(), "target": batch["target"], "unlabelled": batch["unlabelled"].double()}
    trainer.dataloader_unlabelled = iter([{"data": batch["unlabelled"]}])
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, limit: None)
    twin, weights = copy.deepcopy(trainer.network), trainer.loss.weight_factors
    weak, strong = batch["unlabelled"].split(1, dim=1)
    with torch.no_grad():
        p = twin(weak)[0].softmax(1)
    sure, pseudo = p.amax(1) >= Short.tau, p.argmax(1)
    sets = [t[:, :, :: 2**i, :: 2**i] for i in range(len(weights)) for t in [torch.stack([sure.long(), pseudo], 1)]]

    def unsupervised() -> Tensor:
        pairs = zip(twin(strong), sets, weights, strict=False)
        return sum(w * _ce_dice(logits, s[:, 1], s[:, 0].bool()) for logits, s, w in pairs if w)

    def supervised() -> Tensor:
        return trainer.loss(twin(batch["data"]), batch["target"][: len(weights)])

    params = list(twin.parameters())
    expected = algorithm_1(params, unsupervised, supervised, eps=Short.gap_eps, alpha=Short.gap_alpha)
    seen = updated_with(trainer.optimizer)
    trainer.train_step({**batch, "target": batch["target"][: len(weights)]})
    torch.testing.assert_close(seen, expected)


def _ce_dice(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    p, y = logits.softmax(1), F.one_hot(target, 2).movedim(-1, 1)
    ce = (F.cross_entropy(logits, target, reduction="none") * mask).mean()
    p, y = p * mask.unsqueeze(1), y * mask.unsqueeze(1)
    dice = (2 * (p * y).sum((0, 2, 3)) + 1e-5) / (p.square().sum((0, 2, 3)) + y.sum((0, 2, 3)) + 1e-5)
    return (ce + 1 - dice.mean()) / 2


def test_in_the_warm_up_it_is_nnunets_own_step(plans: dict, batch: dict) -> None:
    class WarmingUp(Short):
        warm_up = 1

    weights = []
    for kind in (nnUNetTrainer, WarmingUp):
        trainer = _trainer(plans, kind)
        trainer.initialize()
        for _ in range(2):
            trainer.train_step({**batch, "target": batch["target"][: len(trainer.loss.weight_factors)]})
        weights.append(trainer.network.state_dict())
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_the_views_show_the_same_place(plans: dict) -> None:
    trainer = _trainer(plans)
    trainer.initialize()
    loader = trainer._unlabelled_loader(SPLIT["unlabelled"])
    batch = next(loader)
    assert batch["data"].shape[:2] == (2, 2)
    assert set(batch["keys"]) <= set(SPLIT["unlabelled"])
    views: TwoViews = loader.transforms
    views.intensities.transforms.clear()
    weak, strong = next(loader)["data"].chunk(2, dim=1)
    torch.testing.assert_close(weak, strong, rtol=0, atol=0)


@pytest.mark.parametrize("split", [{"train": ["case0"], "val": []}, {**SPLIT, "unlabelled": ["case0"]}])
def test_splits_without_cases_of_their_own_are_an_error(plans: dict, split: dict, tmp_path: Path) -> None:
    (tmp_path / "splits_final.json").write_text(json.dumps([split]))
    for fold in (0, 1, "all"):
        trainer = SimpleNamespace(fold=fold, preprocessed_dataset_folder_base=str(tmp_path))
        with pytest.raises(ValueError, match="needs a list 'unlabelled'"):
            GapMatchTrainer.unlabelled_cases(trainer)


def test_nnunet_finds_the_trainer_in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(nnunet_gap.__file__, tmp_path / "nnunet_gap_copy.py")
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    found = recursive_find_trainer_class_by_name("GapMatchTrainer")
    assert found.__name__ == "GapMatchTrainer"
    assert issubclass(found, nnUNetTrainer)
