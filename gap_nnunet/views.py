"""Weak and strong views of a scan, made by nnU-Net's own training transforms in its worker processes."""

from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, ImageOnlyTransform, SegOnlyTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.random import OneOfTransform, RandomTransform


class WeakAndStrong(BasicTransform):
    """An image (C, *spatial) becomes its weak view and `strong` strong ones behind it, ((1 + strong) C, *spatial).

    Of nnU-Net's training transforms the geometry makes the weak view, and random intensities make the strong ones of
    it, so that every view shows the same place. What nnU-Net does at the end (0 outside the mask of normalisation) is
    done to each.

    Args:
        training: nnU-Net's transforms.
        strong: how many strong views.
        strength: times nnU-Net's own probability of each intensity transform, which leave a quarter of patches alone.

    Raises:
        ValueError: no transform changes intensities, so that a strong view would be the weak one.
    """

    def __init__(self, training: ComposeTransforms, strong: int = 1, strength: float = 1.0) -> None:
        super().__init__()
        self.strong = strong
        self.geometry = ComposeTransforms([t for t in training.transforms if not (_is_intensity(t) or _is_last(t))])
        self.intensities = ComposeTransforms([_often(t, strength) for t in training.transforms if _is_intensity(t)])
        if not self.intensities.transforms:
            raise ValueError(
                "get_training_transforms has no change of intensity (an ImageOnlyTransform of batchgeneratorsv2), so "
                "that strong views would be weak ones: take a trainer with nnU-Net's augmentation."
            )
        self.last = ComposeTransforms([t for t in training.transforms if _is_last(t)])

    def apply(self, data_dict: dict[str, Any], **params: Any) -> dict[str, Any]:
        weak = self.geometry(**data_dict)
        views = [weak, *(self.intensities(**_copy(weak)) for _ in range(self.strong))]
        views = [self.last(**_copy(view)) for view in views]
        return {**views[0], "image": torch.cat([view["image"] for view in views])}


def _copy(view: dict[str, Any]) -> dict[str, Any]:
    """Some transforms write to what they are given."""
    return {name: tensor.clone() for name, tensor in view.items()}


def _is_intensity(transform: BasicTransform) -> bool:
    if isinstance(transform, RandomTransform):
        return _is_intensity(transform.transform)
    if isinstance(transform, OneOfTransform):
        return all(map(_is_intensity, transform.list_of_transforms))
    return isinstance(transform, ImageOnlyTransform)


def _often(transform: BasicTransform, strength: float) -> BasicTransform:
    if isinstance(transform, RandomTransform):
        return RandomTransform(transform.transform, min(1.0, strength * transform.apply_probability))
    if isinstance(transform, OneOfTransform):
        return OneOfTransform([_often(t, strength) for t in transform.list_of_transforms])
    return transform


def _is_last(transform: BasicTransform) -> bool:
    """The mask of normalisation, and what concerns labels alone."""
    return isinstance(transform, (MaskImageTransform, SegOnlyTransform))
