"""The main job from its command line: end to end on a tiny phantom, and every bad input by name."""

import json
import math
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import acdc_gapmatch
from presentation.palette import METHOD_COLOURS
from segmentation import cli, report, run
from segmentation.data.files import patient_of, read_list
from segmentation.data.slices import slice_path, volume_path
from segmentation.errors import InputError
from segmentation.recipe import RUNS, Recipe
from segmentation.scoring.evaluate import Evaluation
from segmentation.scoring.metrics import ClassScore
from segmentation.training import loop
from segmentation.training.loop import Progress

pytestmark = pytest.mark.usefixtures("undrawn")

# What people put under `label` where they have none.
FILLERS = {
    "nothing": None,
    "zeros": np.zeros_like,
    "255": lambda image: np.full(image.shape, 255, np.uint8),
    "the image": lambda image: image,
    "another shape": lambda image: np.zeros((1, 2)),
}

TINY = {
    "size": (32, 32),
    "width": 2,
    "iterations": 4,
    "labelled_batch": 2,
    "unlabelled_batch": 2,
    "validate_every": 2,
    "log_every": 1,
    "statistics_samples": 4,
    "average_decay": 0.5,
}


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(acdc_gapmatch.ACDC.presets, "cpu", TINY)


@pytest.fixture
def data(tiny_data: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    copy = tmp_path / "data"
    subprocess.run(["cp", "-r", str(tiny_data), str(copy)], check=True)
    return copy


def _run(data: Path | str, out: Path, *more: str) -> int:
    arguments = [
        "--data",
        str(data),
        "--patients",
        "1",
        "--device",
        "cpu",
        "--preset",
        "cpu",
        "--out",
        str(out),
    ]
    return acdc_gapmatch.main([*arguments, *more])


def test_end_to_end(drawn, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert _run(data, out, "--method", "supervised", "fixmatch", "gapmatch") == 0
    printed = capsys.readouterr().out
    for label in ("Supervised", "FixMatch", "GapMatch"):
        assert label in printed
    for name in ("predictions.png", "curves.png", "table.md"):
        assert (out / name).stat().st_size > 100
    for method in ("supervised", "fixmatch", "gapmatch"):
        result = json.loads((out / method / "result.json").read_text())
        assert 0 <= result["test"]["dice"] <= 100
        recipe = Recipe(**{**result["recipe"], "size": (32, 32)})
        assert recipe.name == method
        assert len((out / method / "train.csv").read_text().splitlines()) == 5
        assert list((out / method / "tensorboard").iterdir())


def test_every_method_with_and_without_gap(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert _run(data, out, "--iterations", "1", "--method", *RUNS) == 0
    assert {path.name for path in out.iterdir() if (path / "result.json").is_file()} == set(RUNS)
    methods = [line.split("|")[1].strip() for line in (out / "table.md").read_text().splitlines()[4:]]
    assert len(set(methods)) == len(RUNS)
    assert {"Supervised", "FixMatch", "GapMatch", "Pseudo Label + GAP", "Mean Teacher", "CCT + GAP"} <= set(methods)
    pages = math.ceil(len(RUNS) / len(METHOD_COLOURS))  # a colour a run
    assert {path.name for path in out.glob("pictures_*")} == {f"pictures_{page}" for page in range(2, pages + 1)}
    for folder in (out, *out.glob("pictures_*")):
        assert (folder / "predictions.png").is_file()
        assert (folder / "curves.png").is_file()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ["gapmatch"]),
        (["--no-gap"], ["fixmatch"]),
        (["--method", "fixmatch", "--gap"], ["gapmatch"]),
        (["--method", "ict", "vat", "--gap"], ["ict+gap", "vat+gap"]),
        (["--method", "supervised", "cct", "--no-gap"], ["supervised", "cct"]),
        (["--method", "ict", "ict+gap", "gapmatch"], ["ict", "ict+gap", "gapmatch"]),
        (["--method", "supervised", "gapmatch", "--eps", "0.2", "--tau", "0.9"], ["supervised", "gapmatch"]),
    ],
)
def test_which_runs_are_meant(options: list[str], expected: list[str], data: Path) -> None:
    arguments = cli.parse(acdc_gapmatch.ACDC, "", ["--data", str(data), "--device", "cpu", *options])
    assert [recipe.name for recipe in cli.job(acdc_gapmatch.ACDC, arguments).recipes] == expected


def test_options_go_to_the_methods_that_have_them(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = ["--method", "vat", "ict+gap", "em", "--option", "radius=0.05", "decay=0.9"]
    assert _run(data, out, "--iterations", "1", *asked) == 0
    recipes = {run: json.loads((out / run / "result.json").read_text())["recipe"] for run in ("vat", "ict+gap", "em")}
    assert recipes["vat"]["options"] == {"radius": 0.05, "xi": 10 / 256, "iterations": 1, "variant": "original"}
    assert recipes["ict+gap"]["options"] == {"beta": 0.1, "decay": 0.9}
    assert recipes["em"]["options"] == {}


@pytest.mark.parametrize(
    ("made_with", "resumed_with", "status"),
    [
        (["radius=0.05"], ["radius=0.05"], 0),
        (["radius=0.05"], ["radius=0.06"], 2),
        (["radius=0.05"], [], 2),
        ([], ["radius=0.05"], 2),
        ([], ["radius=0.0234375"], 0),  # the default
        (["radius=0.05", "--option", "xi=0.01"], ["xi=0.01", "radius=0.05"], 0),  # no flag hides another
    ],
)
def test_a_run_goes_on_with_its_own_options_alone(made_with, resumed_with, status: int, data: Path, tmp_path: Path):
    command = ["--iterations", "1", "--method", "vat"]
    first, second = (["--option", *options] if options else [] for options in (made_with, resumed_with))
    assert _run(data, tmp_path / "out", *command, *first) == 0
    assert _run(data, tmp_path / "out", *command, *second, "--resume") == status


def test_resume_repeats_a_finished_job_without_training(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(data, tmp_path / "out") == 0
    first = (tmp_path / "out" / "table.md").read_text()
    assert _run(data, tmp_path / "out", "--resume") == 0
    assert (tmp_path / "out" / "table.md").read_text() == first


def test_knobs_reach_the_recipe(data: Path, tmp_path: Path) -> None:
    knobs = ["--eps", "0.3", "--alpha", "0.7", "--tau", "0.8", "--iterations", "2", "--seed", "5"]
    knobs += ["--aligned", "predictions", "--no-freeze-statistics", "--replay-dropout", "--weight", "0.5"]
    knobs += ["--warm-up", "1"]
    assert _run(data, tmp_path / "out", *knobs) == 0
    recipe = json.loads((tmp_path / "out" / "gapmatch" / "result.json").read_text())["recipe"]
    assert [recipe[k] for k in ("eps", "alpha", "tau", "iterations", "seed")] == [0.3, 0.7, 0.8, 2, 5]
    assert [recipe[k] for k in ("aligned", "freeze_statistics", "replay_dropout")] == ["predictions", False, True]
    assert [recipe[k] for k in ("weight", "warm_up")] == [0.5, 1]


def _first_slice(data: Path) -> Path:
    return data / "data" / "slices" / f"{(data / 'train_slices.list').read_text().split()[0]}.h5"


def _relabel(path: Path, label) -> None:
    with h5py.File(path) as file:
        image = file["image"][()]
    _rewrite(path, image=image, **({} if label is None else {"label": label(image)}))


def _rewrite(path: Path, **datasets: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        for key, value in datasets.items():
            file[key] = value


@pytest.fixture(scope="module")
def whole_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which the unlabelled slices have their labels."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(acdc_gapmatch.ACDC.presets, "cpu", TINY)
        assert _run(tiny_data, out) == 0
    return out


@pytest.mark.parametrize("label", FILLERS.values(), ids=FILLERS)
def test_labels_of_unlabelled_slices_are_never_read(data: Path, whole_run: Path, tmp_path: Path, label) -> None:
    for name in read_list(data / "train_slices.list"):
        if patient_of(name) != "patient001":
            _relabel(slice_path(data, name), label)
    assert _run(data, tmp_path / "out") == 0
    ours, theirs = (
        torch.load(out / "gapmatch" / "best.pt", weights_only=True)["model"] for out in (tmp_path / "out", whole_run)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_goes_on_where_labels_of_unlabelled_slices_are_gone(data: Path, tmp_path: Path) -> None:
    assert _run(data, tmp_path / "out") == 0
    for name in read_list(data / "train_slices.list"):
        if patient_of(name) != "patient001":
            _relabel(slice_path(data, name), None)
    assert _run(data, tmp_path / "out", "--resume") == 0


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_volume_that_is_scored_needs_a_label(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str
) -> None:
    (name,) = read_list(data / f"{split}.list")[:1]
    _relabel(volume_path(data, name), None)
    assert _run(data, tmp_path / "out") == 2
    _assert_one_line(capsys, f"{name}.h5: has no dataset `label`; unlabelled training cases alone need none")


@pytest.mark.parametrize("patients", ["1", "2"])
def test_a_labelled_patient_without_any_foreground_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], patients: str
) -> None:
    for name in read_list(data / "train_slices.list"):
        if patient_of(name) == f"patient00{patients}":
            _relabel(slice_path(data, name), np.zeros_like)
    assert _run(data, tmp_path / "out", "--patients", patients) == 2
    _assert_one_line(capsys, f"the labels of patient00{patients} are empty, background alone")


def test_a_labelled_slice_may_be_background_alone(data: Path, tmp_path: Path) -> None:
    _relabel(_first_slice(data), np.zeros_like)
    assert _run(data, tmp_path / "out", "--method", "supervised", "--iterations", "1") == 0


SPOILT = {
    "no list": (lambda d: (d / "val.list").unlink(), "val.list"),
    "empty list": (lambda d: (d / "test.list").write_text(""), "test.list"),
    "malformed list": (lambda d: (d / "val.list").write_text("a b\n"), "val.list"),
    "missing case": (lambda d: _first_slice(d).unlink(), "slice_1.h5"),
    "no label": (lambda d: _rewrite(_first_slice(d), image=np.zeros((4, 4), "f4")), "label"),
    "no image": (lambda d: _rewrite(_first_slice(d), label=np.zeros((4, 4), "u1")), "image"),
    "shapes": (
        lambda d: _rewrite(_first_slice(d), image=np.zeros((4, 4), "f4"), label=np.zeros((4, 5), "u1")),
        "shape",
    ),
    "labels": (
        lambda d: _rewrite(_first_slice(d), image=np.zeros((4, 4), "f4"), label=np.full((4, 4), 9, "u1")),
        "holds the label 9; each has to be one of 0, 1, 2, 3",
    ),
    "intensities": (
        lambda d: _rewrite(_first_slice(d), image=np.full((4, 4), 255, "f4"), label=np.zeros((4, 4), "u1")),
        "outside [0, 1]",
    ),
    "a test patient in training": (
        lambda d: (d / "test.list").write_text("patient001_frame01\n"),
        "patient001_frame01_slice_1 in train_slices.list and patient001_frame01 in test.list are of one patient",
    ),
    "NaN": (
        lambda d: _rewrite(_first_slice(d), image=np.full((4, 4), np.nan, "f4"), label=np.zeros((4, 4), "u1")),
        "NaN",
    ),
    "damaged": (lambda d: _first_slice(d).write_bytes(b"not h5"), "slice_1.h5"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_bad_data_is_one_line_before_any_training(
    case: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, telling = SPOILT[case]
    spoil(data)
    assert _run(data, tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert telling in captured.err
    assert "validation Dice" not in captured.out


@pytest.mark.parametrize(
    ("arguments", "telling"),
    [
        (["--patients", "3"], "needs unlabelled ones"),
        (["--patients", "0"], "choose 1 to 3"),
        (["--device", "warp"], "warp"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--eps", "-1"], "eps"),
        (["--alpha", "nan"], "alpha"),
        (["--tau", "1.5"], "tau"),
        (["--iterations", "0"], "iterations"),
        (["--seed", "-1"], "seed"),
        (["--seed", str(2**32)], "seed"),
        (["--device", ""], "''"),
        (["--device", "meta"], "meta"),
        (["--device", "hpu"], "hpu"),
        (["--device", "cpu:3"], "cpu:3"),
        (["--labelled", "5"], "--labelled and --patients"),
        (["--method", "fixmatch", "fixmatch"], "twice"),
        (["--method", "ict", "ict+gap", "--gap"], "twice"),
        (["--method", "fixmatch", "gapmatch", "--gap"], "twice"),
        (["--method", "fixmatch+gap", "gapmatch"], "twice"),
        (["--method", "gapmatch", "--no-gap"], "--method gapmatch --no-gap: contradict"),
        (["--method", "vat", "ict+gap", "--no-gap"], "--method ict+gap --no-gap: contradict"),
        (["--method", "supervised", "--gap"], "supervised with GAP"),
        (["--method", "supervised+gap"], "supervised with GAP"),
        (["--method", "gapmatch+gap"], "'gapmatch+gap': not one of supervised, em"),
        (["--method", "UNet"], "'UNet': not one of"),
        (["--weight", "-1"], "weight"),
        (["--warm-up", "-1"], "warm_up"),
        (["--preset", "study", "--iterations", "100"], "warm_up must be below iterations (100), not 200"),
        (["--no-gap", "--eps", "0.2"], "--eps: means nothing without GAP"),
        (["--method", "fixmatch", "supervised", "--alpha", "0.2"], "--alpha: means nothing without GAP"),
        (["--method", "ict", "--aligned", "targets"], "--aligned: means"),
        (["--method", "ict", "--no-freeze-statistics"], "--freeze-statistics: means"),
        (["--method", "ict", "--replay-dropout"], "--replay-dropout: means"),
        (["--method", "supervised", "--tau", "0.9"], "--tau: means nothing to supervised alone"),
        (["--method", "em", "freematch+gap", "--tau", "0.9"], "--tau: means nothing to these methods; name one"),
        (["--method", "em", "ict+gap", "--unlabelled-loss", "dice"], "--unlabelled-loss: means nothing"),
        (["--method", "supervised", "--weight", "2"], "--weight: means"),
        (["--method", "supervised", "--warm-up", "1"], "--warm-up: means"),
        (["--labeled", "5"], "--labelled and --patients"),  # the old spelling
        (
            ["--method", "vat", "em", "--option", "radios=1"],
            "there is no 'radios' here. Options of vat: radius, xi, iterations, variant; em: none",
        ),
        (["--method", "vat", "--option", "radius=far"], "'far' is not a value of radius, float"),
        (["--method", "vat", "--option", "radius"], "--option radius: must be NAME=VALUE"),
        (["--method", "vat", "--option", "radius="], "'' is not a value of radius, float"),
        (["--method", "ict", "--option", "beta=-1"], "--option of ict: beta must be between"),
        (["--method", "vat", "--option", "radius=1", "radius=2"], "radius: is given twice"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], telling: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(data, tmp_path / "out", *arguments) == 2
    _assert_one_line(capsys, telling)


@pytest.mark.parametrize("lacks", [{"write_phantom": None}, {"presets": {"paper": {}, "cpu": {}}}])
def test_a_data_set_without_a_phantom_needs_its_data(lacks: dict, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(replace(acdc_gapmatch.ACDC, **lacks), "", []) == 2
    _assert_one_line(capsys, "--data: ACDC has no phantom")


@pytest.mark.parametrize("option", [["--labelled", "5"], ["--preset", "paper"]])
def test_options_without_effect_on_the_phantom_are_refused(
    option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert acdc_gapmatch.main(["--out", str(tmp_path), *option]) == 2
    _assert_one_line(capsys, option[0])


def test_a_file_in_place_of_the_data_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "acdc.zip").write_text("")
    assert _run(tmp_path / "acdc.zip", tmp_path / "out") == 2
    _assert_one_line(capsys, "acdc.zip: is a file")


def _assert_one_line(capsys: pytest.CaptureFixture[str], telling: str) -> None:
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert telling in error


def test_a_path_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(tmp_path / "nowhere", tmp_path / "out") == 2
    assert "nowhere" in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_written(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert _run(data, tmp_path / "file" / "out") == 2
    assert "can't be written" in capsys.readouterr().err


def test_an_old_run_is_not_overwritten(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(data, tmp_path / "out") == 0
    assert _run(data, tmp_path / "out") == 2
    assert "--resume" in capsys.readouterr().err


def test_the_phantom_starts_anew_in_its_own_folder_alone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _small_phantom(data, monkeypatch)
    quickstart = ["--device", "cpu", "--method", "fixmatch"]
    for iterations in ("4", "2"):
        assert acdc_gapmatch.main([*quickstart, "--iterations", iterations]) == 0
    result = json.loads(Path("runs/acdc-phantom/fixmatch/result.json").read_text())
    assert result["recipe"]["iterations"] == 2
    assert len(list(Path("runs/acdc-phantom/fixmatch/tensorboard").iterdir())) == 1

    real = ["--data", str(data), "--patients", "1", *quickstart]
    assert acdc_gapmatch.main(real) == 0
    assert Path("runs/acdc/fixmatch/result.json").is_file()
    assert acdc_gapmatch.main(real) == 2
    assert acdc_gapmatch.main([*quickstart, "--out", "runs/acdc"]) == 2
    assert capsys.readouterr().err.count("--resume, or choose another --out") == 2


@pytest.mark.parametrize(
    ("change", "telling"),
    [
        (["--amp", "none"], "amp=torch.bfloat16, this run has amp=None"),
        (["--compile", "on"], "compiled=False, this run has compiled=True"),
        (["--patients", "2"], "labelled patients=['patient001'], this run has labelled patients="),
        (["--eps", "0.5"], "eps=0.1, this run has eps=0.5"),
    ],
)
def test_another_run_is_not_resumed(
    change: list[str], telling: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(data, tmp_path / "out", "--iterations", "1") == 0
    assert _run(data, tmp_path / "out", "--iterations", "1", "--resume", *change) == 2
    _assert_one_line(capsys, telling)


def test_a_run_from_before_recipes_had_more_fields_goes_on(data: Path, tmp_path: Path) -> None:
    assert _run(data, tmp_path / "out", "--iterations", "2", "--method", "vat") == 0
    path = tmp_path / "out/vat/last.pt"
    content = torch.load(path, weights_only=True)
    for name in ("lr_schedule", "labelled_weight", "blur", "joint"):
        del content["identity"][name]
    del content["identity"]["options"]["variant"]
    torch.save(content, path)
    assert _run(data, tmp_path / "out", "--iterations", "2", "--method", "vat", "--resume") == 0


@pytest.mark.parametrize("name", ["train_slices", "val", "test"])
def test_a_run_on_other_data_is_not_resumed(
    name: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(data, tmp_path / "out", "--iterations", "1") == 0
    path = data / f"{name}.list"
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([*others, first]))
    assert _run(data, tmp_path / "out", "--iterations", "1", "--resume", "--patients", "1") == 2
    _assert_one_line(capsys, f"{name}.list=")


def test_all_runs_are_checked_before_any_is_trained(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (out / "gapmatch").mkdir(parents=True)
    (out / "gapmatch" / "last.pt").write_bytes(b"damaged")
    assert _run(data, out, "--method", "supervised", "gapmatch", "--resume") == 2
    assert "supervised: no run to resume" in capsys.readouterr().out
    assert not (out / "supervised" / "train.csv").exists()


def test_it_says_where_it_resumes(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(data, tmp_path / "out", "--resume") == 0
    assert "gapmatch: no run to resume in" in capsys.readouterr().out
    assert _run(data, tmp_path / "out", "--resume") == 0
    assert "resuming gapmatch at iteration 4" in capsys.readouterr().out


def test_divergence_is_one_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setitem(acdc_gapmatch.ACDC.presets, "cpu", {**TINY, "lr": 1e30, "iterations": 40})
    assert _run(data, tmp_path / "out", "--method", "supervised") == 2
    _assert_one_line(capsys, "loss_labelled is nan at iteration")


def test_ctrl_c_is_one_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    def press_ctrl_c(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "check_files", press_ctrl_c)
    assert _run(data, tmp_path / "out") == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("empty", "note"),
    [
        ((4, 4), "collapsed: 4 of 6 empty; collapsed at the last iteration: 4 of 6 empty"),
        ((3, 5), "collapsed at the last iteration: 5 of 6 empty"),
        ((4, 3), "collapsed: 4 of 6 empty"),
        ((3, 3), ""),
    ],
)
def test_a_collapse_is_noted(empty: tuple[int, int], note: str) -> None:
    progress = Progress(iteration=1, validated=1)
    assert report.row(Recipe(), progress, report.Evaluations(*map(_with_empty, empty))).note == note


def test_a_collapse_is_noted_once_where_the_last_iteration_is_the_chosen_one() -> None:
    both = report.Evaluations(*[_with_empty(4)] * 2)
    assert report.row(Recipe(), Progress(iteration=1), both).note == "collapsed: 4 of 6 empty"


def _with_empty(empty: int) -> Evaluation:
    scores = [ClassScore(0.0, 0.0, empty=i < empty) for i in range(6)]
    return Evaluation(("a", "b"), (tuple(scores[:3]), tuple(scores[3:])))


def test_the_last_iteration_is_scored_beside_the_chosen_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs whose weights are the same, of which validation chooses other iterations."""
    scored, evaluate = [], run.evaluate
    monkeypatch.setattr(run, "evaluate", lambda *a, **k: scored.append(1) or evaluate(*a, **k))
    tests, scorings, rows = {}, {}, {}
    for name, validated in {"first": [2.0, 1.0], "last": [1.0, 2.0]}.items():
        scored.clear()
        dice = iter(validated)
        monkeypatch.setattr(loop, "_dice", lambda *_, dice=dice: next(dice))
        assert _run(data, tmp_path / name) == 0
        result = json.loads((tmp_path / name / "gapmatch/result.json").read_text())
        tests[name], scorings[name] = (result["test"], result["test_last"]), len(scored)
        *_, header, _, line = (tmp_path / name / "table.md").read_text().splitlines()
        titles, cells = ([cell.strip() for cell in row.split("|")] for row in (header, line))
        rows[name] = dict(zip(titles, cells, strict=True))
    assert scorings == {"first": 2, "last": 1}
    assert tests["last"][0] == tests["last"][1] == tests["first"][1] != tests["first"][0]
    chosen, last = tests["first"]
    assert rows["first"]["Dice %"] == f"{chosen['dice']:.1f}"
    assert rows["first"]["Dice % last"] == rows["last"]["Dice %"] == f"{last['dice']:.1f}"


def test_a_checkpoint_from_another_network(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _run(data, tmp_path / "out") == 0
    monkeypatch.setitem(acdc_gapmatch.ACDC.presets, "cpu", {**TINY, "width": 4})
    assert _run(data, tmp_path / "out", "--resume") == 2
    assert "width" in capsys.readouterr().err


def test_a_damaged_checkpoint(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out" / "gapmatch").mkdir(parents=True)
    (tmp_path / "out" / "gapmatch" / "last.pt").write_bytes(b"damaged")
    assert _run(data, tmp_path / "out", "--resume") == 2
    assert "last.pt" in capsys.readouterr().err


def test_without_data_it_makes_its_own(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _small_phantom(data, monkeypatch)
    assert acdc_gapmatch.main(["--out", str(tmp_path), "--device", "cpu"]) == 0
    for method in ("fixmatch", "gapmatch"):
        assert (tmp_path / method / "result.json").is_file()


def _small_phantom(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(acdc_gapmatch.ACDC, write_phantom=lambda root: shutil.copytree(data, root, dirs_exist_ok=True))
    monkeypatch.setattr(acdc_gapmatch, "ACDC", small)
    monkeypatch.setitem(acdc_gapmatch.ACDC.presets, "phantom", TINY)


def test_it_runs_as_a_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process, which has imported what takes seconds; the gate's quickstart is one of its own."""
    monkeypatch.setattr(sys, "argv", ["acdc_gapmatch.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(acdc_gapmatch.__file__, run_name="__main__")
    assert ended.value.code == 0
    assert "--labelled" in capsys.readouterr().out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("amp", ["bfloat16", "float16", "none"])
def test_end_to_end_on_cuda(data: Path, tmp_path: Path, amp: str) -> None:
    assert _run(data, tmp_path / "out", "--device", "cuda", "--amp", amp) == 0


def test_amp_off_is_another_name_for_none(data: Path, tmp_path: Path) -> None:
    assert _run(data, tmp_path / "out", "--iterations", "1", "--amp", "none") == 0
    assert _run(data, tmp_path / "out", "--iterations", "1", "--amp", "off", "--resume") == 0


def test_all_patients_labelled_is_for_supervised_alone(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everybody = str(len({patient_of(name) for name in read_list(data / "train_slices.list")}))
    assert _run(data, tmp_path / "out", "--patients", everybody, "--method", "supervised") == 0
    assert (tmp_path / "out/supervised/result.json").is_file()
    assert _run(data, tmp_path / "other", "--patients", everybody, "--method", "supervised", "fixmatch") == 2
    _assert_one_line(capsys, "fixmatch needs unlabelled ones")


def test_labelled_patients_are_drawn_by_a_seed(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And one that is resumed is of the same draw."""
    drawn = {}
    for seed in map(str, range(4)):
        assert _run(data, tmp_path / seed, "--patients-seed", seed, "--iterations", "1") == 0
        content = torch.load(tmp_path / seed / "gapmatch/last.pt", weights_only=True)
        drawn[seed] = content["identity"]["labelled patients"]
        assert json.loads((tmp_path / seed / "gapmatch/result.json").read_text())["patients_seed"] == int(seed)
    assert len(set(map(tuple, drawn.values()))) > 1
    capsys.readouterr()
    other = next(seed for seed in drawn if drawn[seed] != drawn["0"])
    assert _run(data, tmp_path / "0", "--patients-seed", other, "--iterations", "1", "--resume") == 2
    _assert_one_line(capsys, "labelled patients=")


@pytest.mark.parametrize(
    ("eps", "amp", "warned"), [("0.02", "bfloat16", True), ("0.1", "bfloat16", False), ("0.02", "off", False)]
)
def test_a_move_that_bfloat16_rounds_away_is_warned_of(
    eps: str, amp: str, warned: bool, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(data, tmp_path / "out", "--iterations", "1", "--eps", eps, "--amp", amp) == 0
    assert ("rounding noise" in capsys.readouterr().err) == warned


def test_every_part_of_a_recipe_can_be_asked_for(data: Path, tmp_path: Path) -> None:
    asked = ["--joint", "--weight", "0.3", "--ramp-up", "0.5", "--labelled-weight", "0.5", "--unlabelled-loss", "dice"]
    asked += ["--lr", "0.02", "--lr-schedule", "step", "--average-decay", "0.9", "--statistics-samples", "3"]
    asked += ["--aligned", "pseudo_labels"]
    assert _run(data, tmp_path / "out", *asked) == 0
    recipe = json.loads((tmp_path / "out/gapmatch/result.json").read_text())["recipe"]
    names = ("joint", "weight", "ramp_up", "labelled_weight", "unlabelled_loss", "lr", "lr_schedule", "average_decay")
    assert [recipe[name] for name in names] == [True, 0.3, 0.5, 0.5, "dice", 0.02, "step", 0.9]
    assert (recipe["statistics_samples"], recipe["aligned"]) == (3, "pseudo_labels")


def test_tau_counts_where_confident_classes_are_aligned(data: Path, tmp_path: Path) -> None:
    asked = ["--method", "em", "--gap", "--iterations", "1", "--tau", "0.7"]
    assert _run(data, tmp_path / "out", *asked, "--aligned", "pseudo_labels") == 0
    assert _run(data, tmp_path / "other", *asked) == 2


LONG = Recipe(iterations=30_000)


@pytest.mark.parametrize(
    ("choice", "device", "recipe", "expected"),
    [
        ("on", "cpu", Recipe(iterations=1), True),
        ("off", "cuda", LONG, False),
        ("auto", "cuda", LONG, True),
        ("auto", "cpu", LONG, False),
        ("auto", "cuda", Recipe(iterations=1_000), False),
        ("auto", "cuda", replace(LONG, size=(112, 112, 80)), False),
    ],
)
def test_compiling_is_as_asked_or_where_it_pays(choice: str, device: str, recipe: Recipe, expected: bool) -> None:
    assert cli._compiled(choice, torch.device(device), recipe) == expected


def test_several_processes_do_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.ranks, "world", lambda: 2)
    assert not cli._compiled("auto", torch.device("cuda"), LONG)
    with pytest.raises(InputError, match="--compile on"):
        cli._compiled("on", torch.device("cuda"), LONG)


def test_a_graph_is_captured_on_cuda_and_where_it_cannot_be_a_line_says_why(capsys) -> None:
    cuda, replay = torch.device("cuda"), Recipe(replay_dropout=True)
    assert [cli._graph(choice, cuda, LONG) for choice in ("auto", "on", "off")] == [True, True, False]
    assert not cli._graph("auto", torch.device("cpu"), LONG)  # where nobody expects one
    assert not cli._graph("off", cuda, replay)
    assert capsys.readouterr().err == ""
    assert not cli._graph("auto", cuda, replay)
    (line,) = capsys.readouterr().err.splitlines()
    assert "not captured as a CUDA graph: --replay-dropout" in line
    with pytest.raises(InputError, match="--graph on: --replay-dropout"):
        cli._graph("on", cuda, replay)


def test_a_graph_is_refused_on_the_cpu(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(data, tmp_path / "out", "--graph", "on") == 2
    _assert_one_line(capsys, "--graph on: a graph is captured on CUDA alone, not on cpu; leave it out")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_run_on_cuda_is_the_same_captured_and_not(data: Path, tmp_path: Path) -> None:
    """As far as rounding lets it: over the first replays."""
    losses = {}
    for graph in ("on", "off"):
        out = tmp_path / graph
        cuda = ["--device", "cuda", "--amp", "none", "--iterations", "8", "--eps", "0.01"]
        assert _run(data, out, *cuda, "--graph", graph) == 0
        assert json.loads((out / "gapmatch/result.json").read_text())["graph"] == (graph == "on")
        lines = (out / "gapmatch/train.csv").read_text().splitlines()
        losses[graph] = [float(value) for line in lines[6:9] for value in line.split(",")[1:3]]
    assert losses["on"] == pytest.approx(losses["off"], rel=0.01)
