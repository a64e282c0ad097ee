"""SyncBatchNorm under DDP: the joint batch's statistics in every pass; the perturbed pass leaves the running ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gap_torch import GAPWrapper

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's SyncBatchNorm works on GPUs alone")


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double().cuda()


def _data(step: int) -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64).cuda()


def _train(model: nn.Module, mine: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), lr=0.1), eps=0.1)
    for step in range(3):
        x = mine(_data(step))
        model(x).square().mean().backward()
        with optimizer.perturbed(model):
            model(x).square().mean().backward()
        model(x + 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name.removeprefix("module."): value.cpu() for name, value in model.state_dict().items()}


def _worker(rank: int) -> dict[str, Tensor]:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(_model())  # both ranks on one GPU, which gloo allows
    return _train(DistributedDataParallel(model, device_ids=[0]), lambda x: x.chunk(2)[rank])


def test_two_ranks_are_one_process_with_the_joint_batch(on_two_ranks: Callable[..., list[dict[str, Any]]]) -> None:
    expected = _train(_model(), lambda x: x)
    for rank in on_two_ranks(_worker):
        for name, value in expected.items():
            torch.testing.assert_close(rank[name], value)
    assert expected["1.num_batches_tracked"] == 6
