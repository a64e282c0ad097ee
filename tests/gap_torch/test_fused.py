"""The fused path: its switch, its kernels (interpreted, compiled ahead of time), and what it costs a GPU."""

import copy
import inspect
import os
import pickle
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from gap_torch import GAPWrapper, fused, multi_tensor, wrapper

needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Kernel launches of first_step and second_step for the UNet, counted on paper (docs/performance.md). The target is 12.
LAUNCHES = {None: 17, True: 4}


def wrapped(**knobs):
    return GAPWrapper(torch.optim.SGD([nn.Parameter(torch.ones(3))], 0.1), **knobs)


# ---------------------------------------------------------------- the switch


def test_fused_is_not_the_default_as_long_as_no_gpu_has_measured_it():
    assert not fused.BY_DEFAULT
    assert not fused.chosen(None, foreach=True)


@pytest.mark.parametrize(
    ("argument", "foreach", "installed", "expected"),
    [
        (None, True, True, True),
        (None, True, False, False),
        (None, False, True, False),
        (False, True, True, False),
    ],
)
def test_once_it_is_the_default(monkeypatch, argument, foreach, installed, expected):
    monkeypatch.setattr(fused, "BY_DEFAULT", True)
    monkeypatch.setattr(fused, "available", lambda: installed)
    assert fused.chosen(argument, foreach) is expected


def test_fused_without_triton_is_an_error(monkeypatch):
    monkeypatch.setattr(fused, "available", lambda: False)
    with pytest.raises(RuntimeError, match="needs Triton"):
        wrapped(fused=True)
    wrapped()


def test_fused_without_foreach_is_an_error():
    with pytest.raises(ValueError, match="contradict"):
        wrapped(fused=True, foreach=False)


@needs_triton
def test_copies_and_repr_know_of_it():
    assert "fused=True" in repr(wrapped(fused=True))
    assert "fused" not in repr(wrapped()).split("base_optimizer")[0]
    assert copy.deepcopy(wrapped(fused=True)).fused is True


def test_what_was_saved_with_fused_is_read_where_triton_is_missing(monkeypatch):
    monkeypatch.setattr(fused, "available", lambda: True)
    saved = pickle.dumps(wrapped(fused=True, eps=0.3))
    monkeypatch.setattr(fused, "available", lambda: False)
    monkeypatch.setattr(wrapper, "available", lambda: False)
    with pytest.warns(UserWarning, match="going on without it"):
        loaded = pickle.loads(saved)
    assert (loaded.fused, loaded.eps) == (None, 0.3)


def test_fused_can_not_be_changed_afterwards():
    optimizer = wrapped()
    with pytest.raises(AttributeError, match="make a new wrapper"):
        optimizer.fused = True
    assert optimizer.fused is None


@needs_triton
def test_parameters_on_the_cpu_go_the_other_way(monkeypatch):
    monkeypatch.setattr(fused, "_kernels", lambda: pytest.fail("a kernel for CUDA was called"))
    optimizer = wrapped(fused=True)
    (p,) = optimizer.param_groups[0]["params"]
    p.square().sum().backward()
    with optimizer.perturbed():
        assert (p != 1).all()
        p.square().sum().backward()
    assert (p == 1).all()


def test_gap_torch_does_not_import_triton():
    code = "import sys, gap_torch; sys.exit('gap_torch.triton_kernels' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------- the kernels without a GPU


@needs_triton
def test_the_kernels_in_triton_s_interpreter():
    """It has to be chosen before Triton is imported."""
    tests = Path(__file__).with_name("interpreted_kernels.py")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore::RuntimeWarning",
        str(tests),
    ]
    child = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr


@needs_triton
def test_launches_bind_their_arguments_and_compile(tmp_path):
    script = Path(__file__).with_name("launched_without_gpu.py")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    child = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr


TABLES = {"sizes": "*i64", "owners": "*i64", "starts": "*i64"}
SIGNATURES = {
    "squares": {"addresses": "*i64", **TABLES, "sums": "*fp64"},
    "root": {"sums": "*fp64", "norm": "*fp64", "count": "i32"},
    "backup_and_perturb": {
        **dict.fromkeys(["thetas", "copies", "grads"], "*i64"),
        **TABLES,
        "norm": "*fp64",
        "eps": "*fp64",
    },
    "copy": {"targets": "*i64", "sources": "*i64", **TABLES},
}


@pytest.fixture
def assembled(tmp_path, monkeypatch):
    """Compiles a kernel to machine code and gives its PTX."""
    triton = pytest.importorskip("triton")
    compiler = pytest.importorskip("triton.backends.compiler")
    if not hasattr(compiler, "GPUTarget") or not hasattr(triton.compiler, "ASTSource"):
        pytest.skip("this Triton can't compile without a GPU")
    if "constexprs" not in inspect.signature(triton.compiler.ASTSource).parameters:
        pytest.skip("this Triton (3.2, of torch 2.6) names the arguments of ASTSource otherwise")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from gap_torch import triton_kernels

    def compile_for(capability, name, **constants):
        kernel = getattr(triton_kernels, name)
        types = {argument: SIGNATURES[name].get(argument, "constexpr") for argument in kernel.arg_names}
        source = triton.compiler.ASTSource(kernel, types, constexprs=constants)
        target = compiler.GPUTarget("cuda", capability, 32)
        try:
            compiled = triton.compile(source, target=target, options=triton_kernels.LAUNCH)
        except FileNotFoundError as error:
            pytest.skip(f"no ptxas: {error}")
        assert compiled.asm["cubin"]
        return compiled.asm["ptx"]

    return compile_for


CAPABILITY = pytest.mark.parametrize("capability", [80, 90])
DTYPE = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def constants(**dtypes):
    from gap_torch import triton_kernels

    types = {name: triton_kernels.TYPES[dtype] for name, dtype in dtypes.items()}
    return {**types, "ALIGNED": True, "BLOCK": triton_kernels.BLOCK}


@CAPABILITY
@DTYPE
@needs_triton
def test_kernels_of_one_type_compile(assembled, capability, dtype):
    loads_by_16_bytes = "ld.global.v2.b64" if dtype == torch.float64 else "ld.global.v4.b32"
    for name in ("squares", "copy"):
        assert loads_by_16_bytes in assembled(capability, name, **constants(TYPE=dtype))
    assembled(capability, "copy", **{**constants(TYPE=dtype), "ALIGNED": False})


@CAPABILITY
@DTYPE
@needs_triton
def test_the_perturbation_compiles_for_gradients_of_all_types(assembled, capability, dtype):
    for grad in {dtype, torch.float32}:
        types = {"PARAM": dtype, "GRAD": grad, "WIDE": multi_tensor.arithmetic(dtype)}
        ptx = assembled(capability, "backup_and_perturb", **constants(**types))
        assert "st.global.v" in ptx
        assert ".ftz" not in ptx  # which would take subnormal numbers for zero


@CAPABILITY
@needs_triton
def test_the_sum_compiles(assembled, capability):
    from gap_torch import triton_kernels

    assembled(capability, "root", WIDTH=triton_kernels.WIDTH)


# ---------------------------------------------------------------- on a GPU


def unet_like():
    """82 tensors, as many as the ACDC example's UNet has, with 2.27 M elements (the UNet: 1.8 M)."""
    widths = [16, 32, 64, 128, 256]
    layers = [nn.Conv2d(w, w, 3) for w in widths for _ in range(2)]
    layers += [nn.BatchNorm2d(w) for w in widths for _ in range(2)]
    layers += [nn.Conv2d(2 * w, w, 1) for w in widths for _ in range(4)] + [nn.BatchNorm2d(16)]
    return [p for layer in layers for p in layer.parameters()]


def gap_step(optimizer, params):
    torch.autograd.backward(params, [torch.ones_like(p) for p in params])
    optimizer.first_step()
    torch.autograd.backward(params, [torch.ones_like(p) for p in params])
    optimizer.second_step()
    optimizer.step()
    optimizer.zero_grad()


def test_the_stand_in_has_as_many_tensors_as_the_unet():
    assert len(unet_like()) == 82
    assert sum(p.numel() for p in unet_like()) == pytest.approx(2.27e6, rel=0.005)


@needs_cuda
@pytest.mark.parametrize("choice", [None, True])
def test_launches_of_first_and_second_step(choice):
    from torch.profiler import ProfilerActivity, profile

    params = [p.cuda().detach().requires_grad_() for p in unet_like()]
    optimizer = GAPWrapper(torch.optim.SGD(params, 0.0), fused=choice)
    for _ in range(2):
        gap_step(optimizer, params)
    torch.autograd.backward(params, [torch.ones_like(p) for p in params])
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        optimizer.first_step()
        torch.cuda.synchronize()
    launches = kernels(seen)
    torch.autograd.backward(params, [torch.ones_like(p) for p in params])
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        optimizer.second_step()
        torch.cuda.synchronize()
    launches += kernels(seen)
    assert len(launches) <= LAUNCHES[choice], launches


def kernels(seen):
    """Names of what ran on the GPU, but for copies from the host and memsets."""
    names = [event.name for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in names if not name.startswith(("Memcpy", "Memset"))]


@needs_cuda
@DTYPE
def test_the_numbers_of_multi_tensor_on_a_gpu(dtype):
    shapes = [(1,), (4095,), (4096,), (4097,), (3, 50_000), (2, 3, 5, 7)]
    params = [torch.randn(shape, device="cuda").to(dtype) for shape in shapes]
    grads = [torch.randn(shape, device="cuda").to(dtype) for shape in shapes]
    params[-1], grads[-1] = (t.to(memory_format=torch.channels_last) for t in (params[-1], grads[-1]))
    theirs, before = [p.clone() for p in params], [p.clone() for p in params]
    copies = [torch.empty_like(p) for p in params]
    norm = multi_tensor.global_norm(grads)
    torch.testing.assert_close(fused.global_norm(grads), norm, rtol=1e-6, atol=0)
    multi_tensor.perturb(theirs, grads, norm, 0.5)
    fused.backup_and_perturb(params, copies, grads, norm, 0.5, [])
    torch.testing.assert_close(params, theirs)
    assert all(map(torch.equal, copies, before))
    fused.restore(params, copies)
    assert all(map(torch.equal, params, before))


@needs_cuda
@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, 1e-44), (torch.float32, 3e38), (torch.bfloat16, 1e-30)])
def test_norm_of_extreme_values_on_a_gpu(dtype, value):
    tensors = [torch.full((10_000,), value, dtype=dtype, device="cuda")]
    assert fused.global_norm(tensors).item() == pytest.approx(tensors[0][0].item() * 100, rel=1e-6)


@needs_cuda
@pytest.mark.parametrize("bad", [0.0, float("inf"), float("nan")])
def test_without_a_finite_direction_nothing_moves_on_a_gpu(bad):
    param, grad = torch.randn(5000, device="cuda"), torch.full((5000,), bad, device="cuda")
    before, memory = param.clone(), torch.empty_like(param)
    fused.backup_and_perturb([param], [memory], [grad], fused.global_norm([grad]), 0.5, [])
    assert torch.equal(param, before)
