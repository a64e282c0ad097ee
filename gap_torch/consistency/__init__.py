"""Consistency methods, each one `prepare` and one `loss`.

`prepare(model, unlabelled)` runs once, at theta and without gradient: it makes the views and fixes their targets.
`loss(model, views)` may then be called any number of times on the same views, at theta and at theta*.
"""

from .cutmix import CutMix
from .cutmix_seg import CutMixSeg
from .em import EntropyMinimisation
from .fixmatch import FixMatch
from .flexmatch import CurriculumThreshold
from .freematch import SelfAdaptiveThreshold
from .method import Method, Outputs, Views, logits_of
from .mixup import MixUp
from .pseudo_label import PseudoLabel
from .teacher import Teacher
from .thresholds import FixedThreshold, Threshold

__all__ = [
    "CurriculumThreshold",
    "CutMix",
    "CutMixSeg",
    "EntropyMinimisation",
    "FixMatch",
    "FixedThreshold",
    "Method",
    "MixUp",
    "Outputs",
    "PseudoLabel",
    "SelfAdaptiveThreshold",
    "Teacher",
    "Threshold",
    "Views",
    "logits_of",
]
