"""The main job under a real torchrun: two processes, one log, one checkpoint, one end."""

import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

import acdc_gapmatch
from segmentation import ranks

TINY = {
    "size": (32, 32),
    "width": 2,
    "iterations": 4,
    "labelled_batch": 2,
    "unlabelled_batch": 2,
    "validate_every": 2,
    "log_every": 1,
    "statistics_samples": 4,
    "average_decay": 0.5,
}
# The command line with the tiny preset. While GapMatch trains iteration 2, torchrun gets a Ctrl-C from the last rank,
# which takes long enough for it to come back.
SCRIPT = f"""
import os, signal, sys, time
import acdc_gapmatch
from segmentation import ranks
from segmentation.training.step import Trainer
acdc_gapmatch.ACDC.presets["cpu"] = {TINY!r}
step = Trainer.step
def press_ctrl_c(self, iteration):
    if iteration == 2 and self.recipe.gap and ranks.rank() == 1:
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(5)
    return step(self, iteration)
Trainer.step = press_ctrl_c
sys.exit(acdc_gapmatch.main())
"""


def test_the_other_ranks_wait_for_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as rank 0 draws; gloo's default is half an hour."""
    options = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **given: options.append(given))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    with ranks.joined():
        assert options[0]["timeout"] >= timedelta(hours=12)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_one_process_goes_on_where_torchrun_was_interrupted(
    undrawn, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["--data", str(tiny_data), "--patients", "1", "--device", "cpu", "--preset", "cpu", "--out", str(out)]
    arguments += ["--method", "fixmatch", "gapmatch"]
    stopped = _torchrun(tmp_path, *arguments)
    assert stopped.stdout.count("reading") == 1
    assert stopped.stdout.count("fixmatch 4/4  validation Dice") == 1
    assert stopped.stdout.count("gapmatch: stopped after iteration 3; --resume goes on.") == 1
    assert stopped.stderr.count("interrupted\n") == 1
    assert stopped.returncode != 0
    for method, rows in (("fixmatch", 4), ("gapmatch", 3)):
        assert len((out / method / "train.csv").read_text().splitlines()) == 1 + rows
        assert len(list((out / method / "tensorboard").iterdir())) == 1
    joint = json.loads((out / "fixmatch" / "result.json").read_text())
    assert joint["processes"] == 2

    monkeypatch.setitem(acdc_gapmatch.ACDC.presets, "cpu", TINY)
    assert acdc_gapmatch.main([*arguments, "--resume"]) == 0
    printed = capsys.readouterr().out
    assert "resuming fixmatch at iteration 4" in printed
    assert "resuming gapmatch at iteration 3" in printed
    alone = json.loads((out / "fixmatch" / "result.json").read_text())
    assert alone["processes"] == 1
    assert alone["test"] == joint["test"]


def _torchrun(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*launcher, str(script), *arguments], capture_output=True, text=True, timeout=300, check=False
    )
