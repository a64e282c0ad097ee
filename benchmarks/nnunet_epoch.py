"""How long is an epoch with scans without labels beside nnU-Net's own, and against the arithmetic of its passes?

    python benchmarks/nnunet_epoch.py --device cpu

nnU-Net plans and preprocesses generated scans; then its own trainer, FixMatch, GapMatch and Mean Teacher train on them
in turns, beside two bare tasks: forward passes without gradient, and forward and backward passes with nnU-Net's loss,
on batches of the same shape. The arithmetic of an epoch is nnU-Net's own plus as many bare passes as the method adds:
FixMatch a forward pass and one with its backward, GapMatch one more of these.

On the CPU, with one thread, time is this process's own, and batches are made in it: their share stands apart, for on a
GPU other processes make them meanwhile. There the clock's time counts, and waiting for batches is a part of it.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.common import RESULTS, Timed, device_kind, interleaved, print_table, write_results

QUESTION = "Seconds of an epoch of nnU-Net's own and of ours, their parts, and over the arithmetic of the passes"
NAME, PREPROCESSED = "Dataset005_Heart", "nnUNet_preprocessed"
# Bare passes beside nnU-Net's own step: forward without gradient, forward and backward.
ADDED = {"FixMatchTrainer": (1, 1), "GapMatchTrainer": (1, 2), "MeanTeacherTrainer": (1, 1)}
Seconds = dict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--size", type=int, default=64, help="pixels along an edge of the patch")
    parser.add_argument("--iterations", type=int, default=4, help="of an epoch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()

    if options.device == "cpu":
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        shape = prepare(Path(folder), options.size)
        if options.device == "cpu":
            os.environ.update(nnUNet_n_proc_DA="0")
        rows = measure(options.device, options.iterations, options.rounds)
    print_table(QUESTION, [{key: value for key, value in row.items() if key != "parts"} for row in rows])
    for row in rows:
        print(row["trainer"], ", ".join(f"{part} {share:.1%}" for part, share in row["parts"].items()))
    record = {"plan": shape, "iterations": options.iterations, "rounds": options.rounds, "epochs": rows}
    path = options.results / f"nnunet_epoch_{device_kind(options.device)}.json"
    write_results(path, QUESTION, options.device, record)


# ------------------------------------------------------------------ generated scans


def prepare(root: Path, size: int) -> dict[str, Any]:
    """Six labelled scans and six without labels, prepared in 2D; batch and patch of the plan."""
    for name in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{name}"] = str(root / name)
        (root / name).mkdir()
    from gap_nnunet.prepare import prepare as prepare_scans

    _write_scans(root / "raw" / NAME, size)
    prepare_scans("5", ["2d"], processes=1)
    plans = json.loads((root / "preprocessed" / NAME / "nnUNetPlans.json").read_text())["configurations"]["2d"]
    return {key: plans[key] for key in ("batch_size", "patch_size")} | plans["architecture"]["arch_kwargs"]


def _write_scans(folder: Path, size: int) -> None:
    import SimpleITK as sitk

    rng = np.random.default_rng(0)
    axis = np.arange(size)
    for i in range(12):
        z, y, x = np.meshgrid(np.arange(8), axis, axis, indexing="ij")
        label = ((y - rng.uniform(0.4, 0.6) * size) ** 2 + (x - size / 2) ** 2 < (size / 5) ** 2) & (z > 1)
        image = 100 + 80 * label + rng.normal(0, 20, label.shape)
        images, labels = ("imagesTr", "labelsTr") if i < 6 else ("imagesUn", None)
        for name, array in ((images, image.astype(np.float32)), (labels, label.astype(np.uint8))):
            if name is None:
                continue
            (folder / name).mkdir(parents=True, exist_ok=True)
            ending = "_0000" if name == images else ""
            scan = sitk.GetImageFromArray(array)
            scan.SetSpacing((1.0, 1.0, 5.0))
            sitk.WriteImage(scan, str(folder / name / f"scan{i}{ending}.nii.gz"))
    described = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "disc": 1}}
    (folder / "dataset.json").write_text(json.dumps({**described, "numTraining": 6, "file_ending": ".nii.gz"}))


# ------------------------------------------------------------------ epochs


def measure(device: str, iterations: int, rounds: int) -> list[dict[str, Any]]:
    """A row a trainer."""
    trainers = {name: _trainer(name, device) for name in ("nnUNetTrainer", *ADDED)}
    parts: dict[str, Seconds] = {name: {} for name in trainers}
    own = trainers["nnUNetTrainer"]
    tasks = {name: _epoch(trainer, iterations, parts[name]) for name, trainer in trainers.items()}
    bare = {"forward": _passes(own, iterations, False), "forward and backward": _passes(own, iterations, True)}
    seconds = interleaved({**tasks, **bare}, device, rounds)
    for trainer in trainers.values():
        _finish(trainer)
    forward, both = (median(seconds[name]) for name in bare)
    rows = []
    for name in trainers:
        kept = {part: median(values[-rounds:]) for part, values in parts[name].items()}
        batches = kept.get("labelled batches", 0) + kept.get("batches without labels", 0) if device == "cpu" else 0
        step, of_own = median(seconds[name]) - batches, median(seconds["nnUNetTrainer"])
        of_own -= median(parts["nnUNetTrainer"]["labelled batches"][-rounds:]) if device == "cpu" else 0
        arithmetic = of_own + sum(n * s for n, s in zip(ADDED.get(name, (0, 0)), (forward, both), strict=True))
        shares = {part: value / median(seconds[name]) for part, value in kept.items()}
        rows.append(
            {
                "trainer": name,
                "epoch": median(seconds[name]),
                "steps": step,
                "arithmetic": arithmetic,
                "steps / arithmetic": step / arithmetic,
                "steps / nnU-Net's": step / of_own,
                "parts": {**shares, "rest": 1 - sum(shares.values())},
            }
        )
    return rows


def _trainer(name: str, device: str) -> Any:
    """From the first epoch on with scans without labels."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from gap_nnunet.trainers import gap_nnunet_trainers

    kind = nnUNetTrainer if name == "nnUNetTrainer" else getattr(gap_nnunet_trainers, name)
    folder = Path(os.environ[PREPROCESSED]) / NAME
    plans = json.loads((folder / "nnUNetPlans.json").read_text()) | {"continue_training": False}
    described = json.loads((folder / "dataset.json").read_text())
    knobs = {"__module__": kind.__module__, "warm_up": 0, "ramp_up": 0.0}
    trainer = type(name, (kind,), knobs)(plans, "2d", 0, described, torch.device(device))
    trainer.on_train_start()
    trainer.network.train()
    return trainer


def _epoch(trainer: Any, iterations: int, parts: Seconds) -> Timed:
    """Training alone: nnU-Net's validation costs the same in all."""

    def timed(clock: Callable[[], float]) -> float:
        spent: dict[str, float] = {}
        start = clock()
        with _taken_apart(trainer, clock, spent):
            for _ in range(iterations):
                with _part("labelled batches", clock, spent):
                    batch = next(trainer.dataloader_train)
                trainer.train_step(batch)
        taken = clock() - start
        for part, value in spent.items():
            parts.setdefault(part, []).append(value)
        return taken

    return timed


@contextmanager
def _taken_apart(trainer: Any, clock: Callable[[], float], spent: dict[str, float]) -> Iterator[None]:
    """Our trainers' parts, each counted by itself."""
    if not hasattr(trainer, "backward_unlabelled"):
        yield
        return
    method, loader = trainer.method, trainer.dataloader_unlabelled
    prepare, unlabelled, step = method.prepare, trainer.backward_unlabelled, trainer._step
    after = trainer.after_step
    method.prepare = _counted("pseudo-labels", prepare, clock, spent)
    trainer.backward_unlabelled = _counted("passes without labels", unlabelled, clock, spent)
    trainer._step, trainer.after_step = (_counted("optimizer", f, clock, spent) for f in (step, after))
    trainer.dataloader_unlabelled = _Counted(loader, clock, spent)
    try:
        yield
    finally:
        for name in ("backward_unlabelled", "_step", "after_step"):
            delattr(trainer, name)
        del method.prepare
        trainer.dataloader_unlabelled = loader


class _Counted:
    """Batches, and the time that they take."""

    def __init__(self, batches: Any, clock: Callable[[], float], spent: dict[str, float]) -> None:
        self.batches, self.clock, self.spent = batches, clock, spent

    def __next__(self) -> Any:
        with _part("batches without labels", self.clock, self.spent):
            return next(self.batches)


def _counted(part: str, function: Callable[..., Any], clock: Callable[[], float], spent: dict[str, float]) -> Any:
    def counted(*arguments: Any) -> Any:
        with _part(part, clock, spent):
            return function(*arguments)

    return counted


@contextmanager
def _part(part: str, clock: Callable[[], float], spent: dict[str, float]) -> Iterator[None]:
    start = clock()
    yield
    spent[part] = spent.get(part, 0.0) + clock() - start


def _passes(trainer: Any, iterations: int, backward: bool) -> Timed:
    """Bare passes on one batch, with nnU-Net's loss."""
    batch = next(trainer.dataloader_train)
    data, target = batch["data"].to(trainer.device), [t.to(trainer.device) for t in batch["target"]]

    def timed(clock: Callable[[], float]) -> float:
        start = clock()
        for _ in range(iterations):
            with torch.autocast(trainer.device.type, enabled=trainer.device.type == "cuda"):
                if backward:
                    loss = trainer.loss(trainer.network(data), target)
                else:
                    with torch.no_grad():
                        trainer.network(data)
            if backward:
                loss.backward()
        trainer.optimizer.zero_grad(set_to_none=True)
        return clock() - start

    return timed


def _finish(trainer: Any) -> None:
    trainer.disable_checkpointing = True
    trainer.on_train_end()


if __name__ == "__main__":
    main()
