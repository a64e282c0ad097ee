"""SASSNet: its discriminator sees distances, of unlabelled images through them alone, and of all in eval mode."""

import pytest
import torch
from torch import Tensor, nn

from gap_torch.consistency import DTC, Adversary, Batch, SASSNet
from gap_torch.losses import ce_dice_loss


class Network(nn.Module):
    """A trunk with batch norm and dropout, a head, and in training mode one of distances."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.head, self.distances = nn.Conv2d(4, classes, 1), nn.Conv2d(4, classes - 1, 1)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        features = self.trunk(images)
        return (self.head(features), self.distances(features).tanh()) if self.training else self.head(features)


class Mean(nn.Module):
    """A discriminator of the means of map and image, which keeps what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, maps: Tensor, images: Tensor) -> Tensor:
        self.seen.append((maps.detach(), images))
        return torch.stack([maps.flatten(1).mean(1), images.flatten(1).mean(1)], dim=1) * self.scale


def _method() -> tuple[SASSNet, Mean]:
    discriminator = Mean()
    return SASSNet(Adversary(discriminator), lambda images: images.flip(-1)), discriminator


def test_the_loss_reaches_the_trunk_and_the_distances_not_the_head() -> None:
    (method, discriminator), model, images = _method(), Network(), torch.rand(2, 1, 5, 6)
    views = method.prepare(model, Batch(images, torch.rand(2, 1, 5, 6)))
    outputs = model(views.inputs[0])
    method.compare((outputs,), views).backward()
    ((maps, shown),) = discriminator.seen
    assert torch.equal(maps, outputs[1])
    assert torch.equal(shown, images.flip(-1))
    assert model.head.weight.grad is None
    assert all(p.grad.any() for p in (model.trunk[0].weight, model.distances.weight))


def test_its_step_sees_the_distances_of_all_images_as_in_eval_mode() -> None:
    (method, discriminator), model = _method(), Network()
    model(torch.rand(4, 1, 5, 6))  # statistics that are not the initial ones
    before, flags = [v.clone() for v in model.state_dict().values()], [m.training for m in model.modules()]
    labelled, unlabelled = torch.rand(1, 1, 5, 6), torch.rand(2, 1, 5, 6)
    method.update(model, Batch(unlabelled, labelled))
    assert all(map(torch.equal, model.state_dict().values(), before))
    assert [m.training for m in model.modules()] == flags
    ((maps, shown),) = discriminator.seen
    assert torch.equal(shown, torch.cat([labelled, unlabelled.flip(-1)]))
    with torch.no_grad():
        torch.testing.assert_close(maps, model.distances(model.trunk.eval()(shown)).tanh())
    assert method.logged().keys() == {"discriminator"}


def test_labels_train_it_as_dtc() -> None:
    (method, _), outputs = _method(), (torch.randn(2, 3, 4, 4), torch.rand(2, 2, 4, 4))
    labels = torch.randint(3, (2, 4, 4))
    theirs = DTC(lambda images: images).labelled_loss(ce_dice_loss, outputs, labels)
    assert torch.equal(method.labelled_loss(ce_dice_loss, outputs, labels), theirs)


def test_errors() -> None:
    (method, _), model = _method(), Network()
    with pytest.raises(ValueError, match="behind the logits came nothing"):
        method.update(model.eval(), Batch(torch.rand(1, 1, 4, 4), torch.rand(1, 1, 4, 4)))
    with pytest.raises(ValueError, match="0 of 1 are labelled"):
        method.update(model.train(), Batch(torch.rand(1, 1, 4, 4)))
    with pytest.raises(ValueError, match="distance_weight must be at least 0"):
        SASSNet(method.adversary, lambda images: images, -1.0)
