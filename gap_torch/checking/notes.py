"""What is worth knowing of an update and not wrong, or could not be told: one note after the other."""

import math
from collections.abc import Callable, Iterator

from ..batchnorm import is_running_stat
from .passes import counted_in, of_part, on_data, on_features, seen_in, silent_samples
from .report import Finding, shown
from .update import Update


def notes(update: Update) -> Iterator[Finding]:
    """All notes that apply to `update`."""
    if update.hidden:
        what = "first_step() ran where it can't be watched, as in a compiled step, so nothing is known of this update."
        yield Finding("not told", update.where("step"), what, "Check it without torch.compile.")
    if update.where("first_step") and update.where("second_step"):
        yield from filter(None, (note(update) for note in NOTES))


def nothing_moved(update: Update) -> Finding | None:
    """theta* was theta."""
    if not update.stood_still:
        return None
    if update.grad_norm and math.isfinite(update.grad_norm):
        why, fix = "eps is 0.", ""
    elif not update.grad_norm:
        why = "||g1|| was zero."
        fix = (
            "Common early in FixMatch, when no pixel is confident: check again later. Or the network has one logit: a "
            "softmax over it is 1 everywhere, so give it two."
        )
    else:
        why, fix = "||g1|| was not finite.", "Common with a GradScaler, until its scale fits: check again later."
    return Finding("no move", update.where("first_step"), f"theta* is theta: {why}", fix)


def unknown_radius(update: Update) -> Finding | None:
    """Each process has but a part of the parameters."""
    if update.move is not None or update.stood_still:
        return None
    what = "the radius can't be told: the parameters are spread over processes."
    return Finding("not told", update.where("first_step"), what)


def unknown_samples(update: Update) -> Finding | None:
    """The inputs of the model could not be seen, or its outputs."""
    if seen_in(update.went_through("g1")) and seen_in(update.went_through("g2")):
        return None
    what = "whether both passes saw the same samples can't be told: the inputs of the model were not seen."
    return Finding("not told", update.where("first_step"), what)


def silent(update: Update) -> Finding | None:
    """Some samples at theta* count nowhere: they may be there for targets."""
    if not (samples := silent_samples(update)):
        return None
    what = f"{len(samples)} of the samples at theta* got no gradient."
    fix = (
        "Fine if no pixel of theirs is confident, or if they are there for batch norm; if targets are made from them, "
        "make those once, at theta."
    )
    return Finding("no gradient", update.where("g2"), what, fix)


def in_one_pass(update: Update) -> Finding | None:
    """Some samples have a gradient in one of the two passes alone, too small for a rule to speak of."""
    first, second = counted_in(on_data(update, "g1"), "g1"), counted_in(on_data(update, "g2"), "g2")
    if not first or not second or not (alone := first ^ second):
        return None
    what = f"{len(alone)} samples have a small gradient in one of g1 and g2, and none in the other."
    fix = (
        "Fine if it is rounded to zero there. If the labelled loss is small and part of one pass, move it behind both."
    )
    return Finding("one pass", update.where("g2"), what, fix)


def no_labelled_backward(update: Update) -> Finding | None:
    """The labelled loss may be in g1 and g2."""
    if not update.where("step") or update.where("g_l") or update.where("aside"):
        return None
    what = "no backward came after second_step(), and none was set aside."
    fix = "If the labelled loss is part of both passes, it steers the direction as well: move it behind them."
    return Finding("no g_l", update.where("second_step"), what, fix)


def features(update: Update) -> Finding | None:
    """Detached features, it seems, went into a part of the model."""
    parts = on_features(update)
    for forward in update.went_through("g2"):
        if forward.part in parts:
            what = f"{forward.part} got other inputs in the perturbed pass than in that of g1."
            return Finding("features", forward.where, what, "Fine if these are features, detached, and no new views.")
    return None


def other_batches(update: Update) -> Finding | None:
    """Batch norm normalised the same samples in other batches."""
    first = update.went_through("g1")
    batches = {frozenset(forward.samples) for forward in first}
    for forward in update.went_through("g2"):
        known = forward.batch_norm and forward.samples and seen_in(of_part(forward.part, first)) >= {*forward.samples}
        if known and frozenset(forward.samples) not in batches:
            what = "batch norm saw other batches in the perturbed pass than in that of g1: g2 is of another function."
            fix = "Cheaper, and fine if that doesn't matter to you; else send the same batches through again."
            return Finding("batch norm", forward.where, what, fix)
    return None


def other_buffers(update: Update) -> Finding | None:
    """A pass at theta* moved buffers that are no running statistics."""
    for forward in update.at_theta_star():
        # a batch count alone makes no difference
        if names := [n for n in forward.moved if not is_running_stat(n) and not n.endswith("num_batches_tracked")]:
            what = f"the perturbed pass moves buffers of the model ({shown(names)})."
            fix = "GAP leaves those alone, as spectral norm's vectors and the ranges of quantisation."
            return Finding("buffers", forward.where, what, fix)
    return None


NOTES: tuple[Callable[[Update], Finding | None], ...] = (
    nothing_moved,
    unknown_radius,
    unknown_samples,
    silent,
    in_one_pass,
    no_labelled_backward,
    features,
    other_batches,
    other_buffers,
)
