"""A second network that follows the first: the moving average of Mean Teacher (Tarvainen and Valpola, 2017)."""

import copy

import torch
from torch import Tensor, nn

from ..tensors import by_kind, norm_dtype, to_device
from .method import Outputs


class Teacher(nn.Module):
    """A copy of `model` whose parameters are a moving average of the model's; its buffers are copies of the latest.

    theta' <- a theta' + (1 - a) theta with a = min(decay, 1 - 1 / (updates + 1)), so that the random initial weights
    leave early. Without `warm_up` a = decay, for a model whose first weights are worth keeping. The teacher is never
    trained: its parameters require no gradient and are in no optimizer.

    Parameters must be float32 or float64: in 16 bits most of a step of 1 - a = 0.01 is rounded away, and the average
    stands still. Autocast leaves them float32.

    The teacher takes over the model's training flags, and no mode (`targets.Mode`) switches a layer to training that is
    not in it: make a teacher from a model in training mode.

    Args:
        model: the model that is averaged; the teacher starts as a copy of it.
        decay: weight of the old average once it is warm, in [0, 1).
        warm_up: whether the first updates weigh more.

    Raises:
        ValueError: `decay` is outside [0, 1), or `model` has floating parameters of fewer than 32 bits.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import Teacher
        >>> student = torch.nn.Linear(1, 1)
        >>> teacher = Teacher(student, decay=0.99)
        >>> teacher.update(student)  # after each step of the student's optimizer
        >>> teacher(torch.ones(4, 1)).requires_grad
        False
    """

    updates: Tensor
    """Number of updates; on the device, so that a captured CUDA graph counts its updates too."""

    def __init__(self, model: nn.Module, decay: float = 0.99, warm_up: bool = True) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {decay}.")
        _check_precision(model)
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay, self.warm_up = decay, warm_up
        device = next(iter(self.model.parameters()), torch.empty(0)).device
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=device), persistent=False)

    def forward(self, images: Tensor) -> Outputs:
        """Outputs of the averaged model for `images`; no gradient reaches its parameters."""
        return self.model(images)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the present parameters of `model`.

        Raises:
            ValueError: parameters or buffers of `model` have other shapes than the teacher's.
        """
        _check_alike(list(self.model.parameters()), list(model.parameters()))
        _check_alike(list(self.model.buffers()), list(model.buffers()))
        self.updates += 1
        follow(self.model, model, self._keep())

    def _keep(self) -> Tensor:
        """a, 0-dim: nothing is read by the host."""
        mean_of_all = 1 - 1 / self.updates.to(norm_dtype(self.updates.device))
        return mean_of_all.clamp(max=self.decay) if self.warm_up else torch.full_like(mean_of_all, self.decay)

    def get_extra_state(self) -> Tensor:
        """The number of updates, for `state_dict`."""
        return self.updates  # under the name that it had when it was a number

    def set_extra_state(self, state: Tensor) -> None:
        """Load what `get_extra_state` returned."""
        self.updates.copy_(state)


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, keep: Tensor) -> None:
    """a <- keep a + (1 - keep) b for each parameter a of `average` and b of `model`; buffers become the model's.

    As b + keep (a - b): exactly b where `keep` is 0, and a stays what it is where the two are equal.

    Args:
        average: module that is changed in place.
        model: module of the same architecture, on the same devices.
        keep: weight of the old average in [0, 1], 0-dim: the host does not read it.
    """
    parameters = ([p.detach() for p in each.parameters()] for each in (average, model))
    buffers, latest_buffers = list(average.buffers()), list(model.buffers())
    for ours, latest in by_kind(*parameters):
        torch._foreach_sub_(ours, latest)
        torch._foreach_mul_(ours, to_device(keep, ours[0].device).to(ours[0].dtype))
        torch._foreach_add_(ours, latest)
    if buffers:
        torch._foreach_copy_(buffers, latest_buffers)


def _check_precision(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if p.is_floating_point() and p.dtype.itemsize < 4:
            raise ValueError(
                f"model must have parameters of float32 or float64, for an average of fewer bits stands still; {name} "
                f"is {p.dtype}. Under autocast they may stay float32."
            )


def _check_alike(ours: list[Tensor], theirs: list[Tensor]) -> None:
    if [t.shape for t in ours] != [t.shape for t in theirs]:  # which would broadcast, or be averaged halfway
        raise ValueError("model must be of the teacher's architecture: its parameters or buffers are of other shapes.")
