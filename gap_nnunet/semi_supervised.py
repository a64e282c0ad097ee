"""An nnU-Net trainer that learns from scans without labels too; a method fills it in."""

import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn

from gap_torch.consistency import Batch, Method, Views

from . import checkpoints, folders, scans
from .heads import Classes, Heads, Regions
from .loader import UnlabelledLoader, augmented, finish
from .problems import Problems
from .views import WeakAndStrong

RAW = "nnUNet_raw"
GRADIENT_NORM = 12  # nnU-Net's own limit


class SemiSupervisedTrainer(nnUNetTrainer):
    """nnU-Net's trainer with a consistency loss on the scans that `gap-nnunet prepare` has found in imagesUn.

    Without such scans it is nnU-Net's own, and so it is, bit for bit, in the first `warm_up` epochs. Derive to change a
    class attribute; a trainer of nnU-Net's may stand behind ours:
    `class MyTrainer(GapMatchTrainer, nnUNetTrainer_250epochs)`.

    Raises:
        Problems: when training starts, if imagesUn is not prepared for this configuration and plan, or if this is
            the second stage of a cascade.
    """

    weight = 1.0  # of the consistency loss, beside nnU-Net's loss on labels
    warm_up = 10  # epochs on labels alone
    ramp_up = 0.0  # share of the epochs in which the weight grows to its full value
    strong_views = 1
    strength = 2.0  # how much more often than nnU-Net a strong view has each change of intensity
    patches = 1  # without labels, for each with one

    method: Method | None = None
    dataloader_unlabelled: Any = None
    _unlabelled: list[str]
    _resumed: dict[str, Any] | None = None

    # ------------------------------------------------------------------ what a method fills in

    def build_method(self) -> Method:
        """The method; its `prepare` gets a patch's views behind each other, (B, (1 + strong_views) C, *spatial)."""
        raise NotImplementedError

    def after_step(self) -> None:
        """After each step, those of the warm-up too."""

    def heads(self) -> Heads:
        """What the network's outputs mean."""
        return Regions() if self.label_manager.has_regions else Classes()

    def depth_weights(self) -> tuple[float, ...]:
        """Those of nnU-Net's loss, a resolution each."""
        return tuple(self.loss.weight_factors) if self.enable_deep_supervision else (1.0,)

    def plain_network(self) -> nn.Module:
        """The network without DDP and compilation around it."""
        network = self.network.module if self.is_ddp else self.network
        return getattr(network, "_orig_mod", network)

    # ------------------------------------------------------------------ scans without labels

    def on_train_start(self) -> None:
        if not self.was_initialized:
            self.initialize()
        self._unlabelled = self.unlabelled_cases()
        super().on_train_start()
        if not self._unlabelled:
            self.print_to_log_file(f"No scans in {scans.FOLDER}: training goes as nnU-Net's own.")
            return
        self.method = self.build_method().to(self.device)
        if self._resumed:
            self.method.load_state_dict(self._resumed)
        self.print_to_log_file(
            f"{type(self).__name__} learns from {len(self._unlabelled)} scans without labels, "
            f"from epoch {self.warm_up} on."
        )

    def unlabelled_cases(self) -> list[str]:
        """Identifiers of the prepared scans; none if imagesUn has none."""
        folder = folders.unlabelled(self.preprocessed_dataset_folder)
        prepared, found = folders.cases(folder), self._raw_cases()
        raw = set(prepared) if found is None else found
        again = (
            f"Run: gap-nnunet prepare -d {self.plans_manager.dataset_name} -c {self.configuration_name} "
            f"-p {self.plans_manager.plans_name}"
        )
        if not (prepared or raw):
            return []
        if self.is_cascaded:
            stage = (
                f"{self.configuration_name} reads the first stage's predictions, which nnU-Net makes of labelled cases "
                "alone. Train 3d_fullres or 3d_lowres with scans without labels, or this one with nnUNetTrainer."
            )
            raise Problems(scans.FOLDER, [stage])
        missing, gone = sorted(raw - set(prepared)), sorted(set(prepared) - raw)
        if missing:
            raise Problems(scans.FOLDER, [f"{len(missing)} scans are not in {folder}: {missing[0]}... {again}"])
        if gone:
            there = f"{len(gone)} scans in {folder} are not in {scans.FOLDER} any more: {gone[0]}..."
            raise Problems(scans.FOLDER, [f"{there} {again}"])
        if not folders.made_by(folder, folders.recipe(self.plans_manager, self.configuration_manager)):
            now = self.plans_manager.plans_name
            raise Problems(scans.FOLDER, [f"{folder} was made by another plan than {now} is now. {again}"])
        both = sorted(set(prepared) & set(self.dataset_class.get_identifiers(self.preprocessed_dataset_folder)))
        if both:
            raise Problems(scans.FOLDER, [f"{both[0]} has a label and is in {folder}, too. {again}"])
        return prepared

    def _raw_cases(self) -> set[str] | None:
        """What is in imagesUn; None where the raw files cannot be seen."""
        root = os.environ.get(RAW)
        raw = Path(root) / self.plans_manager.dataset_name if root else None
        return set(scans.find(raw, self.dataset_json)) if raw and (raw / scans.FOLDER).is_dir() else None

    def get_dataloaders(self) -> tuple[Any, Any]:
        loaders: tuple[Any, Any] = super().get_dataloaders()
        if self._unlabelled:
            self.dataloader_unlabelled = augmented(self.unlabelled_loader(), self.device.type == "cuda")
            next(self.dataloader_unlabelled)  # the processes start here, and so do their errors
        return loaders

    def unlabelled_loader(self) -> UnlabelledLoader:
        """`patches` times as many as nnU-Net's own batch has, each with its views."""
        patch = self.configuration_manager.patch_size
        rotation, dummy_2d, initial_patch, mirror = self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        normalised = self.configuration_manager.use_mask_for_norm
        training = self.get_training_transforms(patch, rotation, None, mirror, dummy_2d, use_mask_for_norm=normalised)
        dataset = self.dataset_class(str(folders.unlabelled(self.preprocessed_dataset_folder)), list(self._unlabelled))
        return UnlabelledLoader(
            dataset,
            self.patches * self.batch_size,
            initial_patch,
            patch,
            self.label_manager,
            transforms=WeakAndStrong(training, self.strong_views, self.strength),
        )

    def on_train_end(self) -> None:
        super().on_train_end()
        finish(self.dataloader_unlabelled)

    # ------------------------------------------------------------------ a step

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        if self.method is None:
            return dict(super().train_step(batch))
        in_warm_up = self.current_epoch < self.warm_up
        seen = super().train_step(batch) if in_warm_up else self.semi_supervised_step(batch, self.method)
        self.after_step()
        return dict(seen)

    def semi_supervised_step(self, batch: dict[str, Any], method: Method) -> dict[str, Any]:
        """The consistency loss's passes, the labelled one, one step."""
        data, target = self._on_device(batch["data"]), self._on_device(batch["target"])
        unlabelled = self._on_device(next(self.dataloader_unlabelled)["data"])
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            views = method.prepare(self.network, Batch(unlabelled))
        consistency = self.backward_unlabelled(views)
        loss = self._backward(lambda: self.loss(self.network(data), target))
        self._step()
        confident = torch.ones(()) if views.mask is None else views.mask.float().mean()
        seen = torch.stack([t.detach().float().to(loss.device) for t in (loss, consistency, confident)]).cpu().numpy()
        return dict(zip(("loss", "consistency", "confident"), seen, strict=True))

    def backward_unlabelled(self, views: Views) -> Tensor:
        """One pass of the consistency loss, forward and backward; the loss without its weight."""
        method, weight = self.method, self.consistency_weight()
        assert method is not None
        return self._backward(lambda: method.loss(self.network, views), weight)

    def consistency_weight(self) -> float:
        """`weight`, after a ramp-up of exp(-5 (1 - t)^2), the field's."""
        epochs = self.ramp_up * self.num_epochs
        t = min(1.0, self.current_epoch / epochs) if epochs else 1.0
        return self.weight * math.exp(-5 * (1 - t) ** 2)

    def _on_device(self, tensors: Any) -> Any:
        if isinstance(tensors, list):
            return [self._on_device(tensor) for tensor in tensors]
        return tensors.to(self.device, non_blocking=True)

    def _autocast(self) -> Any:
        # nnU-Net's rule: on the CPU autocast is slow, and MPS rejects it even when it is not enabled
        return torch.autocast("cuda") if self.device.type == "cuda" else nullcontext()

    def _backward(self, loss_function: Callable[[], Tensor], weight: float = 1.0) -> Tensor:
        with self._autocast():
            loss = loss_function()
        weighted = loss if weight == 1 else weight * loss
        (weighted if self.grad_scaler is None else self.grad_scaler.scale(weighted)).backward()
        return loss

    def _step(self) -> None:
        """nnU-Net's own: clipped, by the scaler where there is one."""
        if self.grad_scaler is not None:
            self.grad_scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.network.parameters(), GRADIENT_NORM)
        if self.grad_scaler is None:
            self.optimizer.step()
        else:
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        super().on_train_epoch_end(train_outputs)
        if "consistency" in train_outputs[0]:
            loss, confident = (np.mean([seen[key] for seen in train_outputs]) for key in ("consistency", "confident"))
            self.print_to_log_file(
                f"consistency_loss {loss:.4f}, times {self.consistency_weight():.3g}; confident {confident:.1%}"
            )

    # ------------------------------------------------------------------ checkpoints

    def save_checkpoint(self, filename: str) -> None:
        super().save_checkpoint(filename)
        if self.local_rank == 0 and not self.disable_checkpointing:
            checkpoints.detach(filename, type(self), self.method)

    def load_checkpoint(self, filename_or_checkpoint: dict[str, Any] | str) -> None:
        super().load_checkpoint(filename_or_checkpoint)
        self._resumed = checkpoints.state(filename_or_checkpoint)
        if self.method is not None and self._resumed:
            self.method.load_state_dict(self._resumed)
