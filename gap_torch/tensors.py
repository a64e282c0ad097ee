"""What kernels over lists of tensors need to know: kinds of tensors, their memory, and the size of a step."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST_SCALE = torch.finfo(torch.float32).max

# ---------------------------------------------------------------------- kinds


def of_one_kind(tensors: Sequence[Tensor]) -> bool:
    """Whether all tensors are of one device and dtype."""
    return len({t.dtype for t in tensors}) == len({t.device for t in tensors}) == 1


def by_kind(*lists: list[Tensor]) -> list[tuple[list[Tensor], ...]]:
    """Lists of equal length, cut into parts whose tensors share device and dtype in the first list."""
    if of_one_kind(lists[0]):
        return [lists]
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for index, tensor in enumerate(lists[0]):
        kinds[tensor.device, tensor.dtype].append(index)
    return [tuple([tensors[i] for i in indices] for tensors in lists) for indices in kinds.values()]


def as_real(tensor: Tensor) -> Tensor:
    """A view of a complex tensor as real numbers; a real tensor itself."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def unconjugated(tensor: Tensor) -> Tensor:
    """`as_real` of a tensor that may be conjugated, to be read only."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, for which the host waits only if that is the CPU."""
    # a copy to the CPU that is not waited for could be read before it is there
    return tensor.to(device, non_blocking=device.type != "cpu")


# ---------------------------------------------------------------------- memory


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


def flattened(*tensors: Tensor) -> list[Tensor]:
    """The elements of `tensors` in one order, without a copy where each fills a block of memory in the same order."""
    first = tensors[0]
    if is_dense(first) and all(same_order(first, other) for other in tensors[1:]):
        return [tensor.as_strided((tensor.numel(),), (1,)) for tensor in tensors]
    return [tensor.reshape(-1) for tensor in tensors]


# ---------------------------------------------------------------------- sizes


def norm_of_norms(norms: list[Tensor], device: torch.device) -> Tensor:
    """L2 norm of 1-dim tensors of norms, 0-dim on `device`."""
    if len(norms) == 1 and norms[0].device == device:
        return torch.linalg.vector_norm(norms[0], dtype=norm_dtype(device))
    norms = [to_device(n.to(norm_dtype(n.device)), device) for n in norms]
    return torch.linalg.vector_norm(torch.cat(norms))


def norm_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which norms are added up."""
    return torch.float32 if device.type == "mps" else torch.float64


def usable_scale(eps: float | Tensor, norm: Tensor, device: torch.device, dtype: torch.dtype) -> float | Tensor:
    """eps / norm for tensors of `dtype` on `device`; zero where it is not finite in float32.

    A number for the CPU, where nothing has to be waited for. Else, and under torch.compile, a 0-dim tensor there.
    """
    if device.type == "cpu" and not torch.compiler.is_compiling():
        number, length = float(eps), norm.item()
        ratio = number / length if length else 0.0
        return ratio if 0 < ratio <= LARGEST_SCALE else 0.0
    radius = to_device(eps, device) if isinstance(eps, Tensor) else eps
    scale = radius / to_device(norm, device)
    if dtype in (torch.float64, torch.complex128):  # which move in float64, all narrower ones in float32
        scale = scale.double()
        scale = torch.where(scale <= LARGEST_SCALE, scale, 0.0)
    else:
        scale = scale.float()
    return scale.nan_to_num(0.0, 0.0, 0.0)  # one operation for a float32: on a GPU each is a launch


def ones_for(params: Sequence[Tensor]) -> list[Tensor]:
    """A 0-dim tensor of value 1 on the CPU for each of `params`, which are of one dtype.

    theta + scale * g * 1: addcmul computes that in float32 for half precision, where add rounds `scale` first.
    """
    return [torch.ones((), dtype=params[0].dtype, device="cpu")] * len(params)
