"""Deep adversarial network (Zhang et al., MICCAI 2017), as in SSL4MIS."""

import torch
from torch import Tensor, nn

from ..losses import at_least_float32, check_classes
from .adversary import Adversary
from .method import Augmentation, Batch, Method, Outputs, Views, all_images, logits_of, only, unlabelled_of
from .targets import probabilities


class DAN(Method):
    """Predictions on unlabelled images are to look, to a discriminator, like those on labelled ones.

    loss = CE(D(softmax(f(u)), u), labelled), with D fixed; after each optimizer step D takes one of its own, on what
    the model now predicts, in eval mode, on labelled and unlabelled images.

    As `train_adversarial_network_2D.py` of SSL4MIS has it: the paper's own network, of 2017, is not public. There both
    are shown the same augmented images; here D's step draws another weak view of the unlabelled ones.

    Args:
        adversary: whose discriminator takes K maps.
        weak: weak augmentation of images (B, C, *spatial).
    """

    def __init__(self, adversary: Adversary, weak: Augmentation) -> None:
        super().__init__()
        self.adversary, self.weak = adversary, weak

    @torch.no_grad()
    def prepare(self, model: nn.Module, batch: Batch) -> Views:
        """Weak views of the unlabelled images; the target is the discriminator's class "labelled"."""
        return Views((self.weak(unlabelled_of(batch)),))

    def compare(self, outputs: tuple[Outputs, ...], views: Views) -> Tensor:
        """How surely the discriminator takes the predictions for those on unlabelled images."""
        logits = check_classes(logits_of(only(outputs)))
        return self.adversary.loss(at_least_float32(logits).softmax(dim=1), views.inputs[0])

    @torch.no_grad()
    def update(self, model: nn.Module, batch: Batch) -> None:
        """The discriminator's step. Raises ValueError without labelled images."""
        weak = self.weak(unlabelled_of(batch))
        images = all_images(batch, weak)
        self.adversary.step(probabilities(model, images, "eval"), images, len(images) - len(weak))

    def logged(self) -> dict[str, Tensor]:
        """The discriminator's accuracy, 0.5 being a guess."""
        return {"discriminator": self.adversary.accuracy.clone()}
