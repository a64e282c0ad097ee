"""The self-check: does a training step of yours follow Algorithm 1?"""

from .check import Check, check
from .report import Finding, Report

__all__ = ["Check", "Finding", "Report", "check"]
