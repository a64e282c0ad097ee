# ruff: noqa: PT012 (blocks of several statements are what is tested)
"""Whatever would train on a wrong gradient is an error that says what to do instead."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD

import gap_torch
from gap_torch import GAPWrapper


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


@pytest.fixture
def optimizer(model):
    return GAPWrapper(SGD(model.parameters(), 0.1), eps=0.5, alpha=0.5)


def loss(model):
    return model(torch.ones(2, 4)).square().sum()


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------- construction


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: SGD, r"instance: GAPWrapper\(SGD\(model.parameters"),
        (lambda p: p, "not list"),
        (lambda p: None, "not NoneType"),
        (lambda p: nn.Linear(1, 1), "not Linear"),
        (lambda p: torch.optim.lr_scheduler.StepLR(SGD(p), 1), "not StepLR"),
        (lambda p: GAPWrapper(SGD(p)), "a GAPWrapper already"),
        (lambda p: LBFGS(p), "LBFGS can't be wrapped"),
    ],
)
def test_what_cannot_be_wrapped_is_refused(model, make, message):
    with pytest.raises(TypeError, match=message):
        GAPWrapper(make(list(model.parameters())))


@pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan")])
@pytest.mark.parametrize("knob", ["eps", "alpha"])
def test_knobs_must_be_finite_and_not_negative(model, knob, value):
    match = f"{knob} must be finite and not negative, got {value}"
    with pytest.raises(ValueError, match=match):
        GAPWrapper(SGD(model.parameters()), **{knob: value})
    group = {"params": list(model.parameters()), f"gap_{knob}": value}
    with pytest.raises(ValueError, match=match):
        GAPWrapper(SGD([group]))
    optimizer = GAPWrapper(SGD(model.parameters()))
    new = {"params": [nn.Parameter(torch.ones(1))], f"gap_{knob}": value}
    with pytest.raises(ValueError, match=match):
        optimizer.add_param_group(new)
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0][f"gap_{knob}"] = value
    loss(model).backward()
    before = values(model)
    with pytest.raises(ValueError, match=match):
        optimizer.first_step()
    assert same(values(model), before)


def test_a_proxy_that_is_an_optimizer_in_name_alone_is_refused(model):
    class Proxy(torch.optim.Optimizer):  # as Accelerate's `prepare` makes one
        def __init__(self, optimizer):
            self.optimizer = optimizer

        @property
        def param_groups(self):
            return self.optimizer.param_groups

    with pytest.raises(TypeError, match=r"Proxy is a proxy .* wrap the optimizer inside it, before prepare\(\)"):
        GAPWrapper(Proxy(SGD(model.parameters(), 0.1)))


# ---------------------------------------------------------------- order of calls


@pytest.mark.parametrize(
    "action",
    [
        lambda o: o.first_step(),
        lambda o: o.step(),
        lambda o: o.state_dict(),
        lambda o: o.load_state_dict({}),
        lambda o: o.add_param_group({"params": [nn.Parameter(torch.ones(1))]}),
        lambda o: o.set_aside().__enter__(),
        lambda o: o.perturbed().__enter__(),
        copy.deepcopy,
        pickle.dumps,
    ],
    ids=[
        "first_step",
        "step",
        "state_dict",
        "load_state_dict",
        "add_param_group",
        "set_aside",
        "perturbed",
        "deepcopy",
        "pickle",
    ],
)
def test_while_perturbed_only_the_way_back_is_open(model, optimizer, action):
    before = values(model)
    loss(model).backward()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match=r"call second_step\(\) first"):
        action(optimizer)
    loss(model).backward()
    optimizer.second_step()  # the refused action has broken nothing
    assert same(values(model), before)
    optimizer.step()


def test_second_step_needs_a_first(model, optimizer):
    loss(model).backward()
    with pytest.raises(RuntimeError, match=r"call first_step\(\) after the backward of g1"):
        optimizer.second_step()


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_schedule_free_weights_are_not_swapped_while_perturbed(model, mode):
    """`train` and `eval` of a schedule-free optimizer move the parameters, which `second_step` would undo."""

    class ScheduleFree(SGD):
        def train(self):
            self.mode = "train"

        def eval(self):
            self.mode = "eval"

    optimizer = GAPWrapper(ScheduleFree(model.parameters(), 0.1))
    getattr(optimizer, mode)()
    assert optimizer.mode == mode
    loss(model).backward()
    with optimizer.perturbed(model):
        with pytest.raises(RuntimeError, match=rf"{mode}\(\) while the parameters are perturbed"):
            getattr(optimizer, mode)()
        loss(model).backward()
    getattr(optimizer, mode)()
    assert not hasattr(GAPWrapper(SGD(model.parameters(), 0.1)), mode)


def test_first_step_needs_a_gradient(model, optimizer):
    before = values(model)
    with pytest.raises(RuntimeError, match=r"call backward\(\) on the consistency loss"):
        optimizer.first_step()
    for p in model.parameters():
        p.requires_grad_(False).grad = torch.ones_like(p)
    with (
        pytest.raises(RuntimeError, match=r"call backward\(\) on the consistency loss"),
        optimizer.perturbed(),
    ):
        pass
    assert same(values(model), before)


@pytest.mark.parametrize("zero", [lambda m: None, lambda m: m.zero_grad()], ids=["kept", "None"])
def test_a_missing_second_backward_is_an_error(model, optimizer, zero):
    before = values(model)
    loss(model).backward()
    with pytest.raises(RuntimeError, match="no backward pass"), optimizer.perturbed(model):
        zero(model)
        loss(model)
    assert same(values(model), before)
    assert all(p.grad is None for p in model.parameters())  # nothing to step with by mistake


def test_zeroing_g1_in_place_is_an_error(model, optimizer):
    before = values(model)
    loss(model).backward()
    with pytest.raises(RuntimeError, match="g1 was overwritten"), optimizer.perturbed(model):
        model.zero_grad(set_to_none=False)
        loss(model).backward()
    assert same(values(model), before)


def test_step_would_lose_what_was_set_aside(model, optimizer):
    with optimizer.set_aside():
        loss(model).backward()
    with pytest.raises(RuntimeError, match="would lose the gradients that were set aside"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()


def test_set_aside_must_not_hold_the_perturbation(model, optimizer):
    loss(model).backward()
    with pytest.raises(RuntimeError, match="leaving set_aside"), optimizer.set_aside():
        loss(model).backward()
        optimizer.first_step()


# ---------------------------------------------------------------- gradients that can't be accumulated


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("linear", [True, False], ids=["gradient without a graph", "gradient with a graph"])
@pytest.mark.parametrize("zero", [True, False], ids=["zero_grad", "no zero_grad"])
def test_create_graph_in_the_second_pass_is_an_error(linear, zero):
    model = nn.Linear(4, 3)
    optimizer = GAPWrapper(SGD(model.parameters(), 0.1))
    before = values(model)

    def value():
        return model(torch.ones(2, 4)).sum() if linear else loss(model)

    value().backward()
    message = r"replaced or dropped .*create_graph=True did so" if linear else "g2 was computed with create_graph=True"
    with pytest.raises(RuntimeError, match=message), optimizer.perturbed(model):
        if zero:
            model.zero_grad()
        value().backward(create_graph=True)
    assert same(values(model), before)


@pytest.mark.filterwarnings("ignore:Using backward")
def test_create_graph_in_the_first_pass_is_an_error(model, optimizer):
    loss(model).backward(create_graph=True)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        optimizer.first_step()


def test_a_sparse_gradient_is_an_error():
    embedding = nn.Embedding(7, 3, sparse=True)
    optimizer = GAPWrapper(SGD(embedding.parameters(), 0.1))
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"sparse gradient of a parameter of shape \(7, 3\)"):
        optimizer.first_step()


@pytest.mark.parametrize("foreach", [True, False], ids=["foreach", "loop"])
def test_a_graph_from_theta_must_not_run_backward_at_theta_star(model, foreach):
    optimizer = GAPWrapper(SGD(model.parameters(), 0.1), foreach=foreach)
    value = loss(model)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"), optimizer.perturbed(model):
        value.backward()


def test_a_group_that_the_wrapper_has_not_seen_gets_its_knobs(model, optimizer):
    extra = nn.Linear(2, 2)
    optimizer.base_optimizer.add_param_group({"params": extra.parameters()})
    loss(model).backward()
    with optimizer.perturbed():
        loss(model).backward()
    assert optimizer.param_groups[1]["gap_eps"] == 0.5


# ---------------------------------------------------------------- the import


def test_importing_gap_torch_needs_nothing_but_torch():
    code = """
import sys, torch
before = set(sys.modules)
import gap_torch
extras = {m.split(".")[0] for m in set(sys.modules) - before}
extras -= {"gap_torch", "torch"} | set(sys.stdlib_module_names)
extras = {m for m in extras if not m.startswith("_sysconfigdata")}  # sysconfig's, under a name that no list has
assert not extras, extras
for name in ("monai", "torchvision", "h5py", "scipy", "matplotlib", "nibabel", "rich"):
    assert name not in sys.modules, name
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


# ---------------------------------------------------------------- found in review: each was silently wrong once


def test_replacing_a_gradient_after_the_perturbed_backward_is_an_error(model, optimizer):
    loss(model).backward()
    with pytest.raises(RuntimeError, match="replaced or dropped"), optimizer.perturbed(model):
        loss(model).backward()
        for p in model.parameters():
            p.grad = p.grad.clamp(-1, 1)


def test_zeroing_in_place_is_noticed_whatever_the_second_pass_reaches():
    body, heads = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)])
    optimizer = GAPWrapper(SGD([*heads.parameters(), *body.parameters()], 0.1), eps=0.1)
    x = torch.ones(2, 4)
    sum(head(body(x)).square().sum() for head in heads).backward()
    with pytest.raises(RuntimeError, match="overwritten"), optimizer.perturbed():
        heads.zero_grad(set_to_none=False)
        heads[1](body(x)).square().sum().backward()


def test_zeroing_in_place_does_not_pass_for_a_backward(model, optimizer):
    loss(model).backward()
    with pytest.raises(RuntimeError, match="no backward pass"), optimizer.perturbed(model):
        model.zero_grad(set_to_none=False)


def test_a_knob_changed_inside_the_block_counts_from_the_next_step(model, optimizer):
    loss(model).backward()
    with optimizer.perturbed(model):
        loss(model).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    optimizer.zero_grad()
    loss(model).backward()
    with optimizer.perturbed(model):
        optimizer.param_groups[0]["gap_alpha"] = 3.0
        loss(model).backward()
    assert same(expected, [p.grad for p in model.parameters()])


def test_a_frozen_parameters_old_gradient_is_no_part_of_g1(model):
    optimizer = GAPWrapper(SGD(model.parameters(), 0.1), eps=0.5)
    model[0].weight.grad = torch.full_like(model[0].weight, 100.0)
    model[0].weight.requires_grad_(False)
    loss(model).backward()
    live = [p.grad for p in model.parameters() if p.requires_grad]
    norm = torch.stack([g.norm() for g in live]).norm()
    before = values(model)
    with optimizer.perturbed(model):
        torch.testing.assert_close(optimizer.grad_norm.float(), norm)
        assert torch.equal(model[0].weight, before[0])
        loss(model).backward()


def test_a_first_step_that_fails_half_way_leaves_theta(model, optimizer, monkeypatch):
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    before, calls = values(model), []

    def fail_second_time(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError
        return perturb(*arguments)

    perturb = gap_torch.multi_tensor.perturb
    monkeypatch.setattr(gap_torch.multi_tensor, "perturb", fail_second_time)
    (loss(model) + optimizer.param_groups[1]["params"][0].sum()).backward()
    with pytest.raises(MemoryError):
        optimizer.first_step()
    assert same(before, values(model))
    with pytest.raises(RuntimeError, match="without first_step"):
        optimizer.second_step()


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_listed_twice_moves_once():
    p = nn.Parameter(torch.tensor([3.0]))
    optimizer = GAPWrapper(SGD([p, p], 0.1), eps=0.5, alpha=0.25)
    p.sum().backward()
    with optimizer.perturbed():
        assert p.item() == 3.5
        p.sum().backward()
    assert p.grad.item() == 1.25


def test_the_wrappers_defaults_cannot_be_set_without_effect(optimizer):
    for knob in ("eps", "alpha"):
        with pytest.raises(AttributeError):
            setattr(optimizer, knob, 1.0)


def test_copying_does_not_lose_what_was_set_aside(model, optimizer):
    with optimizer.set_aside():
        loss(model).backward()
    with pytest.raises(RuntimeError, match="set aside"):
        copy.deepcopy(optimizer)


def test_float16_gradients_do_not_overflow_under_a_small_alpha():
    p = nn.Parameter(torch.zeros(3, dtype=torch.float16))
    optimizer = GAPWrapper(SGD([p], 0.1), eps=0.1, alpha=0.01)
    (p * 8192).sum().backward()
    with optimizer.perturbed():
        (p * 8192).sum().backward()
    torch.testing.assert_close(p.grad, torch.full_like(p, 8192 * 1.01))


def test_a_frozen_parameters_old_gradient_is_left_as_it_is(model):
    optimizer = GAPWrapper(SGD(model.parameters(), 0.1), eps=0.5, alpha=0.5)
    model[0].weight.grad = torch.full_like(model[0].weight, 5.0)
    model[0].weight.requires_grad_(False)
    loss(model).backward()
    with optimizer.perturbed(model):
        loss(model).backward()
    assert torch.equal(model[0].weight.grad, torch.full_like(model[0].weight, 5.0))


def test_a_gradient_penalty_is_no_misuse():
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = GAPWrapper(SGD([p], 0.1), eps=0.0)

    def penalised():
        value = p.square().sum()
        (gradient,) = torch.autograd.grad(value, p, create_graph=True)
        return value + gradient.square().sum()

    penalised().backward()
    with optimizer.perturbed():
        penalised().backward()
    torch.testing.assert_close(p.grad, 20 * p.detach())


def test_an_out_of_place_accumulation_is_an_error():
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = GAPWrapper(SGD([p], 0.1), eps=0.0)
    p.square().sum().backward()
    with pytest.raises(RuntimeError, match="replaced or dropped"), optimizer.perturbed():
        (g2,) = torch.autograd.grad(p.square().sum(), p)
        p.grad = p.grad + g2


@pytest.mark.parametrize("clone", [False, True], ids=["views", "tensors"])
def test_a_grad_replaced_by_hand_is_an_error(model, optimizer, clone):
    """Those that autograd computes for a linear layer are views, as the gradients in DDP's buckets are."""

    def assign():
        params = list(model.parameters())
        for p, g in zip(params, torch.autograd.grad(loss(model), params), strict=True):
            p.grad = g.clone() if clone else g

    assign()
    assert clone or any(p.grad._is_view() for p in model.parameters())
    before = values(model)
    with pytest.raises(RuntimeError, match=r"replaced or dropped .* separate=True"), optimizer.perturbed(model):
        assign()
    assert same(values(model), before)


@pytest.mark.parametrize("how", ["replaced", "added"])
def test_a_g2_that_is_set_by_hand_is_an_error_that_names_the_way(model, how):
    """No backward pass comes by here; with `separate=True` the same lines are right."""
    g2 = [torch.full_like(p, 7.0) for p in model.parameters()]

    def set_by_hand():
        for p, g in zip(model.parameters(), g2, strict=True):
            p.grad = g.clone() if how == "replaced" or p.grad is None else p.grad.add_(g)

    optimizer = GAPWrapper(SGD(model.parameters(), 0.1), eps=0.5)
    loss(model).backward()
    g1 = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"no backward pass .* by hand .* separate=True"), optimizer.perturbed(model):
        set_by_hand()
    loss(model).backward()
    with optimizer.perturbed(model, separate=True):
        set_by_hand()
    for p, a, b in zip(model.parameters(), g1, g2, strict=True):
        torch.testing.assert_close(p.grad, a + b)


def test_gradients_that_share_a_storage_over_two_groups():
    a, b = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([2.0]))
    base = SGD([{"params": [a], "gap_alpha": 0.5}, {"params": [b], "gap_alpha": 2.0}], 0.1)
    optimizer = GAPWrapper(base, eps=0.0)
    torch.cat([a, b]).square().sum().backward()
    with optimizer.perturbed():
        torch.cat([a, b]).square().sum().backward()
    torch.testing.assert_close(torch.cat([a.grad, b.grad]), torch.tensor([3.0, 12.0]))


def test_parameters_that_share_a_storage_over_two_groups_come_back():
    shared = torch.ones(2)
    a, b = nn.Parameter(shared[:]), nn.Parameter(shared[:])
    optimizer = GAPWrapper(SGD([{"params": [a]}, {"params": [b]}], 0.1), eps=0.5)
    (a.sum() + b.sum()).backward()
    with optimizer.perturbed():
        (a.sum() + b.sum()).backward()
    assert torch.equal(shared, torch.ones(2))


@pytest.mark.parametrize("alpha", [1e-39, 1e30])
def test_an_extreme_alpha_does_not_overflow(alpha):
    p = nn.Parameter(torch.ones(2))
    optimizer = GAPWrapper(SGD([p], 0.1), eps=0.1, alpha=alpha)
    (1e-3 * p).sum().backward()
    with optimizer.perturbed():
        (1e-3 * p).sum().backward()
    torch.testing.assert_close(p.grad, torch.full_like(p, 1e-3 * (1 + alpha)))


def test_a_second_perturbation_on_top_of_an_old_sum_is_told() -> None:
    """GAP for each micro-batch on its own, as with Accelerate's `accumulate` around a whole step."""
    model = nn.Linear(3, 2)
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1))

    def gap() -> None:
        model(torch.ones(1, 3)).square().mean().backward()
        with optimizer.perturbed(model):
            model(torch.ones(1, 3)).square().mean().backward()

    gap()
    with pytest.warns(UserWarning, match=r"seen no step\(\) or zero_grad\(\) since") as warned:
        gap()
    assert [w.filename for w in warned] == [__file__]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("end", ["step", "zero_grad", "model.zero_grad"])
def test_a_step_that_ended_is_not_told(end: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1))
    for _ in range(3):
        model(torch.ones(1, 3)).square().mean().backward()
        with optimizer.perturbed(model):
            model(torch.ones(1, 3)).square().mean().backward()
        model(torch.ones(1, 3)).square().mean().backward()
        {"step": optimizer.step, "zero_grad": optimizer.zero_grad, "model.zero_grad": model.zero_grad}[end]()
