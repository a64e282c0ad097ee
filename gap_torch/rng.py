"""Replay of random numbers: the perturbed pass can see the dropout masks of the first pass."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RNGState:
    """State of torch's default generators at one moment.

    Take the state with `RNGState.now()` just before the first pass, and give it to `GAPWrapper.perturbed(rng=...)`.

    Examples:
        >>> import torch
        >>> from gap_torch import GAPWrapper, RNGState
        >>> model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(2, 1))
        >>> optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
        >>> inputs, state = torch.ones(4, 2), RNGState.now()
        >>> model(inputs).square().mean().backward()
        >>> with optimizer.perturbed(model, rng=state):  # with the dropout masks of the first pass
        ...     model(inputs).square().mean().backward()
    """

    cpu: Tensor
    """State of the CPU's generator."""
    accelerators: dict[int, Tensor]
    """Index of a CUDA device -> state of its generator."""

    @classmethod
    def now(cls, devices: Sequence[torch.device | str | int] | None = None) -> "RNGState":
        """The current state.

        Args:
            devices: CUDA devices whose generators to read; None for the current device, if there is one. Reading
                a generator's state does not wait for the GPU's work.

        Returns:
            The state of the CPU's generator and of those of `devices`.
        """
        accelerators = {}
        if torch.cuda.is_available():
            for device in [torch.cuda.current_device()] if devices is None else devices:
                index = device if isinstance(device, int) else torch.device(device).index
                index = torch.cuda.current_device() if index is None else index
                accelerators[index] = torch.cuda.get_rng_state(index)
        return cls(torch.get_rng_state(), accelerators)


@contextmanager
def replayed(state: RNGState) -> Iterator[None]:
    """Within the context the default generators start from `state`; afterwards they are as before."""
    with torch.random.fork_rng(devices=list(state.accelerators)):
        torch.set_rng_state(state.cpu)
        for index, accelerator in state.accelerators.items():
            torch.cuda.set_rng_state(accelerator, index)
        yield
