"""Deep adversarial network (Zhang et al., MICCAI 2017), as in SSL4MIS."""

import torch
from torch import Tensor, nn

from ..losses import at_least_float32, check_classes
from .adversary import Adversary
from .method import Augmentation, Batch, Method, Outputs, Views, all_images, logits_of, only, unlabelled_of
from .targets import probabilities


class DAN(Method):
    """To a discriminator, predictions on unlabelled images are to look like predictions on labelled images.

    loss = CE(D(softmax(f(u)), u), labelled), with the discriminator D fixed. After each optimizer step D takes a step
    of its own, on the model's new predictions, in eval mode, on labelled and unlabelled images.

    As `train_adversarial_network_2D.py` of SSL4MIS has it: the paper's own network, of 2017, is not public. There the
    loss and D's step take the same augmented images; here D's step draws another weak view of the unlabelled images.

    Args:
        adversary: holds the discriminator, which takes maps of K channels.
        weak: weak augmentation of images (B, C, *spatial).

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import DAN, Adversary, Batch, Discriminator
        >>> model = torch.nn.Conv2d(1, 3, kernel_size=1)
        >>> adversary = Adversary(Discriminator(map_channels=3))
        >>> method = DAN(adversary, weak=lambda images: images.flip(-1))
        >>> labelled, unlabelled = torch.rand(2, 1, 16, 16), torch.rand(2, 1, 16, 16)
        >>> views = method.prepare(model, Batch(unlabelled))
        >>> method.loss(model, views).backward()
        >>> method.update(model, Batch(unlabelled, labelled))  # the discriminator learns
    """

    def __init__(self, adversary: Adversary, weak: Augmentation) -> None:
        super().__init__()
        self.adversary, self.weak = adversary, weak

    @torch.no_grad()
    def prepare(self, model: nn.Module, batch: Batch) -> Views:
        """Weak views of the unlabelled images; the target is the discriminator's class "labelled"."""
        return Views((self.weak(unlabelled_of(batch)),))

    def compare(self, outputs: tuple[Outputs, ...], views: Views) -> Tensor:
        """Cross-entropy between the discriminator's verdicts on the predictions and the class "labelled"."""
        logits = check_classes(logits_of(only(outputs)))
        return self.adversary.loss(at_least_float32(logits).softmax(dim=1), views.inputs[0])

    @torch.no_grad()
    def update(self, model: nn.Module, batch: Batch) -> None:
        """The discriminator's step.

        Raises:
            ValueError: `batch` has no labelled images.
        """
        weak = self.weak(unlabelled_of(batch))
        images = all_images(batch, weak)
        self.adversary.step(probabilities(model, images, "eval"), images, len(images) - len(weak))

    def logged(self) -> dict[str, Tensor]:
        """The discriminator's accuracy, 0.5 being a guess."""
        return {"discriminator": self.adversary.accuracy.clone()}
