"""FreeMatch's self-adaptive thresholds (Wang et al., 2022): they follow how confident the model has become.

The thresholds alone: FreeMatch's other half, a loss for fairness between the classes, is not here.
"""

import torch
from torch import Tensor

from .thresholds import Threshold, check_momentum, check_num_classes, check_probabilities


class SelfAdaptiveThreshold(Threshold):
    """Threshold tau_t p~_t(c) / max p~_t for a pixel of predicted class c.

    tau_t is the moving average of the highest probability, p~_t(c) that of the probability of class c; both begin at 1
    / K. A batch enters the averages before its own pixels are judged, and each pixel is a sample. As in the paper
    p~_t(c) grows with the size of a class as well as with its certainty, so that the pixels of small structures count
    early. A batch's mean that isn't finite is left out.

    The averages are buffers; each rank has its own.

    Args:
        num_classes: number of classes, K.
        momentum: momentum of the averages over batches, the paper's lambda.

    Raises:
        ValueError: `num_classes` is below 2, `momentum` outside [0, 1); when called, probabilities of another number of
            classes.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import SelfAdaptiveThreshold
        >>> threshold = SelfAdaptiveThreshold(num_classes=2, momentum=0.9)
        >>> mask = threshold(torch.tensor([[[0.9, 0.6], [0.1, 0.4]]]))
        >>> threshold.thresholds()  # from 1 / K on
        tensor([0.5250, 0.4750])
    """

    overall: Tensor
    """tau_t, 0-dim, float32."""
    local: Tensor
    """p~_t, (K,), float32."""

    def __init__(self, num_classes: int, momentum: float = 0.999) -> None:
        super().__init__()
        check_num_classes(num_classes)
        check_momentum(momentum)
        self.momentum = momentum
        self.register_buffer("overall", torch.tensor(1 / num_classes))
        self.register_buffer("local", torch.full((num_classes,), 1 / num_classes))

    @torch.no_grad()
    def forward(self, probabilities: Tensor) -> Tensor:
        check_probabilities(probabilities, len(self.local))
        highest, label = probabilities.max(dim=1)
        self._update_average(self.overall, highest.mean())
        self._update_average(self.local, probabilities.mean([0, *range(2, probabilities.ndim)]))
        return highest >= self.thresholds()[label]

    def thresholds(self) -> Tensor:
        """The present threshold of each class, (K,), float32."""
        return self.overall * self.local / self.local.max()

    def _update_average(self, average: Tensor, latest: Tensor) -> None:
        finite = torch.where(latest.isfinite(), latest, average)  # a nan would never leave the average
        average.lerp_(finite.to(average.dtype), 1 - self.momentum)
