"""Deep co-training (Qiao et al., ECCV 2018): two networks, each to resist the other's adversarial examples."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batchnorm import frozen_running_stats
from ..losses import at_least_float32, check_classes, soft_cross_entropy
from .method import Augmentation, Batch, Outputs, Views, all_images, logits_of, one_each, unlabelled_of
from .targets import without_dropout
from .twins import TwinMethod, disagreement, twins


class ViewsDCT(TwinMethod):
    """Deep co-training as in the paper: two networks agree, and resist each other's adversarial examples.

    With p_1 and p_2 the predictions of two networks of different initial weights, H the entropy, u unlabelled images,
    x labelled and unlabelled ones, y their labels, or the network's own classes where there are none:

        L_cot = H((p_1 + p_2) / 2) - (H(p_1) + H(p_2)) / 2                on u: Jensen-Shannon's divergence, in nats
        g_i(x) = x + radius sign(grad_x CE(p_i(x), y))
        L_dif = CE(sg p_1(x), p_2(g_1(x))) + CE(sg p_2(x), p_1(g_2(x)))
        loss = cot L_cot + dif L_dif

    The p_i(x) of L_dif are targets, fixed at theta. The paper makes the g_i in eval mode. Here the model has no second
    network in eval mode, so the g_i are made with batch norm in its own mode, without dropout; running statistics stay
    as they are. The paper gives each network labelled images in an order of its own; here both networks get the same
    order.

    The model returns (logits of f_1, logits of f_2) in training mode, and f_1's alone in eval mode.

    Args:
        weak: weak augmentation of images (B, C, *spatial).
        radius: size of the adversarial change of each pixel, in units of the image's intensities.
        cot: weight of L_cot.
        dif: weight of L_dif.

    Raises:
        ValueError: `radius`, `cot` or `dif` is negative or not finite; from `prepare` and `compare`, a model without a
            second network's logits, or logits of one class.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import Batch, ViewsDCT
        >>> class Twins(torch.nn.Sequential):  # (logits of f_1, logits of f_2)
        ...     def forward(self, images):
        ...         first, second = super().forward(images).chunk(2, dim=1)
        ...         return (first, second) if self.training else first
        >>> model = Twins(torch.nn.Conv2d(1, 2 * 3, kernel_size=1))
        >>> method = ViewsDCT(weak=lambda images: images.flip(-1))
        >>> views = method.prepare(model, Batch(torch.rand(2, 1, 8, 8)))
        >>> method.loss(model, views).backward()
    """

    def __init__(self, weak: Augmentation, radius: float = 0.02, cot: float = 10.0, dif: float = 0.5) -> None:
        super().__init__()
        for name, value in {"radius": radius, "cot": cot, "dif": dif}.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {value}.")
        self.weak, self.radius, self.cot, self.dif = weak, radius, cot, dif

    @torch.no_grad()
    def prepare(self, model: nn.Module, batch: Batch) -> Views:
        """Weak views u of the unlabelled images, g_1(x) and g_2(x); `fixed` are p_1(x) and p_2(x).

        Labelled images come first in x. Of f_2 no output for g_2(x) is needed.
        """
        u = self.weak(unlabelled_of(batch))
        x = all_images(batch, u)
        labels = None if batch.labelled is None else batch.labels
        with without_dropout(model), frozen_running_stats(model), torch.enable_grad():
            x = x.detach().requires_grad_()
            logits = [at_least_float32(check_classes(each)) for each in twins(model(x))]
            adversarial = [self._adversarial(x, each, labels) for each in logits]
        torch.clear_autocast_cache()  # an autocast region around this and the loss would reuse casts of another graph
        self.disagreement = disagreement(*(each[len(x) - len(u) :].argmax(dim=1) for each in logits))
        fixed = tuple(each.detach().softmax(dim=1) for each in logits)
        return Views((u, *adversarial), fixed=fixed, attached=(True, True, False))

    def compare(self, outputs: tuple[Outputs, ...], views: Views) -> Tensor:
        """cot L_cot + dif L_dif."""
        on_u, on_first, on_second = one_each(outputs, 3)
        p_first, p_second = views.fixed
        difference = soft_cross_entropy(twins(on_first)[1], p_first) + soft_cross_entropy(
            logits_of(on_second), p_second
        )
        return self.cot * jensen_shannon(*twins(on_u)) + self.dif * difference

    def _adversarial(self, x: Tensor, logits: Tensor, labels: Tensor | None) -> Tensor:
        """Adversarial examples, for the network that made `logits`, around `x`, whose first images have `labels`."""
        target = logits.detach().argmax(dim=1)
        if labels is not None:
            target = torch.cat([labels, target[len(labels) :]])
        loss = F.cross_entropy(logits, target, reduction="sum")  # a mean over so many pixels would vanish in float16
        (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)  # for the other network
        return (x + self.radius * gradient.sign()).detach()


def jensen_shannon(logits: Tensor, others: Tensor) -> Tensor:
    """H((p + q) / 2) - (H(p) + H(q)) / 2 of two softmaxes, mean over pixels: 0 at agreement, at most ln 2.

    Args:
        logits: logits of p, (B, K, *spatial), any floating dtype; computed in float32 at least.
        others: logits of q, of the same shape. Gradients reach both.

    Returns:
        0-dim tensor, in nats.

    Raises:
        ValueError: logits of one class.
    """
    log_p, log_q = (at_least_float32(check_classes(each)).log_softmax(dim=1) for each in (logits, others))
    log_mean = torch.logaddexp(log_p, log_q) - math.log(2)
    return (log_p.exp() * (log_p - log_mean) + log_q.exp() * (log_q - log_mean)).sum(dim=1).mean() / 2
