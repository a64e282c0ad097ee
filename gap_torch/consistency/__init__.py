"""Consistency methods, each one `prepare` and one `loss`.

`prepare(model, unlabelled)` runs once, at theta and without gradient: it makes the views and fixes their targets.
`loss(model, views)` may then be called any number of times on the same views, at theta and at theta*.
"""

from .cutmix import CutMix
from .fixmatch import FixMatch
from .method import Method, Outputs, Views, logits_of
from .mixup import MixUp
from .teacher import Teacher
from .thresholds import FixedThreshold, Threshold

__all__ = [
    "CutMix",
    "FixMatch",
    "FixedThreshold",
    "Method",
    "MixUp",
    "Outputs",
    "Teacher",
    "Threshold",
    "Views",
    "logits_of",
]
