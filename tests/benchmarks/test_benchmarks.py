"""Every benchmark runs at a small size, and what it counts rather than times is right."""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import thread_time
from types import ModuleType
from typing import Any

import pytest
import torch

from gap_torch import multi_tensor

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
    host = json.loads((tmp_path / "results/host_time_cpu.json").read_text())["results"]
    assert [row["tensors"] for row in host] == [82, 1000]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
def test_overhead_on_a_gpu_tells_device_and_host_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--device", "cuda", "--sets", "UNet", "--dtypes", "float32", "--repetitions", "2"]
    _run("overhead", tmp_path, monkeypatch, *arguments)
    wall, device, host = (
        json.loads((tmp_path / f"results/{name}_cuda.json").read_text())["results"]
        for name in ("overhead", "device_time", "host_time")
    )
    assert 0 < device[0]["device ms"] < wall[0]["ms"]
    assert all(row["ratio"] > 0 for row in host)


class _Recorded:
    """In place of a CUDA graph: what is captured is run at once, and again by `replay`."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    @torch.no_grad()
    def replay(self) -> None:
        for call in self.calls:
            call()


def test_the_device_is_timed_over_both_steps_without_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import overhead

    capturing: list[_Recorded] = []

    @contextmanager
    def capture(graph: _Recorded) -> Iterator[None]:
        capturing.append(graph)
        yield
        capturing.pop()

    def kernel(call: Any) -> Any:
        def recorded(*arguments: Any) -> Any:
            if capturing:
                capturing[-1].calls.append(lambda: (seen.append(call.__name__), call(*arguments)))
            return call(*arguments)

        return recorded

    seen: list[str] = []
    for name in ("perturb", "restore"):
        monkeypatch.setattr(multi_tensor, name, kernel(getattr(multi_tensor, name)))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Recorded)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(overhead, "COPIES", {"cuda": 3})
    params = [torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(2, 3))]
    for p in params:
        p.grad = torch.ones_like(p)
    times = iter([10.0, 16.0])
    assert overhead.replayed(params)(lambda: next(times)) == 2.0
    assert seen == ["perturb", "restore"] * 3
    assert all((p == 1).all() for p in params)


def test_host_time_counts_the_steps_alone() -> None:
    from benchmarks import host_time

    class Slow:
        def first(self) -> None:
            assert all(p.grad is not None for p in params)
            burn(0.01)

        def second(self) -> None:
            assert all((p.grad == 2).all() for p in params)
            burn(0.01)

        def after(self) -> None:
            burn(0.1)

    def burn(seconds: float) -> None:
        end = thread_time() + seconds
        while thread_time() < end:
            pass

    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    run = host_time.task(Slow(), params)
    waits: list[float] = []
    assert 0.02 <= run(lambda: waits.append(0.0) or 0.0) < 0.1
    assert len(waits) == 2


def test_the_bare_calls_do_what_the_wrapper_does() -> None:
    from benchmarks import host_time, peers
    from benchmarks.common import make, second_gradient

    params = make([(3, 4), (5,)], "cpu", torch.float32)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    for p, twin in zip(params, twins, strict=True):
        twin.grad = p.grad.clone() if p.grad is not None else None
    before = [p.detach().clone() for p in params]
    bare, ours = host_time.Bare(twins), peers.Ours(params)
    bare.first()
    ours.first()
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(p, twin)
    second_gradient(params)
    bare.second()
    ours.second()
    assert all(map(torch.equal, twins, before))
    assert all(map(torch.equal, params, before))


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
