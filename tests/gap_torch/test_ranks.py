"""A mistake on one rank is an error on every rank that says what happened, in time, and theta is as it was."""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gap_torch import GAPWrapper

TIMEOUT = timedelta(seconds=2)


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def _backward(model: nn.Module) -> None:
    model(torch.ones(2, 4)).square().mean().backward()


def _note(action: Callable[[], Any], model: nn.Module) -> dict[str, Any]:
    """The error of `action`, how long it took, and whether the parameters of `model` are as before."""
    before = [_whole(p) for p in model.parameters()]
    started, message = time.monotonic(), ""
    try:
        action()
    except (RuntimeError, ValueError) as error:
        message = str(error)
    intact = all(torch.equal(a, _whole(b)) for a, b in zip(before, model.parameters(), strict=True))
    return {"error": message, "seconds": time.monotonic() - started, "intact": intact}


def _whole(p: Tensor) -> Tensor:
    return getattr(p, "_local_tensor", p).detach().clone()


def _no_mistake(rank: int) -> dict[str, Any]:
    model = _model()
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1), process_group=dist.group.WORLD)
    _backward(model)
    return _note(lambda: (optimizer.first_step(), _backward(model), optimizer.second_step()), model)


def _different_parameters(rank: int) -> dict[str, Any]:
    model = _model()
    params = [*model.parameters()][rank:]
    optimizer = GAPWrapper(torch.optim.SGD(params, 0.1), process_group=dist.group.WORLD)
    _backward(model)
    return _note(optimizer.first_step, model)


def _one_without_gradient(rank: int) -> dict[str, Any]:
    model = _model()
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1), process_group=dist.group.WORLD)
    if rank == 0:
        _backward(model)
    return _note(optimizer.first_step, model)


def _one_perturbed_already(rank: int) -> dict[str, Any]:
    model = _model()
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1), process_group=dist.group.WORLD)
    _backward(model)
    if rank == 1:
        optimizer.process_group = None
        optimizer.first_step()
        optimizer.process_group = dist.group.WORLD
    return _note(optimizer.first_step, model)


def _one_bad_knob(rank: int) -> dict[str, Any]:
    model = _model()
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1), process_group=dist.group.WORLD)
    _backward(model)
    if rank == 0:
        optimizer.param_groups[0]["gap_eps"] = -1.0
    return _note(optimizer.first_step, model)


def _different_knobs(rank: int) -> dict[str, Any]:
    model = _model()
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1), 0.1 + rank, process_group=dist.group.WORLD)
    _backward(model)
    return _note(optimizer.first_step, model)


def _one_alone(rank: int) -> dict[str, Any]:
    group, model = dist.new_group(timeout=TIMEOUT), _model()
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1), process_group=group)
    _backward(model)
    return _note(optimizer.first_step, model) if rank == 0 else _wait()


def _one_alone_sharded(rank: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    mesh = DeviceMesh.from_group(dist.new_group(timeout=TIMEOUT), "cpu")
    model = fully_shard(_model(), mesh=mesh)
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1))
    _backward(model)
    return _note(optimizer.first_step, model) if rank == 0 else _wait()


def _exception_in_one_perturbed_pass(rank: int) -> dict[str, Any]:
    model = DistributedDataParallel(_model(), process_group=dist.new_group(timeout=TIMEOUT))
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1))
    _backward(model)

    def step() -> None:
        with optimizer.perturbed(model):
            if rank == 1:
                raise RuntimeError("out of memory, say")
            _backward(model)

    note = _note(step, model)
    note["gradients"] = sum(p.grad is not None for p in model.parameters())
    if rank == 1:
        _wait()
    return note


def _wait() -> dict[str, Any]:
    time.sleep(TIMEOUT.total_seconds() + 1)
    return {}


FSDP2_ON_CPU = not torch.__version__.startswith("2.6.")
CASES = [
    _no_mistake,
    _different_parameters,
    _one_without_gradient,
    _one_perturbed_already,
    _one_bad_knob,
    _different_knobs,
    _one_alone,
    *([_one_alone_sharded] if FSDP2_ON_CPU else []),
    _exception_in_one_perturbed_pass,
]


def _worker(rank: int) -> dict[str, Any]:
    return {case.__name__: case(rank) for case in CASES}


@pytest.fixture(scope="module")
def notes(on_two_ranks: Callable[..., list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    ranks = on_two_ranks(_worker)
    return {case.__name__: [rank[case.__name__] for rank in ranks] for case in CASES}


def test_without_a_mistake_nothing_is_said(notes: dict) -> None:
    assert [note["error"] for note in notes["_no_mistake"]] == ["", ""]
    assert all(note["intact"] for note in notes["_no_mistake"])


def test_different_parameters(notes: dict) -> None:
    for note in notes["_different_parameters"]:
        assert "differ. rank 0: 4 tensors" in note["error"]
        assert "rank 1: 3 tensors" in note["error"]
        assert note["intact"]


def test_different_knobs(notes: dict) -> None:
    for note in notes["_different_knobs"]:
        assert "differ" in note["error"]
        assert note["intact"]


def test_a_bad_knob_on_one_rank(notes: dict) -> None:
    bad, other = notes["_one_bad_knob"]
    assert bad["error"].startswith("gap_eps must be finite and not negative")
    assert "rank 0" in other["error"]
    assert "gap_eps" in other["error"]
    assert other["intact"]


def test_a_rank_without_a_gradient(notes: dict) -> None:
    with_gradient, without = notes["_one_without_gradient"]
    assert without["error"].startswith("first_step() found no gradient")
    assert "rank 1" in with_gradient["error"]
    assert "found no gradient" in with_gradient["error"]
    assert with_gradient["intact"]


def test_a_rank_that_is_perturbed_already(notes: dict) -> None:
    other, perturbed = notes["_one_perturbed_already"]
    assert "second time" in perturbed["error"]
    assert "rank 1" in other["error"]
    assert "second time" in other["error"]
    assert other["intact"]


@pytest.mark.parametrize("case", ["_one_alone", "_one_alone_sharded"])
def test_a_first_step_on_one_rank_alone_ends_with_the_time_out(notes: dict, case: str) -> None:
    if case not in notes:
        pytest.skip("torch 2.6 has no FSDP2 on the CPU")
    note = notes[case][0]
    assert "must call first_step() in the same iterations" in note["error"].replace("\n", " ")
    assert note["seconds"] < TIMEOUT.total_seconds() + 10
    assert note["intact"]


def test_an_exception_in_the_perturbed_pass_of_one_rank(notes: dict) -> None:
    waiting, raising = notes["_exception_in_one_perturbed_pass"]
    assert raising["error"] == "out of memory, say"
    assert waiting["error"]
    for note in (waiting, raising):
        assert note["intact"]
        assert note["gradients"] == 0
