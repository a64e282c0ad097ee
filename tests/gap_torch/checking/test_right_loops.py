"""No false alarm: loops that follow Algorithm 1, in all the ways in which the pages show it."""

import contextlib
import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import gap_torch
from gap_torch import GAPWrapper, RNGState, frozen_running_stats
from gap_torch.checking import Report
from gap_torch.consistency import VAT, Batch

from .scene import Scene


def plain(s: Scene) -> None:
    views = s.views()
    s.consistency(views).backward()
    with s.optimizer.perturbed(s.model):
        s.consistency(views).backward()
    s.supervised().backward()
    s.optimizer.step()
    s.optimizer.zero_grad()


def zeroed_first(s: Scene) -> None:
    s.optimizer.zero_grad(set_to_none=False)
    views = s.views()
    s.consistency(views).backward()
    with s.optimizer.perturbed(s.model):
        s.consistency(views).backward()
    s.supervised().backward()
    s.optimizer.step()


def two_calls(s: Scene) -> None:
    views = s.views()
    s.consistency(views).backward()
    s.optimizer.first_step()
    s.optimizer.zero_grad()  # as in SAM; does nothing
    with frozen_running_stats(s.model):
        s.consistency(views).backward()
    s.optimizer.second_step()
    s.supervised().backward()
    s.optimizer.step()
    s.model.zero_grad()


def zeroed_between(s: Scene) -> None:
    views = s.views()
    s.consistency(views).backward()
    with s.optimizer.perturbed(s.model):
        s.model.zero_grad()  # needless, but the wrapper puts g1 back
        s.consistency(views).backward()
    s.supervised().backward()
    s.optimizer.step()
    s.optimizer.zero_grad()


def micro_batches(s: Scene) -> None:
    views = [s.views(u) for u in s.u.split(2)]
    for v in views:
        (s.consistency(v) / 2).backward()
    with s.optimizer.perturbed(s.model):
        for v in reversed(views):
            (s.consistency(v) / 2).backward()
    for x, y in zip(s.x, s.y, strict=True):
        (F.cross_entropy(s.model(x[None]), y[None]) / 2).backward()
    s.optimizer.step()
    s.optimizer.zero_grad()


def clipped(s: Scene) -> None:
    views = s.views()
    s.consistency(views).backward()
    nn.utils.clip_grad_norm_(s.model.parameters(), 1e-3)
    with s.optimizer.perturbed(s.model, separate=True):
        s.consistency(views).backward()
        nn.utils.clip_grad_norm_(s.model.parameters(), 1e-3)
    s.supervised().backward()
    nn.utils.clip_grad_norm_(s.model.parameters(), 1e-3)
    s.optimizer.step()
    s.optimizer.zero_grad()


def shared_forward(s: Scene) -> None:
    views = s.views()
    logits = s.model(torch.cat([s.x, *views.inputs]))
    with s.optimizer.set_aside():
        F.cross_entropy(logits[:2], s.y).backward(retain_graph=True)
    s.method.compare((logits[2:],), views).backward()
    with s.optimizer.perturbed(s.model):
        s.consistency(views).backward()
    s.optimizer.step()
    s.optimizer.zero_grad()


def scaled(s: Scene) -> None:
    """The first update overflows and is skipped."""
    for factor in (float("inf"), 1.0):
        views = s.views()
        s.scaler.scale(s.consistency(views) * factor).backward()
        with s.optimizer.perturbed(s.model):
            s.scaler.scale(s.consistency(views)).backward()
        s.scaler.scale(s.supervised()).backward()
        s.scaler.unscale_(s.optimizer)
        nn.utils.clip_grad_norm_(s.model.parameters(), 1.0)
        s.scaler.step(s.optimizer)
        s.scaler.update()
        s.optimizer.zero_grad()


def autocast(s: Scene) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        plain(s)


def with_interval(s: Scene) -> None:
    for _ in range(4):
        views = s.views()
        s.consistency(views).backward()
        if s.optimizer.due:
            with s.optimizer.perturbed(s.model):
                s.consistency(views).backward()
        s.supervised().backward()
        s.optimizer.step()
        s.optimizer.zero_grad()


def from_the_second_of_an_interval(s: Scene) -> None:
    assert not s.optimizer.due
    with_interval(s)


def replayed(s: Scene) -> None:
    views, rng = s.views(), RNGState.now()
    s.consistency(views).backward()
    with s.optimizer.perturbed(s.model, rng=rng):
        s.consistency(views).backward()
    s.supervised().backward()
    s.optimizer.step()
    s.optimizer.zero_grad()


def compiled_inside(s: Scene) -> None:
    """The check is given the model without its compiled shell."""
    whole, s.model = s.model, torch.compile(s.model, backend="eager")
    plain(s)
    s.model = whole


def in_parts(s: Scene) -> None:
    """The model's parts are called one by one, and the second one's inputs differ at theta*."""
    assert isinstance(s.model, nn.Sequential)
    body, head, views = s.model[:-1], s.model[-1], s.views()
    s.method.compare((head(body(*views.inputs)),), views).backward()
    with s.optimizer.perturbed(s.model):
        s.method.compare((head(body(*views.inputs)),), views).backward()
    s.supervised().backward()
    s.optimizer.step()
    s.optimizer.zero_grad()


def two_losses_in_one_pass(s: Scene) -> None:
    """As two backward calls once, and as one the second time."""
    a, b = s.views(s.u[:2]), s.views(s.u[2:])
    s.consistency(a).backward()
    s.consistency(b).backward()
    with s.optimizer.perturbed(s.model):
        (s.consistency(a) + s.consistency(b)).backward()
    s.supervised().backward()
    s.optimizer.step()
    s.optimizer.zero_grad()


def frozen_encoder(s: Scene) -> None:
    """Its features are computed without gradient in every pass."""
    assert isinstance(s.model, nn.Sequential)
    encoder, head = s.model[:-1], s.model[-1]
    target = s.views().target

    def logits(x: Tensor) -> Tensor:
        with torch.no_grad():
            features = encoder(x)
        return head(features)

    F.cross_entropy(logits(s.u), target).backward()
    with s.optimizer.perturbed(s.model):
        F.cross_entropy(logits(s.u), target).backward()
    F.cross_entropy(logits(s.x), s.y).backward()
    s.optimizer.step()
    s.optimizer.zero_grad()


def in_eval_mode(s: Scene) -> None:
    """Fine-tuning with batch norm as it is."""
    s.model.eval()
    plain(s)


def by_closure(s: Scene) -> None:
    def closure() -> Tensor:
        s.optimizer.zero_grad()
        views = s.views()
        s.consistency(views).backward()
        with s.optimizer.perturbed(s.model):
            s.consistency(views).backward()
        loss = s.supervised()
        loss.backward()
        return loss

    s.optimizer.step(closure)
    s.optimizer.zero_grad()


def measured_before(s: Scene) -> None:
    """The labelled gradient is looked at, and zeroed before g1."""
    s.supervised().backward()
    s.optimizer.zero_grad()
    plain(s)


def measured_before_and_dropped(s: Scene) -> None:
    s.supervised().backward()
    for p in s.model.parameters():
        p.grad = None
    plain(s)


def searched_before_zeroing(s: Scene) -> None:
    """As VAT does for its direction, in a script that zeroes behind the forward passes."""
    s.supervised().backward()
    s.model.zero_grad()
    views = s.views()
    s.consistency(views).backward()
    with s.optimizer.perturbed(s.model):
        s.consistency(views).backward()
    s.supervised().backward()
    s.optimizer.step()


def skipped(s: Scene) -> None:
    """An update whose loss is too high comes to nothing, once before and once after the labelled loss."""
    for labelled in (False, True):
        views = s.views()
        s.consistency(views).backward()
        with s.optimizer.perturbed(s.model):
            s.consistency(views).backward()
        if labelled:
            s.supervised().backward()
        s.optimizer.zero_grad()
    plain(s)


def zeroed_in_part(s: Scene) -> None:
    views = s.views()
    s.consistency(views).backward()
    with s.optimizer.perturbed(s.model):
        s.model[0].weight.grad = None  # type: ignore[index]  # needless, but the wrapper puts g1 back
        s.consistency(views).backward()
    s.supervised().backward()
    s.optimizer.step()
    s.optimizer.zero_grad()


def clipped_in_scaled_units(s: Scene) -> None:
    views = s.views()
    s.scaler.scale(s.consistency(views)).backward()
    nn.utils.clip_grad_norm_(s.model.parameters(), 1e-3 * s.scaler.get_scale())
    with s.optimizer.perturbed(s.model):
        s.scaler.scale(s.consistency(views)).backward()
    s.scaler.scale(s.supervised()).backward()
    s.scaler.unscale_(s.optimizer)
    s.scaler.step(s.optimizer)
    s.scaler.update()
    s.optimizer.zero_grad()


def unscaled_throughout(s: Scene) -> None:
    """With losses that are not scaled any more."""
    views = s.views()
    s.scaler.scale(s.consistency(views)).backward()
    s.scaler.unscale_(s.optimizer)
    with s.optimizer.perturbed(s.model):
        s.consistency(views).backward()
    s.supervised().backward()
    s.scaler.step(s.optimizer)
    s.scaler.update()
    s.optimizer.zero_grad()


def scaled_and_dropped(s: Scene) -> None:
    """As `scaled`, with gradients that no zero_grad() drops."""
    for factor in (float("inf"), 1.0):
        views = s.views()
        s.scaler.scale(s.consistency(views) * factor).backward()
        with s.optimizer.perturbed(s.model):
            s.scaler.scale(s.consistency(views)).backward()
        s.scaler.scale(s.supervised()).backward()
        s.scaler.step(s.optimizer)
        s.scaler.update()
        for p in s.model.parameters():
            p.grad = None


def shared_forward_twice(s: Scene) -> None:
    """As `shared_forward`, with the labelled images in the block as well, for batch norm."""
    views = s.views()
    images = torch.cat([s.x, *views.inputs])
    logits = s.model(images)
    with s.optimizer.set_aside():
        F.cross_entropy(logits[:2], s.y).backward(retain_graph=True)
    s.method.compare((logits[2:],), views).backward()
    with s.optimizer.perturbed(s.model):
        s.method.compare((s.model(images)[2:],), views).backward()
    s.optimizer.step()
    s.optimizer.zero_grad()


def labelled_images_for_batch_norm(s: Scene) -> None:
    """As `shared_forward_twice`, with a labelled pass of its own."""
    views = s.views()
    images = torch.cat([s.x, *views.inputs])
    s.method.compare((s.model(images)[2:],), views).backward()
    with s.optimizer.perturbed(s.model):
        s.method.compare((s.model(images)[2:],), views).backward()
    s.supervised().backward()
    s.optimizer.step()
    s.optimizer.zero_grad()


def two_networks(s: Scene) -> None:
    """Each teaches the other; the check is given the first."""
    other = Scene()
    images = torch.cat([s.x, s.u])
    mine, others = s.model(images), other.model(images)
    target, others_target = others[2:].argmax(1), mine[2:].argmax(1)
    with s.optimizer.set_aside(), other.optimizer.set_aside():
        (F.cross_entropy(mine[:2], s.y) + F.cross_entropy(others[:2], s.y)).backward(retain_graph=True)
    (F.cross_entropy(mine[2:], target) + F.cross_entropy(others[2:], others_target)).backward()
    with s.optimizer.perturbed(s.model), other.optimizer.perturbed(other.model):
        mine, others = s.model(images)[2:], other.model(images)[2:]
        (F.cross_entropy(mine, target) + F.cross_entropy(others, others_target)).backward()
    s.optimizer.step()
    other.optimizer.step()
    s.optimizer.zero_grad()


def _adversarial(s: Scene, adversarial: Tensor) -> None:
    """GAP on the loss of adversarial examples."""
    target = s.views().target
    F.cross_entropy(s.model(adversarial), target).backward()
    with s.optimizer.perturbed(s.model):
        F.cross_entropy(s.model(adversarial), target).backward()
    s.supervised().backward()
    s.optimizer.step()
    s.optimizer.zero_grad()


def searched_by_autograd_grad(s: Scene) -> None:
    images = s.u.clone().requires_grad_()
    (along,) = torch.autograd.grad(F.cross_entropy(s.model(images), s.views().target), images)
    _adversarial(s, s.u + 0.1 * along.sign())


def searched_and_zeroed(s: Scene) -> None:
    direction = torch.randn_like(s.u).requires_grad_()
    F.cross_entropy(s.model(s.u + 0.1 * direction), s.views().target).backward()
    s.model.zero_grad()
    _adversarial(s, s.u + 0.1 * direction.grad.sign())  # type: ignore[union-attr]


def searched_for_inputs_alone(s: Scene) -> None:
    images = s.u.clone().requires_grad_()
    F.cross_entropy(s.model(images), s.views().target).backward(inputs=[images])
    _adversarial(s, s.u + 0.1 * images.grad.sign())  # type: ignore[union-attr]


def searched_with_frozen_parameters(s: Scene) -> None:
    images = s.u.clone().requires_grad_()
    s.model.requires_grad_(False)
    F.cross_entropy(s.model(images), s.views().target).backward()
    s.model.requires_grad_(True)
    _adversarial(s, s.u + 0.1 * images.grad.sign())  # type: ignore[union-attr]


def inputs_that_want_gradients(s: Scene) -> None:
    """As reentrant checkpointing asks for."""
    target = s.views().target
    s.consistency = lambda _: F.cross_entropy(s.model(s.u.clone().requires_grad_()), target)  # type: ignore[method-assign]
    plain(s)


def own_vat(s: Scene) -> None:
    method = VAT(lambda x: x, radius=0.1)
    views = method.prepare(s.model, Batch(s.u))
    method.loss(s.model, views).backward()
    with s.optimizer.perturbed(s.model):
        method.loss(s.model, views).backward()
    s.supervised().backward()
    s.optimizer.step()
    s.optimizer.zero_grad()


class WithHead(nn.Module):
    """Logits, and a head for features that are detached. `change`: what else happens to the features."""

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda features: features) -> None:
        super().__init__()
        self.body, self.logits, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1)
        self.change = change

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        return self.logits(features), features


def head_on_detached_features(s: Scene) -> None:
    target = torch.randint(3, (4, 6, 6))

    def loss() -> Tensor:
        logits, features = s.model(s.u)
        by_head = s.model.head(s.model.change(features.detach()))  # type: ignore[operator]
        return F.cross_entropy(logits, target) + F.cross_entropy(by_head, target)

    loss().backward()
    with s.optimizer.perturbed(s.model):
        loss().backward()
    F.cross_entropy(s.model(s.x)[0], s.y).backward()
    s.optimizer.step()
    s.optimizer.zero_grad()


def head_alone(s: Scene) -> None:
    """The body gets no gradient, so theta* has it where it was."""

    def loss(x: Tensor) -> Tensor:
        return s.model.head(s.model.body(x).detach()).square().mean()  # type: ignore[operator]

    loss(s.u).backward()
    with s.optimizer.perturbed(s.model):
        loss(s.u).backward()
    loss(s.x).backward()
    s.optimizer.step()
    s.optimizer.zero_grad()


def _with_head(*change: Callable[[Tensor], Tensor]) -> Scene:
    s = Scene()
    s.model = WithHead(*change)
    s.base = torch.optim.SGD(s.model.parameters(), 0.1)
    s.optimizer = GAPWrapper(s.base, eps=0.1)
    return s


def momentum_of_zero(s: Scene) -> None:
    """Another way to hold running statistics still."""
    views = s.views()
    s.consistency(views).backward()
    with s.optimizer.perturbed():
        s.model[1].momentum = 0.0  # type: ignore[index]
        s.consistency(views).backward()
        s.model[1].momentum = 0.1  # type: ignore[index]
    s.supervised().backward()
    s.optimizer.step()
    s.optimizer.zero_grad()


def a_gradient_that_is_rounded_to_zero(s: Scene) -> None:
    """Of one sample, at theta*, as where a sigmoid comes to 1 in half precision."""
    weights = torch.tensor([1.0, 1.0, 1.0, 1e-4]).view(4, 1, 1)
    for w in (weights, weights.round(decimals=3)):
        with s.optimizer.perturbed(s.model) if w is not weights else contextlib.nullcontext():
            (F.cross_entropy(s.model(s.u), s.u[:, 0].gt(0).long(), reduction="none") * w).mean().backward()
    s.supervised().backward()
    s.optimizer.step()
    s.optimizer.zero_grad()


def adversarial_in_both_passes(s: Scene) -> None:
    """The images as they are and, wanting gradients for whatever reason, once more: alike in both passes."""
    views = s.views()

    def loss() -> Tensor:
        return s.consistency(views) + s.model(s.u.clone().requires_grad_()).square().mean()

    loss().backward()
    with s.optimizer.perturbed(s.model):
        loss().backward()
    s.supervised().backward()
    s.optimizer.step()
    s.optimizer.zero_grad()


def learnt_input(s: Scene) -> None:
    """A prompt: a leaf that the optimizer trains and that is no nn.Parameter."""
    prompt = torch.zeros(1, 6, 6, requires_grad=True)
    s.optimizer.add_param_group({"params": [prompt]})
    target = s.u[:, 0].gt(0).long()
    F.cross_entropy(s.model(s.u + prompt), target).backward()
    with s.optimizer.perturbed(s.model):
        F.cross_entropy(s.model(s.u + prompt), target).backward()
    s.supervised().backward()
    s.optimizer.step()
    s.optimizer.zero_grad()


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


def recomputed_to_the_end(s: Scene) -> None:
    """Checkpointing's second forward returns, instead of stopping where it has all that it needs."""
    with set_checkpoint_early_stop(False):
        plain(s)


def _frozen(s: Scene) -> Scene:
    s.model[:-1].requires_grad_(False)  # type: ignore[index]
    return s


def _compiled(s: Scene) -> Scene:
    s.model = torch.compile(s.model, backend="eager")  # type: ignore[assignment]
    return s


RIGHT: dict[str, tuple[Callable[[Scene], None], Callable[[], Scene]]] = {
    "plain": (plain, Scene),
    "AdamW": (plain, lambda: Scene(base=torch.optim.AdamW)),
    "alpha 0.5": (plain, lambda: Scene(alpha=0.5)),
    "alpha 0": (plain, lambda: Scene(alpha=0.0)),
    "eps 0": (plain, lambda: Scene(eps=0.0)),
    "eps a tensor": (plain, lambda: Scene(eps=torch.tensor(0.2))),
    "eps a schedule": (plain, lambda: Scene(eps=lambda update: 0.3 + update)),
    "adaptive": (plain, lambda: Scene(adaptive=True)),
    "loop": (plain, lambda: Scene(foreach=False)),
    "g1 = 0": (plain, lambda: Scene(tau=0.9999)),
    "zeroed first": (zeroed_first, Scene),
    "two calls": (two_calls, Scene),
    "two calls, alpha 0.5": (two_calls, lambda: Scene(alpha=0.5)),
    "zeroed between": (zeroed_between, lambda: Scene(alpha=0.5)),
    "micro-batches": (micro_batches, lambda: Scene(alpha=0.5)),
    "clipped": (clipped, lambda: Scene(alpha=0.5)),
    "shared forward": (shared_forward, lambda: Scene(alpha=0.5)),
    "scaled": (scaled, Scene),
    "autocast": (autocast, Scene),
    "interval": (with_interval, lambda: Scene(interval=3)),
    "dropout": (plain, lambda: Scene(nn.Dropout(0.5))),
    "dropout replayed": (replayed, lambda: Scene(nn.Dropout(0.5))),
    "instance norm": (plain, lambda: Scene(nn.InstanceNorm2d(4, track_running_stats=True))),
    "checkpointed": (plain, lambda: Scene(Checkpointed(False))),
    "checkpointed, reentrant": (plain, lambda: Scene(Checkpointed(True))),
    "checkpointed, to the end": (recomputed_to_the_end, lambda: Scene(Checkpointed(False))),
    "compiled model": (plain, lambda: _compiled(Scene())),
    "compiled inside": (compiled_inside, Scene),
    "in parts": (in_parts, Scene),
    "frozen encoder": (frozen_encoder, lambda: _frozen(Scene())),
    "eval mode": (in_eval_mode, Scene),
    "two losses": (two_losses_in_one_pass, Scene),
    "closure": (by_closure, Scene),
    "measured before": (measured_before, Scene),
    "measured before, dropped": (measured_before_and_dropped, Scene),
    "searched": (searched_before_zeroing, Scene),
    "skipped": (skipped, Scene),
    "zeroed in part": (zeroed_in_part, Scene),
    "clipped, scaled": (clipped_in_scaled_units, Scene),
    "unscaled": (unscaled_throughout, Scene),
    "scaled, dropped": (scaled_and_dropped, Scene),
    "shared forward twice": (shared_forward_twice, lambda: Scene(alpha=0.5)),
    "labelled images for batch norm": (labelled_images_for_batch_norm, Scene),
    "two networks": (two_networks, Scene),
    "searched by autograd.grad": (searched_by_autograd_grad, Scene),
    "searched and zeroed": (searched_and_zeroed, Scene),
    "searched for inputs": (searched_for_inputs_alone, Scene),
    "searched, frozen": (searched_with_frozen_parameters, Scene),
    "inputs want gradients": (inputs_that_want_gradients, Scene),
    "own VAT": (own_vat, Scene),
    "detached features": (head_on_detached_features, _with_head),
    "detached features, normalised": (head_on_detached_features, lambda: _with_head(F.normalize)),
    "head alone": (head_alone, _with_head),
    "momentum 0": (momentum_of_zero, Scene),
    "adversarial in both passes": (adversarial_in_both_passes, Scene),
    "learnt input": (learnt_input, Scene),
    "rounded to zero": (a_gradient_that_is_rounded_to_zero, Scene),
    "spectral norm": (plain, lambda: Scene(spectral_norm(nn.Conv2d(4, 4, 1)))),
}


NOTES = {
    "g1 = 0": {"no move"},
    "eps 0": {"no move"},
    "compiled inside": {"not told"},
    "shared forward": {"batch norm"},
    "detached features, normalised": {"features"},
    "spectral norm": {"buffers"},
    "learnt input": {"not told"},
    "rounded to zero": {"one pass"},
}


def assert_right(report: Report, name: str = "") -> None:
    assert not report.problems, str(report)
    assert report.ok == ("no move" not in NOTES.get(name, set())), str(report)
    assert any("came back bit for bit" in line for line in report.right)
    assert {note.kind for note in report.notes} == NOTES.get(name, set())


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_loop_gives_no_finding(name: str) -> None:
    loop, scene = RIGHT[name]
    s = scene()
    with gap_torch.check(s.optimizer, s.model, show=None) as report:
        loop(s)
    assert_right(report, name)


@pytest.mark.parametrize("name", RIGHT)
def test_as_a_statement_it_reports_when_the_next_update_begins(name: str) -> None:
    loop, scene = RIGHT[name]
    s, shown = scene(), []
    loop(s)
    check = gap_torch.check(s.optimizer, s.model, show=shown.append)
    for _ in range(3):
        loop(s)
    assert shown == [check.report]
    assert shown[0].ok == ("no move" not in NOTES.get(name, set())), str(shown[0])
    assert not shown[0].problems, str(shown[0])


@pytest.mark.parametrize("name", RIGHT)
def test_it_changes_nothing_and_leaves_nothing(name: str) -> None:
    loop, scene = RIGHT[name]
    watched, plainly = scene(), scene()
    plainly.model.load_state_dict(watched.model.state_dict())
    attributes = [(o, n, getattr(o, n)) for o, n in _patched()]
    torch.manual_seed(1)
    with gap_torch.check(watched.optimizer, watched.model, show=None):
        loop(watched)
    torch.manual_seed(1)
    loop(plainly)
    for a, b in zip(watched.model.state_dict().values(), plainly.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert all(getattr(o, n) is before for o, n, before in attributes)
    assert not watched.optimizer.base_optimizer._optimizer_step_pre_hooks


def _patched() -> Iterator[tuple[Any, str]]:
    yield torch.autograd, "backward"
    yield nn.Module, "__call__"
    yield torch.amp.GradScaler, "scale"
    yield torch.amp.GradScaler, "unscale_"
    for owner in (nn.Module, torch.optim.Optimizer):
        yield owner, "zero_grad"
    for name in ("first_step", "second_step", "set_aside", "zero_grad"):
        yield GAPWrapper, name


def test_g1_that_is_not_finite_is_no_error() -> None:
    s = Scene()
    views = s.views()
    with gap_torch.check(s.optimizer, s.model, show=None) as report, contextlib.suppress(AssertionError):
        (s.consistency(views) * float("nan")).backward()
        with s.optimizer.perturbed(s.model):
            s.consistency(views).backward()
        s.supervised().backward()
        s.optimizer.step()
    assert not report.problems, str(report)
    assert [note.kind for note in report.notes] == ["no move"]
    assert "||g1|| was not finite" in report.notes[0].what
    assert not report.ok


@pytest.mark.parametrize(("options", "why"), [({"tau": 0.9999}, "||g1|| was zero"), ({"eps": 0.0}, "eps is 0")])
def test_where_nothing_moves_nothing_was_checked(options: dict[str, Any], why: str) -> None:
    s = Scene(**options)
    with gap_torch.check(s.optimizer, s.model, show=None) as report:
        plain(s)
    assert not report.ok
    assert "gap_torch.check: nothing moved in this update, so GAP was not checked: check again later." in str(report)
    (note,) = report.notes
    assert why in note.what
    assert ("one logit" in note.fix) == (options == {"tau": 0.9999})


def test_one_update_of_several_has_to_move() -> None:
    s = Scene(eps=lambda update: 0.1 * update)
    with gap_torch.check(s.optimizer, s.model, updates=2, show=None) as report:
        plain(s)
        plain(s)
    assert report.ok
    assert report.updates == 1


def test_it_may_be_given_the_base_optimizer() -> None:
    """As where the wrapper has another name than the optimizer of before."""
    s = Scene()
    with gap_torch.check(s.base, s.model, show=None) as report:
        views = s.views()
        s.consistency(views).backward()
        with s.optimizer.perturbed(s.model):
            s.consistency(views).backward()
        s.supervised().backward()
        s.base.step()
    assert report.ok, str(report)
    assert [call for call, _ in report.timeline] == ["g1", "first_step", "g2", "second_step", "g_l", "step"]


def test_other_models_are_passed_over() -> None:
    """Which are trained in turns with this one."""
    s, other = Scene(), Scene()
    with gap_torch.check(s.optimizer, s.model, show=None) as report:
        other.optimizer.zero_grad()
        other.supervised().backward()
        views = s.views()
        s.consistency(views).backward()
        plain(other)
        with s.optimizer.perturbed(s.model):
            plain(other)
            s.consistency(views).backward()
        other.supervised().backward()
        s.supervised().backward()
        s.optimizer.step()
    assert_right(report)
    assert [name for name, _ in report.timeline] == ["g1", "first_step", "g2", "second_step", "g_l", "step"]


def test_the_model_may_be_copied_and_pickled_meanwhile() -> None:
    """As teachers are made, often after the optimizer."""
    s = Scene()
    with gap_torch.check(s.optimizer, s.model, show=None) as report:
        copy.deepcopy(s.optimizer)
        teacher = pickle.loads(pickle.dumps(copy.deepcopy(s.model)))
        views = s.views()
        s.consistency(views).backward()
        with s.optimizer.perturbed(s.model):
            with torch.no_grad():
                teacher(s.u)  # which is not at theta*
            s.consistency(views).backward()
        s.supervised().backward()
        s.optimizer.step()
    assert_right(report)


class WithPrototypes(nn.Module):
    """Returns a parameter beside its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.prototypes = nn.Conv2d(1, 3, 1), nn.Parameter(torch.ones(3, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x), self.prototypes


def _watched(model: nn.Module, loss: Callable[[Tensor], Tensor]) -> Report:
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1))
    with gap_torch.check(optimizer, model, show=None) as report:
        unlabelled, x = torch.ones(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
        loss(unlabelled).backward()
        with optimizer.perturbed(model):
            loss(unlabelled).backward()
        loss(x).backward()
        optimizer.step()
    return report


def test_no_hook_stays_on_a_parameter_that_the_model_returns() -> None:
    model = WithPrototypes()
    assert_right(_watched(model, lambda x: sum(output.square().mean() for output in model(x))))
    assert not model.prototypes._backward_hooks


def test_parameters_that_are_integers() -> None:
    model = nn.Conv2d(1, 3, 1)
    model.register_parameter("codes", nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False))
    assert_right(_watched(model, lambda x: model(x).square().mean()))


def test_within_vmap_inputs_can_not_be_seen() -> None:
    model = nn.Conv2d(1, 3, 1)
    report = _watched(model, lambda x: torch.vmap(model)(x).square().mean())
    assert _kinds(report) == ["not told"]


def test_what_others_have_patched_meanwhile_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    s, seen = Scene(), []
    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "zero_grad", nn.Module.zero_grad)  # which is undone before the check ends
        check = gap_torch.check(s.optimizer, s.model, show=None)
    before = torch.autograd.backward
    patch.setattr(torch.autograd, "backward", lambda *args, **kwargs: seen.append(1) or before(*args, **kwargs))
    check.stop()
    plain(s)
    assert len(seen) == 3
    assert "checking" not in nn.Module.zero_grad.__module__
    patch.undo()


def test_another_thread_is_another_training() -> None:
    """Which trains the same model's copy, or evaluates, at the same time."""
    s, other = Scene(), Scene()
    with gap_torch.check(s.optimizer, s.model, show=None) as report:
        views = s.views()
        loss = s.consistency(views)
        loss.register_hook(lambda _: _in_a_thread(lambda: other.supervised().backward()))
        loss.backward()
        with s.optimizer.perturbed(s.model):
            s.consistency(views).backward()
        s.supervised().backward()
        s.optimizer.step()
    assert_right(report)


def _in_a_thread(work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


# ---------------------------------------------------------------- what is worth a note


def _kinds(report: Report) -> list[str]:
    assert report.ok, str(report)
    return [note.kind for note in report.notes]


def test_a_joint_loss_in_both_passes_is_noted() -> None:
    """As in SAM: it can't be told that part of it is the labelled loss."""
    s = Scene()
    views = s.views()
    with gap_torch.check(s.optimizer, s.model, show=None) as report:
        (s.supervised() + s.consistency(views)).backward()
        with s.optimizer.perturbed(s.model):
            (s.supervised() + s.consistency(views)).backward()
        s.optimizer.step()
    assert _kinds(report) == ["no g_l"]
    assert "GAP ran as Algorithm 1 in this update, as far as can be told." in str(report)


def test_targets_that_may_come_from_the_same_forward_pass_are_noted() -> None:
    """Weak and strong views go through the model together: whether the weak half gives targets can't be told."""
    s = Scene()

    def loss() -> Tensor:
        weak, strong = s.model(torch.cat([s.u, 0.7 * s.u])).chunk(2)
        return F.cross_entropy(strong, weak.detach().argmax(1))

    with gap_torch.check(s.optimizer, s.model, show=None) as report:
        loss().backward()
        with s.optimizer.perturbed(s.model):
            loss().backward()
        s.supervised().backward()
        s.optimizer.step()
    assert _kinds(report) == ["no gradient"]
    assert "4 of the samples" in str(report)
    assert "no forward pass for targets" not in str(report)


class InAndOut(nn.Module):
    """A model whose inputs and outputs are in objects that nobody can look into."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 1)

    def forward(self, sample: Any) -> Any:
        return type("Output", (), {"logits": nn.functional.linear(sample.x, self.inner.weight)})


def test_inputs_that_cannot_be_seen_are_noted() -> None:
    model, sample = InAndOut(), type("Sample", (), {"x": torch.ones(2, 3)})
    optimizer = GAPWrapper(torch.optim.SGD([model.inner.weight], 0.1))
    with gap_torch.check(optimizer, model, show=None) as report:
        model(sample).logits.sum().backward()
        with optimizer.perturbed(model):
            model(sample).logits.sum().backward()
        model(sample).logits.sum().backward()
        optimizer.step()
    assert _kinds(report) == ["not told"]


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 15), reason="first_step compiles on torch 2.15"
)
def test_a_compiled_first_step_is_no_update_without_gap() -> None:
    s = Scene()
    first_step = torch.compile(s.optimizer.first_step, backend="eager")
    with gap_torch.check(s.optimizer, s.model, show=None) as report:
        views = s.views()
        s.consistency(views).backward()
        first_step()
        with frozen_running_stats(s.model):
            s.consistency(views).backward()
        s.optimizer.second_step()
        s.optimizer.step()
    assert not report.ok
    assert not report.problems, str(report)
    assert [note.kind for note in report.notes] == ["not told"]


# ---------------------------------------------------------------- two ranks

FSDP2_ON_CPU = not torch.__version__.startswith("2.6.")
DDP_OPTIONS: list[dict[str, Any]] = [
    {},  # each forward pass begins with the buffers of rank 0
    {"broadcast_buffers": False},
    {"broadcast_buffers": False, "gradient_as_bucket_view": True},
    {"broadcast_buffers": False, "static_graph": True},
]


def _worker(rank: int) -> list[str]:
    loops = (plain, shared_forward, micro_batches)
    reports = [_under_ddp(rank, loop, **options) for options in DDP_OPTIONS for loop in loops]
    return [*reports, _under_fsdp2(rank)] if FSDP2_ON_CPU else reports


def _under_fsdp2(rank: int) -> str:
    """After a forward pass, when the model shows other parameters than the optimizer has."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model, mesh = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), init_device_mesh("cpu", (2,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1), eps=0.1)
    unlabelled, x = torch.randn(4, 4) + rank, torch.randn(2, 4) - rank
    with torch.no_grad():
        model(x)
    with gap_torch.check(optimizer, model, show=None) as report:
        for views in unlabelled.split(2):
            model(views).square().mean().backward()
        with optimizer.perturbed(model):
            for views in unlabelled.split(2):
                model(views).square().mean().backward()
        model(x).square().mean().backward()
        optimizer.step()
    right = report.ok and "both passes saw the same 4 samples" in report.right
    return "" if right and [note.kind for note in report.notes] == ["not told"] else str(report)


def _under_ddp(rank: int, loop: Callable[[Scene], None], **options: Any) -> str:
    s = Scene(alpha=0.5)
    s.x, s.u = s.x + rank, s.u - rank
    s.model = DistributedDataParallel(s.model, **options)
    if loop is shared_forward and options.get("static_graph"):
        return ""
    shown: list[Report] = []
    for _ in range(2):  # DDP arranges its buckets anew after the first
        gap_torch.check(s.optimizer, s.model, show=shown.append, updates=1)
        loop(s)
        loop(s)
    return "" if all(report.ok for report in shown) and len(shown) == 2 else "\n".join(map(str, shown))


def test_two_ranks_give_no_finding(on_two_ranks: Callable[..., list[list[str]]]) -> None:
    for rank in on_two_ranks(_worker):
        assert not any(rank), "\n".join(rank)
