"""LA's layout, what is refused in it, and random crops."""

from collections import Counter
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from segmentation.data.crops import Crops, case_path, load_cases, load_images
from segmentation.data.files import Volume, patient_of, read_list, write_case
from segmentation.errors import InputError

SHARED = Path(__file__).parents[5] / "shared" / "data"


# Reading


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    return rng.standard_normal((6, 7, 5), dtype=np.float32), rng.integers(0, 2, (6, 7, 5), dtype=np.uint8)


def test_cases_are_read_bit_for_bit_in_order(tmp_path, case):
    image, label = case
    write_case(case_path(tmp_path, "A1"), image, label)
    write_case(case_path(tmp_path, "B2"), -image, 1 - label)
    second, first = load_cases(tmp_path, ["B2", "A1"])
    assert (first.name, second.name) == ("A1", "B2")
    np.testing.assert_array_equal(first.image, image)
    np.testing.assert_array_equal(first.label, label)
    np.testing.assert_array_equal(second.image, -image)


def test_where_la_keeps_a_case(tmp_path):
    assert case_path("data/LA", "A1") == Path("data/LA/2018LA_Seg_Training Set/A1/mri_norm2.h5")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda image, label: (image[0], label[0]), r"shape \(7, 5\) where a volume \(X, Y, Z\) was expected"),
        (lambda image, label: (image, label * 0), "the label is empty"),
        (lambda image, label: (image, label * 2), "has to be one of 0, 1:"),
        (lambda image, label: (image[1:], label), "must be of one shape"),
        (lambda image, label: (abs(image), label), "not normalised"),
        (lambda image, label: (100 * image, label), "not normalised"),
        (lambda image, label: (image * 0 - 1, label), "not normalised"),
        (lambda image, label: (image * np.nan, label), "NaN"),
    ],
)
def test_a_bad_case_is_refused_by_its_file(tmp_path, case, spoil, message):
    write_case(case_path(tmp_path, "good"), *case)
    write_case(case_path(tmp_path, "bad"), *spoil(*case))
    with pytest.raises(InputError, match=rf"bad/mri_norm2\.h5: .*{message}"):
        load_cases(tmp_path, ["good", "bad"])


def test_an_image_is_read_without_its_label(tmp_path, case):
    write_case(case_path(tmp_path, "A1"), *case)
    write_case(case_path(tmp_path, "B2"), -case[0], None)
    one, two = load_images(tmp_path, ["A1", "B2"])
    np.testing.assert_array_equal(one, case[0])
    np.testing.assert_array_equal(two, -case[0])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda image: image[0], r"shape \(7, 5\) where a volume \(X, Y, Z\) was expected"),
        (abs, "not normalised"),
        (lambda image: image * np.nan, "NaN"),
    ],
)
def test_a_bad_image_is_refused_by_its_file(tmp_path, case, spoil, message):
    write_case(case_path(tmp_path, "bad"), spoil(case[0]), None)
    with pytest.raises(InputError, match=rf"bad/mri_norm2\.h5: .*{message}"):
        load_images(tmp_path, ["bad"])


def test_a_missing_case_is_refused_by_its_file(tmp_path):
    with pytest.raises(InputError, match=r"A1/mri_norm2\.h5: no such file"):
        load_cases(tmp_path, ["A1"])


def test_statistics_as_far_off_as_las_own_are_taken(tmp_path, case):
    image, label = case
    write_case(case_path(tmp_path, "bright"), image * 0.3 + 0.2, label)
    write_case(case_path(tmp_path, "wide"), image * 1.7 + 1.9, label)
    assert len(load_cases(tmp_path, ["bright", "wide"])) == 2


def test_las_lists_are_a_split(tmp_path):
    archive = SHARED / "la_1.zip"
    if not archive.is_file():
        pytest.skip(f"no LA data at {archive}")
    with ZipFile(archive) as files:
        for split in ("train", "test"):
            (tmp_path / f"{split}.list").write_bytes(files.read(f"LA/{split}.list"))
    train, test = (read_list(tmp_path / f"{split}.list") for split in ("train", "test"))
    assert (len(train), len(test)) == (80, 20)
    assert not set(train) & set(test)
    assert [patient_of(name) for name in train + test] == train + test


# Crops


def numbered(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Each voxel's number from 1 as image, and a label that follows from it and is never background."""
    image = torch.arange(1, np.prod(shape) + 1, dtype=torch.float32).view(shape)
    return image, label_of(image)


def label_of(image: torch.Tensor) -> torch.Tensor:
    return torch.where(image > 0, image % 250 + 1, 0).to(torch.uint8)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def crops_of(*shapes: tuple[int, ...], size: tuple[int, int, int]) -> Crops:
    images, labels = zip(*map(numbered, shapes), strict=True)
    return Crops([f"case{i}" for i in range(len(shapes))], images, labels, size)


shapes = st.tuples(*[st.integers(4, 9)] * 3)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10_000), size=st.tuples(*[st.integers(1, 8)] * 3))
def test_a_crop_is_one_box_of_its_volume_and_as_much_of_it_as_fits(data, seed, size):
    volumes = data.draw(st.lists(shapes, min_size=1, max_size=3))
    indices = data.draw(st.lists(st.integers(0, len(volumes) - 1), min_size=1, max_size=4))
    images, labels = crops_of(*volumes, size=size).batch(torch.tensor(indices), seeded(seed))
    assert images.shape == (len(indices), 1, *size)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.uint8)
    assert torch.equal(labels, label_of(images.squeeze(1)))
    unlabelled = Crops([""] * len(volumes), [numbered(shape)[0] for shape in volumes], None, size)
    assert torch.equal(unlabelled.image_batch(torch.tensor(indices), seeded(seed)), images)
    for index, image in zip(indices, images.squeeze(1), strict=True):
        whole = numbered(volumes[index])[0]
        lacking = [max(0, side - n) for side, n in zip(size, whole.shape, strict=True)]
        inner = [slice(lack // 2, lack // 2 + side - lack) for lack, side in zip(lacking, size, strict=True)]
        box = image[tuple(inner)]
        assert (image > 0).sum() == box.numel()
        start = np.unravel_index(int(box.flatten()[0]) - 1, whole.shape)
        expected = whole[tuple(slice(s, s + n) for s, n in zip(start, box.shape, strict=True))]
        assert torch.equal(box, expected)


def test_every_place_is_equally_likely():
    crops = crops_of((4, 3, 6), size=(3, 3, 4))
    images, _ = crops.batch(torch.tensor([0] * 3000), seeded())
    places = Counter(images[:, 0, 0, 0, 0].tolist())
    assert set(places) == {1 + 18 * x + z for x in (0, 1) for z in (0, 1, 2)}
    assert all(abs(count - 500) < 5 * 500**0.5 for count in places.values())


def test_the_axes_of_a_place_are_drawn_apart():
    images, _ = crops_of((4, 4, 4), size=(3, 3, 3)).batch(torch.tensor([0] * 400), seeded())
    assert len(images[:, 0, 0, 0, 0].unique()) == 8


@pytest.mark.parametrize(("side", "before", "behind"), [(4, 0, 0), (5, 0, 1), (6, 1, 1), (7, 1, 2), (8, 2, 2)])
def test_padding_is_zero_on_both_sides(side, before, behind):
    crops = Crops(["a"], [torch.ones(4, 4, 4)], [torch.ones(4, 4, 4, dtype=torch.uint8)], (4, side, 4))
    images, labels = crops.batch(torch.tensor([0]), seeded())
    expected = torch.tensor([0.0] * before + [1.0] * 4 + [0.0] * behind)
    assert torch.equal(images[0, 0, 1, :, 2], expected)
    assert torch.equal(labels[0, 3, :, 0], expected.to(torch.uint8))


def test_the_seed_decides_and_every_batch_is_new():
    crops = crops_of((9, 9, 9), size=(2, 2, 2))
    first, _ = crops.batch(torch.tensor([0, 0, 0, 0]), generator := seeded(1))
    again, _ = crops.batch(torch.tensor([0, 0, 0, 0]), seeded(1))
    second, _ = crops.batch(torch.tensor([0, 0, 0, 0]), generator)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert len(first[:, 0, 0, 0, 0].unique()) > 1


@pytest.mark.parametrize("shape", [(3, 8, 8), (8, 3, 8), (8, 8, 3)])
def test_a_volume_that_does_not_fill_half_of_a_crop_is_refused_by_name(shape):
    volume = Volume("CASE7", np.zeros(shape, np.float32), np.zeros(shape, np.uint8))
    with pytest.raises(InputError, match=r"CASE7: shape .* does not fill half of a \(8, 8, 8\) crop"):
        Crops.of([volume], (8, 8, 8))


def test_crops_of_volumes_share_their_memory():
    volume = Volume("a", np.zeros((4, 4, 4), np.float32), np.zeros((4, 4, 4), np.uint8))
    crops = Crops.of([volume], (2, 2, 2))
    volume.image[...] = 7
    assert len(crops) == 1
    assert (crops.batch(torch.tensor([0]), seeded())[0] == 7).all()


def test_batches_come_on_the_device_of_the_volumes():
    moved = crops_of((4, 4, 4), (3, 5, 4), size=(4, 4, 4)).to(torch.device("meta"))
    images, labels = moved.batch(torch.tensor([1, 0]), seeded())
    assert images.device.type == labels.device.type == "meta"
    assert images.shape == (2, 1, 4, 4, 4)
    unlabelled = Crops(["a"], [torch.ones(4, 4, 4)], None, (4, 4, 4)).to(torch.device("meta"))
    assert unlabelled.image_batch(torch.tensor([0]), seeded()).device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_nothing_waits_for_the_gpu():
    crops = crops_of((6, 4, 4), (3, 5, 4), size=(4, 4, 4)).to(torch.device("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        crops.batch(torch.tensor([0, 1, 1]), seeded())
    finally:
        torch.cuda.set_sync_debug_mode("default")
