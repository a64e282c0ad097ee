"""A CUDA graph's stand-in on the CPU: records the operations of a function, and does them again on the same tensors.

What a CUDA graph would keep for good stays as it was here too: Python's numbers, and all that Python decides. The
host may not look at a value while it records.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LOOKS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}


class CpuGraph(TorchDispatchMode):
    """Has the methods of `segmentation.training.cuda_graph.Recorder`.

    Args:
        state: gives all that the function changes. A CUDA graph does nothing while it records; here it is put back.
    """

    def __init__(self, state: Callable[[], Any]) -> None:
        super().__init__()
        self.state = state
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self.replays = 0

    def rehearse(self, function: Callable[[], Any], watch: bool) -> tuple[Any, str | None]:
        return function(), None

    def record(self, function: Callable[[], Any]) -> Any:
        changed = _tensors(self.state())
        before = [tensor.detach().clone() for tensor in changed]
        with torch.random.fork_rng(devices=[]), self:
            values = function()
        with torch.no_grad():
            for tensor, value in zip(changed, before, strict=True):
                tensor.copy_(value)
        return values

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, recorded in self.calls:
            for old, new in zip(recorded, _tensors(function(*args, **kwargs)), strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in LOOKS:
            raise RuntimeError(f"the host looks at a value while capturing: {function}")
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, _tensors(result)))
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
