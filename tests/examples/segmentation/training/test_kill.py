"""`kill -9` wherever it may strike: a run that is resumed ends with the weights of one that was left alone."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import acdc_gapmatch
from segmentation.training import checkpoint

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

DEATHS = 2
KINDS = ["after a while", "at a line", "at a line that writes a checkpoint", "half-way through a checkpoint"]

# Imports once and forks a process for every life of a run, which is much quicker than to import anew.
DRIVER = """
import io, json, os, random, signal, sys, time
from pathlib import Path
import torch, torch._dynamo  # which the first optimizer imports
torch.set_num_threads(1)
examples, data, out, seed, deaths, kinds = json.loads(sys.argv[1])
import acdc_gapmatch, gap_torch
from segmentation import report, slice_task
from segmentation.training import checkpoint
slice_task.save_predictions = report.save_curves = lambda *arguments: None  # slower than all the rest
acdc_gapmatch.ACDC.presets["cpu"] = {
    "size": (32, 32), "width": 2, "iterations": 10, "labelled_batch": 2, "unlabelled_batch": 2, "validate_every": 2,
    "log_every": 1, "statistics_samples": 4, "average_decay": 0.5, "tau": 0.3,
}
OURS = (examples, str(Path(gap_torch.__file__).parent))
die = lambda: os.kill(os.getpid(), signal.SIGKILL)


def die_at_line(number, folders):
    seen = 0
    def line(frame, event, argument):
        nonlocal seen
        if event == "line":
            seen += 1
            if seen == number:
                die()
        return line
    sys.settrace(lambda frame, event, argument: line if frame.f_code.co_filename.startswith(folders) else None)
    return lambda: seen


def die_half_way_through_checkpoint(number):
    save, seen = torch.save, 0
    def half(content, file):
        nonlocal seen
        seen += 1
        if seen < number:
            return save(content, file)
        whole = io.BytesIO()
        save(content, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        die()
    torch.save = half


def live(folder, kind, number=0):
    # one life of a run: its wait status, and how many of our lines it saw
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        sys.stdout = sys.stderr = open(folder + ".log", "a", buffering=1)
        lines = lambda: 0
        if kind == "half-way through a checkpoint":
            die_half_way_through_checkpoint(number)
        elif kind == "at a line that writes a checkpoint":
            die_at_line(number, (checkpoint.__file__,))
        elif kind == "at a line":
            lines = die_at_line(number, OURS)
        code = acdc_gapmatch.main([
            "--data", data, "--patients", "1", "--device", "cpu", "--preset", "cpu", "--out", folder, "--resume"
        ])
        sys.settrace(None)
        os.write(write, str(lines()).encode())
        os._exit(code)
    os.close(write)
    if kind == "after a while":
        time.sleep(number)
        os.kill(pid, signal.SIGKILL)  # a zombie, if it has finished
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with os.fdopen(read) as pipe:
        return status, int(pipe.read() or 0)


def finish(folder, *death):
    status, lines = live(folder, *death)
    assert status == 0, f"{folder} did not finish: {status}"
    return lines


started = time.perf_counter()
finish(out + "/whole", "left alone")
seconds = time.perf_counter() - started
lines = finish(out + "/watched", "at a line", -1)
chance = random.Random(seed)
draw = {
    "after a while": lambda: chance.uniform(0, seconds),
    "at a line": lambda: chance.randrange(1, lines),
    "at a line that writes a checkpoint": lambda: chance.randrange(1, 50),
    "half-way through a checkpoint": lambda: chance.randrange(1, 5),
}
runs = {}
for i, kind in enumerate(kinds):
    folder, kills, resumed = f"{out}/{i}.0", 0, 0
    runs[kind] = [folder]
    while kills < deaths or resumed < 2:
        resumed += Path(folder, "gapmatch", "last.pt").exists()
        status, _ = live(folder, kind, draw[kind]())
        kills += status == -signal.SIGKILL
        assert status in (0, -signal.SIGKILL), f"{folder}: {status}"
        if status == 0:  # has outlived its death: on with another one
            folder = f"{out}/{i}.{len(runs[kind])}"
            runs[kind].append(folder)
    finish(folder, "left alone")
print(json.dumps(runs))
"""


@pytest.fixture(scope="module")
def runs(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """For each kind of death the folders of the runs that died so, again and again, until they were left alone."""
    out = tmp_path_factory.mktemp("killed")
    examples, seed = Path(acdc_gapmatch.__file__).parent, random.randrange(2**32)
    print(f"seed {seed}")
    arguments = json.dumps([str(examples), str(tiny_data), str(out), seed, DEATHS, KINDS])
    done = subprocess.run([sys.executable, "-c", DRIVER, arguments], stdout=subprocess.PIPE, text=True, check=True)
    return {"whole": [str(out / "whole")], **json.loads(done.stdout)}


def _finished(folder: Path) -> dict[str, Any]:
    """Everything that a run leaves behind but its times."""
    run = folder / "gapmatch"
    last = checkpoint.load(run / "last.pt", torch.device("cpu"))
    last["progress"].pop("seconds")
    best = checkpoint.load(run / "best.pt", torch.device("cpu"))
    logs = [(run / f"{name}.csv").read_text().splitlines() for name in ("train", "validation")]
    result = json.loads((run / "result.json").read_text())
    result.pop("seconds_per_iteration")
    return {
        "last": last,
        "best": best,
        "train": [row.rsplit(",", 1)[0] for row in logs[0]],
        "validation": logs[1],
        "result": result,
    }


def _assert_equal(ours: Any, theirs: Any, where: str) -> None:
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            _assert_equal(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), where
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            _assert_equal(*pair, f"{where}.{i}")
    else:
        assert ours == theirs, where


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_ends_as_one_that_was_left_alone(runs: dict[str, list[str]], kind: str) -> None:
    whole = _finished(Path(runs["whole"][0]))
    assert len(whole["train"]) == 11
    for folder in runs[kind]:
        _assert_equal(_finished(Path(folder)), whole, folder)
        log = Path(f"{folder}.log").read_text()
        print(folder, log.count("reading"), "lives,", log.count("resuming"), "resumed")
        assert "damaged" not in log
