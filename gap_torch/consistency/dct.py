"""Deep co-training as in SSL4MIS: one network, and a turned image. The paper's method is in `dct_views`."""

import torch
from torch import Tensor, nn

from ..losses import at_least_float32, check_classes
from .method import Augmentation, Batch, Method, Outputs, Views, logits_of, one_each, unlabelled_of

PLANE = (2, 3)
"""The axes in which images are turned: in space, those of X and Y."""


class DCT(Method):
    """What SSL4MIS calls deep co-training: the prediction on a turned image is to be the turned prediction.

    There is one network. R turns by k quarters of a circle in the plane of the first two axes, with one k from {0, 1,
    2, 3} for the whole batch. With p = f(u), p' = f(R u), and sg x for x without a gradient:

        loss = 1/2 [ mean (sg p' - R p)^2 + mean (p' - sg R p)^2 ]       over batch, classes and pixels

    Images that are not square in that plane are turned by 0 or 2 quarters. SSL4MIS has it in 2D alone.

    It is not the paper's method, which has two networks: that is `ViewsDCT`.

    Args:
        weak: weak augmentation of images (B, C, *spatial).

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import Batch, DCT
        >>> model = torch.nn.Conv2d(1, 3, kernel_size=1)
        >>> method = DCT(weak=lambda images: images.flip(-1))
        >>> views = method.prepare(model, Batch(torch.rand(2, 1, 8, 8)))
        >>> method.loss(model, views).backward()
    """

    def __init__(self, weak: Augmentation) -> None:
        super().__init__()
        self.weak = weak

    @torch.no_grad()
    def prepare(self, model: nn.Module, batch: Batch) -> Views:
        """Weak views of the unlabelled images, and the same views turned; `fixed` is k, 0-dim, on their device."""
        weak = self.weak(unlabelled_of(batch))
        quarters = self.draw(weak.device)
        return Views((weak, turned(weak, quarters)), fixed=quarters)

    def draw(self, device: torch.device) -> Tensor:
        """A random k, 0-dim int64 on `device`."""
        return torch.randint(4, (), device=device)

    def compare(self, outputs: tuple[Outputs, ...], views: Views) -> Tensor:
        """The squared difference of the two predictions.

        Raises:
            ValueError: logits of one class.
        """
        upright, p = (at_least_float32(check_classes(logits_of(each))).softmax(dim=1) for each in one_each(outputs, 2))
        turned_p = turned(upright, views.fixed)
        return ((p.detach() - turned_p).square().mean() + (p - turned_p.detach()).square().mean()) / 2


def turned(images: Tensor, quarters: Tensor) -> Tensor:
    """`images` (B, C, H, W, ...) turned in the plane of H and W; where H and W differ, by half turns alone.

    Args:
        images: tensor of any dtype.
        quarters: number of quarters of a circle, 0 to 3, 0-dim on the device of `images`: the host does not read it.
    """
    height, width = (images.shape[axis] for axis in PLANE)
    images = torch.where(quarters >= 2, images.rot90(2, PLANE), images)
    return images if height != width else torch.where(quarters % 2 == 1, images.rot90(1, PLANE), images)
