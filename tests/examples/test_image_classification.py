"""The classification example: its generated images, its step, and a run offline."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import image_classification as example
from classification.data import labelled_indices
from classification.results import Point, save_curves, show_table
from classification.shapes import NAMES, shapes
from gap_torch import GAPWrapper
from gap_torch.consistency import FixMatch
from gap_torch.losses import cross_entropy

TINY = ["--iterations", "3", "--labels", "10", "--labelled-batch", "4", "--unlabelled-batch", "4", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no `data` folder."""
    monkeypatch.chdir(tmp_path)


def test_shapes_are_ten_and_the_same_again() -> None:
    images, classes = shapes(40, seed=3)
    assert images.shape == (40, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert classes.bincount().tolist() == [4] * len(NAMES)
    assert torch.equal(images, shapes(40, seed=3)[0])
    assert not torch.equal(images, shapes(40, seed=4)[0])


def test_a_shape_is_brighter_than_its_ground() -> None:
    images, classes = shapes(200, seed=0, noise=0.0)
    middle = images.float().mean(dim=1)[:, 12:20, 12:20].mean(dim=(1, 2))
    corner = images.float().mean(dim=1)[:, 0, 0]
    discs = classes == NAMES.index("disc")
    assert (middle[discs] > corner[discs] + 50).all()
    assert [len(image.unique(dim=0)) for image in images.flatten(2).transpose(1, 2)] == [2] * 200  # two colours


def test_labels_are_spread_over_the_classes() -> None:
    classes = torch.arange(100) % 10
    chosen = labelled_indices(classes, 40, seed=1)
    assert classes[chosen].bincount().tolist() == [4] * 10
    assert len(chosen.unique()) == 40
    assert not torch.equal(chosen, labelled_indices(classes, 40, seed=2))


def test_augmentations_keep_shape_and_dtype_and_differ_between_groups() -> None:
    torch.manual_seed(0)
    images = shapes(1, seed=0)[0].expand(4 * example.GROUP, -1, -1, -1)
    for augmentation in (example.weak, example.strong):
        augmented = augmentation(images)
        assert augmented.shape == images.shape
        assert augmented.dtype == torch.uint8
        assert len(augmented.unique(dim=0)) > 1


def _gradients(gap: bool) -> list[torch.Tensor]:
    """What the base optimizer is handed in one step, from the same weights and views."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 10)).double()
    seen: list[torch.Tensor] = []
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), lr=0.1), eps=0.5)
    optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad.clone() for p in model.parameters()))
    method = FixMatch(lambda x: x, lambda x: x, 0.0, loss=cross_entropy)
    images = torch.rand(6, 3, 2, 2, dtype=torch.float64)
    batch = (images[:2], torch.tensor([1, 2]))
    example.step(model, optimizer, method, gap, batch, images)
    return seen


def test_the_step_is_algorithm_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "weak", lambda images: images)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 10)).double()
    weight, bias = model[1].weight.detach(), model[1].bias.detach()
    images = torch.rand(6, 3, 2, 2, dtype=torch.float64).flatten(1)
    pseudo_label = (images @ weight.T + bias).argmax(dim=1)

    def gradient(w: torch.Tensor, b: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        error = ((x @ w.T + b).softmax(dim=1) - nn.functional.one_hot(y, 10)) / len(x)
        return error.T @ x, error.sum(dim=0)

    g1 = gradient(weight, bias, images, pseudo_label)
    norm = math.sqrt(sum(float(g.square().sum()) for g in g1))
    g2 = gradient(weight + 0.5 * g1[0] / norm, bias + 0.5 * g1[1] / norm, images, pseudo_label)
    labelled = gradient(weight, bias, images[:2], torch.tensor([1, 2]))
    torch.testing.assert_close(_gradients(gap=True), [a + b + c for a, b, c in zip(g1, g2, labelled, strict=True)])
    torch.testing.assert_close(_gradients(gap=False), [a + c for a, c in zip(g1, labelled, strict=True)])


@pytest.mark.parametrize(
    ("arguments", "methods"),
    [([], ["Supervised", "FixMatch", "GapMatch"]), (["--no-gap", "--method", "fixmatch", "gapmatch"], ["FixMatch"])],
)
def test_end_to_end_offline(arguments: list[str], methods: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert example.main([*TINY, *arguments, "--out", "runs"]) == 0
    printed = capsys.readouterr()
    assert "Generated shapes instead" in printed.err
    rows = [line.split(" | ")[0] for line in printed.out.splitlines() if line.startswith("| ")]
    assert rows == ["| ", "| :--", *(f"| {name}" for name in methods)]
    assert Path("runs/table.md").read_text() in printed.out
    assert Image.open("runs/curves.png").width == 1800
    for name in methods:
        with Path(f"runs/{name.lower()}.csv").open() as file:
            assert [int(row["iteration"]) for row in csv.DictReader(file)] == [1, 2, 3]


def test_a_seed_gives_the_same_again_and_another_seed_another_result() -> None:
    def losses(seed: str, out: str) -> list[str]:
        assert example.main([*TINY, "--method", "gapmatch", "--seed", seed, "--out", out]) == 0
        with Path(out, "gapmatch.csv").open() as file:
            return [row["loss"] for row in csv.DictReader(file)]

    first = losses("0", "a")
    assert losses("0", "b") == first
    assert losses("1", "c") != first


@pytest.mark.parametrize(
    ("arguments", "telling"),
    [
        (["--data", "nowhere"], "--data nowhere"),
        (["--device", "gpu"], "--device 'gpu'"),
        (["--labels", "15"], "--labels"),
        (["--labels", "3000"], "2000 at most"),
        (["--iterations", "0"], "--iterations"),
        (["--no-gap", "--method", "gapmatch"], "--no-gap"),
        (["--eps", "-1", "--method", "gapmatch"], "eps"),
        (["--tau", "2", "--method", "fixmatch"], "tau"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], telling: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert example.main([*TINY, *arguments, "--out", "runs"]) == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert telling in error


class _FewOfCifar10:
    """What the example takes from torchvision's data set."""

    def __init__(self, root: str, train: bool, download: bool) -> None:
        self.data = np.random.default_rng(0).integers(256, size=(40 if train else 10, 32, 32, 3), dtype=np.uint8)
        self.targets = [i % 10 for i in range(len(self.data))]


def test_cifar_has_its_own_settings_and_network(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("classification.data.CIFAR10", _FewOfCifar10)
    monkeypatch.setattr(example, "small_network", None)
    seen = []
    monkeypatch.setattr(example, "FixMatch", lambda *args, **more: seen.append(args[2]) or FixMatch(*args, **more))
    assert example.main([*TINY, "--data", "here", "--method", "gapmatch", "--out", "runs"]) == 0
    assert seen == [0.95]
    assert "CIFAR-10, 10 labels, seed 0" in capsys.readouterr().out


def test_no_download_is_no_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("classification.data.CIFAR10", offline)
    assert example.main([*TINY, "--download", "--method", "supervised", "--out", "runs"]) == 0
    assert "no download: no route to host" in capsys.readouterr().err


def test_a_table_without_pseudo_labels_leaves_them_out(tmp_path: Path) -> None:
    runs = {
        "Supervised": [Point(10, 50.0, 0.1, 0.0, math.nan, 2.0)],
        "FixMatch": [Point(10, 60.0, 0.1, 50.0, 90.0, 4.0)],
    }
    show_table(tmp_path / "table.md", runs, "title")
    assert (tmp_path / "table.md").read_text().splitlines()[-2:] == [
        "| Supervised | 50.0 | - | - | 200 |",
        "| FixMatch | 60.0 | 50.0 | 90.0 | 400 |",
    ]
    save_curves(tmp_path / "curves.png", runs, "title")
