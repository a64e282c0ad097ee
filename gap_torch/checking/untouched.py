"""Whether the user's code leaves `.grad` alone while g2 is added to g1 in it."""

from . import values
from .loop import Loop
from .report import Finding


def look_at_gradients(loop: Loop, where: str) -> None:
    """Write down what has been done to `.grad` since the perturbed pass left it."""
    update, marks, now = loop.update, loop.marks, values.gradients(loop.params)
    changed = [p for p, g in marks.last.items() if p not in now or not values.same_bits(g, now[p])]
    if not update.where("g2"):  # before it, the wrapper puts back what is None
        changed = [p for p in changed if p in now]
    if all(p not in now or not now[p].any() for p in changed):
        if changed:
            update.seen.append(_zeroed(marks.zeroed_at or where))
    elif not marks.separate:
        update.seen.append(_changed(where))
    marks.last = now


def _zeroed(where: str) -> Finding:
    what = "gradients were zeroed while the parameters were perturbed: what had been computed by then is lost."
    return Finding("zeroed", where, what, "zero gradients only between step() and the next update's first backward.")


def _changed(where: str) -> Finding:
    what = "gradients were changed between first_step() and second_step(), where g1 and g2 are one sum."
    fix = "clip before first_step() or after second_step(), or use perturbed(model, separate=True) to clip g2 alone."
    return Finding("changed", where, what, fix)
