"""docs/your_own_scans.md shows what there is, and its trainers run."""

import re
from pathlib import Path

import pytest

pytest.importorskip("nnunetv2", reason="pip install 'gap-torch[nnunet]'")

import gap_torch
from gap_nnunet.semi_supervised import SemiSupervisedTrainer
from gap_nnunet.trainers import gap_nnunet_trainers

from .conftest import Build
from .my_trainers import CheckedTrainer, MyTrainer

PAGE = (Path(__file__).parents[2] / "docs" / "your_own_scans.md").read_text()


@pytest.mark.usefixtures("in_one_process")
def test_the_pages_trainers_run(heart: Path, build: Build, capsys: pytest.CaptureFixture) -> None:
    mine = build(heart, MyTrainer)
    assert (mine.tau, mine.warm_up, mine.weight) == (0.9, 20, 1.0)
    trainer = build(heart, CheckedTrainer)
    trainer.on_train_start()
    for _ in range(2):  # it reports when the next step begins
        trainer.train_step(next(trainer.dataloader_train))
    assert "GAP ran as Algorithm 1 in this update" in capsys.readouterr().out


def test_the_page_has_every_trainer_and_knob_with_its_default() -> None:
    table, knobs = PAGE.split("\n## Trainers\n")[1].split("Class attributes\n")[0:2]
    assert set(re.findall(r"`(\w+Trainer)`", table)) == set(gap_nnunet_trainers.__all__)
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", knobs, re.MULTILINE)
    shown = {name: values for names, values in rows for name in re.findall(r"`(\w+)`", names)}
    for kind in (getattr(gap_nnunet_trainers, name) for name in gap_nnunet_trainers.__all__):
        for name, values in shown.items():
            default = getattr(kind, name, None)
            assert default is None or any(float(value) == default for value in re.findall(r"[\d.]+", values)), name
    own = {n for n, v in vars(SemiSupervisedTrainer).items() if isinstance(v, float | int) and not n.startswith("_")}
    assert own - {"strong_views", "patches"} <= set(shown)


def test_the_package_is_imported_by_nobody_else() -> None:
    sources = Path(gap_torch.__file__).parent.rglob("*.py")
    assert not [path for path in sources if re.search(r"\b(gap_nnunet|nnunetv2)\b", path.read_text())]
