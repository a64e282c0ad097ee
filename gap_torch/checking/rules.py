"""What is right in an update, and what is wrong: one rule after the other.

A rule looks at the record of an update and says what is wrong (a Finding), what is right (a line), or nothing.
"""

from collections.abc import Iterator

from ..batchnorm import is_running_stat
from .passes import counted_in, of_part, on_data, seen_in, silent_samples
from .report import Finding, shown
from .update import Forward, Update

Verdict = Finding | str | None

USE_PERTURBED = "put the second backward into `with optimizer.perturbed(model):`, and call optimizer.step() after it."

ANEW = (
    "call the model anew for it, where its backward is. For a labelled loss there is also "
    "`with optimizer.set_aside():`, before the first pass."
)

LABELLED_ELSEWHERE = "run the labelled backward after second_step(), or first under `with optimizer.set_aside():`;"


def verdicts(update: Update, has_wrapper: bool) -> Iterator[Verdict]:
    """Verdicts of all rules that apply to `update`, which has come to its end."""
    if not has_wrapper:
        yield _no_wrapper(update)
        yield from (rule(update) for rule in BY_HAND)
    elif not update.due:
        yield "an update without GAP (interval)"
    elif update.where("first_step"):
        for rule in RULES:
            yield rule(update)
    elif not update.hidden:
        yield _no_perturbed_pass(update)
        yield from (rule(update) for rule in BY_HAND)


# ---------------------------------------------------------------------- without a perturbed pass


def _no_wrapper(update: Update) -> Finding:
    step = "may be right or wrong" if update.at_theta_star() else "is that of the plain method"
    if any(isinstance(rule(update), Finding) for rule in BY_HAND):
        step = "is wrong"
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
    """A sample that contributes to g1 or g2 is part of the other's pass, and contributes there as well."""
    first, second = on_data(update, "g1"), on_data(update, "g2")
    if not seen_in(first) or not seen_in(second):
        return None
    alone = _alone_in_g2(first, second) or _alone_in_g1(first, second) or _search_in_g1(first, second)
    return alone or f"both passes saw the same {len(seen_in(second))} samples"


def _alone_in_g2(first: list[Forward], second: list[Forward]) -> Finding | None:
    seen = seen_in(first)
    for forward in second:
        flow, counted = forward.flows["g2"], counted_in(of_part(forward.part, first), "g1")
        if flow.samples - seen:
            what = "the perturbed pass takes gradients of samples that the pass of g1 has not seen."
            fix = (
                "use the same batch and the same augmented views in both (draw them once, before the first pass), and "
                "run the labelled loss after second_step()."
            )
            return _of_forward("other batch", forward, what, fix)
        if counted and (alone := flow.clearly - counted):
            what = f"g2 holds gradients of {len(alone)} samples whose loss is not in g1 (the labelled loss?)."
            fix = "use the same loss in both passes, and masks made once, at theta; run the labelled one after them."
            return _of_forward("other batch", forward, what, fix)
    return None


def _alone_in_g1(first: list[Forward], second: list[Forward]) -> Finding | None:
    seen = seen_in(second)
    for forward in first:
        flow, counted = forward.flows["g1"], counted_in(of_part(forward.part, second), "g2")
        if flow.samples - seen:
            if forward.adversarial:
                return _searched(forward)
            what = "g1 holds gradients of samples that the perturbed pass does not see (the labelled loss?)."
            return _of_forward(
                "mixed g1", forward, what, f"{LABELLED_ELSEWHERE} micro-batches belong into both passes."
            )
        if alone := flow.clearly - counted:
            what = f"g1 holds gradients of {len(alone)} samples whose loss is not in g2 (the labelled loss?)."
            return _of_forward("mixed g1", forward, what, f"{LABELLED_ELSEWHERE} make masks once, at theta.")
    return None


def _search_in_g1(first: list[Forward], second: list[Forward]) -> Finding | None:
    """An adversarial search that begins at samples which are in both passes anyway."""
    searches = [f for f in first if f.adversarial and f.flows["g1"].samples]
    others = [f for f in first if not f.adversarial]
    if any(f.adversarial for f in second):
        return None
    return next((_searched(f) for f in searches if f.flows["g1"].samples <= seen_in(others)), None)


def _searched(forward: Forward) -> Finding:
    what = "g1 holds the gradient of a pass whose input wants one itself: of a search for an adversarial example?"
    fix = "search by torch.autograd.grad(loss, inputs), or call model.zero_grad() after the search."
    return _of_forward("mixed g1", forward, what, fix)


def g2_is_used(update: Update) -> Verdict:
    """Some backward goes through a forward pass at theta*."""
    moved = [f for f in update.at_theta_star() if f.tracked]
    if moved and not any(f.reached for f in moved):
        what = "the loss at the perturbed parameters is computed, but no backward goes through it: there is no g2."
        fix = "call .backward() on that loss, before the parameters go back (a detached one has no gradient)."
        return _of_forward("g2 unused", moved[0], what, fix)
    return None


def fixed_targets(update: Update) -> Verdict:
    """No forward pass at theta* looks like a pass for targets."""
    moved = update.at_theta_star()
    if not any(f.reached for f in moved):
        return None
    for forward in moved:
        if forward.for_nothing:
            what = "a forward pass at the perturbed parameters that no gradient goes through: for targets?"
            fix = "make targets once, at theta, before the first pass. (A pass to log something: move it out, too.)"
            return _of_forward("targets", forward, what, fix)
    return None if silent_samples(update) else "no forward pass for targets at theta*"


def own_graphs(update: Update) -> Verdict:
    """A backward runs where its forward did."""
    for forward in update.forwards:
        if where := forward.stale_at:
            what = "a loss was computed before the parameters moved and its backward ran after, or the reverse."
            return _of_forward("stale graph", forward, what, ANEW, where)
    return None


def same_mode(update: Update) -> Verdict:
    """Modules are in training mode, or not, in both passes."""
    first = update.went_through("g1")
    for forward in update.went_through("g2"):
        modes = [f.training for f in first if f.part == forward.part]
        if modes and forward.training not in modes:
            names = sorted(forward.training ^ modes[0])
            what = f"training mode was on in one pass and off in the other ({shown(names)}): g2 is of another function."
            fix = "call model.train() or model.eval() before the first pass, and neither between the two."
            return _of_forward("mode", forward, what, fix)
    return None


def running_statistics(update: Update) -> Verdict:
    """Batch norm's running statistics stay as they are in the perturbed pass."""
    for forward in update.at_theta_star():
        if names := [name for name in forward.moved if is_running_stat(name)]:
            what = f"the perturbed pass moves running statistics of batch norm ({shown(names)})."
            fix = "give the model: perturbed(model); or wrap the pass in `with gap_torch.frozen_running_stats(model):`."
            return _of_forward("statistics", forward, what, fix)
    if update.has_statistics and update.at_theta_star():
        return "batch norm's running statistics stayed as they were in the perturbed pass"
    return None


RULES = (order, radius, restored, same_samples, same_mode, g2_is_used, fixed_targets, own_graphs, running_statistics)
BY_HAND = (g2_is_used, own_graphs)
"""The rules for updates without a wrapper's perturbed pass: GAP written by hand, if the parameters move at all."""


def _of_forward(kind: str, forward: Forward, what: str, fix: str, where: str = "") -> Finding:
    """A finding at the last backward of `forward`, more often a line of the loop itself; else at its call."""
    where = where or [forward.where, *(flow.where for flow in forward.flows.values())][-1]
    return Finding(kind, where, what + (f" (Forward pass: {forward.where}.)" if where != forward.where else ""), fix)
