"""For all tests: packages that may be missing, two gloo processes, and the number of threads."""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

if "PYTEST_XDIST_WORKER" in os.environ:  # workers with several threads each wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
    torch.set_num_threads(1)

# What a process that starts others imports once for all of them; torch._dynamo is what the first optimizer imports.
multiprocessing.set_forkserver_preload(["gap_torch", "torch._dynamo", "torch.nn.parallel", "segmentation.cli"])

# What a full installation has beyond torch, NumPy, pytest and hypothesis, by the names to import.
OF_EXTRAS = {
    "PIL",
    "accelerate",
    "h5py",
    "ignite",
    "lightning",
    "matplotlib",
    "medpy",
    "monai",
    "nibabel",
    "nrrd",
    "pytorch_optimizer",
    "rich",
    "scipy",
    "skimage",
    "tensorboard",
    "torchvision",
    "yaml",
}


class _Module(pytest.Module):
    """A test module that is skipped where a package of an extra is missing, instead of ending the collection."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        try:
            return super().collect()
        except self.CollectError as error:
            cause = error.__cause__
            missing = (cause.name or "").split(".")[0] if isinstance(cause, ModuleNotFoundError) else ""
            if missing not in OF_EXTRAS:
                raise
            pytest.skip(f"{self.path.name} needs {missing}, of an extra in pyproject.toml", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
    return _Module.from_parent(parent, path=module_path)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """A command that sets its own number would change the rounding of all tests behind it."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """`on_two_ranks(worker, *args)` runs `worker(rank, *args)` in two gloo processes.

    `worker` is a function of a test module; what it returns (tensors, numbers, strings, in dicts and lists) comes back
    as a list, one entry a rank. Starting two processes takes a second: gather a module's cases into one worker.
    """
    if not dist.is_available():
        pytest.skip("needs torch.distributed")
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"

    def run(worker: Callable[..., Any], *args: Any) -> list[Any]:
        folder = tmp_path_factory.mktemp("ranks")
        torch.multiprocessing.start_processes(_rank, (worker, args, str(folder)), nprocs=2, start_method=method)
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]

    return run


def _rank(rank: int, worker: Callable[..., Any], args: tuple[Any, ...], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        torch.save(worker(rank, *args), Path(folder) / f"{rank}.pt")
        dist.barrier()  # neither goes while the other still talks to it
    finally:
        dist.destroy_process_group()
    # The result is on disk. At the interpreter's own end gloo's threads have once aborted a process ("terminate called
    # without an active exception").
    os._exit(0)
