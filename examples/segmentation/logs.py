"""What a run writes while it trains: CSV for plotting, TensorBoard, and a progress line."""

import csv
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

TRAIN_COLUMNS = (
    "iteration",
    "loss_labelled",
    "loss_unlabelled",
    "loss_perturbed",
    "confident",
    "grad_norm",
    "learning_rate",
    "it_per_s",
)
VALIDATION_COLUMNS = ("iteration", "dice")


class CsvLog:
    """Rows of numbers under fixed columns, flushed one by one. On resuming, rows after `iteration` are dropped."""

    def __init__(self, path: Path, columns: tuple[str, ...], iteration: int) -> None:
        self.columns = columns
        kept = [row for row in _rows(path) if int(row["iteration"]) <= iteration]
        part = path.with_name(path.name + ".part")
        self.file = part.open("w", newline="")
        self.writer = csv.DictWriter(self.file, columns, restval="", extrasaction="ignore")
        self.writer.writeheader()
        self.writer.writerows(kept)
        self.file.flush()
        part.replace(path)  # the open file goes with its name: rows go on at its end

    def write(self, row: dict[str, float]) -> None:
        """One row; columns without a value stay empty."""
        self.writer.writerow({key: _short(value) for key, value in row.items()})
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class RunLog:
    """CSV files, TensorBoard events and a live line for one run in `folder`, from `iteration` on."""

    def __init__(self, folder: Path, title: str, iteration: int, total: int) -> None:
        self.train = CsvLog(folder / "train.csv", TRAIN_COLUMNS, iteration)
        self.validation = CsvLog(folder / "validation.csv", VALIDATION_COLUMNS, iteration)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=iteration)
        self.console = Console()
        self.title, self.total = title, total
        self.started, self.first = time.perf_counter(), iteration
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task(title, total=total, completed=iteration, values="")
        self.progress.start()

    def step(self, iteration: int, values: dict[str, float]) -> None:
        """Values of one iteration, already on the host."""
        rate = (iteration - self.first) / (time.perf_counter() - self.started)
        row = {"iteration": iteration, **values, "it_per_s": rate}
        self.train.write(row)
        for name, value in row.items():
            if name != "iteration":
                self.board.add_scalar(f"train/{name}", value, iteration)
        text = "  ".join(f"{name} {_short(value)}" for name, value in row.items() if name != "iteration")
        self.progress.update(self.task, completed=iteration, values=text)
        if not self.console.is_terminal:
            left = (self.total - iteration) / rate
            self.console.print(f"{self.title} {iteration}/{self.total}  {text}  left {left:.0f} s", soft_wrap=True)

    def validated(self, iteration: int, dice: float, best: float) -> None:
        """Validation Dice in percent."""
        self.validation.write({"iteration": iteration, "dice": dice})
        self.board.add_scalar("validation/dice", dice, iteration)
        self.say(f"{self.title} {iteration}/{self.total}  validation Dice {dice:.1f} % (best {best:.1f} %)")

    def say(self, text: str) -> None:
        """A line that stays on the screen."""
        self.progress.console.print(text, soft_wrap=True, highlight=False)

    def close(self) -> None:
        self.progress.stop()
        self.train.close()
        self.validation.close()
        self.board.close()


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"
