"""What the wrapper does to each parameter in every step: hooks, copies of theta, and how many functions it calls."""

import copy
import pickle
import sys
import warnings
from contextlib import suppress
from types import FrameType

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from gap_torch import GAPWrapper


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def _loss(model: nn.Module) -> Tensor:
    return model(torch.ones(2, 4)).square().sum()


def _step(model: nn.Module, optimizer: GAPWrapper) -> None:
    _loss(model).backward()
    with optimizer.perturbed(model):
        _loss(model).backward()
    optimizer.step()
    optimizer.zero_grad()


def _zero_in_place(model: nn.Module, optimizer: GAPWrapper) -> None:
    _loss(model).backward()
    with optimizer.perturbed(model):
        model.zero_grad(set_to_none=False)
        _loss(model).backward()


def _hooks(model: nn.Module) -> list[int]:
    return [len(p._backward_hooks or {}) for p in model.parameters()]


@pytest.mark.parametrize("fails", [False, True])
def test_a_hook_is_there_while_perturbed_and_then_gone(fails: bool) -> None:
    model, seen = _model(), []
    optimizer = GAPWrapper(SGD(model.parameters(), 0.1))
    for _ in range(2):
        _loss(model).backward()
        with suppress(ZeroDivisionError), optimizer.perturbed(model):
            seen.append(_hooks(model))
            _loss(model).backward()
            seen.append(1 / (not fails))
        assert _hooks(model) == [0] * 4
        optimizer.zero_grad()
    assert seen[0] == [1] * 4


def test_torch_is_asked_for_hooks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a microsecond and a half for each."""
    model, registered = _model(), []
    register = Tensor.register_hook
    monkeypatch.setattr(Tensor, "register_hook", lambda p, hook: registered.append(p) or register(p, hook))
    optimizer = GAPWrapper(SGD(model.parameters(), 0.1))
    for _ in range(3):
        _step(model, optimizer)
    assert len(registered) == 4


def test_hooks_of_others_stay_and_are_called() -> None:
    model, calls = _model(), []
    before = model[0].weight.register_hook(lambda g: calls.append("before"))
    optimizer = GAPWrapper(SGD(model.parameters(), 0.1))
    _loss(model).backward()
    with optimizer.perturbed(model):
        during = model[0].weight.register_hook(lambda g: calls.append("during"))
        _loss(model).backward()
    _loss(model).backward()
    assert calls == ["before", "before", "during", "before", "during"]
    before.remove()
    during.remove()
    assert _hooks(model) == [0] * 4


@pytest.mark.parametrize("others", [False, True], ids=["alone", "with another's hooks"])
def test_a_zeroing_is_noticed_in_every_step(others: bool) -> None:
    model = _model()
    handles = [p.register_hook(lambda g: None) for p in model.parameters()] if others else []
    optimizer = GAPWrapper(SGD(model.parameters(), 0.1))
    for _ in range(3):
        with pytest.raises(RuntimeError, match="overwritten"):
            _zero_in_place(model, optimizer)
        for handle in handles:
            handle.remove()
        _step(model, optimizer)


def test_each_of_several_wrappers_has_hooks_of_its_own() -> None:
    model = _model()
    outer, inner = (GAPWrapper(SGD(model.parameters(), 0.1)) for _ in range(2))
    _loss(model).backward()
    with outer.perturbed(model):
        _loss(model).backward()
        with inner.perturbed(model):
            assert _hooks(model) == [2] * 4
            _loss(model).backward()
        assert _hooks(model) == [1] * 4
    assert _hooks(model) == [0] * 4


def test_copies_and_pickles_come_without_hooks_and_without_a_warning() -> None:
    """A tensor that is no `nn.Parameter` would warn of hooks that it has."""
    model, alone = _model(), torch.ones(3, requires_grad=True)
    optimizer = GAPWrapper(SGD([*model.parameters(), alone], 0.1))
    (_loss(model) + alone.sum()).backward()
    with optimizer.perturbed(model):
        twin = copy.deepcopy(model)
        (_loss(model) + alone.sum()).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.deepcopy([model, alone])
        pickle.dumps([model, alone])
    assert _hooks(twin) == [0] * 4


def test_parameters_that_come_into_a_group_are_watched() -> None:
    model, other = _model(), _model()
    optimizer = GAPWrapper(SGD(model.parameters(), 0.1))
    _step(model, optimizer)
    optimizer.param_groups[0]["params"] = list(other.parameters())
    with pytest.raises(RuntimeError, match="overwritten"):
        _zero_in_place(other, optimizer)


def test_a_parameter_that_thaws_is_watched() -> None:
    model = _model()
    optimizer = GAPWrapper(SGD(model.parameters(), 0.1))
    model[2].requires_grad_(False)
    _step(model, optimizer)
    model[2].requires_grad_(True)
    model[0].requires_grad_(False)
    with pytest.raises(RuntimeError, match="overwritten"):
        _zero_in_place(model, optimizer)


CHANGES = {
    "dtype": lambda t: t.double(),
    "shape": lambda t: torch.cat([t, t]),
    "strides": lambda t: t.t().contiguous().t(),
    "another storage": torch.clone,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_parameter_whose_data_is_replaced_comes_back_bit_for_bit(change: str) -> None:
    """Memory for theta is kept from step to step, and has to follow."""
    p, another = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2))
    optimizer = GAPWrapper(SGD([p, another], 0.1), eps=0.5)
    for value in (p.data, CHANGES[change](torch.randn(3, 2, dtype=torch.float64).float() / 3)):
        p.data, p.grad = value, None
        if change == "dtype" and value.dtype == torch.float64:
            p.data.add_(1e-12)  # which float32 would lose
        before = p.detach().clone()
        (p.square().sum() + another.sum()).backward()
        with optimizer.perturbed():
            assert not torch.equal(p, before)
            (p.square().sum() + another.sum()).backward()
        assert torch.equal(p, before)
        copied = optimizer._perturbation.memory.copies[p]
        assert (copied.dtype, copied.shape, copied.stride()) == (p.dtype, p.shape, p.stride())
        optimizer.zero_grad()


def test_a_step_that_runs_out_of_memory_can_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    optimizer = GAPWrapper(SGD(model.parameters(), 0.1), eps=0.5)
    _step(model, optimizer)
    model.double()

    def loss() -> Tensor:
        return model(torch.ones(2, 4, dtype=torch.float64)).square().sum()

    loss().backward()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", _out_of_memory)
        with pytest.raises(MemoryError):
            optimizer.first_step()
    before = [p.detach().clone() for p in model.parameters()]
    loss().backward()
    with optimizer.perturbed(model):
        assert all(c.dtype == torch.float64 for c in optimizer._perturbation.memory.theta)
        loss().backward()
    assert all(map(torch.equal, model.parameters(), before))


def _out_of_memory(*arguments: object) -> None:
    raise MemoryError


def test_the_host_calls_few_functions_for_each_parameter() -> None:
    """On a GPU the wrapper's time is the host's. What is asked is asked of whole lists."""

    def calls(count: int) -> int:
        params = [nn.Parameter(torch.ones(2)) for _ in range(count)]
        optimizer, counted = GAPWrapper(SGD(params, 0.1)), 0

        def count_call(frame: FrameType, event: str, argument: object) -> None:
            nonlocal counted
            counted += event == "call"

        for _ in range(2):  # in the second step memory and hooks are there
            counted = 0
            for step in (optimizer.first_step, optimizer.second_step):
                torch.stack(params).sum().backward()
                sys.setprofile(count_call)
                step()
                sys.setprofile(None)
            optimizer.step()
            optimizer.zero_grad()
        return counted

    assert (calls(150) - calls(50)) / 100 <= 3
