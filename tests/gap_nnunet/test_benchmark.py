"""The benchmark of an epoch runs, and its parts add up."""

from pathlib import Path

import pytest

pytest.importorskip("nnunetv2", reason="pip install 'gap-torch[nnunet]'")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks import nnunet_epoch


@pytest.mark.usefixtures("in_one_process")
def test_the_epochs_and_their_parts(heart: Path) -> None:
    assert heart.name == nnunet_epoch.NAME
    rows = {row["trainer"]: row for row in nnunet_epoch.measure("cpu", iterations=1, rounds=1)}
    assert set(rows) == {"nnUNetTrainer", "FixMatchTrainer", "GapMatchTrainer", "MeanTeacherTrainer"}
    for name, row in rows.items():
        assert row["parts"]["rest"] > 0
        assert sum(row["parts"].values()) == pytest.approx(1)
        assert ("passes without labels" in row["parts"]) == (name != "nnUNetTrainer")
    assert rows["nnUNetTrainer"]["steps / arithmetic"] == 1
    assert rows["FixMatchTrainer"]["arithmetic"] < rows["GapMatchTrainer"]["arithmetic"]
