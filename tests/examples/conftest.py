"""A tiny phantom and recipe that several tests share, and two gloo processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from segmentation.phantom import write_phantom
from segmentation.recipe import Recipe


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("phantom")
    write_phantom(root, train_patients=3, val_patients=1, test_patients=1, slices=2, size=32)
    return root


@pytest.fixture
def tiny_recipe() -> Recipe:
    return Recipe(
        size=32,
        width=2,
        labelled_batch=3,
        unlabelled_batch=3,
        iterations=6,
        validate_every=2,
        log_every=1,
        tau=0.3,
        average_decay=0.5,
        statistics_slices=4,
    )


@pytest.fixture(scope="session")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """`on_two_ranks(worker, *args)` runs `worker(*args)` in two gloo processes, and lists what they return.

    `worker` is a function of a test module and returns tensors, numbers and strings, in dicts and lists. Starting two
    processes takes seconds: gather a module's cases into one worker.
    """
    if not dist.is_available():
        pytest.skip("needs torch.distributed")

    def run(worker: Callable[..., Any], *args: Any) -> list[Any]:
        folder = tmp_path_factory.mktemp("ranks")
        torch.multiprocessing.spawn(_rank, args=(worker, args, str(folder)), nprocs=2)
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]

    return run


def _rank(rank: int, worker: Callable[..., Any], args: tuple[Any, ...], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        torch.save(worker(*args), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
