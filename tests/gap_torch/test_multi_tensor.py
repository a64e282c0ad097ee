"""Norm, perturbation and restoration over lists of tensors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gap_torch import multi_tensor, single_tensor

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KERNELS = pytest.mark.parametrize("kernels", [multi_tensor, single_tensor], ids=["foreach", "loop"])
DTYPE = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def exact_norm(tensors):
    flat = np.concatenate([torch.view_as_real(t.to(torch.complex128).resolve_conj()).numpy().ravel() for t in tensors])
    largest = np.abs(flat).max()
    return largest * np.linalg.norm(flat / largest) if largest else 0.0


def copied(params, grads, eps, kernels):
    """The perturbation alone, of copies of `params`."""
    params = [p.clone(memory_format=torch.preserve_format) for p in params]
    kernels.perturb(params, grads, kernels.global_norm(grads), eps)
    return params


# ---------------------------------------------------------------- norm


@KERNELS
@pytest.mark.parametrize(
    ("dtype", "value", "count"),
    [
        (torch.float64, 1.5, 1000),
        (torch.float32, 1.5, 1000),
        (torch.float32, 1e-30, 1000),  # squares underflow
        (torch.float32, 1e-44, 10),  # subnormal
        (torch.float32, 3e38, 1000),  # squares and sum overflow
        (torch.bfloat16, 1e-30, 1000),
        (torch.bfloat16, 3e38, 1000),
        (torch.bfloat16, 1.0, 5000),  # 256 + 1 == 256 in bfloat16
        (torch.float16, 6e4, 1000),
        (torch.float16, 6e-8, 1000),
        (torch.float16, 1.0, 100_000),
    ],
)
def test_norm_of_extreme_values(dtype, value, count, kernels):
    tensors = [torch.full((count,), value, dtype=dtype), torch.full((3, 2), -value, dtype=dtype)]
    assert kernels.global_norm(tensors).item() == pytest.approx(exact_norm(tensors), rel=1e-6)


@KERNELS
def test_norm_spans_tensors_dtypes_layouts_and_complex_numbers(kernels):
    tensors = [
        torch.randn(3, 4),
        torch.randn(5, dtype=torch.float64),
        torch.randn(2, 3, dtype=torch.bfloat16),
        torch.randn(4, dtype=torch.complex64),
        torch.randn(4, dtype=torch.complex128).conj(),
        torch.randn(6, 6).t()[::2],
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.randn(()),
        torch.zeros(4),
        torch.empty(0, 3),
    ]
    assert kernels.global_norm(tensors).item() == pytest.approx(exact_norm(tensors), rel=1e-6)


@KERNELS
@DTYPE
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_norm_of_what_is_not_finite_is_not_finite(dtype, value, kernels):
    tensors = [torch.ones(3, dtype=dtype), torch.tensor([1.0, value], dtype=dtype)]
    assert not kernels.global_norm(tensors).isfinite()


# ---------------------------------------------------------------- perturbation

# half an ulp for the rounding of r, at parameters of zero, so that nothing else rounds
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


@KERNELS
@DTYPE
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), tensors=st.integers(1, 4), eps=st.floats(0.05, 100.0))
def test_the_perturbation_has_length_eps_and_the_direction_of_g1(dtype, kernels, seed, tensors, eps):
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(i + 1, 3, generator=generator).to(dtype) for i in range(tensors)]
    r = copied([torch.zeros_like(g) for g in grads], grads, eps, kernels)
    assert exact_norm(r) == pytest.approx(eps, rel=ROUNDING[dtype])
    for part, g in zip(r, grads, strict=True):
        expected = g.double() * (eps / exact_norm(grads))
        torch.testing.assert_close(part.double(), expected, rtol=ROUNDING[dtype], atol=1e-7)


EXPONENTS = {  # both the gradients and their norm stay in range; squares do not
    torch.float64: st.integers(-110, 110),  # eps / norm has to be a finite float32
    torch.float32: st.integers(-60, 60),
    torch.bfloat16: st.integers(-90, 90),
    torch.float16: st.integers(-22, 13),
}


@KERNELS
@DTYPE
@settings(max_examples=30, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_scaling_every_gradient_by_a_power_of_two_changes_nothing(dtype, kernels, device, data, seed):
    generator = torch.Generator().manual_seed(seed)
    # multiples of 1/4 between 1/4 and 4, so that scaling is exact in float16 down to its subnormals
    grads = [torch.randint(1, 17, (n,), generator=generator).to(device, dtype) / 4 for n in (5, 3)]
    params = [torch.randn(n, generator=generator).to(device, dtype) for n in (5, 3)]
    factor = 2.0 ** data.draw(EXPONENTS[dtype])
    expected, scaled = (
        copied(params, grads, 0.5, kernels),
        copied(params, [g * factor for g in grads], 0.5, kernels),
    )
    for a, b in zip(expected, scaled, strict=True):
        torch.testing.assert_close(
            a, b, rtol=0 if dtype != torch.float32 else 1e-6, atol=0 if dtype != torch.float32 else 1e-7
        )


@KERNELS
@DTYPE
@pytest.mark.parametrize("bad", [0.0, math.inf, -math.inf, math.nan])
def test_without_a_finite_direction_nothing_moves(dtype, kernels, device, bad):
    params = [torch.tensor([1.0, -0.0, 3.0], dtype=dtype, device=device), torch.ones(2, dtype=dtype, device=device)]
    grads = [
        torch.tensor([0.0, 0.0, bad], dtype=dtype, device=device),
        torch.full((2,), 0.0 if bad == 0 else 1.0, dtype=dtype, device=device),
    ]
    for p, moved in zip(params, copied(params, grads, 0.5, kernels), strict=True):
        assert torch.equal(p, moved)


@KERNELS
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("change", [lambda t: t.t(), lambda t: t[:, ::2], lambda t: t[:, None, :4]])
def test_any_layout_of_parameter_and_gradient(change, contiguous, kernels):
    memory, grad = torch.randn(4, 6), change(torch.randn(4, 6))
    grad = grad.contiguous() if contiguous else grad
    param = change(memory)
    expected = memory.clone()
    change(expected).add_(0.5 * grad / grad.norm())
    norm = kernels.global_norm([grad])
    kernels.perturb([param], [grad], norm, 0.5)
    torch.testing.assert_close(memory, expected)  # what lies between the elements stays as it was


def test_mixed_dtypes_of_parameter_and_gradient():
    param, grad = torch.zeros(3, dtype=torch.bfloat16), torch.tensor([3.0, 0.0, 4.0])
    multi_tensor.perturb([param], [grad], multi_tensor.global_norm([grad]), 5.0)
    assert param.tolist() == [3.0, 0.0, 4.0]


@KERNELS
@DTYPE
def test_perturbing_is_seen_by_autograd(dtype, kernels, device):
    param = torch.ones(3, dtype=dtype, device=device)
    version = param._version
    kernels.perturb([param], [torch.ones_like(param)], torch.tensor(1.0, device=device), 0.5)
    assert param._version > version


# ---------------------------------------------------------------- restoration


@KERNELS
@pytest.mark.parametrize("dtype", [*FLOATS, torch.complex64], ids=str)
def test_restore_is_bit_exact_where_subtraction_is_not(dtype, kernels):
    params = [
        torch.randn(100).to(dtype) * 1e-3,
        torch.tensor([-0.0, 1e-7, 6e4], dtype=dtype),
        torch.randn(6, 4).to(dtype).t(),
    ]
    params[1][0] = -0.0
    grads = [torch.randn_like(p) for p in params]
    before = [p.clone() for p in params]
    copies = [torch.empty_like(p) for p in params]

    kernels.backup(params, copies)
    kernels.perturb(params, grads, kernels.global_norm(grads), 10.0)
    moved = [p.clone() for p in params]
    kernels.restore(params, copies)

    norm = exact_norm(grads)
    r = [(g * (10.0 / norm)).to(dtype) for g in grads]
    assert any(not torch.equal(m - d, b) for m, d, b in zip(moved, r, before, strict=True))
    for p, b in zip(params, before, strict=True):
        assert p.contiguous().flatten().view(torch.uint8).equal(b.contiguous().flatten().view(torch.uint8))


@KERNELS
def test_scale(kernels):
    tensors = [torch.ones(3), torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.complex64)]
    kernels.scale_(tensors, 0.25)
    assert all((t == 0.25).all() for t in tensors)


def test_a_large_float32_tensor_loses_no_digits():
    """Its squares are summed in chunks: one float32 sum of 6e7 of them comes out 0.8 % too large."""
    large = torch.full((20_000_000,), 0.1)
    expected = 0.1 * 20_000_000**0.5
    assert abs(multi_tensor.global_norm([large]).item() / expected - 1) < 1e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
def test_gradients_that_differ_in_strides_of_size_one_take_the_fused_path(monkeypatch):
    param = torch.zeros(4, 8, 1, 1, device="cuda")
    grad = (
        torch.randn(4, 8, 1, 1, device="cuda")
        .to(memory_format=torch.channels_last)
        .as_strided((4, 8, 1, 1), (8, 1, 8, 8))
    )
    assert param.stride() != grad.stride()
    seen = []
    fused = multi_tensor._perturb_fused
    monkeypatch.setattr(multi_tensor, "_perturb_fused", lambda *a: seen.append(len(a[0])) or fused(*a))
    multi_tensor.perturb([param], [grad], grad.norm(), 1.0)
    assert seen == [1]
    torch.testing.assert_close(param, grad / grad.norm())


LAYOUTS = {
    "alike": lambda t: t,
    "transposed": lambda t: t.t(),
    "with gaps": lambda t: t[:, ::2],
    "another dtype": lambda t: t.double(),
}


@pytest.mark.parametrize("layouts", [["alike"], ["alike", "transposed", "with gaps", "another dtype"], ["with gaps"]])
def test_what_can_be_fused_is_fused_and_the_rest_moves_too(layouts, device, monkeypatch):
    """The way of a GPU; torch's fused kernel is there on a CPU too."""
    monkeypatch.setattr(multi_tensor, "FUSED_DEVICE", device)
    seen, fused = [], multi_tensor._perturb_fused
    monkeypatch.setattr(multi_tensor, "_perturb_fused", lambda *a: seen.append(len(a[0])) or fused(*a))
    shared = [torch.randn(6, 6, device=device) for _ in layouts]
    params = [LAYOUTS[layout](p) if layout != "another dtype" else p for layout, p in zip(layouts, shared, strict=True)]
    grads = [LAYOUTS[layout](torch.randn(6, 6, device=device)) for layout in layouts]
    grads = [g.contiguous() if layout == "transposed" else g for layout, g in zip(layouts, grads, strict=True)]
    expected = [p + 0.25 * g.to(p.dtype) for p, g in zip(params, grads, strict=True)]
    versions = [p._version for p in params]
    multi_tensor._perturb_on_device(params, grads, torch.tensor(0.25, device=device))
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p, e)
    assert all(p._version > version for p, version in zip(params, versions, strict=True))
    assert seen == [1] * ("alike" in layouts)
    moved = [p.clone() for p in params]
    multi_tensor._perturb_on_device(params, grads, torch.tensor(0.0, device=device))
    assert all(map(torch.equal, params, moved))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [3, 24, 100, 1000])
@KERNELS
def test_every_element_moves_as_in_float32(dtype, size, kernels):
    """Sizes beyond a vector register: torch's `add` rounds eps / ||g1|| to half precision there, on the CPU."""
    param, grad = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
    norm = multi_tensor.global_norm([grad])
    expected = (param.float() + 0.5 * grad.float() / norm.float()).to(dtype)
    kernels.perturb([param], [grad], norm, 0.5)
    torch.testing.assert_close(param, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [2**16, 2**16 + 1, 5 * 2**16 + 7, 70 * 2**16])
@pytest.mark.parametrize("change", [lambda t: t, lambda t: t.t(), lambda t: t[::2]], ids=["as it is", "t", "spread"])
def test_norm_of_tensors_of_several_chunks(dtype, size, change):
    tensors = [change(torch.randn(size, 2).to(dtype)), torch.ones(3, dtype=dtype)]
    # float32 sums of 2^16 squares; those on half precision's coarse grid are rounded one way more often than the other
    assert multi_tensor.global_norm(tensors).item() == pytest.approx(exact_norm(tensors), rel=1e-5)


@pytest.mark.parametrize("small", [0.0, 1e-30, 1e-16])
def test_tensors_of_tiny_gradients_beside_others_do_not_take_the_slow_way(monkeypatch, small):
    """As of a bias before batch norm, or of a layer that nothing reaches."""
    tensors = [torch.full((1000,), small), torch.randn(1000)]
    monkeypatch.setattr(multi_tensor, "_chunk_norms", calls := Counting(multi_tensor._chunk_norms))
    assert multi_tensor.global_norm(tensors).item() == pytest.approx(exact_norm(tensors), rel=1e-6)
    assert calls.count == 1


class Counting:
    def __init__(self, function):
        self.function, self.count = function, 0

    def __call__(self, *args):
        self.count += 1
        return self.function(*args)
