"""FlexMatch's curriculum pseudo-labelling (Zhang et al., 2021): lower thresholds for classes that are learnt less."""

import torch
from torch import Tensor

from .thresholds import FixedThreshold, Threshold, check_momentum, check_num_classes, check_probabilities


class CurriculumThreshold(Threshold):
    """Threshold tau M(beta_c) for a pixel of predicted class c, beta_c = sigma_c / max sigma, M(x) = x / (2 - x).

    FlexMatch's sigma_c, the learning effect, counts the samples of the data set whose latest prediction is c with a
    confidence of tau or more. A memory entry for each pixel of a data set would be too much, and a count would take a
    small structure for a badly learnt one, next to a background of most pixels. So here sigma_c is the share of
    confident pixels among the pixels predicted as c, both counted with a moving average over the batches. Where all
    classes are predicted equally often, beta_c is the paper's.

    With `warm_up`, K times the share of all unconfident pixels takes the place of a smaller max sigma, as the number
    of unused samples does in the paper: thresholds are low until most pixels are confident, and begin at 0.

    A batch enters the average before its own pixels are judged. The two averages are buffers; each rank has its own.

    Args:
        num_classes: number of classes, K.
        tau: the highest threshold, of the class that is learnt best.
        momentum: momentum of the averages, which remember about 1 / (1 - momentum) batches; best an epoch.
        warm_up: whether unconfident pixels keep the thresholds low.

    Raises:
        ValueError: `num_classes` is below 2, `tau` outside [0, 1], `momentum` outside [0, 1); when called,
            probabilities of another number of classes.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import CurriculumThreshold
        >>> threshold = CurriculumThreshold(num_classes=2, tau=0.8)
        >>> mask = threshold(torch.tensor([[[0.9, 0.4], [0.1, 0.6]]]))
        >>> threshold.thresholds()  # class 0 is confident, class 1 not yet
        tensor([0.8000, 0.0000])
    """

    confident: Tensor
    """Share of the pixels that are confident and predicted as each class, (K,), float32."""
    predicted: Tensor
    """Share of the pixels that are predicted as each class, (K,), float32."""

    def __init__(self, num_classes: int, tau: float = 0.95, momentum: float = 0.99, warm_up: bool = True) -> None:
        super().__init__()
        check_num_classes(num_classes)
        check_momentum(momentum)
        self.fixed, self.momentum, self.warm_up = FixedThreshold(tau), momentum, warm_up
        self.register_buffer("confident", torch.zeros(num_classes))
        self.register_buffer("predicted", torch.zeros(num_classes))

    @torch.no_grad()
    def forward(self, probabilities: Tensor) -> Tensor:
        check_probabilities(probabilities, len(self.predicted))
        highest, label = probabilities.max(dim=1)
        confident = self.fixed(probabilities)
        self.confident.lerp_(self._shares(label, confident), 1 - self.momentum)
        self.predicted.lerp_(self._shares(label, torch.ones_like(confident)), 1 - self.momentum)
        return highest >= self.thresholds()[label]

    def thresholds(self) -> Tensor:
        """The present threshold of each class, (K,), float32."""
        tiny = torch.finfo(torch.float32).tiny  # where nothing was predicted or confident, 0 / 0 is to be 0
        sigma = self.confident / self.predicted.clamp(min=tiny)
        most = sigma.max()
        if self.warm_up:
            unused = 1 - self.confident.sum() / self.predicted.sum().clamp(min=tiny)
            most = torch.maximum(most, len(sigma) * unused)
        beta = sigma / most.clamp(min=tiny)
        return self.fixed.tau * beta / (2 - beta)

    def _shares(self, label: Tensor, mask: Tensor) -> Tensor:
        """The share of the pixels that are under `mask` and labelled with each class, (K,)."""
        index = torch.arange(len(self.predicted), device=label.device).view(-1, *[1] * (label.ndim - 1))
        held = (label.unsqueeze(1) == index) & mask.unsqueeze(1)  # `bincount` would wait for the GPU
        return (held.sum([0, *range(2, held.ndim)]) / label.numel()).to(self.predicted.dtype)
