"""The benchmark of the iteration runs, at a tiny size, and writes its numbers and its plot."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_it_runs_and_writes(tmp_path: Path) -> None:
    pytest.importorskip("rich")
    tiny = ["--size", "16", "--width", "2", "--batch", "2", "--rounds", "1", "--threads", "1"]
    places = ["--results", str(tmp_path), "--figures", str(tmp_path)]
    run = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "step_time.py", *tiny, *places],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")])},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    record = json.loads((tmp_path / "step_time_cpu_16_1_threads.json").read_text())
    assert (tmp_path / "step_time_cpu_16_1_threads.png").stat().st_size > 1000
    assert {"device", "torch", "commit", "threads"} <= set(record["environment"])
    for one in record["iteration"].values():
        seconds = one["seconds"]
        parts = sum(value for name, value in seconds.items() if name not in ("whole iteration", "bare passes"))
        assert parts == pytest.approx(seconds["whole iteration"])
    assert len(record["table_4"]["rows"]) == 4
    assert "GapMatch" in run.stdout
