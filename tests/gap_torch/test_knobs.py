"""What users of SAM libraries expect beside eps and alpha: adaptive, interval, schedules, tensors, g2 alone."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gap_torch import GAPWrapper, perturbation
from gap_torch.reference import algorithm_1


def _model(device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double().to(device)


def _loss(model: nn.Module, shift: float = 0.0) -> Tensor:
    return (
        (model(torch.linspace(-1, 1, 8, device=model[0].weight.device).double().reshape(2, 4)) - shift).square().mean()
    )


def _gap(model: nn.Module, optimizer: GAPWrapper, **options: bool) -> None:
    _loss(model).backward()
    with optimizer.perturbed(model, **options):
        _loss(model).backward()


def _update(model: nn.Module, optimizer: GAPWrapper) -> None:
    _loss(model, 1.0).backward()
    if optimizer.due:
        _gap(model, optimizer)
    optimizer.step()
    optimizer.zero_grad()


def _radius(model: nn.Module, optimizer: GAPWrapper) -> float:
    before = [p.detach().clone() for p in model.parameters()]
    _loss(model).backward()
    optimizer.first_step()
    moved = sum((p - q).square().sum() for p, q in zip(model.parameters(), before, strict=True)).sqrt().item()
    _loss(model).backward()
    optimizer.second_step()
    optimizer.zero_grad()
    return moved


# ---------------------------------------------------------------------- adaptive


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_adaptive_is_the_references(device: str, foreach: bool, alpha: float) -> None:
    model = _model(device)
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1), 0.3, alpha, adaptive=True, foreach=foreach)
    expected = algorithm_1([*model.parameters()], lambda: _loss(model), eps=0.3, alpha=alpha, adaptive=True)
    _gap(model, optimizer)
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_adaptive_radius_is_in_units_of_the_weights() -> None:
    model = _model()
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1), 0.3, adaptive=True)
    before = [p.detach().clone() for p in model.parameters()]
    _loss(model).backward()
    optimizer.first_step()
    ratios = [(p - q) / q.abs() for p, q in zip(model.parameters(), before, strict=True)]
    assert sum(r.square().sum() for r in ratios).sqrt().item() == pytest.approx(0.3)


def test_adaptive_does_not_change_with_the_scale_of_a_layer() -> None:
    """What it is for: scaling one layer up and the next down leaves the function, and so theta*'s function, alone."""
    outputs = []
    for scale in (1.0, 10.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)).double()
        with torch.no_grad():
            model[0].weight.mul_(scale)
            model[2].weight.div_(scale)
        optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1), 0.3, adaptive=True)
        _loss(model).backward()
        optimizer.first_step()
        outputs.append(_loss(model).item())
    assert outputs[0] == pytest.approx(outputs[1])


def test_adaptive_in_half_precision_does_not_underflow() -> None:
    p = nn.Parameter(torch.full((4,), 1e-3, dtype=torch.float16))
    optimizer = GAPWrapper(torch.optim.SGD([p], 0.1), 1.0, adaptive=True)
    p.grad = torch.full(
        (4,), 1e-4, dtype=torch.float16
    )  # times theta squared is 1e-10, which float16 can't tell from 0
    optimizer.first_step()
    torch.testing.assert_close(p.detach(), torch.full((4,), 1.5e-3, dtype=torch.float16), rtol=1e-2, atol=0)


# ---------------------------------------------------------------------- interval


def test_interval() -> None:
    model = _model()
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1), interval=3)
    due = []
    for _ in range(7):
        due.append(optimizer.due)
        _update(model, optimizer)
    assert due == [True, False, False, True, False, False, True]


def test_a_perturbed_pass_out_of_turn_is_an_error() -> None:
    model = _model()
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1), interval=2)
    _update(model, optimizer)
    _loss(model).backward()
    with pytest.raises(RuntimeError, match=r"if optimizer\.due"), optimizer.perturbed(model):
        pytest.fail("must not be entered")
    optimizer.step()  # nothing is in the way of the update itself


def test_by_default_every_update_is_due() -> None:
    model = _model()
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1))
    for _ in range(3):
        assert optimizer.due
        _update(model, optimizer)
    assert "gap_updates" not in optimizer.param_groups[0]


@pytest.mark.parametrize("interval", [0, -1])
def test_interval_below_one(interval: int) -> None:
    with pytest.raises(ValueError, match="interval must be at least 1"):
        GAPWrapper(torch.optim.SGD(_model().parameters(), 0.1), interval=interval)


def test_a_warm_up_from_zero_counts() -> None:
    model = _model()
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1), interval=2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: t / 3)
    due = []
    for _ in range(4):
        due.append(optimizer.due)
        _update(model, optimizer)
        scheduler.step()
    assert due == [True, False, True, False]


def test_an_update_that_a_grad_scaler_skips_does_not_count() -> None:
    model, scaler = _model(), torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1), interval=2)
    for bad in (True, False):
        scaler.scale(_loss(model) * (float("inf") if bad else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert optimizer.due == bad


def test_what_is_set_aside_comes_back_in_updates_without_gap() -> None:
    model = _model()
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1), interval=2)
    _update(model, optimizer)
    expected = [p - 0.1 * g for p, g in zip(model.parameters(), _sum_of_gradients(model), strict=True)]
    with optimizer.set_aside():
        _loss(model, 1.0).backward()
    _loss(model).backward()
    optimizer.step()
    for p, e in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p, e)


def _sum_of_gradients(model: nn.Module) -> tuple[Tensor, ...]:
    return torch.autograd.grad(_loss(model) + _loss(model, 1.0), [*model.parameters()])


# ---------------------------------------------------------------------- schedules and tensors


def _ramp(update: int) -> float:
    return 0.1 * min(1.0, update / 4)


def test_eps_follows_its_schedule() -> None:
    model = _model()
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1), eps=_ramp)
    for update in range(6):
        assert _radius(model, optimizer) == pytest.approx(_ramp(update))
        assert optimizer.param_groups[0]["gap_eps"] == _ramp(update)
        _update(model, optimizer)


def test_a_groups_own_eps_wins_over_the_schedule() -> None:
    model = _model()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "gap_eps": 0.0}]
    optimizer = GAPWrapper(torch.optim.SGD(groups, 0.1), eps=_ramp)
    for _ in range(3):
        _update(model, optimizer)
    _gap(model, optimizer)
    assert [group["gap_eps"] for group in optimizer.param_groups] == [_ramp(3), 0.0]
    optimizer.zero_grad()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert optimizer.param_groups[2]["gap_eps"] == _ramp(3)


@pytest.mark.parametrize("options", [{"eps": _ramp}, {"interval": 2}, {"eps": _ramp, "interval": 2}])
def test_a_resumed_run_goes_on_counting(options: dict) -> None:
    def run(updates: int, state: dict | None = None, weights: dict | None = None) -> tuple[nn.Module, GAPWrapper]:
        model = _model()
        optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), **options)
        if state is not None:
            optimizer.load_state_dict(state)
            model.load_state_dict(weights)
        for _ in range(updates):
            _update(model, optimizer)
        return model, optimizer

    whole, _ = run(7)
    half, optimizer = run(3)
    resumed, _ = run(4, optimizer.state_dict(), half.state_dict())
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_follow_the_schedule_too(copied) -> None:
    optimizer = GAPWrapper(torch.optim.SGD(_model().parameters(), 0.1), eps=_ramp, interval=2, adaptive=True)
    optimizer.param_groups[0]["gap_updates"] = 2
    twin = copied(optimizer)
    assert (twin.eps, twin.interval, twin.adaptive, twin.due) == (_ramp, 2, True, True)
    params = [p for group in twin.param_groups for p in group["params"]]
    for p in params:
        p.grad = torch.ones_like(p)
    twin.first_step()
    assert twin.param_groups[0]["gap_eps"] == _ramp(2)


def test_a_schedule_that_goes_below_zero() -> None:
    model = _model()
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1), eps=lambda update: 0.1 - update)
    _update(model, optimizer)
    _loss(model).backward()
    with pytest.raises(ValueError, match="gap_eps must be finite and not negative"):
        optimizer.first_step()


def test_eps_as_a_tensor(device: str) -> None:
    model, eps = _model(device), torch.tensor(0.1, device=device)
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1), eps=eps)
    for radius in (0.1, 0.0, 0.25):
        eps.fill_(radius)
        assert _radius(model, optimizer) == pytest.approx(radius)


def test_eps_as_a_tensor_of_several_numbers() -> None:
    with pytest.raises(ValueError, match="one real number"):
        GAPWrapper(torch.optim.SGD(_model().parameters(), 0.1), eps=torch.ones(2))


def test_the_users_tensor_stays_connected_after_loading() -> None:
    model, eps = _model(), torch.tensor(0.1)
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1), eps=eps)
    state = copy.deepcopy(optimizer.state_dict())
    eps.fill_(0.3)
    optimizer.load_state_dict(state)
    assert eps.item() == pytest.approx(0.1)
    eps.fill_(0.25)
    assert _radius(model, optimizer) == pytest.approx(0.25)


def test_alpha_as_a_tensor() -> None:
    with pytest.raises(ValueError, match="plain number"):
        GAPWrapper(torch.optim.SGD(_model().parameters(), 0.1), alpha=torch.tensor(1.0))


@pytest.mark.parametrize("eps", [0.5, _ramp])
def test_an_eps_without_effect_is_told(eps) -> None:
    base = torch.optim.SGD(_model().parameters(), 0.1)
    GAPWrapper(base, eps=0.1)
    with pytest.warns(UserWarning, match="has no effect"):
        GAPWrapper(base, eps=eps)


@pytest.mark.filterwarnings("error")
def test_an_eps_for_some_groups_is_not() -> None:
    model = _model()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "gap_eps": 0.0}]
    optimizer = GAPWrapper(torch.optim.SGD(groups, 0.1), eps=0.5)
    copy.deepcopy(optimizer)
    GAPWrapper(optimizer.base_optimizer, eps=0.5)


# ---------------------------------------------------------------------- g2 alone


@settings(max_examples=20, deadline=None)
@given(alpha=st.sampled_from([0.0, 0.5, 1.0, 2.0]), limit=st.floats(1e-3, 10.0))
def test_g2_can_be_clipped_alone(alpha: float, limit: float) -> None:
    model = _model()
    theta = [*model.parameters()]
    g1 = torch.autograd.grad(_loss(model), theta)
    both = algorithm_1(theta, lambda: _loss(model), eps=0.1, alpha=1.0)
    g2 = [b - a for a, b in zip(g1, both, strict=True)]
    factor = min(1.0, limit / (sum(g.square().sum() for g in g2).sqrt().item() + 1e-6))

    optimizer = GAPWrapper(torch.optim.SGD(theta, 0.1), 0.1, alpha)
    _loss(model).backward()
    with optimizer.perturbed(model, separate=True):
        assert all(p.grad is None for p in theta)
        _loss(model).backward()
        for p, g in zip(theta, g2, strict=True):
            torch.testing.assert_close(p.grad, g)
        nn.utils.clip_grad_norm_(theta, limit)
    for p, first, second in zip(theta, g1, g2, strict=True):
        torch.testing.assert_close(p.grad, first + alpha * factor * second)


# ---------------------------------------------------------------------- half-precision parameters


def test_a_perturbation_that_is_rounded_away_is_told(device: str) -> None:
    p = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16, device=device))
    optimizer = GAPWrapper(torch.optim.SGD([p], 0.1), eps=1e-3)
    p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match="only 0% of the perturbation is left after rounding to bfloat16"):
        optimizer.first_step()


@pytest.mark.parametrize("how", ["first_step", "perturbed"])
def test_the_warning_is_at_the_users_line(how: str) -> None:
    p = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    optimizer = GAPWrapper(torch.optim.SGD([p], 0.1), eps=1e-3)
    p.grad = torch.ones_like(p)
    begin = {"first_step": optimizer.first_step, "perturbed": lambda: optimizer.perturbed().__enter__()}[how]
    with pytest.warns(UserWarning, match="rounding") as warned:
        begin()
    assert [w.filename for w in warned] == [__file__]


def test_it_waits_for_a_perturbation_to_judge_by() -> None:
    p = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    optimizer = GAPWrapper(torch.optim.SGD([p], 0.1), eps=1e-3)
    p.grad = torch.zeros_like(p)
    optimizer.first_step()
    p.sum().backward()
    optimizer.second_step()
    p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match="rounding"):
        optimizer.first_step()


@pytest.mark.filterwarnings("error")
def test_enough_of_it_left_is_not_told() -> None:
    p = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    q = nn.Parameter(torch.ones(1000))
    optimizer = GAPWrapper(torch.optim.SGD([p, q], 0.1), eps=1.0)
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer.first_step()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_host_looks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    p = nn.Parameter(torch.ones(10, dtype=torch.bfloat16))
    optimizer = GAPWrapper(torch.optim.SGD([p], 0.1), eps=1e-3)
    looks = []
    monkeypatch.setattr(perturbation, "warn_if_rounded_away", lambda *_: looks.append(1))
    for _ in range(3):
        p.grad = torch.ones_like(p)
        optimizer.first_step()
        p.sum().backward()
        optimizer.second_step()
        optimizer.zero_grad()
    assert looks == [1]


# ---------------------------------------------------------------------- changes inside the block


def test_a_parameter_that_is_frozen_inside_keeps_its_g1() -> None:
    model = _model()
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1), alpha=0.5)
    _loss(model).backward()
    g1 = model[0].bias.grad.clone()
    with optimizer.perturbed(model):
        model[0].bias.requires_grad_(False)
        _loss(model).backward()
    torch.testing.assert_close(model[0].bias.grad, g1)


def test_g2_of_parameters_without_g1_counts_as_a_backward() -> None:
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = GAPWrapper(torch.optim.SGD([p, q], 0.1))
    p.sum().backward()
    with optimizer.perturbed():
        q.sum().backward()
    assert torch.equal(p.grad, torch.ones(2))
    assert torch.equal(q.grad, torch.ones(2))


# ---------------------------------------------------------------------- behind the wrapper's back


def test_a_step_of_the_base_while_perturbed_is_an_error() -> None:
    model = _model()
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1))
    _loss(model).backward()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="while the parameters are perturbed"):
        optimizer.base_optimizer.step()
    _loss(model).backward()
    optimizer.second_step()
    optimizer.base_optimizer.step()
    optimizer.step()
