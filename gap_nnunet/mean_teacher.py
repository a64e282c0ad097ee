"""Mean Teacher (Tarvainen and Valpola, 2017) in nnU-Net, with and without GAP."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gap_torch.consistency import Batch, Method, Outputs, Teacher, Views

from .depths import listed, summed
from .gap import WithGAP
from .heads import Heads
from .semi_supervised import SemiSupervisedTrainer


class DeepMeanTeacher(Method):
    """In every resolution the student is to say of the strong view what its moving average says of the weak one.

    Args:
        teacher: the moving average of the network.
        heads: what the outputs mean.
        weights: of each resolution.
    """

    teacher: Teacher

    def __init__(self, teacher: Teacher, heads: Heads, weights: Sequence[float]) -> None:
        super().__init__()
        self.teacher, self.heads, self.weights = teacher, heads, weights

    @torch.no_grad()
    def prepare(self, model: nn.Module, batch: Batch) -> Views:
        """Of `batch.unlabelled`, both views behind each other, (B, 2C, *spatial)."""
        weak, strong = batch.unlabelled.chunk(2, dim=1)
        return Views((strong,), fixed=[self.heads.probabilities(logits) for logits in listed(self.teacher(weak))])

    def compare(self, outputs: tuple[Outputs, ...], views: Views) -> Tensor:
        (logits,) = map(listed, outputs)
        return summed(self.heads.squared, self.weights, logits, views.fixed)


class MeanTeacherTrainer(SemiSupervisedTrainer):
    """Mean Teacher. nnU-Net validates and predicts with the student, which is what is trained."""

    decay = 0.99  # of the teacher's average
    weight = 0.1  # the field's: small, and late
    ramp_up = 1.0

    def build_method(self) -> Method:
        teacher = Teacher(self.plain_network(), self.decay).eval()
        if self._do_i_compile():
            teacher.model.compile()
        return DeepMeanTeacher(teacher, self.heads(), self.depth_weights())

    def after_step(self) -> None:
        assert isinstance(self.method, DeepMeanTeacher)
        self.method.teacher.update(self.plain_network())


class MeanTeacherGAPTrainer(WithGAP, MeanTeacherTrainer):
    """Mean Teacher with GAP."""
