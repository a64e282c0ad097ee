"""Consistency methods, each one `prepare` and one `loss`.

`prepare(model, unlabelled)` runs once, at theta and without gradient: it makes the views and fixes their targets.
`loss(model, views)` may then be called any number of times on the same views, at theta and at theta*.
"""

from .cutmix import CutMix
from .fixmatch import FixMatch, Views
from .method import Method

__all__ = ["CutMix", "FixMatch", "Method", "Views"]
