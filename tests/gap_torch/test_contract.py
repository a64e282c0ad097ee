"""GAPWrapper is a torch.optim.Optimizer: whatever works with the base works with the wrapper."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gap_torch import GAPWrapper
from gap_torch.reference import algorithm_1

EPS, ALPHA = 0.5, 0.5

BASES = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2),
    "SGD nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "SGD fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "SGD maximize": lambda p: torch.optim.SGD(p, 0.1, maximize=True),
    "Adam": lambda p: torch.optim.Adam(p, 1e-2),
    "Adam fused": lambda p: torch.optim.Adam(p, 1e-2, fused=True),
    "Adam tensor lr": lambda p: torch.optim.Adam(p, torch.tensor(1e-2)),
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-2),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, 1e-2, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True, amsgrad=True),
    "AdamW capturable": lambda p: torch.optim.AdamW(p, 1e-2, capturable=True),  # CUDA alone
    "RMSprop": lambda p: torch.optim.RMSprop(p, 1e-2, alpha=0.9, eps=1e-6),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "Adadelta": lambda p: torch.optim.Adadelta(p, 1.0),
    "NAdam": lambda p: torch.optim.NAdam(p, 1e-2),
    "RAdam": lambda p: torch.optim.RAdam(p, 1e-2),
    "Adamax": lambda p: torch.optim.Adamax(p, 1e-2),
    "Adafactor": lambda p: torch.optim.Adafactor(p, 1e-2),
    "ASGD": lambda p: torch.optim.ASGD(p, 1e-2),
    "Rprop": lambda p: torch.optim.Rprop(p, 1e-2),
    "Muon": lambda p: torch.optim.Muon(p, 1e-2),  # torch >= 2.9, matrices alone
}
USUAL = ["SGD momentum", "AdamW", "RMSprop"]


def make_model(device="cpu", dtype=torch.float64, bias=True):
    return nn.Sequential(nn.Linear(4, 6, bias), nn.Tanh(), nn.Linear(6, 3, bias)).to(device, dtype)


def losses(model):
    p = next(model.parameters())
    x = torch.linspace(-1, 1, 20, device=p.device, dtype=p.dtype).view(5, 4)
    return lambda: (model(x).sin() - 0.3).square().mean(), lambda: model(x * 2).square().mean()


def gap_step(model, optimizer):
    unsup, sup = losses(model)
    unsup().backward()
    with optimizer.perturbed(model):
        unsup().backward()
    sup().backward()
    optimizer.step()
    optimizer.zero_grad()


def reference_step(model, base):
    params = list(model.parameters())
    for p, g in zip(params, algorithm_1(params, *losses(model), eps=EPS, alpha=ALPHA), strict=True):
        p.grad = g
    base.step()


def assert_same(a, b, **tolerance):
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, **tolerance)


@pytest.fixture(params=USUAL)
def trained(request):
    """A model and its optimizer after two steps."""
    model = make_model()
    optimizer = GAPWrapper(BASES[request.param](model.parameters()), EPS, ALPHA)
    for _ in range(2):
        gap_step(model, optimizer)
    return model, optimizer


# ---------------------------------------------------------------- any base


def test_rmsprop_keeps_its_own_eps_and_alpha():
    optimizer = GAPWrapper(torch.optim.RMSprop([nn.Parameter(torch.ones(1))], alpha=0.9, eps=1e-6), EPS, ALPHA)
    (group,) = optimizer.param_groups
    assert (group["alpha"], group["eps"], group["gap_alpha"], group["gap_eps"]) == (0.9, 1e-6, ALPHA, EPS)


# ---------------------------------------------------------------- being an Optimizer


def assert_shared(optimizer):
    base = optimizer.base_optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert optimizer.defaults is base.defaults


def test_groups_state_and_defaults_are_the_bases_own(trained):
    _, optimizer = trained
    assert_shared(optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_shared(optimizer)
    assert_shared(copy.deepcopy(optimizer))


def test_assignments_reach_the_base(trained):
    _, optimizer = trained
    optimizer.param_groups = groups = [{**optimizer.param_groups[0]}]
    optimizer.state = state = {}
    assert optimizer.base_optimizer.param_groups is groups
    assert optimizer.base_optimizer.state is state


def test_add_param_group(trained):
    _, optimizer = trained
    extra = nn.Linear(3, 3).double()
    optimizer.add_param_group({"params": extra.parameters(), "lr": 0.5, "gap_eps": 0.0})
    group = optimizer.base_optimizer.param_groups[1]
    assert (group["lr"], group["gap_eps"], group["gap_alpha"]) == (0.5, 0.0, ALPHA)
    before = extra.weight.detach().clone()
    extra(torch.ones(1, 3).double()).sum().backward()
    optimizer.step()
    assert not torch.equal(extra.weight, before)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_is_the_bases(trained, set_to_none):
    model, optimizer = trained
    losses(model)[0]().backward()
    optimizer.zero_grad(set_to_none)
    assert all(p.grad is None if set_to_none else not p.grad.any() for p in model.parameters())


def test_repr_shows_both():
    text = repr(GAPWrapper(torch.optim.SGD(make_model().parameters(), lr=0.25), 0.7, 0.3))
    assert "GAPWrapper" in text
    assert all(part in text for part in ("eps=0.7", "alpha=0.3", "SGD", "lr: 0.25", "gap_eps: 0.7"))


def test_step_takes_a_closure(trained):
    model, optimizer = trained
    _, sup = losses(model)
    before = model[0].weight.detach().clone()

    def closure():
        optimizer.zero_grad()
        value = sup()
        value.backward()
        return value

    expected = sup().item()
    assert optimizer.step(closure).item() == expected
    assert optimizer.step() is None
    assert not torch.equal(before, model[0].weight)


def test_attributes_of_the_base_are_within_reach():
    optimizer = GAPWrapper(torch.optim.SGD(make_model().parameters(), 0.1))
    optimizer.base_optimizer.train = lambda: "schedule-free"
    assert optimizer.train() == "schedule-free"
    assert not hasattr(optimizer, "no_such_thing")


@pytest.mark.parametrize("on", ["wrapper", "base"])
def test_step_hooks_are_called_once(trained, on):
    model, optimizer = trained
    calls = []
    target = optimizer if on == "wrapper" else optimizer.base_optimizer
    target.register_step_pre_hook(lambda o, *_: calls.append(("pre", o)))
    handle = target.register_step_post_hook(lambda o, *_: calls.append(("post", o)))
    gap_step(model, optimizer)
    assert calls == [("pre", optimizer.base_optimizer), ("post", optimizer.base_optimizer)]
    handle.remove()
    gap_step(model, optimizer)
    assert len(calls) == 3


def test_global_step_hooks_are_called_once(trained):
    calls = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("post")),
    ]
    gap_step(*trained)
    for handle in handles:
        handle.remove()
    assert calls == ["pre", "post"]


def test_state_dict_hooks_are_called_once(trained):
    _, optimizer = trained
    calls = []
    optimizer.register_state_dict_pre_hook(lambda *_: calls.append("save"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("load"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["save", "load"]


# ---------------------------------------------------------------- learning rates


# ---------------------------------------------------------------- gradient scaling


@pytest.mark.parametrize("unscale", [True, False], ids=["unscale_", "step alone"])
@pytest.mark.parametrize("name", ["SGD momentum", "AdamW", "SGD fused", "Adam fused", "AdamW fused"])
def test_a_grad_scaler_changes_nothing(name, unscale, device):
    model = make_model(device, torch.float32)
    twin = copy.deepcopy(model)
    optimizer = GAPWrapper(BASES[name](model.parameters()), EPS, ALPHA)
    plain = GAPWrapper(BASES[name](twin.parameters()), EPS, ALPHA)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**16)
    for _ in range(3):
        unsup, sup = losses(model)
        scaler.scale(unsup()).backward()
        with optimizer.perturbed(model):
            scaler.scale(unsup()).backward()
        scaler.scale(sup()).backward()
        if unscale:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e6)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        gap_step(twin, plain)
        assert "grad_scale" not in vars(optimizer) | vars(optimizer.base_optimizer)
    assert_same(model, twin, rtol=1e-4, atol=1e-5)
    assert scaler.get_scale() == 2.0**16


@pytest.mark.parametrize("name", ["SGD momentum", "SGD fused", "AdamW fused"])
@pytest.mark.parametrize("bad_pass", ["first", "second"])
def test_a_grad_scaler_skips_the_step_at_an_overflow(name, bad_pass, device):
    model = make_model(device, torch.float32)
    before = copy.deepcopy(model)
    optimizer = GAPWrapper(BASES[name](model.parameters()), EPS, ALPHA)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**16)
    unsup, _ = losses(model)
    scaler.scale(unsup() * (float("inf") if bad_pass == "first" else 1)).backward()
    with optimizer.perturbed(model):
        scaler.scale(unsup() * (float("inf") if bad_pass == "second" else 1)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_same(model, before, rtol=0, atol=0)
    assert scaler.get_scale() == 2.0**15


class ScalesItself(torch.optim.Optimizer):
    """As Apex's and Transformer Engine's FusedAdam: its `step` takes the GradScaler and unscales by it."""

    _step_supports_amp_scaling = True

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None, grad_scaler=None):
        scale = 1.0
        if grad_scaler is not None:
            if any(found.item() for found in grad_scaler._check_inf_per_device(self).values()):
                return
            scale = grad_scaler.get_scale()
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad / scale)


@pytest.mark.filterwarnings("ignore:GradScaler is going to stop passing")
@pytest.mark.parametrize("overflow", [False, True])
def test_a_base_that_takes_the_grad_scaler_is_unscaled_once(overflow):
    model = make_model("cpu", torch.float32)
    before, twin = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = GAPWrapper(ScalesItself(model.parameters(), 0.1), EPS, ALPHA)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    unsup, sup = losses(model)
    scaler.scale(unsup()).backward()
    with optimizer.perturbed(model):
        scaler.scale(unsup()).backward()
    scaler.scale(sup() * (float("inf") if overflow else 1)).backward()
    scaler.step(optimizer)
    scaler.update()
    gap_step(twin, GAPWrapper(torch.optim.SGD(twin.parameters(), 0.1), EPS, ALPHA))
    assert_same(model, before if overflow else twin, rtol=1e-5, atol=1e-6)
    assert scaler.get_scale() == (512.0 if overflow else 1024.0)


# ---------------------------------------------------------------- bases with signatures of their own


def test_arguments_of_the_bases_step_reach_it():
    class Sophia(torch.optim.SGD):
        def step(self, closure=None, bs=1):
            self.bs = bs
            return super().step(closure)

    model = make_model()
    optimizer = GAPWrapper(Sophia(model.parameters(), 0.1), EPS)
    gap_step(model, optimizer)
    assert optimizer.bs == 1
    model(torch.ones(2, 4, dtype=torch.float64)).sum().backward()
    optimizer.step(bs=480)
    assert optimizer.bs == 480
    assert optimizer.step(lambda: 3.0, bs=7) == 3.0
    assert optimizer.bs == 7
    optimizer.step(None, 8)
    assert optimizer.bs == 8
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(model(torch.ones(2, 4, dtype=torch.float64)).sum()).backward()
    scaler.step(optimizer, bs=9)
    assert optimizer.bs == 9


def test_zero_grad_of_a_base_that_takes_no_argument_or_a_keyword_alone():
    class Old(torch.optim.SGD):  # as Apex's and DeepSpeed's FusedAdam
        def zero_grad(self):
            super().zero_grad()

    class KeywordAlone(torch.optim.SGD):
        def zero_grad(self, *, set_to_none=True):
            super().zero_grad(set_to_none=set_to_none)

    for base in (Old, KeywordAlone):
        model = make_model()
        optimizer = GAPWrapper(base(model.parameters(), 0.1), EPS)
        gap_step(model, optimizer)
        assert all(p.grad is None for p in model.parameters())
    model(torch.ones(2, 4, dtype=torch.float64)).sum().backward()
    optimizer.zero_grad(False)
    assert all((p.grad == 0).all() for p in model.parameters())


# ---------------------------------------------------------------- saving and copying


def assert_goes_on_alike(model, optimizer, other_model, other):
    gap_step(model, optimizer)
    gap_step(other_model, other)
    assert_same(model, other_model, rtol=0, atol=0)


def fresh(optimizer, model):
    return GAPWrapper(type(optimizer.base_optimizer)(model.parameters(), lr=123.0), eps=9.0, alpha=9.0)


def test_state_goes_through_a_file_and_training_goes_on_the_same(trained):
    model, optimizer = trained
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(model)
    other = fresh(optimizer, twin)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.param_groups[0]["gap_eps"] == EPS  # a checkpoint brings its knobs
    assert_goes_on_alike(model, optimizer, twin, other)


def test_state_goes_into_a_bare_base_and_back(trained):
    model, optimizer = trained
    twin = copy.deepcopy(model)
    bare = type(optimizer.base_optimizer)(twin.parameters(), lr=123.0)
    bare.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch shares the tensors otherwise
    back = fresh(optimizer, twin)
    back.load_state_dict(bare.state_dict())
    assert_goes_on_alike(model, optimizer, twin, back)


def test_a_bare_state_leaves_the_groups_their_knobs(trained):
    model, optimizer = trained
    bare = type(optimizer.base_optimizer)(make_model().parameters(), lr=0.5)
    optimizer.param_groups[0]["gap_eps"] = 0.125
    optimizer.load_state_dict(bare.state_dict())
    (group,) = optimizer.param_groups
    assert (group["lr"], group["gap_eps"], group["gap_alpha"]) == (0.5, 0.125, ALPHA)
    gap_step(model, optimizer)


def test_a_state_of_another_shape_is_refused_and_harmless(trained):
    model, optimizer = trained
    params = list(make_model().parameters())
    other = type(optimizer.base_optimizer)([{"params": params[:1]}, {"params": params[1:]}])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(other.state_dict())
    gap_step(model, optimizer)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_model_and_optimizer_are_copied_together(trained, how):
    model, optimizer = trained
    optimizer.foreach = False
    pair = (model, optimizer)
    other_model, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert [id(p) for g in other.param_groups for p in g["params"]] == [id(p) for p in other_model.parameters()]
    assert (other.eps, other.alpha, other.foreach) == (optimizer.eps, optimizer.alpha, optimizer.foreach)
    assert_goes_on_alike(model, optimizer, other_model, other)


def test_a_scheduled_optimizer_can_be_copied(trained):
    model, optimizer = trained
    lr_scheduler.StepLR(optimizer, 1)
    gap_step(model, optimizer)
    assert_goes_on_alike(model, optimizer, *copy.deepcopy((model, optimizer)))


def test_a_pickle_of_0_1_0_that_names_fused_still_loads(trained):
    _, optimizer = trained
    loaded = GAPWrapper.__new__(GAPWrapper)
    loaded.__setstate__({**optimizer.__getstate__(), "fused": True})
    assert (loaded.eps, loaded.alpha) == (EPS, ALPHA)
    assert loaded.base_optimizer is optimizer.base_optimizer
