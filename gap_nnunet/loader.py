"""Patches of scans without labels, augmented in worker processes as nnU-Net's own."""

from typing import Any

from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA


class UnlabelledLoader(nnUNetDataLoader):
    """nnU-Net's loader of random patches; its batches have no targets, which would only travel between processes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.has_ignore = False  # nnU-Net would look for places with labels

    def generate_train_batch(self) -> dict[str, Any]:
        batch = super().generate_train_batch()
        return {"data": batch["data"], "keys": batch["keys"]}


def augmented(loader: nnUNetDataLoader, pin_memory: bool) -> Any:
    """Batches of `loader`, made by as many processes as nnU-Net's training batches (nnUNet_n_proc_DA)."""
    processes = get_allowed_n_proc_DA()
    if processes == 0:
        return SingleThreadedAugmenter(loader, None)
    return NonDetMultiThreadedAugmenter(
        loader, None, processes, max(6, processes // 2), None, pin_memory, wait_time=0.002
    )


def finish(batches: Any) -> None:
    """End the processes of `augmented`."""
    if isinstance(batches, NonDetMultiThreadedAugmenter):
        batches._finish()
