"""What is right in an update, and what is wrong: one rule after the other.

A rule looks at the record of an update and says what is wrong (a Finding), what is right (a line), or nothing.
"""

from collections.abc import Iterator

from .report import Finding
from .update import Forward, Update

Verdict = Finding | str | None

USE_PERTURBED = "put the second backward into `with optimizer.perturbed(model):`, and call optimizer.step() after it."

ANEW = (
    "call the model anew for it, where its backward is. For a labelled loss there is also "
    "`with optimizer.set_aside():`, before the first pass."
)


def verdicts(update: Update, has_wrapper: bool) -> Iterator[Verdict]:
    """Of all rules that apply to `update`, which has come to its end."""
    if not has_wrapper:
        yield _no_wrapper(update)
        yield g2_is_used(update)
    elif not update.due:
        yield "an update without GAP (interval)"
    elif update.where("first_step"):
        for rule in RULES:
            yield rule(update)
    elif not update.hidden:
        yield _no_perturbed_pass(update)
        yield g2_is_used(update)


def notes(update: Update) -> Iterator[Finding]:
    """What is worth knowing."""
    first, second = update.where("first_step"), update.where("second_step")
    if update.hidden:
        what = "first_step() ran where it can't be watched, as in a compiled step, so nothing is known of this update."
        yield Finding("not told", update.where("step"), what, "Check it without torch.compile.")
    if not first or not second:
        return
    if update.move is None:
        yield Finding("not told", first, "the radius can't be told: the parameters are spread over processes.")
    elif update.move.wanted == 0:
        what = "theta* is theta: eps is 0, or ||g1|| was zero or not finite."
        fix = "Common early in FixMatch, when no pixel is confident, and with a GradScaler: check again later."
        yield Finding("no move", first, what, fix)
    if not _samples(update.went_through("g1")) or not _samples(update.went_through("g2")):
        what = "whether both passes saw the same samples can't be told: the inputs of the model were not seen."
        yield Finding("not told", first, what)
    if silent := _silent(update):
        what = f"{len(silent)} of the samples at theta* got no gradient."
        fix = "Fine if no pixel of theirs is confident; if targets are made from them, make those once, at theta."
        yield Finding("no gradient", update.where("g2"), what, fix)
    if update.where("step") and not update.where("g_l") and not update.where("aside"):
        what = "no backward came after second_step(), and none was set aside."
        fix = "If the labelled loss is part of both passes, it steers the direction as well: move it behind them."
        yield Finding("no g_l", second, what, fix)


# ---------------------------------------------------------------------- without a perturbed pass


def _no_wrapper(update: Update) -> Finding:
    step = "may be right or wrong" if update.at_theta_star() else "is that of the plain method"
    what = f"the optimizer is no GAPWrapper, and its step {step}.{_by_hand(update)}"
    fix = f"wrap it, optimizer = GAPWrapper(optimizer, eps=0.1), and {USE_PERTURBED}"
    return Finding("no wrapper", update.where("step"), what, fix)


def _no_perturbed_pass(update: Update) -> Finding:
    if update.dropped:
        what = "gradients were zeroed between second_step() and step(): what had been computed by then is lost."
        return Finding("zeroed", update.dropped, what, "zero gradients only after step().")
    what = f"step() without first_step() and second_step(): this update is that of the plain method.{_by_hand(update)}"
    return Finding("no perturbed pass", update.where("step"), what, f"{USE_PERTURBED} (In a warm-up: check later.)")


def _by_hand(update: Update) -> str:
    moved = update.at_theta_star()
    if not moved:
        return " The parameters are not back where they were." if update.step_by_hand else ""
    back = " and were not back at the step" if update.step_by_hand else ""
    return f" The parameters were moved by other code before {moved[0].where}{back}."


# ---------------------------------------------------------------------- the rules


def order(update: Update) -> Verdict:
    """first_step, second_step and step, in this order."""
    if not update.where("second_step"):
        what = "no second_step() came after first_step(): the parameters were left at theta*."
        fix = "call second_step() after the perturbed backward."
        return Finding("no second_step", update.where("first_step"), what, fix)
    if not update.where("step"):
        what = "no step() came after second_step(), before the end or the next first_step()."
        fix = "call optimizer.step() once all passes are done; with micro-batches, let each pass go over all of them."
        return Finding("no step", update.where("second_step"), what, fix)
    return "first_step(), second_step() and step() come in this order"


def radius(update: Update) -> Verdict:
    """theta* = theta + eps * g1 / ||g1||."""
    move = update.move
    if move is None:
        return None
    if not move.exact:
        what = f"theta* is not theta + eps * g1 / ||g1||: its distance is {move.distance:g}, not {move.wanted:g}."
        fix = "see that nothing changes parameters or .grad while first_step() runs; else please report it."
        return Finding("radius", update.where("first_step"), what, fix)
    return f"theta* = theta + eps * g1 / ||g1||, at a distance of {move.distance:.4g}" if move.wanted else None


def restored(update: Update) -> Verdict:
    """theta is back, bit for bit, and nothing that was done to theta* is lost by that."""
    if not (where := update.where("second_step")):
        return None
    if update.overwritten:
        what = "the parameters were changed between first_step() and second_step(), which has undone it."
        fix = "call no other optimizer's step() there, and write nothing into the model."
        return Finding("overwritten", where, what, fix)
    if not update.restored:
        what = "the parameters are not back at theta, bit for bit, after second_step()."
        return Finding("restore", where, what, "see that nothing writes to them in a hook; else please report it.")
    return "the parameters came back bit for bit"


def same_samples(update: Update) -> Verdict:
    """What contributes to one of g1 and g2 was part of the pass of the other."""
    first, second = update.went_through("g1"), update.went_through("g2")
    seen1, seen2 = _samples(first), _samples(second)
    if not seen1 or not seen2:
        return None
    for forward in second:
        if forward.flows["g2"].samples - seen1:
            what = "the perturbed pass takes gradients of samples that the pass of g1 has not seen."
            fix = (
                "use the same batch and the same augmented views in both (draw them once, before the first pass), and "
                "run the labelled loss after second_step()."
            )
            return _of_forward("other batch", forward, what, fix)
    for forward in first:
        if forward.flows["g1"].samples - seen2:
            what = "g1 holds gradients of samples that the perturbed pass does not see (the labelled loss?)."
            fix = (
                "run the labelled backward after second_step(), or first under `with optimizer.set_aside():`; "
                "micro-batches belong into both passes."
            )
            return _of_forward("mixed g1", forward, what, fix)
    return f"both passes saw the same {len(seen2)} samples"


def g2_is_used(update: Update) -> Verdict:
    """Some backward goes through a forward pass at theta*."""
    moved = [f for f in update.at_theta_star() if f.tracked]
    if moved and not any(f.reached for f in moved):
        what = "the loss at the perturbed parameters is computed, but no backward goes through it: there is no g2."
        fix = "call .backward() on that loss, before the parameters go back (a detached one has no gradient)."
        return _of_forward("g2 unused", moved[0], what, fix)
    return None


def fixed_targets(update: Update) -> Verdict:
    """No forward pass at theta* that looks like one for targets."""
    moved = update.at_theta_star()
    if not any(f.reached for f in moved):
        return None
    for forward in moved:
        if forward.for_nothing:
            what = "a forward pass at the perturbed parameters that no gradient goes through: for targets?"
            fix = "make targets once, at theta, before the first pass. (A pass to log something: move it out, too.)"
            return _of_forward("targets", forward, what, fix)
    return None if _silent(update) else "no forward pass for targets at theta*"


def own_graphs(update: Update) -> Verdict:
    """A backward runs where its forward did."""
    for forward in update.forwards:
        if forward.stale:
            what = "a loss was computed before the parameters moved and its backward ran after, or the reverse."
            return _of_forward("stale graph", forward, what, ANEW)
    return None


def running_statistics(update: Update) -> Verdict:
    """Batch norm's stay as they are in the perturbed pass."""
    for forward in update.at_theta_star():
        if names := forward.moved:
            shown = ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
            what = f"the perturbed pass moves running statistics of batch norm ({shown})."
            fix = "give the model: perturbed(model); or wrap the pass in `with gap_torch.frozen_running_stats(model):`."
            return _of_forward("statistics", forward, what, fix)
    if update.has_statistics and update.at_theta_star():
        return "batch norm's running statistics stayed as they were in the perturbed pass"
    return None


RULES = (order, radius, restored, same_samples, g2_is_used, fixed_targets, own_graphs, running_statistics)


def _of_forward(kind: str, forward: Forward, what: str, fix: str) -> Finding:
    """At its last backward, which is more often a line of the loop itself; else where the model was called."""
    where = [forward.where, *(flow.where for flow in forward.flows.values())][-1]
    return Finding(kind, where, what + (f" (Forward pass: {forward.where}.)" if where != forward.where else ""), fix)


def _samples(forwards: list[Forward]) -> set[int]:
    return {sample for forward in forwards for sample in forward.samples}


def _silent(update: Update) -> set[int]:
    """Samples that went through the model together with those of g2, and got no gradient themselves."""
    second = update.went_through("g2")
    counted = {sample for forward in second for sample in forward.flows["g2"].samples}
    return _samples(second) - counted if counted else set()
