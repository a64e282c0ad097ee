"""GapMatch in nnU-Net v2: a trainer that learns from cases without labels, too.

    nnUNetv2_train 5 2d 0 -tr GapMatchTrainer

Where nnU-Net finds this file, how the cases get in, and what is particular: docs/recipes/nnunet.md.
"""

from collections.abc import Callable
from contextlib import nullcontext
from os.path import join
from typing import Any

import torch
import torch.nn.functional as F
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from batchgenerators.utilities.file_and_folder_operations import load_json
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch import Tensor

from gap_torch import GAPWrapper
from gap_torch.consistency import Views
from gap_torch.losses import ce_dice_loss

GRADIENT_NORM = 12  # nnU-Net's own limit


class TwoViews(BasicTransform):
    """An image (C, *spatial) becomes its weak view and its strong one behind it, (2C, *spatial).

    Of nnU-Net's training transforms the geometry makes the weak view; the intensities, all of them `RandomTransform`s,
    make the strong one of it, so that pseudo-labels stay in place.
    """

    def __init__(self, training: ComposeTransforms) -> None:
        super().__init__()
        intensities = [t for t in training.transforms if isinstance(t, RandomTransform)]
        others = [t for t in training.transforms if not isinstance(t, RandomTransform)]
        mirror = max((i for i, t in enumerate(others) if isinstance(t, MirrorTransform)), default=0)
        self.geometry = ComposeTransforms(others[: mirror + 1])
        self.intensities = ComposeTransforms(intensities)
        self.rest = ComposeTransforms(others[mirror + 1 :])  # the mask of normalisation, and what concerns labels

    def apply(self, data_dict: dict[str, Any], **params: Any) -> dict[str, Any]:
        weak = self.geometry(**data_dict)
        strong = self.intensities(**{name: tensor.clone() for name, tensor in weak.items()})
        views = [self.rest(**view) for view in (weak, strong)]
        return {**views[0], "image": torch.cat([view["image"] for view in views])}


class GapMatchTrainer(nnUNetTrainer):
    """nnU-Net's trainer with FixMatch and GAP on the cases under "unlabelled" in `splits_final.json`.

    Derive from it to change the five numbers, as one does with nnU-Net's own.

    Raises:
        ValueError: regions instead of classes, a cascade, or splits without usable "unlabelled" cases.
    """

    gap_eps = 0.1
    gap_alpha = 1.0
    tau = 0.95  # least confidence of a pseudo-label
    weight = 1.0  # of the consistency loss beside the labelled one
    warm_up = 10  # epochs on labelled cases alone

    def initialize(self) -> None:
        if self.label_manager.has_regions or self.is_cascaded:
            raise ValueError("GapMatchTrainer takes classes, not regions, and no cascade: pseudo-labels are an argmax.")
        super().initialize()

    def configure_optimizers(self) -> tuple[GAPWrapper, Any]:
        optimizer, scheduler = super().configure_optimizers()
        return GAPWrapper(optimizer, self.gap_eps, self.gap_alpha), scheduler

    # ------------------------------------------------------------------ cases without labels

    def unlabelled_cases(self) -> list[str]:
        """The fold's identifiers under "unlabelled" in `splits_final.json`, which is to be there."""
        splits = load_json(join(self.preprocessed_dataset_folder_base, "splits_final.json"))
        fold = splits[self.fold] if self.fold in range(len(splits)) else {}
        cases = fold.get("unlabelled", [])
        labelled = {*fold.get("train", []), *fold.get("val", [])}
        if not cases or labelled & set(cases):
            raise ValueError(
                f"fold {self.fold} of splits_final.json needs a list 'unlabelled', next to 'train' and 'val', and no "
                f"case in it may be in those: got {cases}."
            )
        return list(cases)

    def get_dataloaders(self) -> tuple[Any, Any]:
        cases = self.unlabelled_cases()
        loaders = super().get_dataloaders()
        self.dataloader_unlabelled = self._augmented(self._unlabelled_loader(cases))
        return loaders

    def _unlabelled_loader(self, cases: list[str]) -> nnUNetDataLoader:
        patch = self.configuration_manager.patch_size
        rotation, dummy_2d, initial_patch, mirror_axes = (
            self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        transforms = self.get_training_transforms(
            patch, rotation, None, mirror_axes, dummy_2d, self.configuration_manager.use_mask_for_norm
        )
        dataset = self.dataset_class(self.preprocessed_dataset_folder, cases)
        return nnUNetDataLoader(
            dataset, self.batch_size, initial_patch, patch, self.label_manager, transforms=TwoViews(transforms)
        )

    def _augmented(self, loader: nnUNetDataLoader) -> Any:
        processes = get_allowed_n_proc_DA()
        if processes == 0:
            return SingleThreadedAugmenter(loader, None)
        pin = self.device.type == "cuda"
        return NonDetMultiThreadedAugmenter(loader, None, processes, max(6, processes // 2), None, pin, wait_time=0.002)

    def on_train_end(self) -> None:
        super().on_train_end()
        if isinstance(self.dataloader_unlabelled, NonDetMultiThreadedAugmenter):
            self.dataloader_unlabelled._finish()

    # ------------------------------------------------------------------ one step

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        if self.current_epoch < self.warm_up:
            return super().train_step(batch)
        data, target = self._to_device(batch["data"]), [self._to_device(t) for t in _listed(batch["target"])]
        both_views = self._to_device(next(self.dataloader_unlabelled)["data"])
        self.optimizer.zero_grad(set_to_none=True)
        views = self.prepare(both_views)
        self._backward(lambda: self.weight * self.consistency(views))  # g1
        with self.optimizer.perturbed(self.network):
            self._backward(lambda: self.weight * self.consistency(views))  # g2, at theta*
        loss = self._backward(
            lambda: self.loss(self.network(data), target if self.enable_deep_supervision else target[0])
        )
        self._step()
        return {"loss": loss.detach().cpu().numpy()}

    @torch.no_grad()
    def prepare(self, both_views: Tensor) -> Views:
        """The strong views (B, C, *spatial) of `both_views` (B, 2C, *spatial), and the weak ones' pseudo-labels."""
        weak, strong = both_views.chunk(2, dim=1)
        with self._autocast():
            logits = _listed(self.network(weak))[0]
        torch.clear_autocast_cache()  # casts that were made without gradient
        confidence, pseudo_label = logits.float().softmax(dim=1).max(dim=1)
        return Views((strong,), pseudo_label, confidence >= self.tau)

    def consistency(self, views: Views) -> Tensor:
        """Cross-entropy and Dice on the strong views' confident pixels, in all resolutions of deep supervision."""
        outputs = _listed(self.network(views.inputs[0]))
        target = [_resized(views.target, logits) for logits in outputs]
        mask = [_resized(views.mask, logits) for logits in outputs]
        weights = self.loss.weight_factors if self.enable_deep_supervision else (1,)
        return DeepSupervisionWrapper(ce_dice_loss, weights)(outputs, target, mask)

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _autocast(self) -> Any:
        # nnU-Net's rule: on the CPU autocast is slow, and MPS rejects it even when it is not enabled
        return torch.autocast("cuda") if self.device.type == "cuda" else nullcontext()

    def _backward(self, loss_function: Callable[[], Tensor]) -> Tensor:
        with self._autocast():
            loss = loss_function()
        (loss if self.grad_scaler is None else self.grad_scaler.scale(loss)).backward()
        return loss

    def _step(self) -> None:
        if self.grad_scaler is not None:
            self.grad_scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), GRADIENT_NORM)
        if self.grad_scaler is None:
            self.optimizer.step()
        else:
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()


def _listed(outputs: Any) -> list[Tensor]:
    """One entry for each resolution, the full one first."""
    return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]


def _resized(labels: Any, logits: Tensor) -> Tensor:
    """`labels` (B, *spatial) in the resolution of `logits`, dtype kept."""
    return F.interpolate(labels[:, None].float(), logits.shape[2:], mode="nearest")[:, 0].to(labels.dtype)
