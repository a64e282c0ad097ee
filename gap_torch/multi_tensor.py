"""Norm, perturbation and restoration over lists of tensors.

By the `_foreach_` operations, and, for the perturbation on CUDA, torch's fused SGD kernel. `single_tensor` has the same
functions for one tensor after the other, as in `torch.optim`. None copies from a device to the host.

On the CPU threads are the price: torch's elementwise operations share out a tensor of more than 2^15 elements and
leave smaller ones to the caller, which is right. What shares out every tensor (fused SGD) or works block by block, to
find theta in the cache, is many times slower as soon as another process wants a core.
"""

from operator import eq

import torch
from torch import Tensor

from . import single_tensor
from .sharding import PLAIN
from .tensors import (
    as_real,
    by_kind,
    flattened,
    is_dense,
    norm_dtype,
    norm_of_norms,
    ones_for,
    same_order,
    unconjugated,
    usable_scale,
)

# On the CPU torch's fused SGD is slow (above), and there in tests alone.
FUSED_DEVICE = "cuda"
FUSED_DTYPES = {torch.float32, torch.float16, torch.bfloat16}
# Summing more squares than this in float32 loses digits.
CHUNK = 2**16
# That many are widened at a time.
CHUNKS_AT_ONCE = 32
# Squares are exact enough in float32 if the largest norm of a chunk lies in here: nothing overflows, and what
# underflows (elements below 1e-19) does not count beside it.
SAFE_NORM = (1e-8, 1e18)


def global_norm(tensors: list[Tensor]) -> Tensor:
    """L2 norm of all `tensors` as if they were one vector.

    Devices and dtypes may be mixed. Sums of squares are accumulated wide enough that float16 and bfloat16
    neither overflow nor underflow.

    Args:
        tensors: at least one dense tensor, real or complex.

    Returns:
        0-dim tensor on the first tensor's device; float64 where the device has it, else float32.
    """
    norms = []
    for (group,) in by_kind(tensors):
        if group[0].is_complex():
            group = [unconjugated(tensor) for tensor in group]
        norms.append(_tensor_norms(group, norm_dtype(group[0].device)))
    return norm_of_norms(norms, tensors[0].device)


def backup(params: list[Tensor], copies: list[Tensor]) -> None:
    """Copy `params`, of one device and dtype, into `copies`."""
    torch._foreach_copy_(copies, params)


def restore(params: list[Tensor], copies: list[Tensor]) -> None:
    """Copy `copies` back into `params`: bit for bit what `backup` saw, whatever happened in between."""
    backup(copies, params)


def perturb(params: list[Tensor], grads: list[Tensor], norm: Tensor, eps: float | Tensor) -> None:
    """theta <- theta + eps * g / norm (Algorithm 1, line 7), in place.

    Nothing moves where `norm` is zero or not finite, or so small that eps / norm is not a finite float32.
    That is decided on the device.

    Args:
        params: tensors of theta, of one device and dtype.
        grads: g1, of the same shapes and devices; of the same dtypes, or wider.
        norm: ||g1||, 0-dim.
        eps: radius of the perturbation in the units of theta; a 0-dim tensor is read on the device.
    """
    scale = usable_scale(eps, norm, params[0].device, params[0].dtype)
    if isinstance(scale, Tensor):
        _perturb_on_device(params, grads, scale)
    elif scale:
        _perturb_on_cpu(params, grads, scale)


def scale_(tensors: list[Tensor], factor: float) -> None:
    """Multiply every tensor by `factor` in place."""
    for (group,) in by_kind(tensors):
        # a real factor does not mind conjugation, of which `_foreach_mul_` will not hear
        torch._foreach_mul_([t.conj() if t.is_conj() else t for t in group], factor)


def _perturb_on_cpu(params: list[Tensor], grads: list[Tensor], scale: float) -> None:
    if params[0].is_complex():
        params, grads = [as_real(p) for p in params], [unconjugated(g) for g in grads]
    torch._foreach_addcmul_(params, grads, ones_for(params), value=scale)


def _perturb_on_device(params: list[Tensor], grads: list[Tensor], scale: Tensor) -> None:
    if _fusable(params, grads):
        _perturb_fused(params, grads, scale)
        return
    pairs = [*zip(map(as_real, params), map(_in_order_of, params, grads), strict=True)]
    fusable = [_fusable([p], [g]) for p, g in pairs]
    for fused, move in ((True, _perturb_fused), (False, single_tensor.add_scaled)):
        chosen = [pair for pair, its in zip(pairs, fusable, strict=True) if its is fused]
        if chosen:
            move([p for p, _ in chosen], [g for _, g in chosen], scale)


def _perturb_fused(params: list[Tensor], grads: list[Tensor], scale: Tensor) -> None:
    # theta + scale * g is an ascending SGD step with learning rate `scale`. torch's fused kernel for it makes
    # one pass without a temporary, reads the rate from the device, and does nothing where found_inf is 1.
    torch._fused_sgd_(
        params,
        grads,
        [],
        weight_decay=0.0,
        momentum=0.0,
        lr=scale,
        dampening=0.0,
        nesterov=False,
        maximize=True,
        is_first_step=False,
        found_inf=torch.le(scale, 0.0, out=torch.empty_like(scale)),  # 1.0 or 0.0
    )
    # The kernel does not tell autograd. Without this, a backward through a graph that was built at theta
    # would quietly use the weights of theta*.
    torch.autograd.graph.increment_version(params)


def _fusable(params: list[Tensor], grads: list[Tensor]) -> bool:
    """Whether the fused kernel can take all tensors: it walks memory, and reads its learning rate as float32."""
    return (
        not torch.compiler.is_compiling()  # which fuses by itself
        and params[0].device.type == FUSED_DEVICE
        and params[0].dtype in FUSED_DTYPES
        and {g.dtype for g in grads} == {params[0].dtype}
        and PLAIN.issuperset(map(type, params))
        and all(map(eq, map(Tensor.stride, params), map(Tensor.stride, grads)))
        and all(map(is_dense, params))
    )


def _in_order_of(param: Tensor, grad: Tensor) -> Tensor:
    """`grad`, real, with `param`'s strides where their strides differ only along dimensions of size 1.

    Convolutions under channels_last give such gradients, whose memory is in the same order all the same.
    """
    param, grad = as_real(param), unconjugated(grad)
    if grad.stride() == param.stride() or not same_order(param, grad):
        return grad
    return grad.as_strided(param.shape, param.stride())


def _tensor_norms(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Norms of `tensors` or of parts of them, in one tensor."""
    # On the CPU a wider accumulator costs a copy of every tensor, a look at the result costs nothing.
    # (A compiled step can't look.)
    narrow = tensors[0].device.type == "cpu" and tensors[0].dtype != dtype and not torch.compiler.is_compiling()
    if not narrow:
        return torch.stack(torch._foreach_norm(tensors, 2.0, dtype=dtype))
    norms = _chunk_norms(tensors, torch.float32)
    return norms if SAFE_NORM[0] < norms.max().item() < SAFE_NORM[1] else _chunk_norms(tensors, dtype)


def _chunk_norms(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Norms of `tensors`, and of the chunks of large tensors."""
    if max(map(Tensor.numel, tensors)) <= CHUNK:
        return torch.stack(torch._foreach_norm(tensors, 2.0, dtype=dtype))
    small, norms = [], []
    for tensor in tensors:
        if tensor.numel() <= CHUNK:
            small.append(tensor)
            continue
        (flat,) = flattened(tensor)
        whole = flat.numel() // CHUNK * CHUNK
        small.append(flat[whole:])
        rows = flat[:whole].view(-1, CHUNK)
        # one operation, whose threads take some rows each; but what is to be widened is copied, so a part at a time
        for part in [rows] if tensor.dtype == dtype else rows.split(CHUNKS_AT_ONCE):
            norms.append(torch.linalg.vector_norm(part, dim=1, dtype=dtype))
    norms.append(torch.stack(torch._foreach_norm(small, 2.0, dtype=dtype)))
    return torch.cat(norms)
