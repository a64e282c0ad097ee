"""The 3D example from its command line: end to end on a tiny phantom, its own options, and bad input by name."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import acdc_gapmatch
import la_gapmatch
from segmentation import cli
from segmentation.data.crops import case_path
from segmentation.data.files import read_list, write_list
from segmentation.data.phantoms.atrium import write_atrium
from segmentation.recipe import RUNS, Recipe
from segmentation.training.step import Trainer
from segmentation.volume_task import VolumeTask

pytestmark = pytest.mark.usefixtures("undrawn")

# What people put under `label` where they have none.
FILLERS = {
    "nothing": None,
    "zeros": np.zeros_like,
    "-1": lambda image: np.full_like(image, -1),
    "the image": lambda image: image,
    "another shape": lambda image: np.zeros((1, 2)),
}

TINY = {
    "size": (16, 16, 16),
    "width": 2,
    "iterations": 4,
    "labelled_batch": 2,
    "unlabelled_batch": 2,
    "validate_every": 2,
    "log_every": 1,
    "statistics_samples": 2,
    "average_decay": 0.5,
}


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(la_gapmatch.LA.presets, "cpu", TINY)


@pytest.fixture(scope="session")
def tiny_atrium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("atrium")
    write_atrium(root, cases=(3, 2), size=(24, 24, 18))
    return root


@pytest.fixture
def data(tiny_atrium: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_atrium, tmp_path / "data"))


def _run(data: Path, out: Path, *more: str) -> int:
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
        "--amp",
        "off",
    ]
    return la_gapmatch.main([*arguments, *more])


def test_end_to_end(drawn, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert _run(data, out, "--method", "supervised", "fixmatch", "gapmatch", "--stride", "8", "8", "8") == 0
    printed = capsys.readouterr().out
    assert "scoring test volumes 2/2" in printed
    for label in ("Supervised", "FixMatch", "GapMatch", "LA %", "stride 8 x 8 x 8"):
        assert label in printed
    for name in ("predictions.png", "surfaces.png", "curves.png", "table.md"):
        assert (out / name).stat().st_size > 100
    for method in ("supervised", "fixmatch", "gapmatch"):
        result = json.loads((out / method / "result.json").read_text())
        assert 0 <= result["test"]["dice"] <= 100
        assert (result["data_set"], result["stride"]) == ("LA", [8, 8, 8])
        assert result["chosen_iteration"] == 4  # without validation the last one
        assert result["validation_dice"] is None
        assert torch.load(out / method / "best.pt", weights_only=True)["dice"] is None
        assert len((out / method / "train.csv").read_text().splitlines()) == 5


def test_every_method_with_and_without_gap(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = {"labelled_batch": 4, "unlabelled_batch": 4}  # BCP's go by halves, and a single voxel has no variance
    monkeypatch.setitem(la_gapmatch.LA.presets, "cpu", {**TINY, **batches})
    out = tmp_path / "out"
    assert _run(data, out, "--iterations", "1", "--stride", "16", "16", "16", "--method", *RUNS) == 0
    assert {path.name for path in out.iterdir() if (path / "result.json").is_file()} == set(RUNS)


def test_another_stride_scores_a_finished_run_without_training(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert _run(data, out, "--stride", "16", "16", "16") == 0
    capsys.readouterr()
    assert _run(data, out, "--stride", "8", "8", "8", "--largest-component", "--resume") == 0
    printed = capsys.readouterr().out
    assert "resuming gapmatch at iteration 4" in printed
    assert "it/s" not in printed
    result = json.loads((out / "gapmatch" / "result.json").read_text())
    assert (result["stride"], result["largest_component"]) == ([8, 8, 8], True)


def test_an_interrupted_run_resumes_to_the_same_weights(data: Path, tmp_path: Path) -> None:
    step = Trainer.step

    def stop(self: Trainer, iteration: int) -> dict[str, torch.Tensor]:
        if iteration == 3:
            raise KeyboardInterrupt
        return step(self, iteration)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", stop)
        assert _run(data, tmp_path / "parts", "--stride", "16", "16", "16") == 130
    assert _run(data, tmp_path / "parts", "--stride", "16", "16", "16", "--resume") == 0
    assert _run(data, tmp_path / "whole", "--stride", "16", "16", "16") == 0
    parts, whole = (
        torch.load(tmp_path / run / "gapmatch" / "best.pt", weights_only=True)["model"] for run in ("parts", "whole")
    )
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--stride", "0", "8", "8"), "--stride 0 8 8"),
        (("--stride", "8", "8", "17"), "--stride 8 8 17"),
        (("--patients", "3"), "needs unlabelled ones"),
    ],
)
def test_bad_options_are_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], complaint: str
) -> None:
    assert _run(data, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def _rewrite(path: Path, image: np.ndarray, label: np.ndarray | None) -> None:
    with h5py.File(path, "w") as file:
        file["image"] = image
        if label is not None:
            file["label"] = label


def _relabel(path: Path, label: Callable[[np.ndarray], np.ndarray] | None) -> None:
    with h5py.File(path) as file:
        image = file["image"][()]
    _rewrite(path, image, None if label is None else label(image))


@pytest.fixture(scope="module")
def whole_run(tiny_atrium: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which the unlabelled cases have their labels."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(la_gapmatch.LA.presets, "cpu", TINY)
        patch.setattr(VolumeTask, "draw", lambda *_: None)
        assert _run(tiny_atrium, out, "--stride", "16", "16", "16") == 0
    return out


@pytest.mark.parametrize("label", FILLERS.values(), ids=FILLERS)
def test_labels_of_unlabelled_cases_are_never_read(
    data: Path, whole_run: Path, tmp_path: Path, label: Callable[[np.ndarray], np.ndarray] | None
) -> None:
    for name in read_list(data / "train.list")[1:]:
        _relabel(case_path(data, name), label)
    assert _run(data, tmp_path / "out", "--stride", "16", "16", "16") == 0
    ours, theirs = (
        torch.load(out / "gapmatch" / "best.pt", weights_only=True)["model"] for out in (tmp_path / "out", whole_run)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_case_that_needs_a_label_is_refused_without_one(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str
) -> None:
    name = read_list(data / f"{split}.list")[0]
    _relabel(case_path(data, name), None)
    assert _run(data, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"{name}/mri_norm2.h5: has no dataset `label`; unlabelled training cases alone need none" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("fault", ["slice", "empty", "small", "raw", "missing"])
def test_bad_files_are_named(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str) -> None:
    labelled, unlabelled, *_ = read_list(data / "train.list")
    name = labelled if fault == "empty" else unlabelled
    path = case_path(data, name)
    rng = np.random.default_rng(0)
    image, label = rng.normal(size=(24, 24, 18)).astype(np.float32), np.ones((24, 24, 18), np.uint8)
    if fault == "slice":
        _rewrite(path, image[0], label[0])
    elif fault == "empty":
        _rewrite(path, image, 0 * label)
    elif fault == "small":
        _rewrite(path, image[:, :, :6], label[:, :, :6])
    elif fault == "raw":
        _rewrite(path, 100 + 20 * image, label)
    else:
        path.unlink()
    assert _run(data, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert name in error
    assert error.count("\n") == 1


def _rename(data: Path, names: dict[str, str]) -> None:
    for old, new in names.items():
        case_path(data, old).parent.rename(case_path(data, new).parent)
    for split in ("train", "test"):
        write_list(data / f"{split}.list", [names[name] for name in read_list(data / f"{split}.list")])


def test_a_task_says_whose_a_case_is(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _rename(data, {f"case00{n}": f"la_00{n}" for n in range(1, 6)})
    arguments = ["--data", str(data), "--patients", "1", "--preset", "cpu", "--device", "cpu", "--amp", "off"]
    arguments += ["--stride", "16", "16", "16", "--method", "supervised", "--out", str(tmp_path / "out")]
    assert cli.main(la_gapmatch.LA, "", arguments) == 2
    error = capsys.readouterr().err
    assert "la_001 in train.list and la_004 in test.list are of one patient, la: " in error
    task = replace(la_gapmatch.LA, patient=str)
    assert cli.main(task, "", arguments) == 0
    last = torch.load(tmp_path / "out" / "supervised" / "last.pt", weights_only=True)
    assert last["identity"]["labelled patients"] == ["la_001"]


def test_two_scans_of_a_patient_are_kept_together(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _rename(data, dict(zip(map("case00{}".format, range(1, 6)), ("p1-a", "p1-b", "p2-a", "p2-b", "p3-a"), strict=True)))
    task = replace(la_gapmatch.LA, patient=lambda name: name.split("-")[0])
    arguments = ["--data", str(data), "--patients", "1", "--preset", "cpu", "--device", "cpu", "--amp", "off"]
    arguments += ["--stride", "16", "16", "16", "--method", "supervised", "--out", str(tmp_path / "out")]
    assert cli.main(task, "", arguments) == 2
    assert "p2-a in train.list and p2-b in test.list are of one patient, p2: " in capsys.readouterr().err
    write_list(data / "test.list", ["p3-a"])
    assert cli.main(task, "", arguments) == 0
    assert "2 labelled samples of 1 patient(s), 1 unlabelled" in capsys.readouterr().out


def test_acdc_s_files_are_refused(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(tiny_data, tmp_path / "out") == 2
    assert str(tiny_data) in capsys.readouterr().err


def test_sizes_with_wrong_gradients_are_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(data, tmp_path / "out", "--amp", "bfloat16") == 2
    assert "--amp off" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("version", "device", "amp", "warned"),
    [
        ("2.9.1+cu128", "cuda", "bfloat16", True),
        ("2.9.0", "cuda:0", "float16", True),
        ("2.9.1", "cuda", "off", False),
        ("2.9.1", "cpu", "bfloat16", False),
        ("2.8.0", "cuda", "bfloat16", False),
        ("2.10.0", "cuda", "bfloat16", False),
    ],
)
def test_a_torch_with_slow_3d_convolutions_is_warned_of(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    device: str,
    amp: str,
    warned: bool,
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(cli.ranks, "usable_device", lambda _: torch.device(device))
    monkeypatch.setitem(la_gapmatch.LA.presets, "cpu", {**TINY, "size": (48, 48, 48)})
    assert _run(tmp_path, tmp_path / "out", "--amp", amp) == 2  # it says so before anything is read
    error = capsys.readouterr().err
    assert error.endswith("train.list: no such list; unpack or convert the data set first\n")
    assert (f"warning: torch {version} takes several times as long" in error) == warned
    assert error.count("\n") == 1 + warned


def test_slices_are_not_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    monkeypatch.setattr(cli.ranks, "usable_device", lambda _: torch.device("cuda"))
    assert acdc_gapmatch.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "warning" not in capsys.readouterr().err


def test_labelled_and_unlabelled_crops_lie_apart(tiny_atrium: Path) -> None:
    names = read_list(tiny_atrium / "train.list")
    recipe = Recipe(**{**TINY, "labelled_batch": 1, "unlabelled_batch": 1})
    pool = la_gapmatch.LA.read_labelled(tiny_atrium, names[:1], recipe)
    trainer = Trainer(la_gapmatch.LA, recipe, pool, pool, torch.device("cpu"), None)
    same = [torch.equal(trainer.labelled_batch(t)[0], trainer.unlabelled_batch(t)) for t in range(20)]
    assert sum(same) < 3
    assert torch.equal(trainer.unlabelled_batch(3), trainer.unlabelled_batch(3))


def test_validation_takes_no_longer_steps_than_its_window(data: Path, tmp_path: Path) -> None:
    shutil.copy(data / "test.list", data / "val.list")
    (data / "test.list").write_text(f"{read_list(data / 'train.list')[-1]}\n")
    (data / "train.list").write_text("\n".join(read_list(data / "train.list")[:-1]))
    task = replace(la_gapmatch.LA, validation_list="val")
    arguments = ["--data", str(data), "--patients", "1", "--preset", "cpu", "--device", "cpu", "--amp", "off"]
    assert cli.main(task, "", [*arguments, "--method", "supervised", "--out", str(tmp_path / "out")]) == 0
    assert len((tmp_path / "out/supervised/validation.csv").read_text().splitlines()) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("amp", ["bfloat16", "float16", "off"])
def test_end_to_end_on_cuda(data: Path, tmp_path: Path, amp: str) -> None:
    assert _run(data, tmp_path / "out", "--device", "cuda", "--amp", amp) == 0
