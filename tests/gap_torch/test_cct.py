"""CCT: auxiliary decoders learn what the main one says, which learns nothing from them."""

import pytest
import torch
from torch import Tensor, nn

from gap_torch.consistency import CCT, Batch, ChannelDropout, FeatureDrop, FeatureNoise, MedicalCCT, Views
from gap_torch.losses import ce_dice_loss, mean_squared, soft_cross_entropy


def _identity(images: Tensor) -> Tensor:
    return images


class Decoders(nn.Module):
    """An encoder, a main decoder, and in training mode three more behind perturbed features."""

    def __init__(self, classes: int = 3, dims: int = 2) -> None:
        super().__init__()
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        self.encoder = nn.Sequential(conv(1, 4, 3, padding=1), nn.ReLU(), nn.Dropout(0.2))
        self.main = conv(4, classes, 1)
        self.others = nn.ModuleList(
            nn.Sequential(perturb, conv(4, classes, 1)) for perturb in (FeatureNoise(), FeatureDrop(), ChannelDropout())
        )

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        z = self.encoder(images)
        return (self.main(z), *(decoder(z) for decoder in self.others)) if self.training else self.main(z)


@pytest.mark.parametrize(("classes", "spatial"), [(2, (6, 7)), (5, (4, 5, 6))])
def test_the_target_is_the_main_decoders_prediction(classes: int, spatial: tuple[int, ...]) -> None:
    model, images = Decoders(classes, len(spatial)).train(), torch.randn(2, 1, *spatial)
    views = CCT(lambda x: x.flip(-1)).prepare(model, Batch(images))
    assert torch.equal(views.inputs[0], images.flip(-1))
    assert model.training
    with torch.no_grad():
        torch.testing.assert_close(views.target, model.eval()(images.flip(-1)).softmax(1))


@pytest.mark.parametrize("loss", [mean_squared, soft_cross_entropy])
def test_the_loss_is_the_mean_over_the_auxiliary_decoders(loss) -> None:
    main, *others = torch.randn(4, 2, 3, 5, 5, dtype=torch.float64)
    target = torch.randn(2, 3, 5, 5, dtype=torch.float64).softmax(1)
    value = CCT(_identity, loss=loss).compare(((main, *others),), Views((main,), target))
    torch.testing.assert_close(value, sum(loss(other, target) for other in others) / 3)


def test_decoders_that_agree_cost_nothing() -> None:
    logits = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    views = Views((logits,), logits.softmax(1))
    assert CCT(_identity).compare(((torch.randn_like(logits), logits, logits + 1),), views).item() < 1e-15


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_main_decoder_gets_no_gradient(mode) -> None:
    model = Decoders()
    method = CCT(_identity, mode=mode)
    views = method.prepare(model, Batch(torch.randn(2, 1, 6, 6)))
    assert not views.target.requires_grad
    method.loss(model, views).backward()
    assert all(p.grad is None for p in model.main.parameters())
    assert all(p.grad is not None for p in [*model.encoder.parameters(), *model.others.parameters()])


def test_labels_supervise_the_main_decoder_alone() -> None:
    model, images, labels = Decoders(), torch.randn(2, 1, 6, 6), torch.randint(3, (2, 6, 6))
    outputs = model(images)
    loss = CCT(_identity).labelled_loss(ce_dice_loss, outputs, labels)
    torch.testing.assert_close(loss, ce_dice_loss(outputs[0], labels))
    loss.backward()
    assert all(p.grad is None for p in model.others.parameters())


def test_a_model_without_them_is_an_error() -> None:
    model = nn.Conv2d(1, 3, 1)
    method = CCT(_identity)
    with pytest.raises(ValueError, match="auxiliary"):
        method.loss(model, method.prepare(model, Batch(torch.randn(2, 1, 4, 4))))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="mode"):
        CCT(_identity, mode="test")


@pytest.mark.parametrize("loss", [mean_squared, soft_cross_entropy])
def test_the_medical_variant_compares_with_the_main_prediction_of_the_same_pass(loss) -> None:
    main, *others = torch.randn(4, 2, 3, 5, 5, dtype=torch.float64)
    method = MedicalCCT(_identity, loss)
    value = method.compare(((main, *others),), method.prepare(nn.Identity(), Batch(main)))
    torch.testing.assert_close(value, sum(loss(other, main.softmax(1)) for other in others) / 3)


def test_in_the_medical_variant_all_decoders_learn_from_each_other_and_from_labels() -> None:
    model, images, labels = Decoders(), torch.randn(2, 1, 6, 6), torch.randint(3, (2, 6, 6))
    method = MedicalCCT(lambda x: x.flip(-1))
    views = method.prepare(model, Batch(images))
    assert torch.equal(views.inputs[0], images.flip(-1))
    assert views.target is None
    method.loss(model, views).backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()
    outputs = model(images)
    loss = method.labelled_loss(ce_dice_loss, outputs, labels)
    torch.testing.assert_close(loss, sum(ce_dice_loss(logits, labels) for logits in outputs) / 4)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_medical_variant_wants_the_other_decoders_too() -> None:
    logits = torch.randn(2, 3, 4, 4)
    for ask in (
        lambda: MedicalCCT(_identity).compare((logits,), Views((logits,))),
        lambda: MedicalCCT(_identity).labelled_loss(ce_dice_loss, logits, logits.argmax(1)),
    ):
        with pytest.raises(ValueError, match="auxiliary"):
            ask()
