"""SASSNet: shape-aware semi-supervised segmentation (Li, Zhang and He, MICCAI 2020)."""

import torch
from torch import Tensor, nn

from .adversary import Adversary
from .distance_head import DistanceMethod, logits_and_distances
from .method import Augmentation, Batch, Outputs, Views, all_images, only, unlabelled_of
from .targets import layers_in_eval_mode


class SASSNet(DistanceMethod):
    """To a discriminator, signed distances of unlabelled images are to look like those of labelled images.

    loss = CE(D(z_u, u), labelled), with the discriminator D fixed; D's step is that of `DAN`. Labels train as
    `DistanceMethod` says. The gradient of `loss` reaches the head of z and the layers before it, not the head of the
    logits.

    As in the authors' code (LA, one class), whose loss of the distances is the squared difference; the paper's product
    form is not used there. For several classes there is no public code: D sees K - 1 maps at once.

    Args:
        adversary: holds the discriminator, which takes maps of K - 1 channels.
        weak: weak augmentation of images (B, C, *spatial).
        distance_weight: weight of the squared difference of the distances in the labelled loss.

    Raises:
        ValueError: `distance_weight` is negative or not finite; from `compare`, outputs without signed distances.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import Adversary, Batch, Discriminator, SASSNet
        >>> class TwoHeads(torch.nn.Sequential):  # (logits, signed distances)
        ...     def forward(self, images):
        ...         logits, z = super().forward(images).split([2, 1], dim=1)
        ...         return (logits, z.tanh()) if self.training else logits
        >>> model = TwoHeads(torch.nn.Conv2d(1, 2 + 1, kernel_size=1))
        >>> adversary = Adversary(Discriminator(map_channels=1))
        >>> method = SASSNet(adversary, weak=lambda images: images.flip(-1))
        >>> labelled, unlabelled = torch.rand(2, 1, 16, 16), torch.rand(2, 1, 16, 16)
        >>> views = method.prepare(model, Batch(unlabelled))
        >>> method.loss(model, views).backward()
        >>> method.update(model, Batch(unlabelled, labelled))  # the discriminator learns
    """

    def __init__(self, adversary: Adversary, weak: Augmentation, distance_weight: float = 0.3) -> None:
        super().__init__(weak, distance_weight)
        self.adversary = adversary

    @torch.no_grad()
    def prepare(self, model: nn.Module, batch: Batch) -> Views:
        """Weak views of the unlabelled images; the target is the discriminator's class "labelled"."""
        return Views((self.weak(unlabelled_of(batch)),))

    def compare(self, outputs: tuple[Outputs, ...], views: Views) -> Tensor:
        """Cross-entropy between the discriminator's verdicts on the distances and the class "labelled"."""
        _, z = logits_and_distances(only(outputs))
        return self.adversary.loss(z, views.inputs[0])

    @torch.no_grad()
    def update(self, model: nn.Module, batch: Batch) -> None:
        """The discriminator's step.

        Raises:
            ValueError: `batch` has no labelled images.
        """
        weak = self.weak(unlabelled_of(batch))
        images = all_images(batch, weak)
        with layers_in_eval_mode(model):
            outputs = model(images)
        torch.clear_autocast_cache()  # as in `targets.probabilities`
        _, z = logits_and_distances(outputs)
        self.adversary.step(z, images, len(images) - len(weak))

    def logged(self) -> dict[str, Tensor]:
        """The discriminator's accuracy, 0.5 being a guess."""
        return {"discriminator": self.adversary.accuracy.clone()}
