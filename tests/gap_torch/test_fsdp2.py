"""Under FSDP2 and tensor parallelism the step is Algorithm 1 on the joint batch, with one norm over all shards."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from gap_torch import GAPWrapper
from gap_torch.reference import algorithm_1

STEPS, EPS = 3, 0.1
ALPHAS = (0.0, 0.5, 1.0)


class Block(nn.Sequential):
    """Rows that two ranks don't share evenly, and a bias of one number, of which a rank has none."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 1))


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), nn.Linear(1, 4), nn.Tanh(), Block()).double()


def _data(step: int) -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def _expected(model: nn.Module, alpha: float, adaptive: bool = False) -> dict[str, Any]:
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    gradients = []
    for step in range(STEPS):
        x = _data(step)
        g = algorithm_1(
            [*model.parameters()],
            lambda x=x: _loss(model, x),
            lambda x=x: _loss(model, x + 1),
            eps=EPS,
            alpha=alpha,
            adaptive=adaptive,
        )
        for p, gradient in zip(model.parameters(), g, strict=True):
            p.grad = gradient.clone()
        gradients.append([gradient.clone() for gradient in g])
        base.step()
    return {"gradients": gradients, "theta": [p.detach() for p in model.parameters()]}


def _full(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t.full_tensor().detach().clone() if hasattr(t, "full_tensor") else t.detach().clone() for t in tensors]


def _train(
    model: nn.Module, mine: Callable[[Tensor], Tensor], between: str = "", folder: str = "", **knobs: Any
) -> dict[str, Any]:
    optimizer = GAPWrapper(torch.optim.AdamW(model.parameters(), lr=0.01), eps=EPS, **knobs)
    gradients, radii, exact = [], [], True
    for step in range(STEPS):
        if folder and step == STEPS - 1:
            dcp.save(_state(model, optimizer), checkpoint_id=folder)
        x = mine(_data(step))
        before = _full(model.parameters())
        _loss(model, x).backward()
        if between == "evaluation before":  # which leaves gathered parameters behind
            with torch.no_grad():
                _loss(model, x)
        if not optimizer.due:
            optimizer.step()
            optimizer.zero_grad()
            continue
        with optimizer.perturbed(model):
            moved = _full(model.parameters())
            if between == "model.zero_grad":
                model.zero_grad()
            elif between == "zeroing in place":
                model.zero_grad(set_to_none=False)
            elif between == "forward":
                _loss(model, x)
            _loss(model, x).backward()
            if between == "forward":
                with torch.no_grad():
                    _loss(model, x)
        radii.append(sum((a - b).square().sum() for a, b in zip(moved, before, strict=True)).sqrt().item())
        exact &= all(map(torch.equal, _full(model.parameters()), before))
        _loss(model, mine(_data(step) + 1)).backward()
        gradients.append(_full(p.grad for p in model.parameters()))
        optimizer.step()
        optimizer.zero_grad()
    return {"gradients": gradients, "theta": _full(model.parameters()), "radii": radii, "exact": exact}


def _state(model: nn.Module, optimizer: GAPWrapper) -> dict[str, Any]:
    weights, state = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": state}


def _sharded(mesh: Any, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    model = _model()
    for layer in model:
        if isinstance(layer, Block):
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def _parallel(mesh: Any) -> nn.Module:
    """Megatron's way: columns, then rows; the layer norm is whole on every rank and sees a part of the batch."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleOutput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    plan = {
        "0": ColwiseParallel(input_layouts=Replicate()),
        "2": RowwiseParallel(output_layouts=Shard(0)),
        "3": SequenceParallel(sequence_dim=0, use_local_output=False),
        "4": PrepareModuleOutput(output_layouts=Shard(0), desired_output_layouts=Replicate()),
    }
    return parallelize_module(_parallel_model(), mesh, plan)


def _parallel_model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4), nn.LayerNorm(4), nn.Identity()
    return nn.Sequential(*layers).double()


def _worker(rank: int, folder: str) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    mesh = init_device_mesh("cpu", (2,))
    nested = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    copied = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))

    def mine(x: Tensor) -> Tensor:
        return x.chunk(2)[rank]

    results: dict[str, Any] = {f"alpha {alpha}": _train(_sharded(mesh), mine, alpha=alpha) for alpha in ALPHAS}
    for between in ("model.zero_grad", "zeroing in place", "forward"):
        results[between] = _train(_sharded(mesh), mine, between)
    results["checkpoint"] = _train(_sharded(mesh), mine, folder=folder, interval=STEPS - 1, adaptive=True)
    results["foreach=False"] = _train(_sharded(mesh), mine, foreach=False)
    results["adaptive"] = _train(_sharded(mesh), mine, adaptive=True)
    results["shard within replicas"] = _train(_sharded(nested), mine)
    results["replicas"] = _train(_sharded(copied), mine)
    results["cpu offload"] = _train(_sharded(mesh, offload_policy=CPUOffloadPolicy(pin_memory=False)), mine)
    results["no reshard"] = _train(_sharded(mesh, reshard_after_forward=False), mine)
    results["evaluation before"] = _train(_sharded(mesh, reshard_after_forward=False), mine, "evaluation before")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    results["mixed precision"] = _train(_sharded(mesh, mp_policy=policy).float(), lambda x: mine(x).float())
    return results


def _parallel_worker(rank: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh

    return {"tensor parallel": _train(_parallel(init_device_mesh("cpu", (2,))), lambda x: x)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def ranks(on_two_ranks: Callable[..., list[dict[str, Any]]], folder: str) -> list[dict[str, Any]]:
    if torch.__version__.startswith("2.6."):
        pytest.skip("torch 2.6 has no FSDP2 on the CPU")
    return on_two_ranks(_worker, folder)


PLAIN = ["model.zero_grad", "zeroing in place", "forward", "foreach=False", "shard within replicas", "replicas"]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_alphas(ranks: list[dict], alpha: float) -> None:
    _compare(ranks, f"alpha {alpha}", _expected(_model(), alpha))


@pytest.mark.parametrize("case", [*PLAIN, "cpu offload", "no reshard", "evaluation before"])
def test_cases(ranks: list[dict], case: str) -> None:
    _compare(ranks, case, _expected(_model(), 1.0))


def test_adaptive(ranks: list[dict]) -> None:
    _compare(ranks, "adaptive", _expected(_model(), 1.0, adaptive=True), radius=False)


def test_tensor_parallel(on_two_ranks: Callable[..., list[dict[str, Any]]]) -> None:
    _compare(on_two_ranks(_parallel_worker), "tensor parallel", _expected(_parallel_model(), 1.0))


def test_mixed_precision(ranks: list[dict]) -> None:
    for rank in ranks:
        ours = rank["mixed precision"]
        assert ours["exact"]
        assert ours["radii"] == pytest.approx([EPS] * STEPS, rel=1e-5)
        for a, b in zip(ours["theta"], ranks[0]["mixed precision"]["theta"], strict=True):
            assert torch.equal(a, b)


def test_a_sharded_checkpoint_goes_on_in_one_process(ranks: list[dict], folder: str) -> None:
    model = _model()
    optimizer = GAPWrapper(torch.optim.AdamW(model.parameters(), lr=0.01), eps=EPS, interval=STEPS - 1, adaptive=True)
    state = _state(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert optimizer.due
    x = _data(STEPS - 1)
    _loss(model, x).backward()
    with optimizer.perturbed(model):
        _loss(model, x).backward()
    _loss(model, x + 1).backward()
    optimizer.step()
    for a, b in zip(model.parameters(), ranks[0]["checkpoint"]["theta"], strict=True):
        torch.testing.assert_close(a.detach(), b)


def _compare(ranks: list[dict], case: str, expected: dict[str, Any], radius: bool = True) -> None:
    for rank in ranks:
        ours = rank[case]
        assert ours["exact"]
        if radius:
            assert ours["radii"] == pytest.approx([EPS] * STEPS)
        for step, theirs in zip(ours["gradients"], expected["gradients"], strict=True):
            for a, b in zip(step, theirs, strict=True):
                torch.testing.assert_close(a, b)
        for a, b in zip(ours["theta"], expected["theta"], strict=True):
            torch.testing.assert_close(a, b)
