"""What several tests share: a tiny phantom and recipe, and runs without pictures."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from segmentation.recipe import Recipe


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from segmentation.data.phantoms.heart import write_phantom  # here, since it needs SciPy

    root = tmp_path_factory.mktemp("phantom")
    write_phantom(root, train_patients=3, val_patients=1, test_patients=1, slices=2, size=32)
    return root


@pytest.fixture(autouse=True)
def _cudnn() -> Iterator[None]:
    """Back to its own choice of algorithms after a job, which has it try them."""
    yield
    torch.backends.cudnn.benchmark = False


@pytest.fixture
def tiny_recipe() -> Recipe:
    return Recipe(
        size=(32, 32),
        width=2,
        labelled_batch=3,
        unlabelled_batch=3,
        iterations=6,
        validate_every=2,
        log_every=1,
        tau=0.3,
        average_decay=0.5,
        statistics_samples=4,
    )


@pytest.fixture
def drawn() -> None:
    """For a test that looks at the pictures of its runs."""


@pytest.fixture
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are empty files, unless the test takes `drawn`: they cost more than all else in a tiny run."""
    from segmentation import report
    from segmentation.slice_task import SliceTask
    from segmentation.volume_task import VolumeTask

    def blank(path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        path.touch()

    if "drawn" not in request.fixturenames:
        for task in (SliceTask, VolumeTask):
            monkeypatch.setattr(task, "draw", lambda self, folder, cases: blank(folder / "predictions.png"))
        monkeypatch.setattr(report, "save_curves", lambda path, logs: blank(path))
