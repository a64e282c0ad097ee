"""What records a step and replays it: a CUDA graph."""

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

Values = dict[str, Tensor]


class Recorder(Protocol):
    """What records a step: a CUDA graph."""

    def rehearse(self, function: Callable[[], Values], watch: bool) -> tuple[Values, str | None]:
        """Call `function` as it is. Returns what it does, and if to `watch` has shown it, why it can't be recorded."""

    def record(self, function: Callable[[], Values]) -> Values:
        """Record `function`; what it returns has values after a `replay`. RuntimeError where that fails."""

    def replay(self) -> None:
        """Do all that was recorded again."""


class CudaGraph:
    """A recorder for CUDA."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.side = torch.cuda.Stream(device)  # nothing can be captured on the default one
        self.graph: torch.cuda.CUDAGraph | None = None

    def rehearse(self, function: Callable[[], Values], watch: bool) -> tuple[Values, str | None]:
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        watching: AbstractContextManager[list[str]] = waits_of_the_host() if watch else nullcontext([])
        with torch.cuda.stream(self.side), watching as waits:
            values = function()
        torch.cuda.current_stream(self.device).wait_stream(self.side)
        return values, waits[0] if waits else None

    def record(self, function: Callable[[], Values]) -> Values:
        gc.collect()  # an earlier run's graph may wait for it, with all its memory
        torch.cuda.synchronize(self.device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.side):
            return function()

    def replay(self) -> None:
        assert self.graph is not None
        self.graph.replay()


@contextmanager
def waits_of_the_host() -> Iterator[list[str]]:
    """Where within the context the host waits for the device, which it can't while a graph is captured.

    A capture that fails leaves torch in disorder: better to know before.
    """
    waits: list[str] = []
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            waits.append(f"the host waits for the device at {warning.filename}:{warning.lineno}")
        elif "prototype feature" not in str(warning.message):  # what torch says of the mode itself
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
