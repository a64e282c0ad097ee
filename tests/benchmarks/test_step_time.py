"""The benchmark of the iteration runs, at a tiny size, and writes its numbers and its plot."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from segmentation.recipe import METHODS, Recipe


def test_it_runs_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    from benchmarks import step_time

    tiny = ["--size", "16", "--width", "2", "--batch", "2", "--rounds", "1", "--threads", "1"]
    places = ["--methods", "mcnet", "dan", "--results", str(tmp_path), "--figures", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["step_time.py", *tiny, *places])
    step_time.main()
    record = json.loads((tmp_path / "step_time_cpu_16_1_threads.json").read_text())
    assert (tmp_path / "step_time_cpu_16_1_threads.png").stat().st_size > 1000
    assert {"device", "torch", "commit", "threads"} <= set(record["environment"])
    for one in record["iteration"].values():
        seconds = one["seconds"]
        parts = sum(value for name, value in seconds.items() if name not in ("whole iteration", "bare passes"))
        assert parts == pytest.approx(seconds["whole iteration"])
    assert len(record["table_4"]["rows"]) == 2 * 5
    assert [row[0] for row in record["methods"]["rows"]] == ["MC-Net", "DAN"]
    assert set(record["methods"]["seconds"]) == {"UNet", "mcnet", "mcnet+gap", "dan", "dan+gap"}
    for label, *ratios in record["methods"]["rows"]:
        plain, _, with_gap, _, gain = map(float, ratios)
        assert gain == pytest.approx(with_gap / plain, abs=0.05), label
    assert set(record["captured"]["seconds"]) == {
        f"{run}, {amp}" for run in ("UNet", "FixMatch", "GapMatch") for amp in ("float32", "bfloat16")
    }
    longest = record["profile"]["longest"]
    assert "convolution" in longest[0][0]
    assert sum(seconds for _, seconds, _ in longest) <= record["profile"]["busy"] * 1.001
    printed = capsys.readouterr().out
    assert all(method in printed for method in ("UNet", "Mean Teacher", "URPC", "CCT", "GapMatch"))


def test_scoring_tells_a_validation_from_its_forward_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    from benchmarks import step_time
    from segmentation.data.phantoms.heart import write_phantom

    data = tmp_path / "data set"
    write_phantom(data, train_patients=2, val_patients=1, test_patients=1, slices=2, size=32)
    tiny = ["--size", "16", "--width", "2", "--batch", "2", "--rounds", "1", "--threads", "1", "--only", "scoring"]
    monkeypatch.setattr(sys, "argv", ["step_time.py", *tiny, "--data", str(data), "--results", str(tmp_path)])
    step_time.main()
    record = json.loads((tmp_path / "step_time_cpu_16_scoring_1_threads.json").read_text())["scoring"]
    assert record["volumes"] == [2, 2]
    for precision in ("bfloat16", "float32"):
        timed = ("validation", "validation, forward passes alone", "test volumes, with ASD")
        assert {f"{precision} {name}" for name in timed} <= record["seconds"].keys()
    assert {"training slices, first time", "training slices, second time"} <= record["seconds"].keys()
    assert min(record["seconds"].values()) > 0
    assert not (data / ".cache").exists()


def test_passes_are_what_the_methods_multiply() -> None:
    pytest.importorskip("rich")
    from benchmarks import step_time

    recipe = Recipe(size=(64, 64), labelled_batch=2, unlabelled_batch=2)
    counted = {}
    for label, entry in step_time.TABLE_4.items():
        batch = 4 if entry.all_labelled else 2
        subject = step_time.trainer(replace(recipe.for_run(entry.run), labelled_batch=batch), torch.device("cpu"), None)
        with FlopCounterMode(display=False) as counter:
            subject.step(0)
        counted[label] = counter.get_total_flops()
    passes = {label: entry.passes for label, entry in step_time.TABLE_4.items()}
    assert {label: count / counted["UNet"] for label, count in counted.items()} == pytest.approx(passes, rel=3e-3)


class Operations(TorchDispatchMode):
    """Counts as `FlopCounterMode` does, which can't do with VAT's `autograd.grad`."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Tensor:
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket in flop_registry:
            self.total += flop_registry[function.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def test_the_lab_plans_with_what_the_methods_multiply() -> None:
    pytest.importorskip("rich")
    from benchmarks import step_time
    from benchmarks.lab import grid, plan

    recipe = Recipe(size=(32, 32), labelled_batch=2, unlabelled_batch=2)

    def operations(recipe: Recipe) -> int:
        subject = step_time.trainer(recipe, torch.device("cpu"), None)
        with Operations() as counted:
            subject.step(0)
        return counted.total

    one = operations(recipe.for_run("supervised"))
    counted = {method: operations(recipe.for_run(method)) / one for method in METHODS}
    assert counted == pytest.approx(
        {method: plan.passes(grid.cell("ACDC", "study", (method, False), 1, 0)) for method in METHODS}, rel=0.02
    )
    joint = grid.cell("ACDC", "study", grid.GAPMATCH, 1, 0, {"joint": True})
    bcp = {gap: grid.cell("ACDC", "study", ("bcp", gap), 1, 0) for gap in (False, True)}
    assert operations(recipe.for_run("bcp+gap")) / one == pytest.approx(plan.passes(bcp[True]), 0.02)
    apart = grid.cell("ACDC", "study", ("bcp", True), 1, 0, {"joint": False})
    assert operations(replace(recipe, joint=False).for_run("bcp+gap")) / one == pytest.approx(plan.passes(apart), 0.02)
    phase = bcp[False].recipe.phase
    assert operations(replace(recipe, method=phase.method, gap=False)) / one == pytest.approx(1 / 2, 0.02)
    after = bcp[False].recipe.iterations * plan.passes(bcp[False])
    assert plan.work(bcp[False]) == pytest.approx(phase.iterations / 2 + after, 0.02)
    assert operations(replace(recipe, joint=True).for_run("gapmatch")) / one == pytest.approx(plan.passes(joint), 0.02)
