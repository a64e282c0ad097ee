"""Parameters that are spread over processes: FSDP2 (`fully_shard`) and tensor parallelism, both made of DTensors.

Moving the weights and putting them back is local to each shard. Only ||g1|| needs the other processes.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

PLAIN = {Tensor, nn.Parameter}


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether `tensor` is a DTensor."""
    if type(tensor) in PLAIN or not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor  # slow to import, and few need it

    return isinstance(tensor, DTensor)


def any_sharded(tensors: Sequence[Tensor]) -> bool:
    """Whether one of `tensors` is a DTensor."""
    return not PLAIN.issuperset(map(type, tensors)) and any(map(is_sharded, tensors))


def local(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor, in the same memory; any other tensor itself."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def all_local(tensors: list[Tensor]) -> list[Tensor]:
    """`local` of each tensor."""
    return [local(t) for t in tensors] if any_sharded(tensors) else tensors


def laid_out_as(param: Tensor, gradient: Tensor) -> Tensor:
    """`gradient` spread over the processes as `param` is; tensor parallelism may leave sums unfinished (`Partial`)."""
    if is_sharded(gradient) and is_sharded(param) and gradient.placements != param.placements:
        return gradient.redistribute(placements=param.placements)
    return gradient


def all_laid_out_as(params: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """`laid_out_as` of each gradient."""
    return [*map(laid_out_as, params, gradients)] if any_sharded(gradients) else gradients


def joint_norm(tensors: Sequence[Tensor], norm: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """L2 norm over all `tensors`, all shards of each included, equal in every process that holds a shard.

    One all-reduce of a number for each way in which tensors are sharded: one in all under FSDP2.

    Args:
        tensors: at least one; DTensors without unfinished sums (`laid_out_as`), or plain tensors.
        norm: L2 norm of a list of plain tensors.

    Raises:
        RuntimeError: the other processes don't come within the group's time-out, or the group can't reduce.
    """
    if not any_sharded(tensors):
        return norm(list(tensors))
    shards: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        shards[_groups_of_shards(tensor)].append(local(tensor))
    norms = []
    for groups, parts in shards.items():
        total = norm(parts)
        for group in groups:
            square = total.square()
            _all_reduce(square, group)
            total = square.sqrt()
        norms.append(total)
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack([n.to(norms[0]) for n in norms]))


def reshard(model: nn.Module) -> None:
    """Let FSDP2 modules of `model` forget gathered parameters, which would hide that the weights have moved."""
    for module in model.modules():
        if hasattr(module, "reshard") and hasattr(module, "unshard"):
            module.reshard()  # type: ignore[operator]


def _groups_of_shards(tensor: Tensor) -> "tuple[dist.ProcessGroup, ...]":
    """The process groups over which the parts of `tensor` are spread; none for a whole or repeated tensor."""
    if is_sharded(tensor):
        mesh: Any = tensor.device_mesh
        spread = [dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()]
        return tuple(mesh.get_group(dim) for dim in spread)
    return ()


def _all_reduce(square: Tensor, group: "dist.ProcessGroup") -> None:
    try:
        dist.all_reduce(square, group=group)
    except RuntimeError as error:
        raise RuntimeError(
            f"first_step() needs ||g1|| over all shards, which failed ({error}). Every process must call "
            "first_step() in the same iterations, and gradients on the CPU (offloading) need a process group with gloo."
        ) from error
