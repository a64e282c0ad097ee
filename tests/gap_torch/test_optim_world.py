"""The world around an optimizer: every base and its settings, every scheduler, averages, hooks, copies, company."""

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler, swa_utils
from torch.optim.lr_scheduler import LRScheduler

from gap_torch import GAPWrapper
from gap_torch.reference import algorithm_1

Settings = dict[str, Any]
Schedule = Callable[[Optimizer], LRScheduler]

EPS, ALPHA = 0.5, 0.5
LAYER_EPS, LAYER_ALPHA = 0.3, 2.0
"""Overrides: `gap_eps` of the first layer of `make_model`, and `gap_alpha` of the second."""


# ---------------------------------------------------------------- the table

BASES: dict[str, list[Settings]] = {  # in each class's own vocabulary, beyond what COMMON asks of all
    "SGD": [
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.1},
    ],
    "Adam": [{"lr": 1e-2}, {"lr": 1e-2, "amsgrad": True}, {"lr": 1e-2, "betas": (0.5, 0.9), "eps": 1e-3}],
    "AdamW": [{"lr": 1e-2}, {"lr": 1e-2, "amsgrad": True}],
    "RMSprop": [{"lr": 1e-2, "alpha": 0.9, "eps": 1e-6}, {"lr": 1e-2, "momentum": 0.9, "centered": True}],
    "Adagrad": [{"lr": 1e-2}, {"lr": 1e-2, "lr_decay": 0.1, "initial_accumulator_value": 0.1}],
    "Adadelta": [{"lr": 1.0}],
    "Adamax": [{"lr": 1e-2}],
    "NAdam": [{"lr": 1e-2}],
    "RAdam": [{"lr": 1e-2, "betas": (0.5, 0.7)}],  # with the default ones five steps would be those of SGD
    "Adafactor": [{"lr": 1e-2}],
    "ASGD": [{"lr": 1e-2, "t0": 1}],
    "Rprop": [{"lr": 1e-2}],
    "Muon": [{"lr": 1e-2}],
}
COMMON: dict[str, Settings] = {  # asked of every class whose constructor knows them
    "foreach": {"foreach": True},
    "loop": {"foreach": False},
    "not differentiable": {"differentiable": False},
    "fused": {"fused": True},
    "capturable": {"capturable": True},
    "maximize": {"maximize": True},
    "weight decay": {"weight_decay": 0.1},
    "decoupled weight decay": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "tensor lr": {"lr": torch.tensor(1e-2, dtype=torch.float64)},
}
REFUSED = {"LBFGS", "SparseAdam"}
MATRICES_ALONE = {"Muon"}
NO_TENSOR_LR = {"Adafactor", "Muon"}
NOT_FUSED_ON_CUDA = {"Adagrad"}


def table() -> Iterator[tuple[str, Settings]]:
    for name, variants in BASES.items():
        known = set(inspect.signature(getattr(torch.optim, name, lambda: None)).parameters)
        for own in variants:
            yield name, own
        for settings in COMMON.values():
            if set(settings) <= known and not ("lr" in settings and name in NO_TENSOR_LR):
                yield name, variants[-1] | settings


TABLE = list(table())


def title(case: tuple[str, Settings]) -> str:
    name, settings = case
    return " ".join([name, *(key if isinstance(s, Tensor) else f"{key}={s}" for key, s in settings.items())])


def make_model(device: str = "cpu", bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6, bias), nn.Tanh(), nn.Linear(6, 3, bias)).to(device, torch.float64)


def make_base(case: tuple[str, Settings], model: nn.Sequential) -> Optimizer:
    """Two groups: the first layer at half the rate with another radius, the second with another weight."""
    name, settings = case
    device = model[0].weight.device
    settings = {key: s.clone().to(device) if isinstance(s, Tensor) else s for key, s in settings.items()}
    groups = [
        {"params": list(model[0].parameters()), "lr": settings["lr"] / 2, "gap_eps": LAYER_EPS},
        {"params": list(model[2].parameters()), "gap_alpha": LAYER_ALPHA},
    ]
    return getattr(torch.optim, name)(groups, **settings)


def losses(model: nn.Module) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    p = next(model.parameters())
    x = torch.linspace(-1, 1, 20, device=p.device, dtype=p.dtype).view(5, 4)
    return lambda: (model(x).sin() - 0.3).square().mean(), lambda: model(x * 2).square().mean()


def gap_step(model: nn.Module, optimizer: GAPWrapper) -> None:
    unsupervised, supervised = losses(model)
    unsupervised().backward()
    with optimizer.perturbed(model):
        unsupervised().backward()
    supervised().backward()
    optimizer.step()
    optimizer.zero_grad()


def reference_gradient(model: nn.Module) -> list[Tensor | None]:
    params = list(model.parameters())
    half = len(params) // 2
    radii, weights = [LAYER_EPS] * half + [EPS] * half, [ALPHA] * half + [LAYER_ALPHA] * half
    return algorithm_1(params, *losses(model), eps=radii, alpha=weights)


def reference_step(model: nn.Module, base: Optimizer) -> None:
    """One step of a bare optimizer with the reference gradient."""
    for p, g in zip(model.parameters(), reference_gradient(model), strict=True):
        p.grad = g
    base.step()
    base.zero_grad()


def assert_same(a: nn.Module, b: nn.Module, rtol: float = 1e-7, atol: float = 1e-9) -> None:
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


def assert_moved(model: nn.Module, start: nn.Module) -> None:
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), start.parameters(), strict=True))


# ---------------------------------------------------------------- optimizers


@pytest.mark.parametrize("case", TABLE, ids=title)
def test_training_is_that_of_the_bare_optimizer_with_the_reference_gradient(
    case: tuple[str, Settings], device: str
) -> None:
    name, settings = case
    if not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")
    if settings.get("capturable") and device == "cpu":
        pytest.skip("capturable needs CUDA")
    if settings.get("fused") and device == "cuda" and name in NOT_FUSED_ON_CUDA:
        pytest.skip("fused on the CPU alone")
    model = make_model(device, bias=name not in MATRICES_ALONE)
    start, twin = copy.deepcopy(model), copy.deepcopy(model)
    optimizer, base = GAPWrapper(make_base(case, model), EPS, ALPHA), make_base(case, twin)
    for _ in range(5):
        gap_step(model, optimizer)
        reference_step(twin, base)
    # Muon computes in bfloat16
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if name == "Muon" else {}
    assert_same(model, twin, **tolerance)
    assert_moved(model, start)


def test_no_optimizer_of_torch_is_left_out() -> None:
    there = {
        name for name, thing in vars(torch.optim).items() if inspect.isclass(thing) and issubclass(thing, Optimizer)
    }
    assert there - {"Optimizer"} <= BASES.keys() | REFUSED


def test_sparse_adam_may_be_wrapped_for_plain_steps_alone() -> None:
    embedding = nn.Embedding(7, 3, sparse=True)
    twin = copy.deepcopy(embedding)
    optimizer = GAPWrapper(torch.optim.SparseAdam(embedding.parameters()))
    bare = torch.optim.SparseAdam(twin.parameters())
    for layer, steps in ((embedding, optimizer), (twin, bare)):
        layer(torch.tensor([1, 2])).square().sum().backward()
        steps.step()
    assert torch.equal(embedding.weight, twin.weight)
    with pytest.raises(RuntimeError, match="sparse gradient"), optimizer.perturbed():
        pass


def test_a_step_in_a_closure_may_hold_all_three_passes() -> None:
    model = make_model()
    twin = copy.deepcopy(model)
    case = ("SGD", {"lr": 0.1, "momentum": 0.9})
    optimizer, base = GAPWrapper(make_base(case, model), EPS, ALPHA), make_base(case, twin)
    unsupervised, supervised = losses(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        unsupervised().backward()
        with optimizer.perturbed(model):
            unsupervised().backward()
        value = supervised()
        value.backward()
        return value

    for _ in range(3):
        expected = supervised().item()
        assert optimizer.step(closure).item() == expected
        reference_step(twin, base)
    assert_same(model, twin)


# ---------------------------------------------------------------- schedulers

SCHEDULES: dict[str, Schedule] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: (1 - t / 30) ** 0.9),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.CosineAnnealingLR(o, 5)], milestones=[2]
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),  # cycles momentum, or betas
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=10),  # cycles momentum, or betas
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 30),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.01, anneal_epochs=3),
}
CYCLING = {"CyclicLR", "OneCycleLR"}
SCHEDULED: dict[str, tuple[str, Settings]] = {
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "betas": ("Adam", {"lr": 0.1}),
}


def advance(schedule: LRScheduler) -> None:
    if isinstance(schedule, lr_scheduler.ReduceLROnPlateau):
        schedule.step(1.0)
    else:
        schedule.step()


def rates(optimizer: Optimizer) -> list[tuple[Any, ...]]:
    return [(group["lr"], group.get("momentum"), group.get("betas")) for group in optimizer.param_groups]


@pytest.fixture
def strict() -> Iterator[None]:
    """No warning goes by, "lr_scheduler.step() before optimizer.step()" least of all."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="The epoch parameter")  # SequentialLR's own, up to torch 2.6
        yield


def test_no_scheduler_of_torch_is_left_out() -> None:
    there = {
        name
        for module in (lr_scheduler, swa_utils)
        for name, thing in vars(module).items()
        if inspect.isclass(thing) and issubclass(thing, LRScheduler)
    }
    assert there - {"LRScheduler", "_LRScheduler"} == SCHEDULES.keys()


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("on", ["wrapper", "base"])
@pytest.mark.parametrize("momentum", SCHEDULED)
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_scheduler_does_what_it_does_on_the_bare_optimizer(name: str, momentum: str, on: str) -> None:
    model = make_model()
    twin = copy.deepcopy(model)
    case = SCHEDULED[momentum]
    optimizer, base = GAPWrapper(make_base(case, model), EPS, ALPHA), make_base(case, twin)
    schedule = SCHEDULES[name](optimizer if on == "wrapper" else optimizer.base_optimizer)
    twins = SCHEDULES[name](base)
    seen = []
    for _ in range(7):
        gap_step(model, optimizer)
        reference_step(twin, base)
        assert rates(optimizer) == rates(base)
        seen.append(rates(optimizer))
        advance(schedule)
        advance(twins)
        assert schedule.get_last_lr() == twins.get_last_lr()
    assert rates(optimizer) == rates(base)
    assert_same(model, twin)
    assert len({str(r) for r in seen}) > 1
    assert len({str([cycled for _, *cycled in groups]) for groups in seen}) > 1 or name not in CYCLING


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("name", ["LambdaLR", "OneCycleLR", "CyclicLR", "SequentialLR", "SWALR"])
def test_a_tensor_learning_rate_is_scheduled_as_on_the_bare_optimizer(name: str) -> None:
    model = make_model()
    twin = copy.deepcopy(model)
    case = ("Adam", {"lr": COMMON["tensor lr"]["lr"]})
    optimizer, base = GAPWrapper(make_base(case, model), EPS, ALPHA), make_base(case, twin)
    tensors = [each.param_groups[1]["lr"] for each in (optimizer, base)]
    schedule, twins = SCHEDULES[name](optimizer), SCHEDULES[name](base)
    for _ in range(4):
        gap_step(model, optimizer)
        reference_step(twin, base)
        schedule.step()
        twins.step()
        assert rates(optimizer) == rates(base)
    # torch 2.6's SequentialLR puts another tensor there
    in_place = [each.param_groups[1]["lr"] is t for each, t in zip((optimizer, base), tensors, strict=True)]
    assert in_place[0] == in_place[1]
    assert_same(model, twin)


@pytest.mark.usefixtures("strict")
def test_stochastic_weight_averaging() -> None:
    def run(model: nn.Module, optimizer: Optimizer, step: Callable[..., None]) -> nn.Module:
        average = swa_utils.AveragedModel(model)
        ema = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
        cosine, late = lr_scheduler.CosineAnnealingLR(optimizer, 4), swa_utils.SWALR(optimizer, 0.05, anneal_epochs=2)
        for t in range(6):
            step(model, optimizer)
            ema.update_parameters(model)
            if t < 3:
                cosine.step()
            else:
                average.update_parameters(model)
                late.step()
        assert average.n_averaged == 3
        return nn.ModuleList([average, ema])

    model = make_model()
    twin = copy.deepcopy(model)
    case = SCHEDULED["momentum"]
    ours = run(model, GAPWrapper(make_base(case, model), EPS, ALPHA), gap_step)
    theirs = run(twin, make_base(case, twin), reference_step)
    assert_same(ours, theirs)


# ---------------------------------------------------------------- hooks


def test_a_step_hook_meets_the_finished_gradient_and_theta() -> None:
    model = make_model()
    params = list(model.parameters())
    optimizer = GAPWrapper(make_base(SCHEDULED["momentum"], model), EPS, ALPHA)
    expected = reference_gradient(model)
    before = copy.deepcopy(model)
    met: list[str] = []

    def look(_: Optimizer, args: Any, kwargs: Any) -> None:
        met.append("look")
        assert_same(model, before, 0, 0)
        for p, g in zip(params, expected, strict=True):
            torch.testing.assert_close(p.grad, g)

    handle = optimizer.register_step_pre_hook(look)
    gap_step(model, optimizer)
    assert met == ["look"]
    handle.remove()
    gap_step(model, optimizer)
    assert met == ["look"]


def test_hooks_of_state_dicts_may_change_them_and_can_be_removed() -> None:
    optimizer = GAPWrapper(make_base(SCHEDULED["momentum"], make_model()), EPS, ALPHA)
    calls: list[str] = []

    def after_saving(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        calls.append("saved")
        return {**state, "extra": 1}

    def before_loading(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        calls.append("loads")
        groups = [{**group, "lr": 7.0, "gap_eps": 0.25} for group in state["param_groups"]]
        return {"state": state["state"], "param_groups": groups}

    handles = [
        optimizer.register_state_dict_post_hook(after_saving),
        optimizer.register_load_state_dict_pre_hook(before_loading),
    ]
    state = optimizer.state_dict()
    assert state["extra"] == 1
    optimizer.load_state_dict(state)
    assert [(group["lr"], group["gap_eps"]) for group in optimizer.param_groups] == [(7.0, 0.25)] * 2
    assert calls == ["saved", "loads"]
    for handle in handles:
        handle.remove()
    assert "extra" not in optimizer.state_dict()


# ---------------------------------------------------------------- copies

COPIES: dict[str, Callable[[Any], Any]] = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}
PICKLABLE = sorted(SCHEDULES.keys() - {"LambdaLR", "MultiplicativeLR"})  # lambdas


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_the_wrapper_alone_is_independent(how: str) -> None:
    model = make_model()
    optimizer = GAPWrapper(make_base(SCHEDULED["momentum"], model), EPS, ALPHA)
    gap_step(model, optimizer)
    before = copy.deepcopy(model)
    other = COPIES[how](optimizer)
    theirs = [p for group in other.param_groups for p in group["params"]]
    ours = list(model.parameters())

    def buffers() -> list[tuple[Tensor, Tensor]]:
        return [
            (optimizer.state[p]["momentum_buffer"], other.state[q]["momentum_buffer"])
            for p, q in zip(ours, theirs, strict=True)
        ]

    assert all(torch.equal(a, b) for a, b in buffers())
    for p in theirs:
        p.square().sum().backward()
    with other.perturbed():
        for p in theirs:
            p.square().sum().backward()
    other.step()
    assert_same(model, before, 0, 0)
    assert all(p.grad is None for p in model.parameters())
    assert not torch.equal(theirs[0], before[0].weight)
    assert not any(torch.equal(a, b) for a, b in buffers())


@pytest.mark.filterwarnings("ignore:Seems like `optimizer.step")  # as of a bare optimizer's copy
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", PICKLABLE)
def test_model_wrapper_and_scheduler_are_copied_together(name: str, how: str) -> None:
    model = make_model()
    optimizer = GAPWrapper(make_base(SCHEDULED["betas"], model), EPS, ALPHA)
    schedule = SCHEDULES[name](optimizer)
    for _ in range(2):
        gap_step(model, optimizer)
        advance(schedule)
    other_model, other, other_schedule = COPIES[how]((model, optimizer, schedule))
    assert other_schedule.optimizer is other
    at_copy = rates(optimizer)
    for _ in range(3):
        gap_step(other_model, other)
        advance(other_schedule)
    assert rates(optimizer) == at_copy
    for _ in range(3):
        gap_step(model, optimizer)
        advance(schedule)
    assert rates(other) == rates(optimizer)
    assert_same(model, other_model, 0, 0)


# ---------------------------------------------------------------- several wrappers over one model


def two_wrappers(model: nn.Sequential) -> tuple[GAPWrapper, GAPWrapper]:
    return (
        GAPWrapper(torch.optim.SGD(model[0].parameters(), 0.1), eps=0.3, alpha=0.5),
        GAPWrapper(torch.optim.AdamW(model[2].parameters(), 0.01), eps=0.7, alpha=2.0),
    )


def radii_of_each(model: nn.Sequential) -> list[float]:
    """What makes Algorithm 1's one norm over all the norm over each layer's own."""
    g1 = torch.autograd.grad(losses(model)[0](), list(model.parameters()))
    norms = [torch.cat([g.flatten() for g in layer]).norm() for layer in (g1[:2], g1[2:])]
    whole = torch.stack(norms).norm()
    return [eps * float(whole / norm) for eps, norm in zip((0.3, 0.7), norms, strict=True) for _ in range(2)]


@pytest.mark.parametrize("order", ["first outside", "second outside"])
def test_two_wrappers_perturbed_at_once_meet_at_their_common_theta_star(order: str) -> None:
    model = make_model()
    before = copy.deepcopy(model)
    unsupervised, supervised = losses(model)
    expected = algorithm_1(
        list(model.parameters()), unsupervised, supervised, eps=radii_of_each(model), alpha=[0.5, 0.5, 2.0, 2.0]
    )
    pair = two_wrappers(model)
    outer, inner = pair if order == "first outside" else reversed(pair)
    unsupervised().backward()
    with outer.perturbed(model), inner.perturbed(model):
        unsupervised().backward()
    assert_same(model, before, 0, 0)
    supervised().backward()
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g)
    for optimizer in pair:
        optimizer.step()
    assert_moved(model, before)


def test_two_wrappers_perturbed_in_turn_each_have_a_g2_of_their_own() -> None:
    """One after the other each would add its g2 to the other's g1: each needs gradients of its own parameters alone."""
    model = make_model()
    params = list(model.parameters())
    before = copy.deepcopy(model)
    unsupervised, _ = losses(model)
    radii = radii_of_each(model)
    alone = [
        algorithm_1(params, unsupervised, eps=[*radii[:2], 0.0, 0.0], alpha=0.5)[:2],
        algorithm_1(params, unsupervised, eps=[0.0, 0.0, *radii[2:]], alpha=2.0)[2:],
    ]
    unsupervised().backward()
    for optimizer in two_wrappers(model):
        own = optimizer.param_groups[0]["params"]
        with optimizer.perturbed(model):
            unsupervised().backward(inputs=own)
    assert_same(model, before, 0, 0)
    for p, g in zip(params, [*alone[0], *alone[1]], strict=True):
        torch.testing.assert_close(p.grad, g)


def test_an_exception_brings_both_back() -> None:
    model = make_model()
    before = copy.deepcopy(model)
    first, second = two_wrappers(model)
    losses(model)[0]().backward()
    with pytest.raises(ZeroDivisionError), first.perturbed(model), second.perturbed(model):
        raise ZeroDivisionError
    assert_same(model, before, 0, 0)
    assert all(p.grad is None for p in model.parameters())
    for optimizer in (first, second):
        optimizer.step()  # neither is perturbed any more
