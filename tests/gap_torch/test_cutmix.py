"""CutMix boxes: their size, place and partner, in 2D and 3D."""

import math

import pytest
import torch

from gap_torch.consistency import CutMix

SPATIAL = [(64, 64), (48, 96), (24, 32, 40)]


@pytest.mark.parametrize("spatial", SPATIAL)
def test_boxes_hold_the_asked_share(spatial: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    boxes = CutMix(p=1.0, share=(0.1, 0.3), aspect=1.5).boxes(500, spatial, torch.device("cpu"))
    share = boxes.flatten(1).double().mean(1)
    assert share.min() > 0.07
    assert share.max() < 0.34
    assert share.std() > 0.04


@pytest.mark.parametrize("spatial", SPATIAL)
def test_every_box_is_one_full_box(spatial: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    for box in CutMix(p=1.0).boxes(50, spatial, torch.device("cpu")):
        extents = [len(index.unique()) for index in box.nonzero(as_tuple=True)]
        assert box.sum() == torch.tensor(extents).prod()


def test_the_sides_keep_to_the_aspect() -> None:
    torch.manual_seed(2)
    boxes = CutMix(p=1.0, share=(0.1, 0.1), aspect=3.0).boxes(400, (300, 300), torch.device("cpu"))
    ratio = boxes.any(2).sum(1) / boxes.any(1).sum(1)
    assert ratio.min() > 1 / 3.1
    assert ratio.max() < 3.1
    assert ratio.max() > 2
    assert ratio.min() < 1 / 2


def test_boxes_lie_anywhere() -> None:
    torch.manual_seed(3)
    boxes = CutMix(p=1.0, share=(0.05, 0.05), aspect=1.0).boxes(1000, (32, 32), torch.device("cpu"))
    often = boxes.double().mean(0)
    assert (often[4:-4, 4:-4] > 0.02).all()  # far from the diagonals too: a corner has two places of its own
    assert (often.sum(0) > 0).all()
    assert (often.sum(1) > 0).all()
    assert often.max() < 0.2


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_a_share_p_of_the_samples_gets_a_box(p: float) -> None:
    torch.manual_seed(4)
    boxes = CutMix(p=p, share=(0.2, 0.4)).boxes(1000, (32, 32), torch.device("cpu"))
    assert abs(boxes.flatten(1).any(1).double().mean().item() - p) < 0.05


@pytest.mark.parametrize("spatial", [(16, 16), (8, 8, 8)])
def test_image_and_targets_get_the_same_boxes_from_the_same_partner(spatial: tuple[int, ...]) -> None:
    torch.manual_seed(5)
    label = torch.arange(6).view(6, *[1] * len(spatial)).expand(6, *spatial)
    image = label.unsqueeze(1).repeat(1, 2, *[1] * len(spatial)).double()
    mixed, mixed_label = CutMix(p=1.0)(image, label)
    assert torch.equal(mixed[:, 0], mixed_label.double())
    assert torch.equal(mixed[:, 1], mixed_label.double())
    for index in range(6):
        assert set(mixed_label[index].unique().tolist()) == {index, (index - 1) % 6}


@pytest.mark.parametrize("spatial", [(16, 16), (8, 8, 8)])
def test_boxes_of_a_second_batch_come_from_its_samples(spatial: tuple[int, ...]) -> None:
    torch.manual_seed(5)
    label = torch.arange(3).view(3, *[1] * len(spatial)).expand(3, *spatial)
    image = label.unsqueeze(1).repeat(1, 2, *[1] * len(spatial)).double()
    mixed, mixed_label = CutMix(p=1.0)(image, label, partners=(image + 10, label + 10))
    torch.manual_seed(5)
    boxes = CutMix(p=1.0).boxes(3, spatial, image.device)
    assert torch.equal(mixed_label, label + 10 * boxes)
    assert torch.equal(mixed, image + 10 * boxes.unsqueeze(1))


@pytest.mark.parametrize("wrong", [(torch.zeros(2, 1, 8, 8),), (torch.zeros(3, 1, 8, 8), torch.zeros(1, 8, 8))])
def test_partners_of_another_number_or_shape_are_refused(wrong: tuple[torch.Tensor, ...]) -> None:
    with pytest.raises(ValueError, match="partner of the same shape"):
        CutMix()(torch.zeros(3, 1, 8, 8), torch.zeros(3, 8, 8), partners=wrong)


def test_a_generator_decides_every_box() -> None:
    def boxes(seed: int) -> torch.Tensor:
        mix = CutMix(generator=torch.Generator().manual_seed(seed))
        return mix.boxes(8, (32, 32), torch.device("cpu"))

    assert torch.equal(boxes(0), boxes(0))
    assert not torch.equal(boxes(0), boxes(1))


@pytest.mark.parametrize(
    "bad", [{"p": 1.5}, {"share": (0.5, 0.1)}, {"aspect": 0.5}, {"aspect": math.inf}, {"aspect": math.nan}]
)
def test_bad_arguments_are_refused(bad) -> None:
    with pytest.raises(ValueError, match="CutMix needs"):
        CutMix(**bad)
