"""Every benchmark runs at a small size, and what it counts rather than times is right."""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _needs() -> Iterator[None]:
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    pytest.importorskip("pytorch_optimizer")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> ModuleType:
    module = importlib.import_module(f"benchmarks.{name}")
    to = ["--results", str(tmp_path / "results"), "--figures", str(tmp_path / "figures")]
    monkeypatch.setattr(sys, "argv", [name, *arguments, *to])
    module.main()
    assert list((tmp_path / "figures").glob("*.png"))
    return module


@pytest.mark.filterwarnings("ignore:GAP. only")
def test_overhead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--sets", "UNet", "V-Net", "--shrink", "16", "--repetitions", "2"]
    _run("overhead", tmp_path, monkeypatch, *arguments)
    record = json.loads((tmp_path / "results/overhead_cpu.json").read_text())
    assert {"device", "torch", "commit", "threads", "cores", "load", "date"} < set(record)
    assert len(record["results"]) == 2 * 2 * 4
    assert all(row["ms"] > 0 for row in record["results"])


def test_parameter_sets_have_the_size_they_are_named_for(tmp_path: Path) -> None:
    common = importlib.import_module("benchmarks.common")
    millions = {name: common.numel(getattr(common, name)()) / 1e6 for name in ("unet", "vnet", "resnet50", "vit_b16")}
    assert millions == pytest.approx({"unet": 1.8, "vnet": 9.4, "resnet50": 25.6, "vit_b16": 86.6}, rel=0.02)


def test_a_table_in_a_log_has_room(capsys: pytest.CaptureFixture[str]) -> None:
    common = importlib.import_module("benchmarks.common")
    names = [f"a column with a long name {i}" for i in range(4)]
    common.print_table("title", [dict.fromkeys(names, 1.0)])
    header = capsys.readouterr().out.splitlines()[2]
    assert all(name in header for name in names)


@pytest.mark.filterwarnings("ignore:GAP. only")
def test_memory_is_one_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _run("memory", tmp_path, monkeypatch, "--sets", "UNet")
    rows = json.loads((tmp_path / "results/memory_cpu.json").read_text())["results"]
    copies = {(row["method"], row["dtype"]): row["extra copies"] for row in rows}
    assert copies["gap-torch", "float32"] == pytest.approx(1, abs=0.002)
    # and in bfloat16 the largest tensor in float32, for the norm
    assert copies["gap-torch", "bfloat16"] == pytest.approx(1 + 2 * 256 * 256 * 9 / 1.8138e6, abs=0.01)
    assert copies["naive Algorithm 1", "float32"] >= 3


def test_it_runs_as_documented(tmp_path: Path) -> None:
    """`python benchmarks/NAME.py`, after an editable installation; one for all, since a process takes seconds."""
    command = [sys.executable, "benchmarks/memory.py", "--device", "cpu", "--sets", "UNet", "--dtypes", "float32"]
    small = ["--shrink", "16", "--results", str(tmp_path), "--figures", str(tmp_path)]
    child = subprocess.run([*command, *small], cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr


@pytest.mark.parametrize("own", [True, False])
def test_peers_that_swap_memory_leave_other_methods_parameters_alone(
    own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import overhead, peers

    monkeypatch.setattr(overhead, "OWN", {"cpu": 1e9 if own else 0})
    places: list[int] = []

    class Watched(peers.Ours):  # type: ignore[misc, name-defined]
        def first(self) -> None:
            (p,) = self.optimizer.param_groups[0]["params"]
            places.append(p.data_ptr())
            super().first()

    chosen = {"ours": Watched, "plain SAM": peers.PlainSAM}
    overhead.measure([(10_000,)], "cpu", torch.float32, 3, chosen)
    assert (len(set(places)) == 1) == own


def test_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import scale

    ranks = [{"way": "DDP", "ranks": 1, "without GAP ms": 2.0, "with GAP ms": 3.0, "ratio": 1.5}]
    monkeypatch.setattr(scale, "on_ranks", lambda *_: ranks)  # two processes take seconds; test_fsdp2 has them
    _run("scale", tmp_path, monkeypatch, "--largest", "1000000", "--total", "1000", "--repetitions", "2")
    results = json.loads((tmp_path / "results/scale_cpu.json").read_text())["results"]
    assert [row["tensors"] for row in results["tensors"]] == [10, 100, 1000]
    names = {path.name for path in (tmp_path / "figures").glob("*")}
    assert names == {f"scale_{what}_cpu.png" for what in ("parameters", "tensors", "ranks", "bytes")}


def test_bytes_on_the_wire() -> None:
    from benchmarks.scale import bytes_on_the_wire

    sent = bytes_on_the_wire(8, 800)
    assert sent["DDP with GAP"] == 3 * 2 * 700
    assert sent["DDP with GAP"] / sent["DDP without GAP"] == 1.5
