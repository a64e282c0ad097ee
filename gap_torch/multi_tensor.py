"""Norm, perturbation and restoration over lists of tensors.

Three ways through the same arithmetic, as in `torch.optim`: one tensor after the other (`foreach=False`), the
`_foreach_` operations, and, for the perturbation on CUDA, torch's fused SGD kernel. None copies from a device to the
host.

On the CPU threads are the price: torch's elementwise operations share out a tensor of more than 2^15 elements and
leave smaller ones to the caller, which is right. What shares out every tensor (fused SGD) or works block by block, to
find theta in the cache, is many times slower as soon as another process wants a core (docs/performance.md).
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .sharding import PLAIN

FUSED_DTYPES = {torch.float32, torch.float16, torch.bfloat16}
# Summing more squares than this in float32 loses digits.
CHUNK = 2**16
# Chunks that are widened at a time.
PART = 32
# Squares are exact enough in float32 if the largest norm of a chunk lies in here: nothing overflows, and what
# underflows (elements below 1e-19) does not count beside it.
SAFE_NORM = (1e-8, 1e18)
LARGEST_SCALE = torch.finfo(torch.float32).max


def global_norm(tensors: Sequence[Tensor], foreach: bool = True) -> Tensor:
    """L2 norm of all `tensors` as if they were one vector.

    Devices and dtypes may be mixed. Sums of squares are accumulated wide enough that float16 and bfloat16
    neither overflow nor underflow.

    Args:
        tensors: at least one dense tensor, real or complex.
        foreach: use multi-tensor operations.

    Returns:
        0-dim tensor on the first tensor's device; float64 where the device has it, else float32.
    """
    norms = []
    for (device, dtype), indices in _by_device_and_dtype(tensors).items():
        group = [tensors[i] for i in indices]
        if dtype.is_complex:
            group = [_unconjugated(tensor) for tensor in group]
        norms.append(_tensor_norms(group, _wide(device), foreach))
    home = tensors[0].device
    norms = [to_device(n.to(_wide(n.device)), home) for n in norms]
    return torch.linalg.vector_norm(norms[0] if len(norms) == 1 else torch.cat(norms))


def backup(params: Sequence[Tensor], copies: Sequence[Tensor], foreach: bool = True) -> None:
    """Copy `params` into `copies`, tensor by tensor."""
    _copy(copies, params, foreach)


def restore(params: Sequence[Tensor], copies: Sequence[Tensor], foreach: bool = True) -> None:
    """Copy `copies` back into `params`: bit for bit what `backup` saw, whatever happened in between."""
    _copy(params, copies, foreach)


def perturb(
    params: Sequence[Tensor], grads: Sequence[Tensor], norm: Tensor, eps: float | Tensor, foreach: bool = True
) -> None:
    """theta <- theta + eps * g / norm (Algorithm 1, line 7), in place.

    Nothing moves where `norm` is zero or not finite, or so small that eps / norm is not a finite float32.
    That is decided on the device.

    Args:
        params: tensors of theta.
        grads: g1, of the same shapes and devices; of the same dtypes, or wider.
        norm: ||g1||, 0-dim.
        eps: radius of the perturbation in the units of theta; a 0-dim tensor is read on the device.
        foreach: use multi-tensor operations, or the fused kernel where there is one for these tensors.
    """
    for (device, dtype), indices in _by_device_and_dtype(params).items():
        radius = to_device(eps, device) if isinstance(eps, Tensor) else eps
        scale = radius / to_device(norm, device)
        if device.type == "cpu" and not torch.compiler.is_compiling():
            _perturb_on_cpu([params[i] for i in indices], [grads[i] for i in indices], float(scale), foreach)
            continue
        scale = _usable(scale.to(arithmetic(dtype)))
        pairs = [(_as_real(params[i]), _in_order_of(params[i], grads[i])) for i in indices]
        fusable: list[tuple[Tensor, Tensor]] = []
        rest: list[tuple[Tensor, Tensor]] = []
        for pair in pairs:
            (fusable if foreach and _fusable(*pair) else rest).append(pair)
        if fusable:
            _perturb_fused([p for p, _ in fusable], [g for _, g in fusable], scale)
        if rest:
            _perturb_one_by_one(rest, scale)


def scale_(tensors: Sequence[Tensor], factor: float, foreach: bool = True) -> None:
    """Multiply every tensor by `factor` in place."""
    for indices in _by_device_and_dtype(tensors).values():
        # a real factor does not mind conjugation, of which `_foreach_mul_` will not hear
        group = [tensors[i].conj() if tensors[i].is_conj() else tensors[i] for i in indices]
        if foreach:
            torch._foreach_mul_(group, factor)
        else:
            for tensor in group:
                tensor.mul_(factor)


def _perturb_on_cpu(params: list[Tensor], grads: list[Tensor], scale: float, foreach: bool) -> None:
    # nothing to wait for here, so that the number may be looked at
    if not 0 < scale <= LARGEST_SCALE:
        return
    if params[0].is_complex():
        params, grads = [_as_real(p) for p in params], [_unconjugated(g) for g in grads]
    # theta + scale * g * 1: addcmul computes that in float32 for half precision, where add rounds `scale` first
    ones = {dtype: torch.ones((), dtype=dtype, device="cpu") for dtype in {g.dtype for g in grads}}
    if foreach:
        torch._foreach_addcmul_(params, grads, [ones[g.dtype] for g in grads], value=scale)
    else:
        for param, grad in zip(params, grads, strict=True):
            param.addcmul_(grad, ones[grad.dtype], value=scale)


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
    for param in params:
        torch.autograd.graph.increment_version(param)


def _perturb_one_by_one(pairs: list[tuple[Tensor, Tensor]], scale: Tensor) -> None:
    moves = scale > 0
    for param, grad in pairs:
        # `where`, for a gradient with inf or NaN in it times zero is still NaN.
        # Widened first: CUDA would cast a 0-dim `scale` to float16, where it may overflow.
        param.add_(torch.where(moves, grad.to(scale.dtype) * scale, 0.0))


def _usable(scale: Tensor) -> Tensor:
    """`scale`, or zero if it is no finite float32. One operation for a float32: on a GPU each is a launch."""
    if scale.dtype == torch.float64:
        scale = torch.where(scale <= LARGEST_SCALE, scale, 0.0)
    return scale.nan_to_num(0.0, 0.0, 0.0)


def _fusable(param: Tensor, grad: Tensor) -> bool:
    """Whether the fused kernel can take these: it walks memory, and reads its learning rate as float32."""
    return (
        not torch.compiler.is_compiling()  # which fuses by itself
        and param.device.type == "cuda"
        and param.dtype in FUSED_DTYPES
        and param.dtype == grad.dtype
        and param.stride() == grad.stride()
        and type(param) in PLAIN
        and is_dense(param)
    )


def _in_order_of(param: Tensor, grad: Tensor) -> Tensor:
    """`grad`, real, with `param`'s strides where the two differ only along dimensions of size 1.

    Convolutions under channels_last give such gradients, whose memory is in the same order all the same.
    """
    param, grad = _as_real(param), _unconjugated(grad)
    if grad.stride() == param.stride() or not same_order(param, grad):
        return grad
    return grad.as_strided(param.shape, param.stride())


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, for which the host waits only if that is the CPU."""
    # a copy to the CPU that is not waited for could be read before it is there
    return tensor.to(device, non_blocking=device.type != "cpu")


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """float64 parameters move in float64; all narrower ones in float32."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def same_order(a: Tensor, b: Tensor) -> bool:
    """Whether tensors of one shape have the same strides, but for dimensions of size 1, which do not count."""
    if a.stride() == b.stride():
        return True
    return all(p == q or size == 1 for p, q, size in zip(a.stride(), b.stride(), a.shape, strict=True))


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory, in whatever order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _tensor_norms(tensors: list[Tensor], dtype: torch.dtype, foreach: bool) -> Tensor:
    """Norms of `tensors` or of parts of them, in one tensor."""
    if not foreach:
        return torch.stack([torch.linalg.vector_norm(t, dtype=dtype) for t in tensors])
    # On the CPU a wider accumulator costs a copy of every tensor, a look at the result costs nothing.
    # (A compiled step can't look.)
    narrow = tensors[0].device.type == "cpu" and tensors[0].dtype != dtype and not torch.compiler.is_compiling()
    if not narrow:
        return torch.stack(torch._foreach_norm(tensors, 2.0, dtype=dtype))
    norms = _chunk_norms(tensors, torch.float32)
    return norms if SAFE_NORM[0] < norms.max() < SAFE_NORM[1] else _chunk_norms(tensors, dtype)


def _chunk_norms(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Norms of `tensors`, and of the chunks of large ones."""
    small, norms = [], []
    for tensor in tensors:
        if tensor.numel() <= CHUNK:
            small.append(tensor)
            continue
        flat = _flat(tensor)
        whole = flat.numel() // CHUNK * CHUNK
        small.append(flat[whole:])
        rows = flat[:whole].view(-1, CHUNK)
        # one operation, whose threads take some rows each; but what is to be widened is copied, so a part at a time
        for part in [rows] if tensor.dtype == dtype else rows.split(PART):
            norms.append(torch.linalg.vector_norm(part, dim=1, dtype=dtype))
    norms.append(torch.stack(torch._foreach_norm(small, 2.0, dtype=dtype)))
    return torch.cat(norms)


def _flat(tensor: Tensor) -> Tensor:
    """The elements in any order, without a copy where they fill one block of memory."""
    return tensor.as_strided((tensor.numel(),), (1,)) if is_dense(tensor) else tensor.reshape(-1)


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor], foreach: bool) -> None:
    if foreach:
        for indices in _by_device_and_dtype(targets).values():
            torch._foreach_copy_([targets[i] for i in indices], [sources[i] for i in indices])
    else:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)


def _by_device_and_dtype(tensors: Sequence[Tensor]) -> Mapping[tuple[torch.device, torch.dtype], Sequence[int]]:
    kinds = {(tensor.device, tensor.dtype) for tensor in tensors}
    if len(kinds) == 1:
        return {kinds.pop(): range(len(tensors))}
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        groups[tensor.device, tensor.dtype].append(index)
    return groups


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _unconjugated(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
