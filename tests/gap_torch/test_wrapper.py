# ruff: noqa: PT012 (blocks of several statements are what is tested)
"""GAPWrapper leaves the gradient of Algorithm 1 in `.grad`, and the parameters as they were, bit for bit."""

import copy
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from gap_torch import GAPWrapper, multi_tensor
from gap_torch.reference import algorithm_1

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# ---------------------------------------------------------------- networks with something special about them


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 6)
        self.again = self.encoder

    def forward(self, x):
        return F.linear(torch.tanh(self.again(x)), self.encoder.weight.t())


class Layouts(nn.Module):
    """Parameters that are transposed, spread out in memory, of one element, and of none."""

    def __init__(self):
        super().__init__()
        self.transposed = nn.Parameter(torch.randn(5, 4).t())
        self.spread = nn.Parameter(torch.randn(5, 12)[:, ::4])
        self.scalar = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.empty(0, 3))

    def forward(self, x):
        return torch.tanh(x @ self.transposed) @ self.spread * self.scalar + self.empty.sum()


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, dtype=torch.complex128))
        self.conjugated = nn.Parameter(torch.randn(3, dtype=torch.complex128))

    def forward(self, x):
        return (x.to(self.weight.dtype) @ self.weight * self.conjugated.conj()).abs()


class Changing(nn.Module):
    """One layer takes part in the first pass alone, one in the perturbed pass alone, one in the third."""

    def __init__(self):
        super().__init__()
        self.always = nn.Linear(4, 3)
        self.sometimes = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.never = nn.Linear(2, 2)
        self.passes = 0

    def forward(self, x):
        layer = self.sometimes[self.passes % 3]
        self.passes += 1
        return layer(torch.tanh(self.always(x)))


def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def conv():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 4, 2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)
    )


def frozen():
    model = mlp()
    model[0].weight.requires_grad_(False)
    return model


NETWORKS = {
    "mlp": mlp,
    "conv": conv,
    "channels_last": lambda: conv().to(memory_format=torch.channels_last),
    "batchnorm": lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)),
    "tied": Tied,
    "frozen": frozen,
    "changing": Changing,
    "layouts": Layouts,
    "complex": Complex,
}

GROUPS = {  # (gap_eps, gap_alpha) of every third parameter; None for the wrapper's
    "one group": [(None, None)],
    "eps": [(0.3, None), (0.0, None), (None, None)],
    "alpha": [(None, 0.0), (None, 0.3), (None, None)],
    "both": [(0.0, 2.0), (0.7, 0.0), (0.1, 0.5)],
    "alpha is 0 everywhere": [(None, 0.0)],
    "eps is 0 everywhere": [(0.0, None)],
}


def build(network, groups="one group", eps=0.5, alpha=1.0, device="cpu", dtype=torch.float64, **path):
    """The model, the wrapper, the unsupervised and supervised closure, each parameter's eps and alpha."""
    model = NETWORKS[network]().to(device)
    model = model if network == "complex" else model.to(dtype)
    params, knobs = list(model.parameters()), GROUPS[groups]
    group_list = []
    for i, (group_eps, group_alpha) in enumerate(knobs):
        group = {"params": params[i :: len(knobs)]}
        group |= {} if group_eps is None else {"gap_eps": group_eps}
        group |= {} if group_alpha is None else {"gap_alpha": group_alpha}
        group_list.append(group)
    optimizer = GAPWrapper(torch.optim.SGD(group_list, lr=0.1), eps, alpha, **path)
    radii = [eps if knobs[i % len(knobs)][0] is None else knobs[i % len(knobs)][0] for i in range(len(params))]
    weights = [alpha if knobs[i % len(knobs)][1] is None else knobs[i % len(knobs)][1] for i in range(len(params))]

    unlabelled, labelled = torch.randn(2, 6, 4, device=device, dtype=dtype)

    def unsupervised():
        return (model(unlabelled).sin() - 0.3).square().mean()

    def supervised():
        return model(labelled).square().mean()

    return model, optimizer, unsupervised, supervised, radii, weights


def gap_step(model, optimizer, unsupervised, supervised=None):
    unsupervised().backward()
    with optimizer.perturbed(model):
        unsupervised().backward()
    if supervised is not None:
        supervised().backward()
    return [p.grad for p in model.parameters()]


def assert_same(actual, expected, **tolerance):
    """None is zero: with alpha = 0, g2 is not even computed for a parameter that has no g1."""
    for a, b in zip(actual, expected, strict=True):
        if a is None or b is None:
            assert all(g is None or not g.any() for g in (a, b))
        else:
            torch.testing.assert_close(a, b, **tolerance)


def bits(model):
    return [
        p.detach().contiguous().flatten().view(torch.uint8).tolist() if p.numel() else [] for p in model.parameters()
    ]


# ---------------------------------------------------------------- Algorithm 1


@pytest.mark.parametrize("foreach", [True, False], ids=["foreach", "loop"])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("network", NETWORKS)
def test_gradient_is_that_of_algorithm_1(network, groups, foreach, device):
    model, optimizer, unsup, sup, radii, weights = build(network, groups, foreach=foreach, device=device)
    model.train()
    before = bits(model)
    expected = algorithm_1(list(model.parameters()), unsup, sup, eps=radii, alpha=weights)
    assert_same(gap_step(model, optimizer, unsup, sup), expected, rtol=1e-9, atol=1e-12)
    assert bits(model) == before


@settings(max_examples=40, deadline=None)
@given(
    network=st.sampled_from(list(NETWORKS)),
    eps=st.sampled_from([0.0, 1e-3, 0.1, 1.0, 10.0]),
    alpha=st.sampled_from([0.0, 0.3, 0.5, 1.0, 2.0]),
    foreach=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_for_any_radius_and_weight(network, eps, alpha, foreach, seed):
    torch.manual_seed(seed)
    model, optimizer, unsup, sup, *_ = build(network, eps=eps, alpha=alpha, foreach=foreach)
    expected = algorithm_1(list(model.parameters()), unsup, sup, eps=eps, alpha=alpha)
    assert_same(gap_step(model, optimizer, unsup, sup), expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("network", [n for n in NETWORKS if n != "complex"])
def test_in_float32_up_to_rounding(network, alpha, device):
    model, optimizer, unsup, sup, *_ = build(network, alpha=alpha, device=device, dtype=torch.float32)
    expected = algorithm_1(list(model.parameters()), unsup, sup, eps=0.5, alpha=alpha)
    assert_same(gap_step(model, optimizer, unsup, sup), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize(
    "dtypes",
    [(torch.float64, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float32)],
)
def test_dtypes_may_be_mixed(dtypes, alpha, device):
    first, second = nn.Linear(4, 8).to(device, dtypes[0]), nn.Linear(8, 3).to(device, dtypes[1])
    model, exact = (
        nn.ModuleList([first, second]),
        nn.ModuleList([copy.deepcopy(m).double() for m in (first, second)]),
    )
    x = torch.randn(6, 4, device=device)

    def loss(layers):
        a, b = layers
        return b(a(x.to(a.weight.dtype)).tanh().to(b.weight.dtype)).double().square().mean()

    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1), 0.5, alpha)
    actual = gap_step(model, optimizer, lambda: loss(model))
    expected = algorithm_1(list(exact.parameters()), lambda: loss(exact), eps=0.5, alpha=alpha)
    assert [g.dtype for g in actual] == [p.dtype for p in model.parameters()]
    assert_same([g.double() for g in actual], expected, rtol=0.03, atol=0.03)


def test_the_perturbed_pass_sees_theta_plus_eps_g1_over_norm(device):
    model, optimizer, unsup, *_ = build("mlp", "eps", device=device)
    params = list(model.parameters())
    unsup().backward()
    theta, g1 = [p.detach().clone() for p in params], [p.grad.clone() for p in params]
    norm = torch.cat([g.flatten() for g in g1]).norm()
    with optimizer.perturbed():
        for i, (p, value, g) in enumerate(zip(params, theta, g1, strict=True)):
            eps = (0.3, 0.0, 0.5)[i % 3]
            torch.testing.assert_close(p.detach(), value + eps * g / norm)
        unsup().backward()
    torch.testing.assert_close(optimizer.grad_norm, norm)


@settings(max_examples=25, deadline=None)
@given(power=st.integers(-60, 60), network=st.sampled_from(["mlp", "conv", "layouts"]))
def test_scaling_the_loss_by_a_power_of_two_scales_the_result(power, network):
    def run(factor):
        torch.manual_seed(1)
        model, optimizer, unsup, *_ = build(network, dtype=torch.float32)
        unit = torch.ones(())  # backward(scale) instead of loss * scale, which is what a GradScaler does too
        unsup().backward(unit * factor)
        with optimizer.perturbed():
            unsup().backward(unit * factor)
        return [p.grad / factor for p in model.parameters()]

    assert_same(run(2.0**power), run(1.0), rtol=1e-5, atol=1e-7)


def test_first_and_second_step_are_the_same_as_perturbed(device):
    model, optimizer, unsup, sup, *_ = build("mlp", "both", device=device)
    expected = [g.clone() for g in gap_step(model, optimizer, unsup, sup)]
    optimizer.zero_grad()
    unsup().backward()
    optimizer.first_step()
    unsup().backward()
    optimizer.second_step()
    sup().backward()
    assert_same([p.grad for p in model.parameters()], expected, rtol=0, atol=0)


def test_steps_do_not_leak_into_each_other(device):
    model, optimizer, unsup, sup, radii, weights = build("changing", "both", device=device)
    for _ in range(4):
        expected = algorithm_1(list(model.parameters()), unsup, sup, eps=radii, alpha=weights)
        assert_same(gap_step(model, optimizer, unsup, sup), expected, rtol=1e-9, atol=1e-12)
        optimizer.step()
        optimizer.zero_grad()


def test_knobs_may_change_between_steps():
    model, optimizer, unsup, sup, *_ = build("mlp")
    for eps, alpha in [(0.1, 1.0), (0.0, 2.0), (0.4, 0.0), (0.2, 0.3)]:
        optimizer.param_groups[0].update(gap_eps=eps, gap_alpha=alpha)
        expected = algorithm_1(list(model.parameters()), unsup, sup, eps=eps, alpha=alpha)
        assert_same(gap_step(model, optimizer, unsup, sup), expected)
        optimizer.zero_grad()


@pytest.mark.parametrize("change", ["dtype", "shape", "freeze", "layout"])
def test_parameters_may_change_between_steps(change):
    model, optimizer, unsup, *_ = build("conv", dtype=torch.float32)
    gap_step(model, optimizer, unsup)
    optimizer.zero_grad()
    x = torch.randn(5, 4)
    if change == "dtype":
        model.double()
        x = x.double()
        for p in model.parameters():
            p.data *= 1 + 1e-10  # not a float32 number any more
    elif change == "shape":
        model[-1].weight.data, model[-1].bias.data = torch.randn(1, 36), torch.randn(1)
    elif change == "freeze":
        model[1].requires_grad_(False)
    else:
        model.to(memory_format=torch.channels_last)

    def loss():
        return model(x).square().mean()

    before = bits(model)
    expected = algorithm_1(list(model.parameters()), loss, eps=0.5)
    assert_same(gap_step(model, optimizer, loss), expected, rtol=1e-4, atol=1e-6)
    assert bits(model) == before


def test_a_frozen_parameter_with_an_old_gradient_does_no_harm():
    model, optimizer, unsup, *_ = build("mlp")
    unsup().backward()
    model[0].requires_grad_(False)
    before = bits(model)
    with optimizer.perturbed(model):
        unsup().backward()
    assert bits(model) == before


@pytest.mark.parametrize("nested", [True, False], ids=["one autocast around all", "one for each pass"])
@pytest.mark.parametrize("foreach", [True, False], ids=["foreach", "loop"])
def test_autocast_does_not_keep_weights_from_before_a_step(nested, foreach, device):
    model, *_ = build("mlp", device=device, dtype=torch.float32)
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1), eps=2.0, foreach=foreach)
    x = torch.randn(6, 4, device=device)

    def loss():
        with torch.autocast(device, torch.bfloat16):
            return model(x).float().square().mean()

    expected = algorithm_1(list(model.parameters()), loss, loss, eps=2.0)
    with torch.autocast(device, torch.bfloat16) if nested else nullcontext():
        actual = gap_step(model, optimizer, loss, loss)
    assert_same(actual, expected, rtol=0.01, atol=0.01)


class UpperTriangle(nn.Module):
    """A parametrization that keeps nothing for backward, so that a cached value of it is not noticed."""

    def forward(self, weight):
        return weight.triu()


def test_a_cached_parametrization_does_not_keep_weights_from_before_a_step():
    model = nn.Linear(3, 3).double()
    parametrize.register_parametrization(model, "weight", UpperTriangle())
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1), eps=0.5)
    x = torch.randn(4, 3, dtype=torch.float64)

    def loss():
        return model(x).square().mean()

    expected = algorithm_1(list(model.parameters()), loss, loss, eps=0.5)
    with parametrize.cached():
        before = model.weight.detach().clone()
        loss().backward()
        with optimizer.perturbed(model):
            assert not torch.equal(model.weight, before)
            loss().backward()
        assert torch.equal(model.weight, before)
        loss().backward()
    assert_same([p.grad for p in model.parameters()], expected)


# ---------------------------------------------------------------- restoration


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("foreach", [True, False], ids=["foreach", "loop"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("exception", [None, Interrupted, KeyboardInterrupt])
def test_parameters_come_back_bit_for_bit(dtype, foreach, exception, device):
    model = nn.ParameterList(torch.randn(50, device=device).to(dtype) * 10.0**-i for i in range(4))
    model[0].data[0] = -0.0
    model[1].requires_grad_(False)
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1), eps=30.0, foreach=foreach)

    def loss():
        return sum((p * p).sum() for p in model)

    before = bits(model)
    identity = [(id(p), p.data_ptr(), p.requires_grad) for p in model.parameters()]
    loss().backward()
    try:
        with optimizer.perturbed(model):
            assert bits(model) != before
            assert [(id(p), p.data_ptr(), p.requires_grad) for p in model.parameters()] == identity
            loss().backward()
            if exception:
                raise exception
    except (Interrupted, KeyboardInterrupt):
        assert exception
        assert all(p.grad is None for p in model)  # half a sum must not be stepped with
    assert bits(model) == before
    assert [(id(p), p.data_ptr(), p.requires_grad) for p in model.parameters()] == identity


def test_after_an_exception_training_goes_on():
    model, optimizer, unsup, sup, *_ = build("mlp")
    expected = algorithm_1(list(model.parameters()), unsup, sup, eps=0.5)
    unsup().backward()
    with pytest.raises(Interrupted), optimizer.perturbed(model):
        raise Interrupted
    assert_same(gap_step(model, optimizer, unsup, sup), expected)


def test_what_was_set_aside_before_an_exception_is_gone():
    """Else it would enter the next update."""
    model, optimizer, unsup, sup, *_ = build("mlp")
    expected = algorithm_1(list(model.parameters()), unsup, sup, eps=0.5)
    with optimizer.set_aside():
        sup().backward()
    unsup().backward()
    with pytest.raises(Interrupted), optimizer.perturbed(model):
        raise Interrupted
    assert_same(gap_step(model, optimizer, unsup, sup), expected)


def test_what_was_set_aside_before_a_checkpoint_was_loaded_is_gone():
    model, optimizer, unsup, sup, *_ = build("mlp")
    expected = algorithm_1(list(model.parameters()), unsup, sup, eps=0.5)
    with optimizer.set_aside():
        sup().backward()
    optimizer.load_state_dict(optimizer.state_dict())
    assert_same(gap_step(model, optimizer, unsup, sup), expected)


@pytest.mark.parametrize("where", ["perturb", "restore", "scale_"])
def test_an_interrupt_within_the_steps_themselves_restores_too(where, monkeypatch):
    model, optimizer, unsup, *_ = build("mlp", alpha=0.5)
    before = bits(model)
    unsup().backward()
    real, calls = getattr(multi_tensor, where), []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 1:
            if where == "perturb":
                real(*args)  # the parameters have moved, nobody has been told
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(multi_tensor, where, interrupted)
    with pytest.raises(KeyboardInterrupt), optimizer.perturbed(model):
        unsup().backward()
    assert bits(model) == before
    optimizer.state_dict()  # not perturbed any more


# ---------------------------------------------------------------- no direction


@pytest.mark.parametrize("foreach", [True, False], ids=["foreach", "loop"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("factor", [0.0, float("inf"), float("nan")])
def test_zero_or_not_finite_g1_moves_nothing(dtype, foreach, factor, device):
    model = nn.ParameterList(torch.randn(5, device=device, dtype=dtype) for _ in range(3))
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1), foreach=foreach)
    before = bits(model)
    for p in model:
        p.grad = torch.zeros_like(p)
    model[1].grad[2] = factor
    with optimizer.perturbed(model):
        assert bits(model) == before
        sum(p.sum() for p in model).backward()
    assert bits(model) == before
    assert model[0].grad.tolist() == [1.0] * 5


# ---------------------------------------------------------------- zero_grad between the two passes


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "zero_grad",
    [
        lambda model, optimizer: optimizer.zero_grad(),
        lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
        lambda model, optimizer: optimizer.base_optimizer.zero_grad(),
        lambda model, optimizer: model.zero_grad(),
        lambda model, optimizer: setattr(next(model.parameters()), "grad", None),
    ],
    ids=["wrapper", "wrapper in place", "base", "model", "one parameter"],
)
@pytest.mark.parametrize("network", ["mlp", "changing", "layouts"])
def test_zero_grad_in_between_loses_nothing(network, zero_grad, alpha, device):
    model, optimizer, unsup, sup, *_ = build(network, alpha=alpha, device=device)
    expected = algorithm_1(list(model.parameters()), unsup, sup, eps=0.5, alpha=alpha)
    unsup().backward()
    optimizer.first_step()
    zero_grad(model, optimizer)
    unsup().backward()
    optimizer.second_step()
    sup().backward()
    assert_same([p.grad for p in model.parameters()], expected)


# ---------------------------------------------------------------- accumulation and set_aside


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_micro_batches_are_one_large_batch(alpha, device):
    model, optimizer, *_ = build("mlp", alpha=alpha, device=device)
    batch = torch.randn(8, 4, device=device, dtype=torch.float64)

    def loss(x):
        return model(x).square().sum()

    expected = algorithm_1(list(model.parameters()), lambda: loss(batch), lambda: loss(batch), eps=0.5, alpha=alpha)
    for x in batch.split(3):
        loss(x).backward()
    with optimizer.perturbed(model):
        for x in batch.split(3):
            loss(x).backward()
    for x in batch.split(3):
        loss(x).backward()
    assert_same([p.grad for p in model.parameters()], expected)


@pytest.mark.parametrize("groups", ["one group", "both"])
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_set_aside_with_a_shared_forward_equals_separate_passes(groups, micro_batches, device):
    model, optimizer, *_, radii, weights = build("mlp", groups, device=device)
    data = torch.randn(8, 4, device=device, dtype=torch.float64)

    def unsup(x):
        return model(x).sin().sum()

    def sup(output):
        return output.square().sum()

    expected = algorithm_1(
        list(model.parameters()), lambda: unsup(data), lambda: sup(model(data)), eps=radii, alpha=weights
    )
    for x in data.chunk(micro_batches):
        output = model(x)
        with optimizer.set_aside():
            sup(output).backward(retain_graph=True)
        output.sin().sum().backward()
    with optimizer.perturbed(model):
        unsup(data).backward()
    assert_same([p.grad for p in model.parameters()], expected)
    optimizer.step()  # nothing is pending


def test_set_aside_reaches_parameters_that_only_it_uses():
    heads = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])
    optimizer = GAPWrapper(torch.optim.SGD(heads.parameters(), 0.1))
    x = torch.ones(1, 4)
    with optimizer.set_aside():
        heads[1](x).sum().backward()
    assert heads[1].weight.grad is None
    heads[0](x).sum().backward()
    with optimizer.perturbed():
        heads[0](x).sum().backward()
    assert (heads[1].weight.grad == 1).all()
    assert (heads[0].weight.grad == 2).all()


def test_what_is_set_aside_does_not_change_with_memory_that_someone_else_owns():
    p = nn.Parameter(torch.ones(3))
    optimizer = GAPWrapper(torch.optim.SGD([p], 0.1))
    bucket = torch.zeros(3)  # as DDP's gradient_as_bucket_view=True
    with optimizer.set_aside():
        p.grad = bucket.fill_(1)
    p.grad = bucket.fill_(10)
    with optimizer.perturbed():
        (100 * p).sum().backward()
    assert p.grad.tolist() == [111.0] * 3


def test_what_fails_inside_set_aside_is_not_kept():
    model, optimizer, unsup, *_ = build("mlp")
    unsup().backward()
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(Interrupted), optimizer.set_aside():
        unsup().backward()
        raise Interrupted
    assert_same([p.grad for p in model.parameters()], before, rtol=0, atol=0)
    optimizer.step()


# ---------------------------------------------------------------- cost


def test_extra_memory_is_one_copy_of_the_parameters_kept_from_step_to_step():
    model, optimizer, unsup, *_ = build("mlp", alpha=0.5)
    addresses = set()
    for _ in range(3):
        gap_step(model, optimizer, unsup)
        addresses.add(tuple(c.data_ptr() for c in optimizer._perturbation.memory.copies.values()))
        optimizer.zero_grad()
    assert len(addresses) == 1
    assert sum(c.numel() for c in optimizer._perturbation.memory.copies.values()) == sum(
        p.numel() for p in model.parameters()
    )


def test_copies_of_parameters_that_have_left_the_optimizer_are_freed():
    """As when a backbone is frozen and taken out, or an optimizer's groups are made anew."""
    model, optimizer, unsup, *_ = build("mlp")
    gap_step(model, optimizer, unsup)
    gone = weakref.ref(optimizer._perturbation.memory.copies[model[0].weight])
    optimizer.zero_grad()
    optimizer.param_groups[0]["params"] = list(model[2].parameters())
    gap_step(model, optimizer, unsup)
    assert gone() is None
    assert set(optimizer._perturbation.memory.copies) == set(model[2].parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
@pytest.mark.parametrize("path", [{}, {"foreach": False}], ids=["foreach", "loop"])
@pytest.mark.parametrize("groups", ["one group", "both"])
def test_the_host_never_waits_for_the_device(groups, path):
    model, optimizer, unsup, sup, *_ = build("mlp", groups, device="cuda", dtype=torch.float32, **path)
    gap_step(model, optimizer, unsup, sup)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gap_step(model, optimizer, unsup, sup)
        optimizer.step()
        optimizer.zero_grad()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("knobs", [{}, {"foreach": False}, {"adaptive": True}, {"eps": torch.tensor(0.3)}], ids=str)
def test_the_default_device_may_be_another_than_the_parameters(knobs):
    p = nn.Parameter(torch.ones(3))
    optimizer = GAPWrapper(torch.optim.SGD([p], 0.1), **{"eps": 0.3, **knobs})
    for _ in range(2):
        p.grad = torch.ones(3)
        with torch.device("meta"):
            optimizer.first_step()
            assert (p > 1).all()
            p.square().sum().backward()
            optimizer.second_step()
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.zero_grad()
        assert (p == 1).all()
