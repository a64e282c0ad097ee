"""DAN: what its discriminator is shown, and when."""

import pytest
import torch
from torch import Tensor, nn

from gap_torch.consistency import DAN, Adversary, Batch


class Recording(nn.Module):
    """A discriminator that keeps what it sees; its logits are the map's and the image's means."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.seen: list[tuple[Tensor, Tensor, bool]] = []

    def forward(self, maps: Tensor, images: Tensor) -> Tensor:
        self.seen.append((maps.detach(), images, self.training))
        return torch.stack([maps[:, 1].flatten(1).mean(1), images.flatten(1).mean(1)], dim=1) * self.scale


class Model(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 3, 1))


def _method() -> tuple[DAN, Recording]:
    discriminator = Recording()
    return DAN(Adversary(discriminator), lambda images: images.flip(-1)), discriminator


def test_it_judges_softmax_and_image_of_the_weak_view() -> None:
    (method, discriminator), model, images = _method(), Model(), torch.rand(3, 1, 5, 6)
    views = method.prepare(model, Batch(images))
    logits = torch.randn(3, 3, 5, 6, requires_grad=True)
    loss = method.compare((logits,), views)
    ((maps, shown, training),) = discriminator.seen
    torch.testing.assert_close(maps, logits.detach().softmax(1))
    assert torch.equal(shown, images.flip(-1))
    assert not training
    expected = 0.0
    for p, u in zip(logits.softmax(1), images, strict=True):
        verdict = torch.stack([p[1].mean(), u.mean()])
        expected += -(verdict[1] - verdict.exp().sum().log()).item() / 3
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_its_step_sees_the_whole_batch_anew_in_eval_mode() -> None:
    (method, discriminator), model = _method(), Model()
    labelled, unlabelled = torch.rand(1, 1, 5, 6), torch.rand(2, 1, 5, 6)
    method.update(model, Batch(unlabelled, labelled))
    ((maps, shown, training),) = discriminator.seen
    assert training
    assert torch.equal(shown, torch.cat([labelled, unlabelled.flip(-1)]))
    torch.testing.assert_close(maps, model.eval()(shown).softmax(1))
    right = torch.stack([maps[:, 1].flatten(1).mean(1) < shown.flatten(1).mean(1)]).float().squeeze(0)
    accuracy = (right[0] + (1 - right[1:]).mean()) / 2
    assert method.logged()["discriminator"].item() == pytest.approx(accuracy.item())


def test_without_labelled_images_it_can_not_learn() -> None:
    method, _ = _method()
    with pytest.raises(ValueError, match=r"0 of 2 are labelled; write Batch\(unlabelled, labelled\)"):
        method.update(Model(), Batch(torch.rand(2, 1, 5, 6)))
