"""Weak and strong views show the same place, whatever nnU-Net's training transforms are."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("nnunetv2", reason="pip install 'gap-torch[nnunet]'")

from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import OneOfTransform, RandomTransform
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerDA5 import nnUNetTrainerDA5
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoMirroring import (
    nnUNetTrainerNoMirroring,
)

from gap_nnunet.fixmatch import FixMatchTrainer
from gap_nnunet.unimatch import UniMatchTrainer
from gap_nnunet.views import WeakAndStrong

from .conftest import Build

DA5_RUNS = nnUNetTrainerDA5.get_training_transforms.__globals__["SpatialTransform"] is SpatialTransform


class WithDA5(FixMatchTrainer, nnUNetTrainerDA5):
    """Quarter turns and transposed axes are random transforms, too."""


class WithoutMirroring(FixMatchTrainer, nnUNetTrainerNoMirroring):
    """In thick slices the last that moves anything is the way back from 2D."""


def _loader(build: Build, folder: Path, kind: type, configuration: str) -> Any:
    trainer = build(folder, kind, configuration)
    trainer.initialize()
    trainer._unlabelled = trainer.unlabelled_cases()
    return trainer.unlabelled_loader()


@pytest.mark.usefixtures("in_one_process")
@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
@pytest.mark.parametrize(
    "kind", [FixMatchTrainer, UniMatchTrainer, WithDA5, WithoutMirroring], ids=lambda k: k.__name__
)
def test_without_intensities_all_views_are_the_same(kind: type, configuration: str, heart: Path, build: Build) -> None:
    if kind is WithDA5 and not DA5_RUNS:
        pytest.skip("before nnU-Net 2.7 this augmentation is of batchgenerators, which nnU-Net's loader does not run")
    loader = _loader(build, heart, kind, configuration)
    assert len(loader.transforms.intensities.transforms) >= 7
    loader.transforms.intensities.transforms.clear()
    for _ in range(5):
        batch = next(loader)
        assert set(batch["keys"]) <= {"scan0", "scan1", "scan2"}
        weak, *strong = batch["data"].chunk(1 + kind.strong_views, dim=1)
        assert len(strong) == kind.strong_views
        for view in strong:
            torch.testing.assert_close(view, weak, rtol=0, atol=0)


def test_without_changes_of_intensity_there_is_no_strong_view() -> None:
    with pytest.raises(ValueError, match="has no change of intensity"):
        WeakAndStrong(ComposeTransforms([MirrorTransform((0, 1))]))


@pytest.mark.usefixtures("in_one_process")
def test_strong_views_differ_from_the_weak_one_and_from_each_other(heart: Path, build: Build) -> None:
    loader = _loader(build, heart, UniMatchTrainer, "2d")
    weak, first, second = next(loader)["data"].chunk(3, dim=1)
    assert not torch.equal(weak, first)
    assert not torch.equal(weak, second)
    assert not torch.equal(first, second)


@pytest.mark.usefixtures("in_one_process")
def test_an_ignore_label_is_no_matter_without_labels(heart: Path, build: Build) -> None:
    """nnU-Net's loader would look for places with labels."""
    trainer = build(heart, FixMatchTrainer)
    trainer.initialize()
    trainer._unlabelled = trainer.unlabelled_cases()
    described = {**trainer.dataset_json, "labels": {"background": 0, "ball": 1, "core": 2, "ignore": 3}}
    trainer.label_manager = trainer.plans_manager.get_label_manager(described)
    assert trainer.label_manager.has_ignore_label
    assert next(trainer.unlabelled_loader())["data"].shape == (trainer.batch_size, 2, 32, 32)


def test_the_mask_of_normalisation_holds_in_every_view(heart: Path, build: Build) -> None:
    transforms = FixMatchTrainer.get_training_transforms([8, 8], (0, 0), None, (0, 1), False, use_mask_for_norm=[True])
    views = WeakAndStrong(transforms, strength=10)
    image, mask = torch.rand(1, 8, 8) + 1, torch.zeros(1, 8, 8, dtype=torch.int16)
    mask[:, :4] = -1  # outside
    both = views(image=image, segmentation=mask)["image"]
    assert both.shape == (2, 8, 8)
    assert ((both == 0).sum(dim=(1, 2)) >= 32).all()
    assert torch.equal(both[0] == 0, both[1] == 0)


def test_strength_makes_intensities_more_likely() -> None:
    gamma = GammaTransform(1, 0, False, 1, 1)
    random = RandomTransform(gamma, 0.3)
    views = WeakAndStrong(
        ComposeTransforms([random, OneOfTransform([random, RandomTransform(gamma, 0.6)])]), strength=2
    )
    alone, one_of = views.intensities.transforms
    assert [alone.apply_probability, *(t.apply_probability for t in one_of.list_of_transforms)] == [0.6, 0.6, 1.0]
    assert random.apply_probability == 0.3
