"""The command, how nnU-Net finds the trainers, and predictions where none of this is installed."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("nnunetv2", reason="pip install 'gap-torch[nnunet]'")

from nnunetv2.run import run_training
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from gap_nnunet import finding
from gap_nnunet.cli import main
from gap_nnunet.fixmatch import GapMatchTrainer

from .conftest import RAW, RESULTS

MINE = "from gap_nnunet.fixmatch import GapMatchTrainer\nclass Mine(GapMatchTrainer):\n    tau = 0.9\n"
# What nnUNetv2_predict does, in an environment without this project and its variable.
PREDICT = """
import sys
sys.modules.update(dict.fromkeys(("gap_torch", "gap_nnunet")))
from nnunetv2.inference.predict_from_raw_data import predict_entry_point
predict_entry_point()
"""


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net's trainers run one epoch of one iteration; for what is derived from them, too."""
    whole = nnUNetTrainer.__init__

    @functools.wraps(whole)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        whole(self, *args, **kwargs)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 1, 1

    monkeypatch.setattr(nnUNetTrainer, "__init__", init)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)


@pytest.fixture
def as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `train` changes is changed back."""
    monkeypatch.setenv(finding.VARIABLE, "")
    monkeypatch.setattr(sys, "argv", sys.argv)
    for name in ("recursive_find_python_class", "run_ddp"):
        monkeypatch.setattr(run_training, name, getattr(run_training, name, None), raising=False)


@pytest.mark.usefixtures("in_one_process", "short", "as_before")
def test_training_by_the_command_and_a_prediction_without_it(heart: Path, tmp_path: Path) -> None:
    assert main(["train", "5", "2d", "0", "-tr", "GapMatchTrainer", "-device", "cpu"]) == 0
    folder = RESULTS / heart.name / "GapMatchTrainer__nnUNetPlans__2d"
    assert (folder / "fold_0" / "checkpoint_final.pth").is_file()
    assert json.loads((folder / "fold_0" / "validation" / "summary.json").read_text())["mean"]
    assert main(["train", "5", "2d", "0", "-tr", "GapMatchTrainer", "-device", "cpu", "--c"]) == 0

    environment = {name: value for name, value in os.environ.items() if name != finding.VARIABLE}
    options = f"-i {RAW / heart.name / 'imagesUn'} -o {tmp_path} -d 5 -c 2d -f 0 -tr GapMatchTrainer -device cpu"
    command = [sys.executable, "-c", PREDICT, *options.split(), "-npp", "1", "-nps", "1"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.glob("*.nii.gz")} == {f"scan{i}.nii.gz" for i in range(3)}


@pytest.mark.usefixtures("as_before")
def test_a_trainer_of_the_users_own_folder_is_found_beside_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_own_trainers.py").write_text(MINE)
    monkeypatch.setenv(finding.VARIABLE, str(tmp_path))
    finding.make_visible()
    finding.make_visible()
    assert os.environ[finding.VARIABLE] == os.pathsep.join([str(tmp_path), str(finding.FOLDER)])
    assert _found("Mine").tau == 0.9
    assert _found("GapMatchTrainer") is GapMatchTrainer
    assert _found("nnUNetTrainer") is nnUNetTrainer
    assert set(finding.FOLDER.glob("*.py")) == {finding.FOLDER / "gap_nnunet_trainers.py"}


def _found(name: str) -> Any:
    """As nnU-Net's `get_trainer_from_args` looks for it, in the version that is installed."""
    if hasattr(run_training, "recursive_find_trainer_class_by_name"):
        return run_training.recursive_find_trainer_class_by_name(name)
    folder = Path(sys.modules["nnunetv2"].__path__[0]) / "training" / "nnUNetTrainer"
    return run_training.recursive_find_python_class(str(folder), name, "nnunetv2.training.nnUNetTrainer")


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize("name", ["FixMatch", "GapMatch", "MeanTeacher", "MeanTeacherGAP", "UniMatch", "UniMatchGAP"])
def test_nnunet_finds_every_trainer_by_its_name(name: str) -> None:
    finding.make_visible()
    assert _found(f"{name}Trainer").__name__ == f"{name}Trainer"


@pytest.mark.usefixtures("as_before")
def test_processes_of_an_nnunet_before_2_8_find_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net starts them by name; what it is told to start there looks into the variable's folders first."""
    finding.set_variable()
    seen: list[Any] = []

    def nnunets(rank: int, *arguments: Any) -> None:
        seen.extend([rank, *arguments, run_training.recursive_find_python_class("", "GapMatchTrainer", "")])

    monkeypatch.setattr(run_training, "recursive_find_python_class", lambda *_: None)
    monkeypatch.setattr(run_training, "run_ddp", nnunets)
    finding.run_ddp(1, "5", "2d")
    assert seen == [1, "5", "2d", GapMatchTrainer]


def test_path_is_the_folder_for_nnunets_variable(capsys: pytest.CaptureFixture) -> None:
    assert main(["path"]) == 0
    assert capsys.readouterr().out.strip() == str(finding.FOLDER)


def test_what_the_user_can_put_right_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.delenv("nnUNet_raw")
    assert main(["prepare", "-d", "5"]) == 1
    assert capsys.readouterr().err.startswith("error: the environment variable nnUNet_raw is not set")


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize("arguments", [["train", "5", "2d", "0"], ["prepare", "-d", "5"]])
def test_without_nnunet_the_command_says_how_to_install_it(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == "nnunetv2" or name == "gap_nnunet.prepare"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "nnunetv2", None)
    assert main(arguments) == 1
    assert capsys.readouterr().err == 'error: nnunetv2 is not installed: pip install "gap-torch[nnunet]"\n'
