"""The benchmark of an epoch runs, and its parts add up."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nnunetv2", reason="pip install 'gap-torch[nnunet]'")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

ROOT = Path(__file__).parents[2]


def test_the_epochs_and_their_parts(tmp_path: Path) -> None:
    options = ["--size", "32", "--iterations", "1", "--rounds", "1", "--results", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.nnunet_epoch", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "nnunet_epoch_cpu.json").read_text())["results"]
    rows = {row["trainer"]: row for row in results["epochs"]}
    assert set(rows) == {"nnUNetTrainer", "FixMatchTrainer", "GapMatchTrainer", "MeanTeacherTrainer"}
    for name, row in rows.items():
        assert row["parts"]["rest"] > 0
        assert sum(row["parts"].values()) == pytest.approx(1)
        assert ("passes without labels" in row["parts"]) == (name != "nnUNetTrainer")
    assert rows["nnUNetTrainer"]["steps / arithmetic"] == 1
    assert rows["FixMatchTrainer"]["arithmetic"] < rows["GapMatchTrainer"]["arithmetic"]
