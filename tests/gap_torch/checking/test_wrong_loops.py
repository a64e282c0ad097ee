# ruff: noqa: PT012 (blocks of several statements are what is tested)
"""Each slip gives its finding and no other, at the line that is marked `# HERE`."""

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gap_torch
from gap_torch import GAPWrapper, frozen_running_stats
from gap_torch.checking import Report
from gap_torch.consistency import Batch

from .scene import Scene

# ---------------------------------------------------------------- order


def missing_second_step(s: Scene) -> None:
    views = s.views()
    s.consistency(views).backward()
    s.optimizer.first_step()  # HERE
    with frozen_running_stats(s.model):
        s.consistency(views).backward()


def missing_second_step_before_the_step(s: Scene) -> None:
    views = s.views()
    s.consistency(views).backward()
    s.optimizer.first_step()
    with frozen_running_stats(s.model):
        s.consistency(views).backward()
    s.optimizer.step()  # HERE


def step_while_perturbed(s: Scene) -> None:
    views = s.views()
    s.consistency(views).backward()
    with s.optimizer.perturbed(s.model):
        s.consistency(views).backward()
        s.optimizer.step()  # HERE


def base_steps_while_perturbed(s: Scene) -> None:
    views = s.views()
    s.consistency(views).backward()
    with s.optimizer.perturbed(s.model):
        s.consistency(views).backward()
        s.base.step()  # HERE


def missing_second_backward(s: Scene) -> None:
    views = s.views()
    s.consistency(views).backward()
    with s.optimizer.perturbed(s.model):  # HERE
        s.consistency(views)


def no_first_step(s: Scene) -> None:
    views = s.views()
    s.consistency(views).backward()
    s.supervised().backward()
    s.optimizer.step()  # HERE
    s.optimizer.zero_grad()


def no_step(s: Scene) -> None:
    views = s.views()
    s.consistency(views).backward()
    with s.optimizer.perturbed(s.model):  # HERE
        s.consistency(views).backward()
    s.supervised().backward()


def no_step_in_plain_training(s: Scene) -> None:
    s.consistency(s.views()).backward()
    s.supervised().backward()  # HERE


def a_whole_step_for_each_micro_batch(s: Scene) -> None:
    for unlabelled in s.u.split(2):
        views = s.views(unlabelled)
        s.consistency(views).backward()
        with s.optimizer.perturbed(s.model):  # HERE
            s.consistency(views).backward()
        s.supervised().backward()
    s.optimizer.step()
    s.optimizer.zero_grad()


def only_the_last_micro_batch(s: Scene) -> None:
    views = [s.views(u) for u in s.u.split(2)]
    for v in views:
        s.consistency(v).backward()  # HERE
    with s.optimizer.perturbed(s.model):
        s.consistency(v).backward()
    s.supervised().backward()
    s.optimizer.step()


# ---------------------------------------------------------------- g1


def labelled_backward_first(s: Scene) -> None:
    views = s.views()
    F.cross_entropy(s.model(s.x), s.y).backward()  # HERE
    s.consistency(views).backward()
    with s.optimizer.perturbed(s.model):
        s.consistency(views).backward()
    s.supervised().backward()
    s.optimizer.step()


def labelled_loss_in_the_same_backward(s: Scene) -> None:
    views = s.views()
    (F.cross_entropy(s.model(s.x), s.y) + s.consistency(views)).backward()  # HERE
    with s.optimizer.perturbed(s.model):
        s.consistency(views).backward()
    s.supervised().backward()
    s.optimizer.step()


def shared_forward_without_set_aside(s: Scene) -> None:
    views = s.views()
    logits = s.model(torch.cat([s.x, *views.inputs]))
    (F.cross_entropy(logits[:2], s.y) + s.method.compare((logits[2:],), views)).backward()  # HERE
    with s.optimizer.perturbed(s.model):
        s.consistency(views).backward()
    s.supervised().backward()
    s.optimizer.step()


def labelled_loss_left_in_g1(s: Scene) -> None:
    """The labelled images are in both passes, for batch norm; their loss is in the first."""
    views = s.views()
    images = torch.cat([s.x, *views.inputs])
    logits = s.model(images)
    (F.cross_entropy(logits[:2], s.y) + s.method.compare((logits[2:],), views)).backward()  # HERE
    with s.optimizer.perturbed(s.model):
        s.method.compare((s.model(images)[2:],), views).backward()
    s.optimizer.step()


def small_labelled_loss_left_in_g1(s: Scene) -> None:
    """The same, with a hundredth of the weight."""
    views = s.views()
    images = torch.cat([s.x, *views.inputs])
    logits = s.model(images)
    (0.01 * F.cross_entropy(logits[:2], s.y) + s.method.compare((logits[2:],), views)).backward()  # HERE
    with s.optimizer.perturbed(s.model):
        s.method.compare((s.model(images)[2:],), views).backward()
    s.supervised().backward()
    s.optimizer.step()


def labelled_loss_in_g1_of_parts(s: Scene) -> None:
    """The same, where the model is called in parts."""
    body, head, views = s.model[:-1], s.model[-1], s.views()  # type: ignore[index]
    features = body(torch.cat([s.x, *views.inputs]))
    (F.cross_entropy(head(features[:2]), s.y) + s.method.compare((head(features[2:]),), views)).backward()  # HERE
    with s.optimizer.perturbed(s.model):
        features = body(torch.cat([s.x, *views.inputs]))
        s.method.compare((head(features[2:]),), views).backward()
    s.optimizer.step()


def labelled_loss_set_aside_and_left_in_g2(s: Scene) -> None:
    views = s.views()
    images = torch.cat([s.x, *views.inputs])
    logits = s.model(images)
    with s.optimizer.set_aside():
        F.cross_entropy(logits[:2], s.y).backward(retain_graph=True)
    s.method.compare((logits[2:],), views).backward()
    with s.optimizer.perturbed(s.model):
        logits = s.model(images)
        (F.cross_entropy(logits[:2], s.y) + s.method.compare((logits[2:],), views)).backward()  # HERE
    s.optimizer.step()


def search_left_in_g1(s: Scene) -> None:
    """FGSM, whose gradient of the weights stays in `.grad`."""
    target, images = s.views().target, s.u.clone().requires_grad_()
    F.cross_entropy(s.model(images), target).backward()  # HERE
    adversarial = (s.u + 0.1 * images.grad.sign()).detach()  # type: ignore[union-attr]
    F.cross_entropy(s.model(adversarial), target).backward()
    with s.optimizer.perturbed(s.model):
        F.cross_entropy(s.model(adversarial), target).backward()
    s.supervised().backward()
    s.optimizer.step()


def search_of_vat_left_in_g1(s: Scene) -> None:
    """The input is computed from the direction, which is the leaf."""
    target, direction = s.views().target, torch.randn_like(s.u).requires_grad_()
    F.cross_entropy(s.model(s.u + 0.1 * direction), target).backward()  # HERE
    adversarial = s.u + direction.grad.sign()  # type: ignore[union-attr]
    F.cross_entropy(s.model(adversarial), target).backward()
    with s.optimizer.perturbed(s.model):
        F.cross_entropy(s.model(adversarial), target).backward()
    s.supervised().backward()
    s.optimizer.step()


def search_left_in_g1_from_images_of_both_passes(s: Scene) -> None:
    """It begins at the images whose prediction is compared as well."""
    target, images = s.views().target, s.u.clone().requires_grad_()
    F.cross_entropy(s.model(images), target).backward()  # HERE
    both = torch.cat([s.u, (s.u + 0.1 * images.grad.sign()).detach()])  # type: ignore[union-attr]
    F.cross_entropy(s.model(both), torch.cat([target, target])).backward()
    with s.optimizer.perturbed(s.model):
        F.cross_entropy(s.model(both), torch.cat([target, target])).backward()
    s.supervised().backward()
    s.optimizer.step()


def search_in_the_perturbed_pass(s: Scene) -> None:
    target = s.views().target
    adversarial = s.u + 0.1
    F.cross_entropy(s.model(adversarial), target).backward()
    with s.optimizer.perturbed(s.model):
        images = s.u.clone().requires_grad_()
        F.cross_entropy(s.model(images), target).backward()  # HERE
        F.cross_entropy(s.model(adversarial), target).backward()
    s.supervised().backward()
    s.optimizer.step()


def leftover_of_before(s: Scene) -> None:
    s.supervised().backward()
    s.base.step()
    with gap_torch.check(s.optimizer, s.model, show=None) as report:
        views = s.views()
        s.consistency(views).backward()  # HERE
        with s.optimizer.perturbed(s.model):
            s.consistency(views).backward()
        s.supervised().backward()
        s.optimizer.step()
    s.report = report  # type: ignore[attr-defined]


def never_zeroed(s: Scene) -> None:
    for _ in range(2):
        views = s.views()
        s.consistency(views).backward()  # HERE
        with s.optimizer.perturbed(s.model):
            s.consistency(views).backward()
        s.supervised().backward()
        s.optimizer.step()


# ---------------------------------------------------------------- the perturbed pass


def other_batch(s: Scene) -> None:
    views, others = s.views(), s.views(torch.randn(4, 1, 6, 6))
    s.consistency(views).backward()
    with s.optimizer.perturbed(s.model):
        s.consistency(others).backward()  # HERE
    s.supervised().backward()
    s.optimizer.step()


def new_augmentation(s: Scene) -> None:
    target = s.views().target
    F.cross_entropy(s.model(s.u + 0.1 * torch.randn_like(s.u)), target).backward()
    with s.optimizer.perturbed(s.model):
        F.cross_entropy(s.model(s.u + 0.1 * torch.randn_like(s.u)), target).backward()  # HERE
    s.supervised().backward()
    s.optimizer.step()


def labelled_inside(s: Scene) -> None:
    views = s.views()
    s.consistency(views).backward()
    with s.optimizer.perturbed(s.model):
        s.consistency(views).backward()
        F.cross_entropy(s.model(s.x), s.y).backward()  # HERE
    s.optimizer.step()


def targets_at_theta_star(s: Scene) -> None:
    s.consistency(s.views()).backward()
    with s.optimizer.perturbed(s.model):
        views = s.method.prepare(s.model, Batch(s.u))  # HERE
        s.consistency(views).backward()
    s.supervised().backward()
    s.optimizer.step()


def detached_targets_at_theta_star(s: Scene) -> None:
    views = s.views()
    s.consistency(views).backward()
    with s.optimizer.perturbed(s.model):
        target = s.model(s.u).argmax(1)  # HERE
        F.cross_entropy(s.model(*views.inputs), target).backward()
    s.supervised().backward()
    s.optimizer.step()


def moving_statistics(s: Scene) -> None:
    views = s.views()
    s.consistency(views).backward()
    with s.optimizer.perturbed():
        s.consistency(views).backward()  # HERE
    s.supervised().backward()
    s.optimizer.step()


def moving_statistics_between_two_calls(s: Scene) -> None:
    views = s.views()
    s.consistency(views).backward()
    s.optimizer.first_step()
    s.consistency(views).backward()  # HERE
    s.optimizer.second_step()
    s.supervised().backward()
    s.optimizer.step()


def eval_mode_in_the_perturbed_pass(s: Scene) -> None:
    """So that the statistics stay still. But batch norm then normalises by others."""
    views = s.views()
    s.consistency(views).backward()
    s.model.eval()
    with s.optimizer.perturbed(s.model):
        s.consistency(views).backward()  # HERE
    s.model.train()
    s.supervised().backward()
    s.optimizer.step()


def batch_norm_alone_in_eval_mode(s: Scene) -> None:
    views = s.views()
    s.consistency(views).backward()
    with s.optimizer.perturbed():
        s.model[1].eval()  # type: ignore[index]
        s.consistency(views).backward()  # HERE
    s.supervised().backward()
    s.optimizer.step()


def graph_of_theta(s: Scene) -> None:
    loss = s.consistency(s.views())
    loss.backward(retain_graph=True)
    with s.optimizer.perturbed(s.model):
        loss.backward()  # HERE


def freed_graph_of_theta(s: Scene) -> None:
    loss = s.consistency(s.views())
    loss.backward()
    with s.optimizer.perturbed(s.model):
        loss.backward()  # HERE


def labelled_forward_before_the_block(s: Scene) -> None:
    labelled, views = s.supervised(), s.views()
    s.consistency(views).backward()
    with s.optimizer.perturbed(s.model):
        s.consistency(views).backward()
    labelled.backward()  # HERE


def another_optimizer_steps_at_theta_star(s: Scene) -> None:
    views = s.views()
    s.consistency(views).backward()
    with s.optimizer.perturbed(s.model):  # HERE
        s.consistency(views).backward()
        torch.optim.SGD(s.model.parameters(), 0.1).step()
    s.supervised().backward()
    s.optimizer.step()


def input_written_in_place(s: Scene) -> None:
    """The second pass sees what the first one left."""
    target = s.views().target
    s.model.insert(0, nn.ReLU(inplace=True))
    F.cross_entropy(s.model(s.u), target).backward()
    with s.optimizer.perturbed(s.model):
        F.cross_entropy(s.model(s.u), target).backward()  # HERE
    s.supervised().backward()
    s.optimizer.step()


# ---------------------------------------------------------------- zeroing


def zeroed_in_place(s: Scene) -> None:
    views = s.views()
    s.consistency(views).backward()
    with s.optimizer.perturbed(s.model):
        s.model.zero_grad(set_to_none=False)  # HERE
        s.consistency(views).backward()


def zeroed_by_hand(s: Scene) -> None:
    """Behind the wrapper's back."""
    views = s.views()
    s.consistency(views).backward()
    with s.optimizer.perturbed(s.model):
        for p in s.model.parameters():
            p.grad.data.zero_()
        s.consistency(views).backward()  # HERE
    s.supervised().backward()
    s.optimizer.step()


def zeroed_between_micro_batches(s: Scene) -> None:
    views = [s.views(u) for u in s.u.split(2)]
    for v in views:
        s.consistency(v).backward()
    with s.optimizer.perturbed(s.model):
        for v in views:
            s.consistency(v).backward()
            s.base.zero_grad(set_to_none=False)  # HERE
    s.supervised().backward()
    s.optimizer.step()


def zeroed_before_the_labelled_backward(s: Scene) -> None:
    views = s.views()
    s.consistency(views).backward()
    with s.optimizer.perturbed(s.model):
        s.consistency(views).backward()
    s.optimizer.zero_grad()  # HERE
    s.supervised().backward()
    s.optimizer.step()


def zeroed_just_before_the_step(s: Scene) -> None:
    views = s.views()
    s.consistency(views).backward()
    with s.optimizer.perturbed(s.model):
        s.consistency(views).backward()
    s.supervised().backward()
    s.optimizer.zero_grad()  # HERE
    s.optimizer.step()


def unscaled_before_first_step(s: Scene) -> None:
    """So that g1 can be clipped. But g2 comes scaled."""
    scaler, views = torch.amp.GradScaler("cpu", init_scale=1024.0), s.views()
    scaler.scale(s.consistency(views)).backward()
    scaler.unscale_(s.optimizer)  # HERE
    with s.optimizer.perturbed(s.model):
        scaler.scale(s.consistency(views)).backward()
    scaler.scale(s.supervised()).backward()
    scaler.step(s.optimizer)


def clipped_in_between(s: Scene) -> None:
    views = s.views()
    s.consistency(views).backward()
    with s.optimizer.perturbed(s.model):  # HERE
        s.consistency(views).backward()
        nn.utils.clip_grad_norm_(s.model.parameters(), 1e-3)
    s.supervised().backward()
    s.optimizer.step()


# ---------------------------------------------------------------- by hand


def move(s: Scene, sign: float) -> None:
    norm = torch.stack([p.grad.norm() for p in s.model.parameters()]).norm()
    for p in s.model.parameters():
        p.data.add_(p.grad, alpha=sign * 0.1 / norm.item())


def sam_by_hand(s: Scene) -> None:
    """Even if it does what it should."""
    views = s.views()
    s.consistency(views).backward()
    move(s, 1.0)
    theta_star = [p.grad.clone() for p in s.model.parameters()]
    with frozen_running_stats(s.model):
        s.consistency(views).backward()
    for p, g1 in zip(s.model.parameters(), theta_star, strict=True):
        p.data.sub_(g1, alpha=0.1 / torch.stack([g.norm() for g in theta_star]).norm().item())
    s.supervised().backward()
    s.base.step()  # HERE


def recomputed_loss_without_backward(s: Scene) -> None:
    """The first public port: the loss is recomputed, and g2 is never used."""
    views = s.views()
    s.consistency(views).backward()
    move(s, 1.0)
    with frozen_running_stats(s.model):
        loss = s.method.loss(s.model, views)  # HERE g2 unused
    move(s, -1.0)
    s.log = loss.item()  # type: ignore[attr-defined]
    s.supervised().backward()
    s.base.step()  # HERE no perturbed pass


def detached_term(s: Scene) -> None:
    """The second one: a term without gradient is added to the loss."""
    views = s.views()
    s.consistency(views).backward()
    move(s, 1.0)
    with frozen_running_stats(s.model):
        term = s.method.loss(s.model, views).detach()  # HERE g2 unused
    move(s, -1.0)
    (s.supervised() + term).backward()
    s.base.step()  # HERE no perturbed pass


def backward_after_restoring(s: Scene) -> None:
    """Another public port: the loss is computed at theta*, and its backward goes through the weights of theta."""
    views = s.views()
    s.consistency(views).backward()
    move(s, 1.0)
    with frozen_running_stats(s.model):
        loss = s.method.loss(s.model, views)
    move(s, -1.0)
    (s.supervised() + loss).backward()  # HERE stale graph
    s.base.step()  # HERE no perturbed pass


def backward_after_moving(s: Scene) -> None:
    """The loss of theta has its second backward at theta*."""
    loss = s.consistency(s.views())
    loss.backward(retain_graph=True)
    move(s, 1.0)
    norm = torch.stack([p.grad.norm() for p in s.model.parameters()]).norm().item()
    g1 = [p.grad.clone() for p in s.model.parameters()]
    loss.backward()  # HERE stale graph
    for p, g in zip(s.model.parameters(), g1, strict=True):
        p.data.sub_(g, alpha=0.1 / norm)
    s.supervised().backward()
    s.base.step()  # HERE no perturbed pass


def backward_after_restoring_noticed_by_autograd(s: Scene) -> None:
    views = s.views()
    s.consistency(views).backward()
    move(s, 1.0)
    with frozen_running_stats(s.model):
        loss = s.method.loss(s.model, views)
    with torch.no_grad():
        for p in s.model.parameters():
            p.sub_(p.grad, alpha=0.1)
    loss.backward()  # HERE


def detached_term_in_the_wrapper(s: Scene) -> None:
    views = s.views()
    s.consistency(views).backward()
    with s.optimizer.perturbed(s.model):  # HERE
        term = s.consistency(views).detach()
    (s.supervised() + term).backward()


def detached_term_beside_the_labelled_loss(s: Scene) -> None:
    views = s.views()
    s.consistency(views).backward()
    with s.optimizer.perturbed(s.model):
        term = s.method.loss(s.model, views).detach()  # HERE targets
        F.cross_entropy(s.model(s.x), s.y).add(term).backward()  # HERE other batch
    s.optimizer.step()


WRONG: dict[Callable[[Scene], None], str] = {
    missing_second_step: "no second_step",
    missing_second_step_before_the_step: "refused",
    step_while_perturbed: "refused",
    base_steps_while_perturbed: "refused",
    missing_second_backward: "refused",
    no_first_step: "no perturbed pass",
    no_step: "no step",
    no_step_in_plain_training: "no step",
    a_whole_step_for_each_micro_batch: "no step",
    only_the_last_micro_batch: "mixed g1",
    labelled_backward_first: "mixed g1",
    labelled_loss_in_the_same_backward: "mixed g1",
    shared_forward_without_set_aside: "mixed g1",
    labelled_loss_left_in_g1: "mixed g1",
    small_labelled_loss_left_in_g1: "mixed g1",
    labelled_loss_in_g1_of_parts: "mixed g1",
    labelled_loss_set_aside_and_left_in_g2: "other batch",
    search_left_in_g1: "mixed g1",
    search_of_vat_left_in_g1: "mixed g1",
    search_left_in_g1_from_images_of_both_passes: "mixed g1",
    search_in_the_perturbed_pass: "other batch",
    leftover_of_before: "leftover",
    never_zeroed: "leftover",
    other_batch: "other batch",
    new_augmentation: "other batch",
    labelled_inside: "other batch",
    targets_at_theta_star: "targets",
    detached_targets_at_theta_star: "targets",
    moving_statistics: "statistics",
    moving_statistics_between_two_calls: "statistics",
    eval_mode_in_the_perturbed_pass: "mode",
    batch_norm_alone_in_eval_mode: "mode",
    graph_of_theta: "stale graph",
    freed_graph_of_theta: "stale graph",
    labelled_forward_before_the_block: "stale graph",
    another_optimizer_steps_at_theta_star: "overwritten",
    input_written_in_place: "other batch",
    zeroed_in_place: "zeroed",
    zeroed_by_hand: "zeroed",
    zeroed_between_micro_batches: "zeroed",
    zeroed_before_the_labelled_backward: "zeroed",
    zeroed_just_before_the_step: "zeroed",
    unscaled_before_first_step: "unscaled",
    clipped_in_between: "changed",
    sam_by_hand: "no perturbed pass",
    recomputed_loss_without_backward: "",
    detached_term: "",
    backward_after_restoring: "",
    backward_after_moving: "",
    backward_after_restoring_noticed_by_autograd: "stale graph",
    detached_term_in_the_wrapper: "refused",
    detached_term_beside_the_labelled_loss: "",
}


def _watched(loop: Callable[[Scene], None], s: Scene) -> Report:
    report = Report()
    try:
        with gap_torch.check(s.optimizer, s.model, show=None) as report:
            loop(s)
    except RuntimeError:
        assert report.stopped
    return getattr(s, "report", report)


def _expected(loop: Callable[[Scene], None]) -> set[tuple[str, str]]:
    """Kind and "file:line" of each mark in the source of `loop`."""
    lines, start = inspect.getsourcelines(loop)
    marks = [(number, line.split("# HERE")[1].strip()) for number, line in enumerate(lines, start) if "# HERE" in line]
    return {(kind or WRONG[loop], f"{Path(__file__).name}:{number}") for number, kind in marks}


@pytest.mark.filterwarnings("ignore:GAP. first_step")
@pytest.mark.parametrize("loop", WRONG, ids=lambda loop: loop.__name__)
def test_a_wrong_loop_gives_its_finding_and_no_other(loop: Callable[[Scene], None]) -> None:
    report = _watched(loop, Scene())
    assert {(p.kind, Path(p.where).name) for p in report.problems} == _expected(loop), str(report)
    assert len(report.problems) == len(_expected(loop))
    assert not report.ok


@pytest.mark.filterwarnings("ignore:GAP. first_step")
@pytest.mark.parametrize("loop", WRONG, ids=lambda loop: loop.__name__)
def test_the_report_names_the_line_and_the_remedy(loop: Callable[[Scene], None]) -> None:
    report = _watched(loop, Scene())
    for problem in report.problems:
        assert f"WRONG  {problem.where}: " in str(report)
        assert problem.fix
        assert problem.fix in str(report)


class Tempered(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, temperature: Tensor, x: Tensor) -> Tensor:
        return self.model(x) / temperature


def test_a_number_beside_the_batch_is_no_batch() -> None:
    """It is the same in labelled and unlabelled passes."""
    s, one = Scene(), torch.ones(1)
    model, target = Tempered(s.model), s.views().target
    with gap_torch.check(s.optimizer, model, show=None) as report:
        F.cross_entropy(model(one, s.x), s.y).backward()
        F.cross_entropy(model(one, s.u), target).backward()
        with s.optimizer.perturbed(model):
            F.cross_entropy(model(one, s.u), target).backward()
        F.cross_entropy(model(one, s.x), s.y).backward()
        s.optimizer.step()
    assert [p.kind for p in report.problems] == ["mixed g1"]


def test_the_labelled_loss_alone_in_g1_is_seen() -> None:
    """As early in FixMatch, when no unlabelled pixel is confident."""
    report = _watched(labelled_loss_left_in_g1, Scene(tau=0.9999))
    assert report.norms["g2"] == 0
    assert {(p.kind, Path(p.where).name) for p in report.problems} == _expected(labelled_loss_left_in_g1), str(report)


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_losses_are_seen_with_any_alpha(alpha: float) -> None:
    for loop in (zeroed_in_place, zeroed_by_hand, zeroed_between_micro_batches, zeroed_before_the_labelled_backward):
        report = _watched(loop, Scene(alpha=alpha))
        assert {(p.kind, Path(p.where).name) for p in report.problems} == _expected(loop), str(report)


BY_HAND = [sam_by_hand, recomputed_loss_without_backward, detached_term, backward_after_restoring, no_first_step]


@pytest.mark.parametrize("loop", BY_HAND)
def test_an_optimizer_that_is_not_wrapped(loop: Callable[[Scene], None]) -> None:
    s = Scene()
    s.optimizer = s.base  # type: ignore[assignment]
    report = _watched(loop, s)
    expected = {(kind.replace("no perturbed pass", "no wrapper"), where) for kind, where in _expected(loop)}
    assert {(p.kind, Path(p.where).name) for p in report.problems} == expected, str(report)
    moved = "moved by other code" in str(report)
    assert moved == (loop is not no_first_step)
    assert ("its step is that of the plain method" in str(report)) == (loop is no_first_step)
    assert ("its step may be right or wrong" in str(report)) == (loop is sam_by_hand)


def test_a_graph_of_theta_is_seen_where_autograd_has_no_objection() -> None:
    """A first layer's gradient needs its input alone, so nothing that the graph has kept was modified."""
    model = nn.Linear(3, 2)
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1), eps=0.1)
    x, u = torch.randn(2, 3), torch.randn(4, 3)
    with gap_torch.check(optimizer, model, show=None) as report:
        loss = model(u).square().mean()
        loss.backward(retain_graph=True)
        with optimizer.perturbed(model):
            model(u).square().mean().backward()
            loss.backward()
        model(x).square().mean().backward()
        optimizer.step()
    assert [p.kind for p in report.problems] == ["stale graph"], str(report)


# ---------------------------------------------------------------- buffers


class OwnBatchNorm(nn.Module):
    """Not an instance of torch's class. `anew`: puts new tensors in place of its buffers."""

    def __init__(self, anew: bool = False) -> None:
        super().__init__()
        self.anew = anew
        self.register_buffer("running_mean", torch.zeros(2))
        self.register_buffer("running_var", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        if not self.anew:
            return F.batch_norm(x, self.running_mean, self.running_var, training=True)
        self.running_mean = 0.9 * self.running_mean + 0.1 * x.detach().mean(0)
        return x - x.mean(0)


def _batch_norm() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


BATCH_NORMS: dict[str, Callable[[], nn.Module]] = {
    "torch's": _batch_norm,
    "own": lambda: nn.Sequential(nn.Linear(3, 2), OwnBatchNorm()),
    "own, anew": lambda: nn.Sequential(nn.Linear(3, 2), OwnBatchNorm(anew=True)),
    "scripted": lambda: torch.jit.script(_batch_norm()),
    "scripted layer": lambda: nn.Sequential(nn.Linear(3, 2), torch.jit.script(nn.BatchNorm1d(2))),
    "traced": lambda: torch.jit.trace(_batch_norm(), torch.randn(4, 3)),
    "exported": lambda: torch.export.export(_batch_norm(), (torch.randn(4, 3),)).module(),
}


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", BATCH_NORMS)
def test_running_statistics_that_move_are_seen_whatever_the_class(name: str) -> None:
    model = BATCH_NORMS[name]()
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1), eps=0.1)
    u, target = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    with gap_torch.check(optimizer, model, show=None) as report:
        F.cross_entropy(model(u), target).backward()
        with optimizer.perturbed():
            F.cross_entropy(model(u), target).backward()
        F.cross_entropy(model(u + 1), target).backward()
        optimizer.step()
    assert [p.kind for p in report.problems] == ["statistics"], str(report)
    assert "1.running_mean" in report.problems[0].what
    assert not report.notes


# ---------------------------------------------------------------- what a reader can see


def test_a_forgotten_weight_shows_in_losses_and_norms() -> None:
    s = Scene(alpha=0.5)
    views = s.views()
    with gap_torch.check(s.optimizer, s.model, show=None) as report:
        (0.01 * s.consistency(views)).backward()
        g1 = _flat(s)
        with s.optimizer.perturbed(s.model):
            loss = s.consistency(views)
            loss.backward()
        supervised = s.supervised()
        supervised.backward()
        g_l = torch.autograd.grad(s.supervised(), list(s.model.parameters()))
        total = _flat(s)
        s.optimizer.step()
    g2 = (total - g1 - torch.cat([g.flatten() for g in g_l])) / 0.5
    expected = {"g1": g1.norm().item(), "g2": g2.norm().item(), "g_l": nn.utils.get_total_norm(g_l).item()}
    assert report.norms == pytest.approx(expected, rel=1e-4)
    assert report.losses["g1"] < 0.02 * report.losses["g2"]
    assert (report.losses["g2"], report.losses["g_l"]) == (loss.item(), supervised.item())
    assert f"loss         g1 {report.losses['g1']:.4g}, g2 {report.losses['g2']:.4g}, g_l " in str(report)
    assert f"norm         g1 {report.norms['g1']:.4g}, g2 {report.norms['g2']:.4g}, g_l " in str(report)


def _flat(s: Scene) -> Tensor:
    return torch.cat([p.grad.flatten().clone() for p in s.model.parameters()])


def test_the_page_lists_every_kind() -> None:
    root = Path(__file__).parents[3]
    source = "".join(file.read_text() for file in (root / "gap_torch" / "checking").glob("*.py"))
    kinds = set(re.findall(r'(?:Finding|_of_forward)\("([^"]+)"', source))
    rows = re.findall(r"^\| ([^|]+) \|", (root / "docs" / "check.md").read_text(), re.MULTILINE)
    assert kinds == {kind for row in rows for kind in row.split(", ")} - {"finding", "note", "---"}


# ---------------------------------------------------------------- a wrapper that is itself wrong


def _broken(monkeypatch: pytest.MonkeyPatch, name: str, broken: Callable[..., None]) -> Report:
    original = getattr(GAPWrapper, name)
    monkeypatch.setattr(GAPWrapper, name, lambda wrapper: broken(original, wrapper))
    s = Scene(alpha=0.5)
    views = s.views()
    with gap_torch.check(s.optimizer, s.model, show=None) as report:
        s.consistency(views).backward()
        s.optimizer.first_step()
        with frozen_running_stats(s.model):
            s.consistency(views).backward()
        s.optimizer.second_step()
        s.supervised().backward()
        s.optimizer.step()
    return report


def test_a_wrong_radius_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_far(first_step: Callable[..., None], wrapper: GAPWrapper) -> None:
        first_step(wrapper)
        with torch.no_grad():
            wrapper.param_groups[0]["params"][0][0, 0, 0, 0] += 1e-4

    assert [p.kind for p in _broken(monkeypatch, "first_step", too_far).problems] == ["radius"]


def test_an_inexact_restore_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def inexact(second_step: Callable[..., None], wrapper: GAPWrapper) -> None:
        second_step(wrapper)
        with torch.no_grad():
            weight = wrapper.param_groups[0]["params"][0]
            weight[0, 0, 0, 0] = weight[0, 0, 0, 0].nextafter(torch.tensor(9.0))

    report = _broken(monkeypatch, "second_step", inexact)
    assert "restore" in [p.kind for p in report.problems]


# ---------------------------------------------------------------- the call itself


def test_arguments_are_checked() -> None:
    s = Scene()
    with pytest.raises(ValueError, match="model: none of its parameters"):
        gap_torch.check(s.optimizer, nn.Linear(1, 1))
    with pytest.raises(ValueError, match="updates must be at least 1, got 0"):
        gap_torch.check(s.optimizer, s.model, updates=0)
    with pytest.raises(TypeError, match=r"must be a torch.optim.Optimizer, not Sequential"):
        gap_torch.check(s.model, s.model)  # type: ignore[arg-type]


def test_it_does_not_begin_while_perturbed() -> None:
    s = Scene()
    s.consistency(s.views()).backward()
    s.optimizer.first_step()
    with pytest.raises(RuntimeError, match=r"check\(\) while the parameters are perturbed"):
        gap_torch.check(s.optimizer, s.model)


def test_an_exception_of_ones_own_goes_its_way() -> None:
    s = Scene()
    with pytest.raises(ZeroDivisionError), gap_torch.check(s.optimizer, s.model, show=None) as report:
        s.consistency(s.views()).backward()
        raise ZeroDivisionError
    assert not report.ok
    assert not report.problems
    assert "ZeroDivisionError at" in report.stopped
    assert "test_wrong_loops.py" in report.stopped


# Runs scripts as programs of their own that have imported torch already, and prints how each ended.
LAUNCHER = """
import os, runpy, sys
import gap_torch, scene, torch._dynamo  # which the first optimizer imports
for script in sys.argv[1:]:
    child = os.fork()
    if not child:
        sys.stdout = open(script + ".out", "w")
        sys.exit(runpy.run_path(script, run_name="__main__"))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
ENDING = [step_while_perturbed, freed_graph_of_theta, labelled_forward_before_the_block]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, int]]:
    """For each script that an exception ends its file, beside which is what it printed, and its exit status."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    folder = tmp_path_factory.mktemp("programs")
    files = [folder / f"{script.__name__}.py" for script in ENDING]
    start = "import gap_torch\nfrom scene import Scene\ns = Scene()\ngap_torch.check(s.optimizer, s.model)\n"
    for script, file in zip(ENDING, files, strict=True):
        file.write_text(f"{start}{inspect.getsource(script)}\n{script.__name__}(s)\n")
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(gap_torch.__file__).parents[1])])
    run = subprocess.run(
        [sys.executable, "-c", LAUNCHER, *map(str, files)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=True,
    )
    return {file.stem: (file, int(status)) for file, status in zip(files, run.stdout.split(), strict=True)}


@pytest.mark.parametrize("script", [script.__name__ for script in ENDING])
def test_as_a_statement_it_explains_the_exception_that_ends_the_program(
    script: str, ended: dict[str, tuple[Path, int]]
) -> None:
    file, status = ended[script]
    printed = Path(f"{file}.out").read_text()
    (line,) = [n for n, text in enumerate(file.read_text().splitlines(), 1) if "# HERE" in text]
    assert status == 1
    assert f"{file.name}:{line}: " in printed
    assert "To mend it: " in printed
    assert f"Stopped by RuntimeError at {file}:{line}" in printed
    assert "no backward came after second_step()" not in printed  # it was about to


def test_an_exception_from_before_the_check_is_not_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook, where Python keeps the last one that it has shown."""
    monkeypatch.setattr(sys, "last_value", ValueError("of another cell"), raising=False)
    s = Scene()
    check = gap_torch.check(s.optimizer, s.model, show=None)
    check._end_of_program()
    assert "ValueError" not in check.report.stopped


def test_nothing_to_see_is_not_ok(capsys: pytest.CaptureFixture) -> None:
    s = Scene()
    with gap_torch.check(s.optimizer, s.model) as report:
        pass
    assert not report.ok
    assert "before any update was complete" in capsys.readouterr().out


def test_another_check_ends_the_first(capsys: pytest.CaptureFixture) -> None:
    s = Scene()
    gap_torch.check(s.optimizer, s.model)
    with gap_torch.check(s.optimizer, s.model, show=None):
        assert "Stopped by another check" in capsys.readouterr().out


def test_two_updates() -> None:
    s = Scene()
    with gap_torch.check(s.optimizer, s.model, updates=2, show=None) as report:
        for loop in (no_first_step, moving_statistics):
            loop(s)
    assert report.updates == 2
    assert [p.kind for p in report.problems] == ["no perturbed pass", "statistics"]


def test_an_update_that_an_exception_ended_is_forgotten() -> None:
    """As in a loop that goes on with the next batch when memory runs out."""
    s = Scene()
    with gap_torch.check(s.optimizer, s.model, show=None) as report:
        views = s.views()
        s.consistency(views).backward()
        with pytest.raises(MemoryError), s.optimizer.perturbed(s.model):
            raise MemoryError
        s.consistency(views).backward()
        with s.optimizer.perturbed(s.model):
            s.consistency(views).backward()
        s.supervised().backward()
        s.optimizer.step()
    assert report.ok, str(report)
    assert not report.notes  # both passes of the second attempt were seen
