"""The toy's pictures and tables, and its margin against a straight line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import toy_boundary
from toy.margin import GRID, WINDOW, Score, boundary, distances, probability_over_window, score
from toy.moons import Data, two_moons
from toy.tables import duels, spread

NAMES = ["labels alone", "instance perturbation", "model perturbation", "both: GapMatch"]


def _upright_at_half(points: Tensor) -> Tensor:
    """Logits of p(lower moon) = sigmoid(10 (x - 0.5)): a linear model whose boundary is x = 0.5."""
    return torch.stack([torch.zeros(len(points)), 10 * (points[:, 0] - 0.5)], dim=1)


def _sure_of_the_upper_moon(points: Tensor) -> Tensor:
    return torch.tensor([5.0, 0.0]).expand(len(points), 2)


def test_the_score_of_a_straight_line() -> None:
    points = torch.tensor([[-0.5, 0.0], [0.45, 0.3], [1.5, 1.0], [0.9, -0.5]])
    data = Data(points, classes=torch.tensor([0, 0, 1, 0]), labelled=torch.tensor([0, 2]))
    result = score(_upright_at_half, data)
    assert result.accuracy == 75  # the last one is on the wrong side
    # 1.0, 0.05, 1.0 and -0.4; a crossing may lie half a grid line above or below the nearest point of x = 0.5
    assert result.margin == pytest.approx(1.65 / 4, abs=GRID / 4)
    assert result.margin_5 == pytest.approx(-0.4, abs=GRID / 4)
    assert result.near == 25
    assert result.unsure == 25  # log(0.95 / 0.05) / 10 = 0.294: the band is 0.206 < x < 0.794


def test_the_boundary_is_where_it_is() -> None:
    line = boundary(_upright_at_half)
    torch.testing.assert_close(line[:, 0], torch.full((len(line),), 0.5), atol=1e-5, rtol=0)
    assert line[:, 1].min() == pytest.approx(WINDOW[2])
    assert line[:, 1].max() == pytest.approx(WINDOW[3], abs=1e-5)


def test_a_slanted_boundary_is_exact_between_grid_points() -> None:
    line = boundary(lambda points: torch.stack([points[:, 1], 0.3 * points[:, 0] + 0.017], dim=1))
    torch.testing.assert_close(line[:, 1], 0.3 * line[:, 0] + 0.017, atol=1e-5, rtol=0)


def test_without_a_boundary_the_margin_is_infinite() -> None:
    assert boundary(_sure_of_the_upper_moon).shape == (0, 2)
    assert distances(torch.zeros(2, 2), torch.zeros(0, 2)).tolist() == [float("inf")] * 2
    assert score(_sure_of_the_upper_moon, two_moons(0)).near == 0


def test_the_window_is_drawn_the_right_way_round() -> None:
    probability = probability_over_window(_upright_at_half)
    assert probability[0, 0] < 0.01  # left, bottom
    assert probability[0, -1] > 0.99
    rows, columns = (WINDOW[3] - WINDOW[2]) / GRID + 1, (WINDOW[1] - WINDOW[0]) / GRID + 1
    assert probability.shape == (round(rows), round(columns))


def test_the_moons_are_half_circles() -> None:
    data = two_moons(0, noise=0.0)
    upper, lower = data.points[data.classes == 0], data.points[data.classes == 1]
    torch.testing.assert_close(upper.norm(dim=1), torch.ones(100))
    torch.testing.assert_close((lower - torch.tensor([1.0, 0.5])).norm(dim=1), torch.ones(100))
    assert upper[:, 1].min() >= 0
    assert lower[:, 1].max() <= 0.5
    assert data.classes[data.labelled].tolist() == [0] * 4 + [1] * 4
    assert len(set(data.labelled.tolist())) == 8


def test_all_variants_start_from_the_same_weights() -> None:
    settings, data = toy_boundary.Settings(iterations=1), two_moons(3)
    first, *others = [
        nn.utils.parameters_to_vector(next(toy_boundary.train(variant, data, settings, seed=3)).parameters()).detach()
        for variant in toy_boundary.panels(settings)
    ]
    assert all(torch.equal(first, other) for other in others)


def test_only_the_labels_of_labelled_points_are_learnt_from() -> None:
    settings, data = toy_boundary.Settings(iterations=5), two_moons(0)
    spoilt = 1 - data.classes
    spoilt[data.labelled] = data.classes[data.labelled]
    for variant in toy_boundary.panels(settings):
        *_, model = toy_boundary.train(variant, data, settings, seed=0)
        weights = nn.utils.parameters_to_vector(model.parameters()).detach()
        *_, model = toy_boundary.train(variant, Data(data.points, spoilt, data.labelled), settings, seed=0)
        assert torch.equal(weights, nn.utils.parameters_to_vector(model.parameters()))


def test_the_heavier_loss_is_gap_with_a_radius_of_zero() -> None:
    settings, data = toy_boundary.Settings(iterations=20, eps=0.0, alpha=0.5, tau=0.5), two_moons(0)
    weights = []
    for variant in (toy_boundary.panels(settings)[3], toy_boundary.controls(settings)[1]):
        *_, model = toy_boundary.train(variant, data, settings, seed=0)
        weights.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_end_to_end_and_the_same_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for folder in ("first", "second"):
        assert toy_boundary.main(["--iterations", "6", "--out", str(tmp_path / folder)]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert [line.split(" | ")[0] for line in printed[0].splitlines()[2:]] == [f"| {name}" for name in NAMES]
    film = Image.open(tmp_path / "first" / "boundary.gif")
    assert film.width == 900
    assert film.n_frames == 7  # one an iteration
    assert Image.open(tmp_path / "first" / "boundary.png").width == 1800


def test_another_seed_is_another_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for seed in ("0", "1"):
        assert toy_boundary.main(["--iterations", "1", "--seed", seed, "--out", str(tmp_path)]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] != printed[1]


def test_many_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert toy_boundary.main(["--iterations", "2", "--seed", "5", "--seeds", "2", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "seeds.json").read_text())
    assert record["seeds"] == [5, 6]
    assert list(record["scores"])[:4] == NAMES
    assert len(record["scores"]) == 6
    assert all(f"| {name} |" in printed for name in record["scores"])


def test_spread_and_duels_by_hand() -> None:
    scores = {
        "a": [Score(99.0, 0.2, 0.0, 0.0, 4.0), Score(97.0, 0.4, 0.0, 2.0, 4.0)],
        "b": [Score(98.0, 0.3, 0.0, 0.0, 0.0), Score(97.0, 0.3, 0.0, 0.0, 0.0)],
    }
    row = "| a | 98.0 ± 1.4 | 0.300 ± 0.141 | 0.000 ± 0.000 | 1.0 ± 1.4 | 4.0 ± 0.0 | 1 |"
    assert row in spread(scores).splitlines()
    assert duels(scores, "a").splitlines()[2:] == ["| b | 1 (ties: 1) | 1 | 2 |"]


@pytest.mark.parametrize(
    ("arguments", "telling"),
    [
        (["--iterations", "0"], "iterations"),
        (["--seeds", "1"], "--seeds"),
        (["--eps", "-1"], "eps"),
        (["--alpha", "nan"], "alpha"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], telling: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert toy_boundary.main([*arguments, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert telling in error


def test_it_runs_as_a_script() -> None:
    script = Path(toy_boundary.__file__)
    helped = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True)
    assert "--seeds" in helped.stdout
