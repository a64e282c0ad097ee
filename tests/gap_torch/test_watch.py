"""Hooks stay on the parameters from step to step: none too many, none left behind, none in a copy."""

import copy
import gc
import io
import pickle
import sys
import warnings
import weakref
from types import FrameType
from typing import Any

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


def test_hooks_are_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, registered = _model(), []
    register = Tensor.register_hook
    monkeypatch.setattr(Tensor, "register_hook", lambda p, hook: registered.append(p) or register(p, hook))
    optimizer = GAPWrapper(SGD(model.parameters(), 0.1))
    for _ in range(3):
        _step(model, optimizer)
    assert len(registered) == 4
    assert _hooks(model) == [1] * 4


def test_a_wrapper_takes_its_hooks_with_it() -> None:
    """As when every fold or sweep makes a new one for the same model."""
    model = _model()
    for _ in range(3):
        optimizer = GAPWrapper(SGD(model.parameters(), 0.1))
        _step(model, optimizer)
        gone = weakref.ref(optimizer)
        gc.disable()  # nothing waits for the garbage collector
        try:
            del optimizer
            assert gone() is None
        finally:
            gc.enable()
        assert _hooks(model) == [0] * 4


def test_hooks_do_not_keep_a_model_alive() -> None:
    model = _model()
    optimizer = GAPWrapper(SGD(model.parameters(), 0.1))
    _step(model, optimizer)
    gone = weakref.ref(model[0].weight)
    del model, optimizer
    gc.collect()
    assert gone() is None


def test_each_of_several_wrappers_has_hooks_of_its_own() -> None:
    model = _model()
    optimizers = [GAPWrapper(SGD(model.parameters(), 0.1)) for _ in range(2)]
    for optimizer in optimizers:
        _step(model, optimizer)
    assert _hooks(model) == [2] * 4
    for optimizer in optimizers:
        with pytest.raises(RuntimeError, match="overwritten"):
            _zero_in_place(model, optimizer)


def test_copies_and_pickles_come_without_hooks_and_without_a_warning() -> None:
    model, alone = _model(), torch.ones(3, requires_grad=True)
    optimizer = GAPWrapper(SGD([*model.parameters(), alone], 0.1))
    for _ in range(2):
        (_loss(model) + alone.sum()).backward()
        with optimizer.perturbed(model):
            (_loss(model) + alone.sum()).backward()
        optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twins: list[Any] = [copy.deepcopy([model, alone]), pickle.loads(pickle.dumps([model, alone]))]
        torch.save([model, alone], file := io.BytesIO())
        file.seek(0)
        twins.append(torch.load(file, weights_only=False))
    for twin, tensor in twins:
        assert _hooks(twin) == [0] * 4
        assert not tensor._backward_hooks


def test_parameters_that_come_into_a_group_are_watched_and_those_that_leave_are_not() -> None:
    model, other = _model(), _model()
    optimizer = GAPWrapper(SGD(model.parameters(), 0.1))
    _step(model, optimizer)
    optimizer.param_groups[0]["params"] = list(other.parameters())
    with pytest.raises(RuntimeError, match="overwritten"):
        _zero_in_place(other, optimizer)
    assert (_hooks(model), _hooks(other)) == ([0] * 4, [1] * 4)


def test_a_parameter_that_thaws_is_watched() -> None:
    model = _model()
    optimizer = GAPWrapper(SGD(model.parameters(), 0.1))
    model[2].requires_grad_(False)
    _step(model, optimizer)
    model[2].requires_grad_(True)
    model[0].requires_grad_(False)
    with pytest.raises(RuntimeError, match="overwritten"):
        _zero_in_place(model, optimizer)


def test_zeroing_in_an_ordinary_pass_is_nobodys_business() -> None:
    model = _model()
    optimizer = GAPWrapper(SGD(model.parameters(), 0.1))
    for _ in range(2):
        _step(model, optimizer)
        _loss(model).backward()
        model.zero_grad(set_to_none=False)
        _loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()


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
