"""Every script runs by itself, learns, and arrives at the plain loop's weights, on one process or on two."""

import importlib.util
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cuda_graph
import plain_pytorch
import pytest
import torch

from .conftest import SCRIPTS

NEEDS = {"lightning_module": "lightning", "accelerate_loop": "accelerate", "monai_engine": "ignite"}
ON_ONE = ["plain_pytorch", "cuda_graph", *NEEDS]
FSDP2_ON_CPU = not torch.__version__.startswith("2.6.")
UNDER_DDP = ["ddp", "accelerate_loop", "lightning_module"]


def _installed(script: str) -> bool:
    return script not in NEEDS or importlib.util.find_spec(NEEDS[script]) is not None


def _import(script: str) -> object:
    pytest.importorskip(NEEDS[script])
    return importlib.import_module(script)


@pytest.mark.parametrize("script", ON_ONE)
def test_the_script_runs_and_learns(script: str, capsys: pytest.CaptureFixture) -> None:
    if script in NEEDS:
        pytest.importorskip(NEEDS[script])
    runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
    before, after = map(float, re.findall(r"loss ([\d.]+)", capsys.readouterr().out.splitlines()[-1]))
    assert after < before / 2


def test_gap_makes_a_difference(trained: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the comparisons below would be worth little."""
    with_gap = trained(plain_pytorch.train)
    monkeypatch.setattr(plain_pytorch, "EPS", 0.0)
    without = trained(plain_pytorch.train)
    assert max((with_gap[name] - without[name]).abs().max() for name in with_gap) > 1e-3


@pytest.mark.parametrize("script", ["lightning_module", "monai_engine"])
def test_the_weights_are_those_of_the_plain_loop(script: str, trained: Callable) -> None:
    ours = trained(_import(script).train)
    torch.testing.assert_close(ours, trained(plain_pytorch.train))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it is captured, which the next test is about")
def test_the_step_to_capture_gives_the_weights_of_the_plain_loop(trained: Callable) -> None:
    ours, expected = trained(cuda_graph.train), trained(plain_pytorch.train)  # float32's learning rate, and float64's
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
def test_the_step_of_the_page_on_cuda_graphs_is_the_same_captured(trained: Callable) -> None:
    """In float64, for AdamW makes steps of full size of what rounding leaves of a gradient that is zero."""
    ours, theirs = (
        trained(lambda model, capture=capture: cuda_graph.train(model.cuda(), capture=capture))
        for capture in (True, False)
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
def test_the_step_of_the_page_on_cuda_graphs_learns_in_every_precision(amp: torch.dtype | None) -> None:
    model = cuda_graph.network().cuda()
    before = cuda_graph.score(model)
    cuda_graph.train(model, amp)
    loss = [float(re.search(r"loss ([\d.]+)", text).group(1)) for text in (before, cuda_graph.score(model))]
    assert loss[1] < loss[0] / 2


def test_micro_batches_give_the_weights_of_the_whole_batch(trained: Callable) -> None:
    """Without batch norm, whose statistics are those of a micro-batch."""
    ours = trained(_import("accelerate_loop").train, batch_norm=False)
    torch.testing.assert_close(ours, trained(plain_pytorch.train, batch_norm=False))


@pytest.fixture(scope="module")
def under_torchrun(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the scripts print on two ranks, and the folder with the weights that each script gives each rank."""
    if not torch.distributed.is_available():
        pytest.skip("needs torch.distributed")
    out = tmp_path_factory.mktemp("weights")
    scripts = [*filter(_installed, UNDER_DDP), *(["fsdp2"] if FSDP2_ON_CPU else [])]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    files = [str(SCRIPTS / f"{script}.py") for script in scripts]
    command = [*launcher, str(Path(__file__).with_name("on_ranks.py")), str(out), *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout, out


def test_ddp_says_that_its_ranks_agree(under_torchrun: tuple[str, Path]) -> None:
    assert "2 ranks agree" in under_torchrun[0]


@pytest.mark.parametrize("script", UNDER_DDP)
def test_ddp_gives_the_weights_of_one_process(script: str, under_torchrun: tuple[str, Path], trained: Callable) -> None:
    if not _installed(script):
        pytest.skip(f"needs {NEEDS[script]}")
    _assert_as_on_one_process(script, under_torchrun[1], trained)


@pytest.mark.skipif(not FSDP2_ON_CPU, reason="torch 2.6 has no FSDP2 on the CPU")
def test_fsdp2_gives_the_weights_of_one_process(under_torchrun: tuple[str, Path], trained: Callable) -> None:
    assert "FSDP2: loss" in under_torchrun[0]
    _assert_as_on_one_process("fsdp2", under_torchrun[1], trained)


def _assert_as_on_one_process(script: str, folder: Path, trained: Callable) -> None:
    expected = trained(plain_pytorch.train, batch_norm=False)
    for rank in range(2):
        torch.testing.assert_close(torch.load(folder / f"{script}_{rank}.pt"), expected)
