"""A training step that is recorded once, as a CUDA graph, and then replayed: the host launches it with one call.

A graph holds what the device did, on the tensors that it did it to. So all that changes from one iteration to the next
has to reach it through tensors that stay where they are: the inputs are copied into those of the recording, the
learning rate is one of them, and random numbers follow from the seed that is set before each replay.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from segmentation import ranks
from segmentation.errors import CaptureError
from segmentation.recipe import Recipe
from segmentation.training.cuda_graph import CudaGraph, Recorder, Values
from segmentation.training.inputs import Inputs

REHEARSALS = 5
"""Ordinary iterations first: cuDNN tries its algorithms, and momentum, scales and buffers come into being."""


def obstacle(device: torch.device, recipe: Recipe) -> str | None:
    """Why the step of `recipe` can't be captured, where that is known beforehand."""
    if device.type != "cuda":
        return f"a graph is captured on CUDA alone, not on {device.type}"
    if ranks.world() > 1:
        return "several processes talk to each other in a step"
    if recipe.replay_dropout:
        return "--replay-dropout sets random numbers back within a step"
    return None


class CapturedStep:
    """`compute`, called a few times and captured then. Where the host looks at values it is called every time.

    Another graph is made where the method joins after a warm-up.

    Args:
        compute: the step (`step.Trainer.compute`).
        device: CUDA.
        recorder: makes what records it.

    Raises:
        CaptureError: when called, the capture fails all the same.
    """

    def __init__(
        self,
        compute: Callable[[Inputs, bool], Values],
        device: torch.device,
        recorder: Callable[[torch.device], Recorder] = CudaGraph,
    ) -> None:
        self.compute, self.device, self.make_recorder = compute, device, recorder
        self.given_up = False
        """Whether `compute` is called every time."""
        self.forget()

    def forget(self) -> None:
        """Start anew, with ordinary iterations."""
        self.recorder, self.rehearsals = self.make_recorder(self.device), 0
        self.joined: bool | None = None
        self.inputs: Inputs | None = None
        """Those of the recording."""
        self.values: Values = {}

    def __call__(self, inputs: Inputs, joined: bool) -> Values:
        """One iteration; what it returns is overwritten by the next."""
        if self.given_up:
            return self.compute(inputs, joined)
        if joined != self.joined:
            self.forget()
            self.joined = joined
        if self.rehearsals < REHEARSALS:
            return self._rehearse(inputs, joined)
        if self.inputs is None:
            self.inputs = Inputs(*map(Tensor.clone, inputs))
            self.values = self._record(self.inputs, joined)
        for static, latest in zip(self.inputs, inputs, strict=True):
            static.copy_(latest)
        self.recorder.replay()
        return self.values

    def _rehearse(self, inputs: Inputs, joined: bool) -> Values:
        self.rehearsals += 1
        last = self.rehearsals == REHEARSALS
        values, obstacle = self.recorder.rehearse(lambda: self.compute(inputs, joined), watch=last)
        if obstacle:
            self._give_up(obstacle)
        return values

    def _record(self, inputs: Inputs, joined: bool) -> Values:
        try:
            return self.recorder.record(lambda: self.compute(inputs, joined))
        except RuntimeError as error:
            raise CaptureError(f"capturing the step as a CUDA graph failed ({error}); run with --graph off.") from error

    def _give_up(self, why: str) -> None:
        self.forget()
        self.given_up = True
        print(f"the step is not captured as a CUDA graph, which makes it slower: {why}", file=sys.stderr, flush=True)
