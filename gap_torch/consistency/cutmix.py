"""CutMix (Yun et al., 2019) between the samples of a batch or of two, with targets pasted along (UniMatch's views)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class CutMix:
    """Paste a box from another sample of the batch, or of a second one, into each sample, with probability `p`.

    Works in 2D and 3D. A box holds a uniformly drawn share of the area or volume; the ratio of two of its sides lies
    between `1 / aspect` and `aspect`. A side longer than the image is cut off, which makes the box smaller. A batch of
    one image has no other image to paste from and stays as it is.

    Args:
        p: probability of a box in each sample.
        share: least and greatest share of the image in the box.
        aspect: greatest ratio of two sides of the box, relative to the image's own.
        generator: source of random numbers, on the tensors' device; None for the default one.

    Raises:
        ValueError: `p` or `share` is outside [0, 1], or `aspect` is below 1 or not finite.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import CutMix
        >>> images, pseudo_label = torch.rand(4, 1, 8, 8), torch.randint(3, (4, 8, 8))
        >>> images, pseudo_label = CutMix(p=1.0)(images, pseudo_label)  # the same boxes in both
    """

    def __init__(
        self,
        p: float = 0.5,
        share: tuple[float, float] = (0.02, 0.4),
        aspect: float = 10 / 3,
        generator: torch.Generator | None = None,
    ) -> None:
        if not (0 <= p <= 1 and 0 <= share[0] <= share[1] <= 1 and 1 <= aspect < math.inf):
            raise ValueError(
                f"CutMix needs 0 <= p <= 1, 0 <= share <= 1, 1 <= aspect < inf; got {p}, {share}, {aspect}."
            )
        self.p, self.share, self.aspect, self.generator = p, share, aspect, generator

    def __call__(self, *tensors: Tensor, partners: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
        """Paste the same boxes, from the same sample, into each of `tensors` (image, pseudo-label, confidence).

        Args:
            tensors: the first is (B, C, *spatial), the others are (B, C, *spatial) or (B, *spatial).
            partners: tensors to paste from, sample i into sample i: one for each of `tensors`, of its shape. None to
                paste from `tensors` themselves, sample i - 1 into sample i.

        Returns:
            `tensors` with boxes, in new memory.

        Raises:
            ValueError: there are more or fewer partners than tensors, or one is of another shape.
        """
        if partners is None:
            partners = [t.roll(1, dims=0) for t in tensors]
        elif [t.shape for t in partners] != [t.shape for t in tensors]:
            raise ValueError(
                "CutMix needs a partner of the same shape for each tensor, got "
                f"{[(*t.shape,) for t in partners]} for {[(*t.shape,) for t in tensors]}."
            )
        image = tensors[0]
        boxes = self.boxes(image.shape[0], image.shape[2:], image.device)
        pairs = zip(tensors, partners, strict=True)
        return tuple(torch.where(_match(boxes, t, image.ndim), partner, t) for t, partner in pairs)

    def boxes(self, batch: int, spatial: tuple[int, ...], device: torch.device) -> Tensor:
        """Random boxes as a bool mask (batch, *spatial)."""
        dims = len(spatial)
        least, greatest = self.share
        share = least + (greatest - least) * self._rand(batch, 1, device=device)
        stretch = (self._rand(batch, dims, device=device) - 0.5) * math.log(self.aspect)
        stretch = (stretch - stretch.mean(dim=1, keepdim=True)).exp()
        corner = self._rand(batch, dims, device=device)
        boxes = (self._rand(batch, device=device) < self.p).view(batch, *[1] * dims)
        for dim, size in enumerate(spatial):
            side = (share[:, 0] ** (1 / dims) * stretch[:, dim] * size).clamp(max=size)
            start = corner[:, dim] * (size - side)
            centre = torch.arange(size, device=device) + 0.5
            along = (centre >= start[:, None]) & (centre < (start + side)[:, None])
            boxes = boxes & along.view(batch, *[size if d == dim else 1 for d in range(dims)])
        return boxes

    def _rand(self, *size: int, device: torch.device) -> Tensor:
        return torch.rand(size, device=device, generator=self.generator)


def _match(boxes: Tensor, tensor: Tensor, image_dims: int) -> Tensor:
    """Boxes for a tensor with a channel dimension, or without."""
    return boxes.unsqueeze(1) if tensor.ndim == image_dims else boxes
