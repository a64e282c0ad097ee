"""The Triton kernels, on the CPU, in Triton's interpreter. Run by test_fused.py in a process of its own.

TRITON_INTERPRET=1 python -m pytest tests/gap_torch/interpreted_kernels.py
"""

import math
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gap_torch import GAPWrapper, fused, multi_tensor, triton_kernels
from gap_torch.reference import algorithm_1

BLOCK = triton_kernels.BLOCK
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DTYPE = pytest.mark.parametrize("dtype", FLOATS, ids=str)
EPS = 0.5


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setattr(fused, "DEVICES", {"cpu"})


@pytest.fixture(autouse=True)
def _no_fallback(monkeypatch, request):
    """Tensors that the kernels leave to `multi_tensor` fail a test, but for those marked with `with_a_rest`."""
    split = fused._split

    def all_taken(rows):
        batches, rest = split(rows)
        assert not rest, "a tensor was left to multi_tensor"
        return batches, rest

    if "_a_rest" not in request.fixturenames:
        monkeypatch.setattr(fused, "_split", all_taken)


@pytest.fixture
def _a_rest():
    pass


with_a_rest = pytest.mark.usefixtures("_a_rest")


def exact_norm(tensors):
    flat = np.concatenate([t.double().numpy().ravel() for t in tensors])
    largest = np.abs(flat).max()
    return largest * np.linalg.norm(flat / largest) if largest else 0.0


def mixed(dtype):
    """Tensors around the size of a block, one of several, and two that are not in the order of rows."""
    shapes = [(1,), (BLOCK - 1,), (BLOCK,), (BLOCK + 1,), (), (3 * BLOCK + 5,), (7, 11)]
    layouts = [torch.randn(2, 3, 5, 7).to(memory_format=torch.channels_last), torch.randn(40, 30).t()]
    return [t.to(dtype) for t in [*(torch.randn(shape) for shape in shapes), *layouts]]


def bits(tensors):
    return [t.contiguous().flatten().view(torch.uint8).tolist() for t in tensors]


def moved(params, grads, eps=EPS, norm=None):
    """`params` moved in place; their copies."""
    copies = [torch.full_like(p, 7.0) for p in params]
    fused.backup_and_perturb(params, copies, grads, fused.global_norm(grads) if norm is None else norm, eps, [])
    return copies


# ---------------------------------------------------------------- norm


@DTYPE
def test_norm(dtype):
    tensors = mixed(dtype)
    norm = fused.global_norm(tensors)
    assert norm.dtype == torch.float64
    assert norm.shape == ()
    assert norm.item() == pytest.approx(exact_norm(tensors), rel=1e-6)


@pytest.mark.parametrize(
    ("dtype", "value", "count"),
    [
        (torch.float64, 1e-150, 10),
        (torch.float64, 1e150, 10),
        (torch.float32, 1e-30, 1000),  # squares underflow
        (torch.float32, 1e-44, 10),  # subnormal
        (torch.float32, 1e25, BLOCK + 10),  # squares overflow
        (torch.float32, 3e38, 1000),  # and so does the norm, in float32
        (torch.bfloat16, 1e-30, 1000),
        (torch.bfloat16, 3e38, 1000),
        (torch.bfloat16, 1.0, 5000),  # 256 + 1 == 256 in bfloat16
        (torch.float16, 6e4, 1000),
        (torch.float16, 6e-8, 1000),
        (torch.float32, 0.0, 10),
        (torch.float32, -0.0, 10),
    ],
)
def test_norm_of_extreme_values(dtype, value, count):
    tensors = [torch.full((count,), value, dtype=dtype), torch.full((3, 2), -value, dtype=dtype)]
    assert fused.global_norm(tensors).item() == pytest.approx(exact_norm(tensors), rel=1e-6, abs=0)


def test_large_and_small_values_side_by_side_and_in_one_tensor():
    tensors = [torch.full((10,), 1e25), torch.full((10,), 1e-25), torch.tensor([3e38, 1e-44, 1.0])]
    assert fused.global_norm(tensors).item() == pytest.approx(exact_norm(tensors), rel=1e-6)
    tensors = [tensors[1], torch.full((10,), 1e-26)]
    assert fused.global_norm(tensors).item() == pytest.approx(exact_norm(tensors), rel=1e-6)


@DTYPE
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_norm_of_what_is_not_finite_is_not_finite(dtype, value):
    tensors = [torch.ones(3, dtype=dtype), torch.tensor([1.0, value], dtype=dtype)]
    assert not fused.global_norm(tensors).isfinite()


@with_a_rest
def test_norm_over_several_dtypes_and_what_the_kernels_do_not_take():
    tensors = [t for dtype in FLOATS for t in mixed(dtype)]
    tensors += [torch.randn(6, 6)[:, ::2], torch.empty(0, 3), nn.Parameter(torch.randn(3)).detach()]
    assert fused.global_norm(tensors).item() == pytest.approx(exact_norm(tensors), rel=1e-6)
    complex_ = torch.randn(4, dtype=torch.complex64)
    expected = math.hypot(exact_norm(tensors), torch.linalg.vector_norm(complex_).item())
    assert fused.global_norm([*tensors, complex_]).item() == pytest.approx(expected, rel=1e-6)


def test_norm_of_more_blocks_than_are_added_at_a_time(monkeypatch):
    monkeypatch.setattr(triton_kernels, "WIDTH", 4)
    tensors = [torch.randn(5) for _ in range(11)]
    assert fused.global_norm(tensors).item() == pytest.approx(exact_norm(tensors), rel=1e-6)


# ---------------------------------------------------------------- perturbation and restoration


@DTYPE
def test_the_copy_is_theta_and_theta_moves_as_in_wide_arithmetic_and_comes_back(dtype):
    params, grads = mixed(dtype), mixed(dtype)
    before = bits(params)
    wide = multi_tensor.arithmetic(dtype)
    scale = torch.tensor(EPS / exact_norm(grads), dtype=torch.float64).to(wide)
    expected = [(p.to(wide) + scale * g.to(wide)).to(dtype) for p, g in zip(params, grads, strict=True)]
    versions = [p._version for p in params]

    copies = moved(params, grads)
    assert bits(copies) == before
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(
            p, e, rtol=1e-12 if dtype == torch.float64 else None, atol=0 if dtype == torch.float64 else None
        )
    assert all(p._version > v for p, v in zip(params, versions, strict=True))

    versions = [p._version for p in params]
    fused.restore(params, copies)
    assert bits(params) == before
    assert all(p._version > v for p, v in zip(params, versions, strict=True))


@DTYPE
@pytest.mark.parametrize("bad", [0.0, math.inf, -math.inf, math.nan])
def test_without_a_finite_direction_nothing_moves(dtype, bad):
    params = [torch.tensor([1.0, -0.0, 3.0], dtype=dtype), torch.ones(BLOCK + 2, dtype=dtype)]
    grads = [torch.tensor([0.0, 0.0, bad], dtype=dtype), torch.full((BLOCK + 2,), float(bad != 0), dtype=dtype)]
    before = bits(params)
    copies = moved(params, grads)
    assert bits(params) == bits(copies) == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("norm", [1e-39, 1e300, math.inf, math.nan, 0.0])
def test_nothing_moves_where_eps_over_norm_is_no_finite_float32(dtype, norm):
    params = [torch.ones(3, dtype=dtype)]
    moved(params, [torch.ones(3, dtype=dtype)], norm=torch.tensor(norm, dtype=torch.float64))
    assert params[0].tolist() == [1.0] * 3


@pytest.mark.parametrize("value", [1e-30, 1e-12, 1e12, 1e30])
def test_huge_and_tiny_gradients_move_as_far_as_others(value):
    params = [torch.zeros(100), torch.zeros(3)]
    moved(params, [torch.full((100,), value), torch.full((3,), -value)])
    assert exact_norm(params) == pytest.approx(EPS, rel=1e-6)


def test_eps_may_be_a_tensor():
    for eps in (torch.tensor(5.0), torch.tensor(5.0, dtype=torch.float64)):
        param = torch.zeros(3)
        moved([param], [torch.tensor([3.0, 0.0, 4.0])], eps)
        assert param.tolist() == [3.0, 0.0, 4.0]


def test_eps_is_not_rounded_to_float32():
    param = torch.zeros(1, dtype=torch.float64)
    moved([param], [torch.ones(1, dtype=torch.float64)], 0.1)
    assert param.item() == 0.1


@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
def test_gradients_wider_than_parameters(wide):
    param = torch.zeros(3, dtype=torch.bfloat16)
    moved([param], [torch.tensor([3.0, 0.0, 4.0], dtype=wide)], 5.0)
    assert param.tolist() == [3.0, 0.0, 4.0]


def test_memory_that_does_not_begin_at_a_multiple_of_sixteen_bytes():
    params, grads = [torch.randn(BLOCK + 9)[1:]], [torch.randn(BLOCK + 9)[1:]]
    expected = params[0] + EPS * grads[0] / grads[0].norm()
    moved(params, grads)
    torch.testing.assert_close(params[0], expected)


def test_strides_that_differ_in_dimensions_of_size_one():
    param = torch.zeros(4, 8, 1, 1)
    grad = torch.randn(4, 8, 1, 1).as_strided((4, 8, 1, 1), (8, 1, 8, 8))
    moved([param], [grad])
    torch.testing.assert_close(param, EPS * grad / grad.norm())


@with_a_rest
@pytest.mark.parametrize("change", [lambda t: t[:, ::2], lambda t: t[:, None, :4], lambda t: t.expand(4, 6)])
def test_the_rest_goes_the_other_way_with_the_same_norm(change):
    memory, beside = torch.randn(4, 6), torch.randn(10)
    spread, grads = change(memory), [torch.randn_like(change(memory)).contiguous(), torch.randn(10)]
    norm = exact_norm(grads)
    expected = [memory.clone(), beside + EPS * grads[1] / norm]
    change(expected[0]).add_(EPS * grads[0] / norm)
    before = memory.clone()

    params = [spread, beside]
    copies = [torch.empty(spread.shape), torch.empty(10)]
    fused.backup_and_perturb(params, copies, grads, fused.global_norm(grads), EPS, [])
    torch.testing.assert_close([memory, beside], expected)
    fused.restore(params, copies)
    assert torch.equal(memory, before)


@with_a_rest
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_a_parameter_whose_dtype_has_changed_gets_its_numbers_back(dtype):
    param = torch.zeros(3, dtype=dtype)
    fused.restore([param], [torch.tensor([1.0, 2.0, 3.0])])
    assert param.tolist() == [1.0, 2.0, 3.0]


@with_a_rest
def test_gradients_in_another_order_than_their_parameters_and_complex_ones():
    params = [torch.zeros(4, 6), torch.zeros(3, dtype=torch.complex64)]
    grads = [torch.randn(6, 4).t(), torch.randn(3, dtype=torch.complex64)]
    norm = multi_tensor.global_norm(grads)
    copies = moved(params, grads)
    for p, g, c in zip(params, grads, copies, strict=True):
        torch.testing.assert_close(p, (EPS * g / norm).to(p.dtype))
        assert (c == 0).all()


def of_three_kinds():
    """A wrapper with gradients whose parameters take two launches and, with gaps in memory, none."""
    tensors = [torch.ones(3), torch.ones(6)[::2], torch.ones(3, dtype=torch.float64)]
    params = [nn.Parameter(t) for t in tensors]
    for p in params:
        p.grad = torch.ones_like(p)
    return params, GAPWrapper(torch.optim.SGD(params, 0.1), fused=True)


@with_a_rest
def test_what_has_moved_when_a_launch_fails_moves_back(monkeypatch):
    launch, seen = fused._backup_and_perturb, []

    def fails_the_second_time(batch, norm, eps):
        if seen:
            raise RuntimeError("no such kernel")
        seen.append(launch(batch, norm, eps))

    params, optimizer = of_three_kinds()
    monkeypatch.setattr(fused, "_backup_and_perturb", fails_the_second_time)
    monkeypatch.setattr(fused, "restore", lambda *_: pytest.fail("a path that failed was to put theta back"))
    with pytest.raises(RuntimeError, match="no such kernel"):
        optimizer.first_step()
    assert all((p == 1).all() for p in params)


@with_a_rest
@pytest.mark.parametrize("when", [0, 1])
def test_an_interrupt_after_a_launch_leaves_theta(monkeypatch, when):
    tell, calls = fused._tell_autograd, []

    def interrupted(tensors):
        calls.append(tensors)
        if len(calls) == when + 1:
            raise KeyboardInterrupt
        tell(tensors)

    params, optimizer = of_three_kinds()
    monkeypatch.setattr(fused, "_tell_autograd", interrupted)
    with suppress(KeyboardInterrupt):
        optimizer.first_step()
    assert len(calls) == when + 1
    assert all((p == 1).all() for p in params)
    optimizer.state_dict()  # an error while perturbed


def test_tables_are_made_whatever_the_default_device():
    fused._table.cache_clear()
    fused._blocks.cache_clear()
    params = [torch.zeros(2), torch.zeros(3)]
    grads = [torch.ones(2), torch.ones(3)]
    with torch.device("meta"):
        copies = [torch.empty_like(p) for p in params]
        fused.backup_and_perturb(params, copies, grads, fused.global_norm(grads), EPS, [])
    assert exact_norm(params) == pytest.approx(EPS)


def test_memory_that_is_shared():
    memory = torch.empty(10)
    assert fused.disjoint([memory[:5], memory[5:], torch.empty(0), torch.empty(3)])
    assert not fused.disjoint([memory[:6], memory[5:]])
    assert not fused.disjoint([memory[::2], memory[1::2]])  # between each other: better safe
    assert not fused.disjoint([memory, memory])


@with_a_rest
@settings(max_examples=25, deadline=None)
@given(
    dtype=st.sampled_from(FLOATS),
    sizes=st.lists(st.sampled_from([0, 1, 2, 5, BLOCK - 1, BLOCK, BLOCK + 1]), min_size=1, max_size=5),
    exponent=st.integers(-10, 10),
    eps=st.floats(0.01, 100.0),
    seed=st.integers(0, 2**31),
)
def test_the_same_numbers_as_multi_tensor(dtype, sizes, exponent, eps, seed):
    generator = torch.Generator().manual_seed(seed)
    params = [torch.randn(n, generator=generator).to(dtype) for n in sizes]
    grads = [(torch.randn(n, generator=generator) * 2.0**exponent).to(dtype) for n in sizes]
    theirs = [p.clone() for p in params]
    norm = multi_tensor.global_norm(grads)
    multi_tensor.perturb(theirs, grads, norm, eps)
    torch.testing.assert_close(fused.global_norm(grads), norm, rtol=1e-6, atol=0)
    moved(params, grads, eps)
    torch.testing.assert_close(params, theirs)


# ---------------------------------------------------------------- the wrapper


@pytest.mark.parametrize("knobs", [{}, {"alpha": 0.5}, {"adaptive": True}, {"eps": torch.tensor(0.3)}], ids=str)
@pytest.mark.parametrize("several", [False, True], ids=["one group", "three groups"])
def test_the_wrapper_leaves_the_gradient_of_algorithm_1(knobs, several):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)).double()
    x, y = torch.randn(5, 1, 4, 4).double(), torch.randn(5, 3).double()
    groups = [{"params": [p]} for p in model.parameters()] if several else model.parameters()
    optimizer = GAPWrapper(torch.optim.SGD(groups, 0.1), **{"eps": 0.3, **knobs}, fused=True)
    if several:
        optimizer.param_groups[1]["gap_eps"] = 0.0
    radii = [0.3, 0.0, 0.3, 0.3] if several else 0.3
    plain = {key: value for key, value in knobs.items() if key != "eps"}
    before = bits(p.detach() for p in model.parameters())

    def loss():
        return (model(x) - y).square().sum()

    expected = algorithm_1(list(model.parameters()), loss, eps=radii, **plain)
    for _ in range(2):
        loss().backward()
        with optimizer.perturbed(model):
            assert bits(p.detach() for p in model.parameters()) != before
            loss().backward()
        torch.testing.assert_close([p.grad for p in model.parameters()], expected)
        assert bits(p.detach() for p in model.parameters()) == before
        model.zero_grad()


def test_a_graph_built_at_theta_is_not_used_at_theta_star():
    p = nn.Parameter(torch.ones(3))
    optimizer = GAPWrapper(torch.optim.SGD([p], 0.1), fused=True)
    late = (p**3).sum()
    (p**2).sum().backward()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


@with_a_rest
def test_parameters_that_share_memory_come_back():
    memory = torch.randn(6)
    before = memory.clone()
    params = [nn.Parameter(memory[:4]), nn.Parameter(memory[2:])]
    optimizer = GAPWrapper(torch.optim.SGD(params, 0.1), fused=True)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.first_step()
    assert not torch.equal(memory, before)
    sum(p.sum() for p in params).backward()
    optimizer.second_step()
    assert torch.equal(memory, before)
