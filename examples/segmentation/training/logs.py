"""What a run writes while it trains: CSV for plotting, TensorBoard, and progress lines."""

import csv
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

TRAIN_COLUMNS = (
    "iteration",
    "loss_labelled",
    "loss_unlabelled",
    "loss_perturbed",
    "confident",
    "grad_norm",
    "discriminator",
    "disagreement",
    "learning_rate",
    "it_per_s",
)
VALIDATION_COLUMNS = ("iteration", "dice")


class CsvLog:
    """Rows of numbers under fixed columns, flushed one by one.

    On resuming, rows after `iteration` are dropped, and what a crash or another program left between them.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], iteration: int) -> None:
        self.columns = columns
        kept = [row for row in _rows(path, columns) if int(row["iteration"]) <= iteration]
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


class Log:
    """What `RunLog` can be told, and nothing done about it: the log of all ranks but the first."""

    def step(self, iteration: int, values: dict[str, float]) -> None:
        """Values of one iteration, already on the host; `it_per_s` among them."""

    def validated(self, iteration: int, dice: float, best: float) -> None:
        """Validation Dice in percent."""

    def say(self, text: str) -> None:
        """A line that stays on the screen."""

    def close(self) -> None:
        """Nothing comes after this."""


class RunLog(Log):
    """CSV files, TensorBoard events and a live line for one run in `folder`, from `iteration` on."""

    def __init__(self, folder: Path, title: str, iteration: int, total: int, console: Console | None = None) -> None:
        self.train = CsvLog(folder / "train.csv", TRAIN_COLUMNS, iteration)
        self.validation = CsvLog(folder / "validation.csv", VALIDATION_COLUMNS, iteration)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=iteration + 1)
        self.console = console or Console()
        self.title, self.total = title, total
        self.progress = Progress(  # all of it in 80 columns
            TextColumn("{task.description}"),
            BarColumn(bar_width=5),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.bar = self.progress.add_task(title, total=total, completed=iteration, values="")
        self.progress.start()

    def step(self, iteration: int, values: dict[str, float]) -> None:
        self.train.write({"iteration": iteration, **values})
        for name, value in values.items():
            self.board.add_scalar(f"train/{name}", value, iteration)
        text = live_text(values)
        self.progress.update(self.bar, completed=iteration, values=text)
        if not self.console.is_terminal:
            left = (self.total - iteration) / values["it_per_s"]
            self.console.print(f"{self.title} {iteration}/{self.total}  {text}  left {left:.0f} s", soft_wrap=True)

    def validated(self, iteration: int, dice: float, best: float) -> None:
        self.validation.write({"iteration": iteration, "dice": dice})
        self.board.add_scalar("validation/dice", dice, iteration)
        self.say(f"{self.title} {iteration}/{self.total}  validation Dice {dice:.1f} % (best {best:.1f} %)")

    def say(self, text: str) -> None:
        self.progress.console.print(text, soft_wrap=True, highlight=False)

    def close(self) -> None:
        self.progress.stop()
        self.train.close()
        self.validation.close()
        self.board.close()


def live_text(values: dict[str, float]) -> str:
    """The few numbers of a training row worth watching, short. The loss is that of theta: labelled + unlabelled."""
    parts = [f"{values['it_per_s']:.3g}it/s"]
    parts.append(f"loss {values['loss_labelled'] + values.get('loss_unlabelled', 0.0):.3g}")
    if "confident" in values:
        parts.append(f"conf {values['confident']:.0%}")
    if "grad_norm" in values:
        parts.append(f"||g1|| {values['grad_norm']:.2g}")
    if "discriminator" in values:
        parts.append(f"D {values['discriminator']:.0%}")
    if "disagreement" in values:
        parts.append(f"differ {values['disagreement']:.0%}")
    return " ".join(parts)


def _rows(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows that `CsvLog.write` wrote, under these columns or before there were all of them."""
    if not path.is_file():
        return []
    header, *lines = path.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    names = header.split(",")
    if len(names) < 2 or names != [column for column in columns if column in names]:
        return []
    rows = [line.split(",") for line in lines]
    return [dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names) and _are_numbers(row)]


def _are_numbers(row: list[str]) -> bool:
    try:
        int(row[0])
        for cell in row[1:]:
            float(cell or 0)
    except ValueError:
        return False
    return True


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"
