"""What is right in an update, and what is wrong: one rule after the other.

A rule looks at the record of an update and says what is wrong (a Finding), what is right (a line), or nothing.
"""

from collections.abc import Callable, Iterator

from .report import Finding
from .update import Forward, Pass, Update

Verdict = Finding | str | None
Rule = Callable[[Update], Verdict]

PERTURBED_PAIR: tuple[Pass, Pass] = ("g1", "g2")
USE_PERTURBED = "put the second backward into `with optimizer.perturbed(model):`, and call optimizer.step() after it."


def verdicts(update: Update, has_wrapper: bool) -> Iterator[Verdict]:
    """Of all rules that apply to `update`, which has come to its end."""
    if not has_wrapper:
        yield _no_wrapper(update)
        yield g2_is_used(update)
    elif not update.due:
        yield "an update without GAP (interval)"
    elif update.first:
        for rule in RULES:
            yield rule(update)
    elif not update.hidden:
        yield _no_perturbed_pass(update)
        yield g2_is_used(update)


def notes(update: Update) -> Iterator[Finding]:
    """What is worth knowing."""
    if update.hidden:
        what = "first_step() ran where it can't be watched, as in a compiled step, so nothing is known of this update."
        yield Finding("not told", update.step, what, "Check it without torch.compile.")
    if not update.first or not update.second:
        return
    if update.move is not None and update.move.wanted == 0 and any(update.move.eps):
        what = "||g1|| was zero or not finite, so nothing was moved."
        fix = "Common early in FixMatch, when no pixel is confident, and with a GradScaler: check again later."
        yield Finding("no move", update.first, what, fix)
    if update.move is None:
        what = "radius and sum of the gradients can't be told: the parameters are spread over processes."
        yield Finding("not told", update.first, what)
    if not all(_union(update.went_through(backward)) for backward in PERTURBED_PAIR):
        what = "whether both passes saw the same samples can't be told: the inputs of the model were not seen."
        yield Finding("not told", update.first, what)
    if not update.has("g_l") and not update.has("aside"):
        what = "no backward came after second_step(), and none was set aside."
        fix = "If the labelled loss is part of the other two passes, it is in the direction too: move it behind them."
        yield Finding("no g_l", update.second, what, fix)
    if update.dropout and not _replayed(update):
        what = f"dropout ({update.dropout}) drew other masks in the perturbed pass, as it does by default."
        yield Finding("dropout", update.first, what, "perturbed(model, rng=RNGState.now()) replays those of g1.")


# ---------------------------------------------------------------------- without a perturbed pass


def _no_wrapper(update: Update) -> Finding:
    what = f"the optimizer is no GAPWrapper, and its step is that of the plain method.{_by_hand(update)}"
    fix = f"wrap it, optimizer = GAPWrapper(optimizer, eps=0.1), and {USE_PERTURBED}"
    return Finding("no wrapper", update.step, what, fix)


def _no_perturbed_pass(update: Update) -> Finding:
    what = f"step() without first_step() and second_step(): this update is that of the plain method.{_by_hand(update)}"
    return Finding("no perturbed pass", update.step, what, USE_PERTURBED)


def _by_hand(update: Update) -> str:
    moved = update.at_theta_star()
    if not moved:
        return " The parameters are not back where they were." if update.step_by_hand else ""
    back = " and were not back at the step" if update.step_by_hand else ""
    return f" The parameters were moved by other code before {moved[0].where}{back}."


# ---------------------------------------------------------------------- the rules


def order(update: Update) -> Verdict:
    """first_step, second_step and step, in this order."""
    if not update.second:
        what = "no second_step() came after first_step(): the parameters were left at theta*."
        return Finding("no second_step", update.first, what, "call second_step() after the perturbed backward.")
    if not update.step:
        what = "after second_step() there was no step() before this update ended or the next first_step() came."
        fix = "call optimizer.step() once all passes are done; with micro-batches, let each pass go over all of them."
        return Finding("no step", update.second, what, fix)
    return "first_step(), second_step() and step() come in this order, each with a backward before it"


def radius(update: Update) -> Verdict:
    """theta* = theta + eps * g1 / ||g1||."""
    move = update.move
    if move is None:
        return None
    eps = ", ".join(f"{radius:g}" for radius in dict.fromkeys(move.eps))
    if not move.as_wanted:
        what = f"theta* is not theta + eps * g1 / ||g1||: its distance is {move.radius:g}, not {move.wanted:g}."
        fix = "see that nothing changes parameters or .grad while first_step() runs; else please report it."
        return Finding("radius", update.first, what, fix)
    return f"theta* lies along g1, at a distance of {move.radius:.4g} (eps = {eps})"


def restored(update: Update) -> Verdict:
    """theta is back, bit for bit."""
    if update.restored is False:
        what = "the parameters are not back at theta, bit for bit, after second_step()."
        return Finding("restore", update.second, what, "see that nothing else writes to them in the perturbed pass.")
    return "the parameters came back bit for bit" if update.restored else None


def gradient_sum(update: Update) -> Verdict:
    """`.grad` = g1 + alpha * g2, and what was set aside. Lost gradients have been noticed already."""
    if update.sum_holds is False and not update.seen:
        what = ".grad after second_step() is not g1 + alpha * g2 (+ what was set aside)."
        return Finding("sum", update.second, what, "see that no hook or other code writes to .grad in between.")
    return ".grad after second_step() is g1 + alpha * g2" if update.sum_holds else None


def same_samples(update: Update) -> Verdict:
    """What contributes to one of g1 and g2 was part of the pass of the other."""
    first, second = update.went_through("g1"), update.went_through("g2")
    seen1, seen2 = _union(first), _union(second)
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
            fix = "make targets once, at theta, before the first pass; both passes must see the same."
            return _of_forward("targets", forward, what, fix)
    return "no forward pass for targets at theta*"


def own_graphs(update: Update) -> Verdict:
    """A backward runs where its forward did."""
    for forward in update.forwards:
        if forward.stale:
            what = "a loss was computed before the parameters moved and its backward ran after, or the reverse."
            return _of_forward("stale graph", forward, what, "run the loss anew, forward and backward, after a move.")
    return None


def running_statistics(update: Update) -> Verdict:
    """Batch norm's stay as they are in the perturbed pass."""
    for forward in update.at_theta_star():
        if forward.statistics:
            what = f"the perturbed pass moves running statistics of batch norm ({_some(forward.statistics)})."
            fix = "give the model: perturbed(model); or wrap the pass in `with gap_torch.frozen_running_stats(model):`."
            return _of_forward("statistics", forward, what, fix)
    if update.layers and update.at_theta_star():
        return f"batch norm's running statistics stayed as they were in the perturbed pass (layers: {update.layers})"
    return None


RULES: tuple[Rule, ...] = (
    order,
    radius,
    restored,
    gradient_sum,
    same_samples,
    g2_is_used,
    fixed_targets,
    own_graphs,
    running_statistics,
)


def _of_forward(kind: str, forward: Forward, what: str, fix: str) -> Finding:
    """At its last backward, which is more often a line of the loop itself; else where the model was called."""
    where = [forward.where, *(flow.where for flow in forward.flows.values())][-1]
    return Finding(kind, where, what + (f" (Forward pass: {forward.where}.)" if where != forward.where else ""), fix)


def _union(forwards: list[Forward]) -> set[int]:
    return {sample for forward in forwards for sample in forward.samples}


def _replayed(update: Update) -> bool:
    first, second = ([f.random_state for f in update.went_through(backward)] for backward in PERTURBED_PAIR)
    return bool(first) and first == second


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
