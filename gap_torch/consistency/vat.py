"""Virtual Adversarial Training (Miyato et al., 2018) for segmentation."""

import math

import torch
from torch import Tensor, nn

from ..batchnorm import frozen_running_stats
from ..losses import at_least_float32, soft_dice_loss
from .divergence import kl_divergence
from .method import Augmentation, Batch, Method, Outputs, Views, logits_of, only, unlabelled_of
from .targets import Mode, check_mode, in_mode, probabilities
from .thresholds import Threshold, as_threshold


class VAT(Method):
    """Within a small radius around the image the prediction is to stay the same, even where it would change most.

    r_adv = argmax over ||r|| <= radius of KL(f(u) || f(u + r)), approximated by power iteration: from a random
    direction d on, d <- the gradient of KL(f(u) || f(u + xi d)), normalised. f(u) stays fixed throughout.

    `radius` and `xi` are root mean squares over the values of each image, in units of its intensities. In the paper
    they are L2 norms of a whole image. Such a norm allows less to each pixel the more pixels there are, and means
    different things for a slice, a larger slice and a volume. An L2 norm of x on an image of n values is a radius of x
    / sqrt(n); the defaults are the customary norms of 6 and 10 on 256 x 256 slices. `xi` isn't as small as in the
    paper, for in float32 the difference of two nearly equal predictions is noise, and in bfloat16 all the more.

    Args:
        weak: weak augmentation of images (B, C, *spatial).
        radius: size of the perturbation that the model is to resist.
        xi: size of the perturbation that the power iteration tries out.
        iterations: number of power iterations, 1 or more; each is a forward and a backward pass.
        tau: least confidence of f(u) for a pixel to count, or a threshold that adapts; None for every pixel. Pixels
            that don't count are in the mean as zeros, as in `losses.cross_entropy`.
        mode: the model's mode for f(u) and in the power iteration (`targets.Mode`), whose passes leave running
            statistics alone. With "train" dropout can outweigh `xi`.

    Raises:
        ValueError: `radius` is negative, `xi` isn't above 0, or either is not finite; `iterations` isn't an int of 1 or
            more, `tau` is outside [0, 1], or `mode` is unknown; from `compare`, `views` without a target.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import Batch, VAT
        >>> model = torch.nn.Conv2d(1, 3, kernel_size=1)
        >>> method = VAT(weak=lambda images: images.flip(-1))
        >>> views = method.prepare(model, Batch(torch.rand(2, 1, 8, 8)))
        >>> method.loss(model, views).backward()
    """

    def __init__(
        self,
        weak: Augmentation,
        radius: float = 6 / 256,
        xi: float = 10 / 256,
        iterations: int = 1,
        tau: float | Threshold | None = None,
        mode: Mode = "eval",
    ) -> None:
        super().__init__()
        check_mode(mode)
        if not 0 <= radius < math.inf:
            raise ValueError(f"radius must be at least 0 and finite, got {radius}.")
        if not 0 < xi < math.inf:
            raise ValueError(f"xi must be above 0 and finite, got {xi}.")
        if not (isinstance(iterations, int) and iterations >= 1):
            raise ValueError(f"iterations must be an int of 1 or more, got {iterations}.")
        self.weak, self.radius, self.xi, self.iterations, self.mode = weak, radius, xi, iterations, mode
        self.threshold = None if tau is None else as_threshold(tau)

    @torch.no_grad()
    def prepare(self, model: nn.Module, batch: Batch) -> Views:
        """u + r_adv for the weak views u of the unlabelled images, and the probabilities f(u)."""
        u = self.weak(unlabelled_of(batch))
        target = probabilities(model, u, self.mode)
        confident = None if self.threshold is None else self.threshold(target)
        radius, xi = self._sizes(u)
        adversarial = u + radius * self._worst_direction(model, u, target, xi)
        return Views((adversarial,), target, confident)

    def compare(self, outputs: tuple[Outputs, ...], views: Views) -> Tensor:
        """Mean over the pixels of KL(f(u) || f(u + r_adv))."""
        each = kl_divergence(logits_of(only(outputs)), views.target)
        return each.mean() if views.mask is None else torch.where(views.mask, each, 0.0).mean()

    def _worst_direction(self, model: nn.Module, u: Tensor, target: Tensor, xi: float) -> Tensor:
        d = _normalised(self._start(u))
        with in_mode(model, self.mode), frozen_running_stats(model):
            for _ in range(self.iterations):
                d = _normalised(self._gradient(model, u + xi * d, target))
        return d

    @torch.enable_grad()
    def _gradient(self, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        """Gradient of the divergence from `target` with respect to `images` alone: no parameter gets one."""
        images = images.detach().requires_grad_()
        return torch.autograd.grad(self._divergence(logits_of(model(images)), target), images)[0]

    def _sizes(self, u: Tensor) -> tuple[float, float]:
        """Radius and xi as root mean squares."""
        return self.radius, self.xi

    def _start(self, u: Tensor) -> Tensor:
        """The first direction, of any length."""
        return torch.randn_like(u)

    def _divergence(self, logits: Tensor, target: Tensor) -> Tensor:
        """The divergence whose gradient is followed: a sum, for a mean over so many pixels would vanish in float16."""
        return kl_divergence(logits, target).sum()


class DiceVAT(VAT):
    """VAT as in SS-Net (Wu et al., 2022) and codes that descend from it: the divergence is the soft Dice loss.

    Dice over batch and space, mean over the classes, weighs a small organ as much as the background. Those codes also
    have a start that is uniform in each value, the model in training mode throughout, and L2 norms of a whole image,
    which mean more to each pixel the fewer pixels there are. SS-Net takes the labelled images too, and in 3D a Dice of
    both classes at once; here the images are unlabelled, and the Dice is the same in 2D and 3D.

    Args:
        weak: weak augmentation of images (B, C, *spatial).
        radius: L2 norm of the perturbation that the model is to resist; None for 6 in 2D and 10 in 3D.
        xi: L2 norm of the perturbation that the power iteration tries out.
        iterations: number of power iterations.
        mode: as for `VAT`.

    Raises:
        ValueError: as for `VAT`.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import Batch, DiceVAT
        >>> model = torch.nn.Conv2d(1, 3, kernel_size=1)
        >>> method = DiceVAT(weak=lambda images: images.flip(-1), radius=0.5)
        >>> views = method.prepare(model, Batch(torch.rand(2, 1, 8, 8)))
        >>> method.loss(model, views).backward()
    """

    def __init__(
        self,
        weak: Augmentation,
        radius: float | None = None,
        xi: float = 10.0,
        iterations: int = 1,
        mode: Mode = "train",
    ) -> None:
        super().__init__(weak, 6.0 if radius is None else radius, xi, iterations, mode=mode)
        self.radius_in_3d = 10.0 if radius is None else radius

    def compare(self, outputs: tuple[Outputs, ...], views: Views) -> Tensor:
        """Soft Dice loss between f(u) and f(u + r_adv)."""
        assert views.target is not None
        return soft_dice_loss(logits_of(only(outputs)), views.target)

    def _sizes(self, u: Tensor) -> tuple[float, float]:
        root = math.sqrt(u[0].numel())
        return (self.radius if u.ndim == 4 else self.radius_in_3d) / root, self.xi / root

    def _start(self, u: Tensor) -> Tensor:
        return torch.rand_like(u) - 0.5

    def _divergence(self, logits: Tensor, target: Tensor) -> Tensor:
        return soft_dice_loss(logits, target) * logits[:, 0].numel()


def _normalised(d: Tensor) -> Tensor:
    """`d` (B, ...) with a root mean square of 1 in each sample; zeros stay zeros."""
    over, tiny = tuple(range(1, d.ndim)), torch.finfo(torch.float32).tiny
    exact = at_least_float32(d)
    unit = exact / exact.abs().amax(over, keepdim=True).clamp(min=tiny)  # its squares don't underflow
    return (unit / unit.square().mean(over, keepdim=True).sqrt().clamp(min=tiny)).to(d.dtype)
