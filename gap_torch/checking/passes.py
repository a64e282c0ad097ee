"""Which samples went through the model in a pass, and which of them count there."""

from typing import get_args

from .update import Forward, Pass, Update


def seen_in(forwards: list[Forward]) -> set[int]:
    """Samples that went through the model."""
    return {sample for forward in forwards for sample in forward.samples}


def counted_in(forwards: list[Forward], adds_to: Pass) -> set[int]:
    """Samples that got a gradient."""
    return {sample for forward in forwards if adds_to in forward.flows for sample in forward.flows[adds_to].samples}


def silent_samples(update: Update) -> set[int]:
    """Samples that went through the model together with samples of g2, and got no gradient in any pass."""
    if not counted_in(update.forwards, "g2"):
        return set()
    silent = seen_in(update.went_through("g2"))
    return silent.difference(*(counted_in(update.forwards, adds_to) for adds_to in get_args(Pass)))


def on_data(update: Update, adds_to: Pass) -> list[Forward]:
    """The forward passes of a pass, without forward passes of parts that got features."""
    parts = on_features(update)
    return [forward for forward in update.went_through(adds_to) if forward.part not in parts]


def on_features(update: Update) -> set[str]:
    """Parts of the model that saw none of their inputs in both passes, where another did: features of it, detached.

    Nothing tells where detached features come from. At theta* the model makes other features.
    """
    first, second = _by_part(update.went_through("g1")), _by_part(update.went_through("g2"))
    common = {part: first[part] & second[part] for part in first.keys() & second.keys()}
    return {part for part, samples in common.items() if part and not samples} if any(common.values()) else set()


def of_part(part: str, forwards: list[Forward]) -> list[Forward]:
    """The calls of `part` among `forwards`; all of `forwards`, if it was not called."""
    return [forward for forward in forwards if forward.part == part] or forwards


def _by_part(forwards: list[Forward]) -> dict[str, set[int]]:
    parts = {forward.part for forward in forwards if forward.samples}
    return {part: seen_in([f for f in forwards if f.part == part]) for part in parts}
