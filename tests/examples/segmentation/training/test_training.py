"""The training step against Algorithm 1, and runs that go on as if they had not been interrupted."""

import os
import signal
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from acdc_gapmatch import ACDC
from gap_torch.consistency import Batch, CutMixMeanTeacher, Method, Views
from gap_torch.losses import ce_dice_loss
from gap_torch.reference import algorithm_1
from segmentation import methods
from segmentation.data.files import Volume, read_list, split_by_patients
from segmentation.data.slices import Slices, load_slices, load_volumes
from segmentation.errors import InputError, RunError
from segmentation.networks.attachments import MedicalDecoders, PerturbedPyramid, TwiceUpsampled, Upsampled
from segmentation.recipe import METHODS, RUNS, Recipe, method_of
from segmentation.training import checkpoint
from segmentation.training import loop as train
from segmentation.training.identity import identity
from segmentation.training.interrupt import interruptible
from segmentation.training.loop import Result, fit
from segmentation.training.schedules import learning_rate
from segmentation.training.step import Trainer

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def slices(tiny_data: Path) -> tuple[Slices, Slices]:
    names = split_by_patients(read_list(tiny_data / "train_slices.list"), 1)
    labelled, unlabelled = (load_slices(tiny_data, part, (32, 32)) for part in names)
    return labelled, unlabelled


@pytest.fixture(scope="session")
def validation(tiny_data: Path) -> list[Volume]:
    return load_volumes(tiny_data, read_list(tiny_data / "val.list"))


def _trainer(recipe: Recipe, slices: tuple[Slices, Slices]) -> Trainer:
    return Trainer(ACDC, recipe, *slices, CPU, None)


def _fit(trainer: Trainer, validation: list[Volume], folder: Path, resume: bool) -> Result:
    run = identity("ACDC", trainer.recipe, [], None, {})
    progress = train.resume(trainer, folder, run) if resume else None
    return fit(trainer, validation, folder, run, progress)


def _weights(trainer: Trainer) -> list[torch.Tensor]:
    return [*trainer.model.state_dict().values(), *trainer.average.module.state_dict().values()]


def _assert_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("aligned", ["targets", "predictions"])
def test_a_gapmatch_step_is_algorithm_1(aligned, slices, tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(
        tiny_recipe, alpha=0.5, eps=0.3, tau=0.25, momentum=0.0, weight_decay=0.0, targets="eval", average_decay=0
    )
    recipe = replace(recipe, aligned=aligned, weight=0.7)
    trainer = _trainer(recipe, slices)
    trainer.model.double()
    for layer in trainer.model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0  # else each pass draws other masks
    trainer.labelled, trainer.unlabelled = (replace(pool, images=pool.images.double()) for pool in slices)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    views = {}
    prepare = trainer.method.prepare
    monkeypatch.setattr(trainer.method, "prepare", lambda *arguments: views.setdefault("views", prepare(*arguments)))
    labelled = {}
    with_labels = trainer.weak.with_labels
    monkeypatch.setattr(
        trainer.weak, "with_labels", lambda *arguments: labelled.setdefault("batch", with_labels(*arguments))
    )
    trainer.step(0)
    moved = [(old - new).detach() / recipe.lr for old, new in zip(before, trainer.model.parameters(), strict=True)]

    twin = _trainer(recipe, slices).model.double()
    for layer in twin.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    images, labels = labelled["batch"]
    unperturbed: list[torch.Tensor] = []

    def consistency() -> torch.Tensor:
        logits = twin(*views["views"].inputs)
        if unperturbed and aligned == "predictions":
            before = unperturbed[0].log_softmax(1)
            return 0.7 * (before.exp() * (before - logits.log_softmax(1))).sum(1).mean()
        unperturbed.append(logits.detach())
        return 0.7 * trainer.method.compare((logits,), views["views"])

    expected = algorithm_1(
        list(twin.parameters()),
        consistency,
        lambda: ce_dice_loss(twin(images), labels.long()),
        eps=0.3,
        alpha=0.5,
    )
    assert views["views"].mask.any()
    for ours, theirs in zip(moved, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-6)


def _compiled_trainer(
    run: str, backend: str, slices, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> tuple[Trainer, CompileCounterWithBackend]:
    """A trainer whose passes are compiled, and the count of the graphs."""
    counter, compile = CompileCounterWithBackend(backend), torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile(model, backend=counter, **options))
    torch._dynamo.reset()
    return Trainer(ACDC, recipe.for_run(run), *slices, CPU, None, compiled=True), counter


def _graphs(trainer: Trainer, counter: CompileCounterWithBackend, steps: range) -> list[int]:
    """How many there are after each of the steps."""
    counts = []
    for t in steps:
        trainer.step(t)
        trainer.scored_model()
        counts.append(counter.frame_count)
    return counts


@pytest.mark.parametrize("run", ["gapmatch", "unimatch+gap"])
def test_compiled_passes_give_the_same_weights_and_are_not_for_scoring(
    run: str, slices, tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, counter = _compiled_trainer(run, "aot_eager", slices, tiny_recipe, monkeypatch)
    eager = _trainer(tiny_recipe.for_run(run), slices)
    counts = _graphs(compiled, counter, range(2))
    for t in range(2):
        eager.step(t)
    assert list(compiled.state_dict()["model"]) == list(eager.state_dict()["model"])
    for ours, theirs in zip(_weights(compiled), _weights(eager), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert not any("OptimizedModule" in type(m).__name__ for m in compiled.scored_model().modules())
    counts += _graphs(compiled, counter, range(2, 4))
    assert counts == counts[:1] * 4 != [0] * 4


@pytest.mark.parametrize("run", ["vat+gap", "cct+gap", "dct_views+gap"])  # the last with what cps+gap does
def test_nothing_is_compiled_again_after_the_first_iteration(
    run: str, slices, tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamo decides on that; what becomes of its graphs takes most of the time, and changes nothing here."""
    counts = _graphs(*_compiled_trainer(run, "eager", slices, tiny_recipe, monkeypatch), range(4))
    assert counts == counts[:1] * 4 != [0] * 4


@pytest.mark.parametrize("gap", [False, True])
def test_a_joint_pass_is_one_batch_and_sums_the_same_gradients(gap: bool, slices, tiny_recipe: Recipe) -> None:
    recipe = replace(tiny_recipe, gap=gap, joint=True, weight=0.7, labelled_weight=0.4, tau=0.25, momentum=0.0)
    recipe = replace(recipe, weight_decay=0.0, eps=0.3, alpha=0.5, average_decay=0.0)
    trainer, twin = (_without_dropout(_trainer(recipe, slices)) for _ in range(2))
    inputs = twin.inputs(0)
    images, labels = twin.weak.with_labels(inputs.images, inputs.labels)
    views = twin.method.prepare(twin.model, Batch(inputs.unlabelled))
    assert views.mask.any()

    def losses() -> tuple[torch.Tensor, torch.Tensor]:
        logits = twin.model(torch.cat([images, *views.inputs]))
        labelled, unlabelled = logits.split([len(images), len(views.inputs[0])])
        return 0.4 * ce_dice_loss(labelled, labels.long()), 0.7 * twin.method.compare((unlabelled,), views)

    parameters = list(twin.model.parameters())
    of_labels = torch.autograd.grad(losses()[0], parameters)
    expected = torch.autograd.grad(losses()[1], parameters)
    if gap:
        norm = torch.stack([g.norm() for g in expected]).norm()
        with torch.no_grad():
            for p, g in zip(parameters, expected, strict=True):
                p += 0.3 * g / norm
        star = torch.autograd.grad(losses()[1], parameters)
        expected = [g + 0.5 * s for g, s in zip(expected, star, strict=True)]

    before = [p.detach().clone() for p in trainer.model.parameters()]
    values = trainer.step(0)
    assert ("loss_perturbed" in values) == gap
    for old, new, g, of_label in zip(before, trainer.model.parameters(), expected, of_labels, strict=True):
        torch.testing.assert_close((old - new).detach() / recipe.lr, g + of_label, atol=1e-5, rtol=1e-3)


def _without_dropout(trainer: Trainer) -> Trainer:
    for layer in trainer.model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    return trainer


def test_confident_classes_at_theta_count_with_alpha_alone(slices, tiny_recipe: Recipe) -> None:
    recipe = replace(tiny_recipe, method="ict", aligned="pseudo_labels", tau=0.25, eps=0.0)
    values = [_trainer(replace(recipe, weight=weight), slices).step(0) for weight in (0.5, 0.01)]
    assert torch.equal(values[0]["loss_perturbed"], values[1]["loss_perturbed"])
    assert values[0]["loss_unlabelled"] > 10 * values[1]["loss_unlabelled"]
    assert values[0]["loss_perturbed"] > 0


def test_the_weight_ramps_up_as_the_fields_does(slices, tiny_recipe: Recipe) -> None:
    trainer = _trainer(replace(tiny_recipe, method="em", iterations=100), slices)
    weights = [trainer.inputs(t).weight.item() for t in (0, 50, 75, 99)]
    assert weights == pytest.approx([0.1 * 0.00674, 0.1 * 0.2865, 0.1 * 0.7316, 0.1], rel=2e-3)
    trainer = _trainer(replace(tiny_recipe, method="em", iterations=100, weight=2.0, ramp_up=0.5), slices)
    assert [trainer.inputs(t).weight.item() for t in (25, 50, 99)] == pytest.approx([2 * 0.2865, 2.0, 2.0], rel=2e-3)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("poly", [0.01, 0.01 * 0.5**0.9]), ("constant", [0.01, 0.01]), ("step", [0.01, 0.0001])],
)
def test_schedules_of_the_learning_rate(schedule: str, expected: list[float], tiny_recipe: Recipe) -> None:
    recipe = replace(tiny_recipe, iterations=10_000, lr=0.01, lr_schedule=schedule)
    assert [learning_rate(recipe, t) for t in (0, 5_000)] == pytest.approx(expected)


def test_methods_differ_in_the_consistency_alone(slices, tiny_recipe: Recipe) -> None:
    runs = ("supervised", "fixmatch", "gapmatch")
    values = {run: _trainer(tiny_recipe.for_run(run), slices).step(0) for run in runs}
    assert "loss_unlabelled" not in values["supervised"]
    assert set(values["gapmatch"]) - set(values["fixmatch"]) == {"loss_perturbed", "grad_norm"}
    assert torch.equal(values["fixmatch"]["loss_unlabelled"], values["gapmatch"]["loss_unlabelled"])


def test_unlabelled_samples_need_no_labels(slices, tiny_recipe: Recipe) -> None:
    labelled, unlabelled = slices
    ours, theirs = _trainer(tiny_recipe, slices), _trainer(tiny_recipe, (labelled, replace(unlabelled, labels=None)))
    for t in range(2):
        ours.step(t), theirs.step(t)
    _assert_equal(_weights(ours), _weights(theirs))


@pytest.mark.parametrize("run", ["supervised", "fixmatch", "gapmatch"])
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_an_interrupted_run_goes_on_to_the_same_weights(
    slices, validation, tiny_recipe: Recipe, tmp_path: Path, run: str, amp, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe.for_run(run)
    whole = Trainer(ACDC, recipe, *slices, CPU, amp)
    uninterrupted = _fit(whole, validation, _folder(tmp_path / "whole"), resume=False)

    folder = _folder(tmp_path / "parts")
    first = Trainer(ACDC, recipe, *slices, CPU, amp)
    step = first.step

    def press_ctrl_c(iteration: int):
        if iteration == 2:  # in the middle of an interval
            os.kill(os.getpid(), signal.SIGINT)
        return step(iteration)

    monkeypatch.setattr(first, "step", press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        _fit(first, validation, folder, resume=False)
    second = Trainer(ACDC, recipe, *slices, CPU, amp)
    resumed = _fit(second, validation, folder, resume=True)

    _assert_equal(_weights(second), _weights(whole))
    _assert_equal([*resumed.model.state_dict().values()], [*uninterrupted.model.state_dict().values()])
    assert resumed.progress.best_dice == uninterrupted.progress.best_dice
    for log in ("train.csv", "validation.csv"):
        rows = [(folder / log).read_text().splitlines() for folder in (tmp_path / "whole", tmp_path / "parts")]
        assert [row.split(",")[:-1] for row in rows[0]] == [row.split(",")[:-1] for row in rows[1]]


@pytest.mark.parametrize("run", RUNS)
def test_every_method_goes_on_from_a_checkpoint_bit_for_bit(
    run: str, slices, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = replace(tiny_recipe.for_run(run), targets="train", replay_dropout=True, warm_up=1)
    whole = _trainer(recipe, slices)
    for t in range(4):
        if t == 2:
            checkpoint.save(tmp_path / "last.pt", whole.state_dict())
        whole.step(t)
    second = _trainer(recipe, slices)
    second.load_state_dict(checkpoint.load(tmp_path / "last.pt", CPU))
    for t in range(2, 4):
        second.step(t)
    _assert_equal(_weights(second), _weights(whole))
    if whole.method is not None:
        ours, theirs = second.method.state_dict(), whole.method.state_dict()
        assert list(ours) == list(theirs)
        _assert_equal([*ours.values()], [*theirs.values()])


@pytest.mark.parametrize("method", [name for name in METHODS if name != "supervised"])
def test_tau_counts_where_the_table_says(method: str) -> None:
    entry, model = methods.TABLE[method], torch.nn.Conv2d(1, 4, 1)
    data = {"num_classes": 4, "channels": 1, "dimensions": 2}
    setting = SimpleNamespace(model=model, weak=None, strong=None, loss=None, targets="eval", **data)
    with pytest.raises(AttributeError, match="tau") if entry.thresholded else nullcontext():
        entry.build(setting)


def _numbers(method: Method) -> dict[tuple[str, str], float]:
    """Each number that the method or a part of it (a teacher, a threshold, CutMix) has, by part and attribute."""
    others = {name: part for name, part in vars(method).items() if hasattr(part, "__dict__")}
    parts = {"": method, **dict(method.named_children()), **others}
    found = {(part, name): value for part, holder in parts.items() for name, value in vars(holder).items()}
    return {place: value for place, value in found.items() if isinstance(value, (int, float))}


@pytest.mark.parametrize("method", [name for name in METHODS if methods.TABLE[name].options])
def test_options_reach_the_method_and_defaults_are_its_own(method: str, slices, tiny_recipe: Recipe) -> None:
    recipe = replace(tiny_recipe, method=method, gap=False)
    before = _numbers(_trainer(recipe, slices).method)
    for name, default in methods.TABLE[method].options.items():
        if isinstance(default, str):
            continue  # which other words there are, the method's own tests know
        other = not default if isinstance(default, bool) else default + 1 if isinstance(default, int) else default / 2
        after = _numbers(_trainer(replace(recipe, options={name: other}), slices).method)
        moved = {place: (before[place], after[place]) for place in before if before[place] != after[place]}
        assert set(moved.values()) == {(default, other)}, f"{method} with {name}={other} instead of {default}: {moved}"
        namesakes = {place for place in before if place[1] == name}
        assert not namesakes or namesakes & set(moved), f"{method} with {name}: it moved {moved}, not what it names"


def test_mc_net_plus_is_a_decoder_more(slices, tiny_recipe: Recipe) -> None:
    recipes = [replace(tiny_recipe, method="mcnet", options={"variant": name}) for name in ("original", "plus")]
    trainers = [_trainer(recipe, slices) for recipe in recipes]
    assert [type(trainer.model.network.attachment) for trainer in trainers] == [Upsampled, TwiceUpsampled]


@pytest.mark.parametrize(("method", "kind"), [("urpc", PerturbedPyramid), ("cct", MedicalDecoders), ("vat", None)])
def test_a_variant_has_its_own_class_and_attachment(
    method: str, kind: type | None, slices, tiny_recipe: Recipe
) -> None:
    plain = _trainer(replace(tiny_recipe, method=method, gap=False), slices)
    other = _trainer(replace(tiny_recipe, method=method, gap=False, options={"variant": "medical"}), slices)
    assert type(plain.method) is not type(other.method)
    assert isinstance(other.method, type(plain.method))
    if kind is not None:
        assert type(other.model.network.attachment) is kind
        assert type(plain.model.network.attachment) is not kind
    assert other.step(0)["loss_unlabelled"] != plain.step(0)["loss_unlabelled"]


def test_cutmix_may_learn_from_probabilities(slices, tiny_recipe: Recipe) -> None:
    recipe = replace(
        tiny_recipe, method="cutmix", gap=False, options={"target": "probabilities", "decay": 0.5, "p": 0.3}
    )
    method = _trainer(recipe, slices).method
    assert isinstance(method, CutMixMeanTeacher)
    assert (method.threshold.tau, method.teacher.decay, method.cutmix.p) == (recipe.tau, 0.5, 0.3)


@pytest.mark.parametrize(
    ("method", "options", "text"),
    [
        ("cct", {"variant": "new"}, "variant must be original or medical, got 'new'"),
        ("mcnet", {"variant": "medical"}, "variant must be original or plus, got 'medical'"),
        ("cutmix", {"target": "medical"}, "target must be pseudo_labels or probabilities, got 'medical'"),
        ("vat", {"variant": "medical", "radius": 0.1}, "radius and a xi of its own"),
    ],
)
def test_wrong_words_are_named(method: str, options: dict[str, Any], text: str, slices, tiny_recipe: Recipe) -> None:
    with pytest.raises(InputError, match=f"--option of {method}: .*{text}"):
        _trainer(replace(tiny_recipe, method=method, gap=False, options=options), slices)


def test_a_methods_weight_grows_with_the_progress(slices, tiny_recipe: Recipe, monkeypatch) -> None:
    plain = [_trainer(tiny_recipe, slices).step(t)["loss_unlabelled"] for t in (0, 1)]
    seen: list[float] = []
    ramped = _trainer(tiny_recipe, slices)
    monkeypatch.setattr(ramped.method, "weight", lambda progress: seen.append(progress) or 0.25)
    assert ramped.step(0)["loss_unlabelled"] == plain[0] / 4
    ramped.step(1)
    assert seen == [0, 1 / tiny_recipe.iterations]


class Mixture(Method):
    """Adds the unlabelled images to the labelled ones, and has no loss of its own but at theta."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Views | None] = []

    def prepare(self, model: torch.nn.Module, batch: Batch) -> Views:
        return Views((), fixed={"share": 0.5}, labelled=(batch.labelled + batch.unlabelled) / 2)

    def compare(self, outputs, views):
        raise AssertionError

    def labelled_loss(self, criterion, outputs, target, views=None):
        self.seen.append(views)
        return criterion(outputs, target) * (1 if views is None else views.fixed["share"])


def test_a_method_may_replace_the_labelled_images_and_have_no_inputs(slices, tiny_recipe: Recipe) -> None:
    recipe = replace(tiny_recipe, warm_up=1, gap=False)
    trainer = _trainer(recipe, slices)
    trainer.method, shown = Mixture(), []
    trainer.model.register_forward_pre_hook(lambda module, inputs: shown.append(inputs[0]))
    for iteration in range(2):
        assert trainer.step(iteration).keys() == {"loss_labelled"}
    warm, views = trainer.method.seen
    assert warm is None
    assert len(shown) == 2
    assert shown[1] is views.labelled

    with_gap = _trainer(tiny_recipe, slices)
    with_gap.method = Mixture()
    with pytest.raises(InputError, match="nothing to perturb by"):
        with_gap.step(0)


def test_a_teacher_follows_and_is_not_trained(slices, tiny_recipe: Recipe) -> None:
    trainer = _trainer(tiny_recipe.for_run("mean_teacher"), slices)
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    teacher = trainer.method.teacher
    assert not any(id(p) in trained or p.requires_grad for p in teacher.parameters())
    trainer.step(0)  # after the first update it is the model itself
    _assert_equal([*teacher.model.parameters()], [*trainer.model.parameters()])


def test_without_a_perturbation_predictions_are_aligned_if_dropout_is_replayed(slices, tiny_recipe: Recipe) -> None:
    recipe = replace(tiny_recipe, eps=0.0, aligned="predictions", replay_dropout=True)
    replayed, drawn = (_trainer(r, slices).step(0) for r in (recipe, replace(recipe, replay_dropout=False)))
    assert replayed["loss_perturbed"].abs() < 1e-6
    assert drawn["loss_perturbed"] > 1e-4


@pytest.mark.parametrize(("freeze", "seen"), [(True, 3), (False, 4)])
def test_the_perturbed_pass_moves_running_statistics_if_asked_to(
    freeze: bool, seen: int, slices, tiny_recipe: Recipe
) -> None:
    trainer = _trainer(replace(tiny_recipe, freeze_statistics=freeze), slices)  # targets of "batch" count too
    trainer.step(0)
    counts = [n for name, n in trainer.model.state_dict().items() if name.endswith("num_batches_tracked")]
    assert {int(n) for n in counts} == {seen}


def test_the_weight_scales_both_losses(slices, tiny_recipe: Recipe) -> None:
    plain = _trainer(replace(tiny_recipe, eps=0.0), slices).step(0)
    half = _trainer(replace(tiny_recipe, weight=0.5, eps=0.0), slices).step(0)
    for name in ("loss_unlabelled", "loss_perturbed"):
        assert half[name] == plain[name] / 2


def test_the_method_joins_after_the_warm_up(slices, tiny_recipe: Recipe) -> None:
    """Until then it is supervised training, bit for bit."""
    warming = _trainer(replace(tiny_recipe, warm_up=2), slices)
    supervised = _trainer(tiny_recipe.for_run("supervised"), slices)
    for iteration in range(2):
        assert warming.step(iteration) == supervised.step(iteration)
    for ours, theirs in zip(warming.model.parameters(), supervised.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert "loss_unlabelled" in warming.step(2)


def test_a_teacher_follows_through_the_warm_up(slices, tiny_recipe: Recipe) -> None:
    trainer = _trainer(replace(tiny_recipe, warm_up=2).for_run("mean_teacher"), slices)
    trainer.step(0)  # after the first update it is the model itself
    _assert_equal([*trainer.method.teacher.parameters()], [*trainer.model.parameters()])


def test_labels_train_what_the_method_says(slices, tiny_recipe: Recipe) -> None:
    """In the warm-up too: URPC's further heads, not CCT's further decoders."""
    for run, learn in (("urpc", True), ("cct", False)):
        trainer = _trainer(replace(tiny_recipe, warm_up=2).for_run(run), slices)
        attachment = trainer.model.network.attachment
        before = [p.detach().clone() for p in attachment.parameters()]
        trainer.step(0)
        moved = [not torch.equal(new, old) for new, old in zip(attachment.parameters(), before, strict=True)]
        assert (all if learn else any)(moved) is learn


def test_a_finished_run_is_not_trained_again(slices, validation, tiny_recipe: Recipe, tmp_path: Path) -> None:
    _fit(_trainer(tiny_recipe, slices), validation, _folder(tmp_path), resume=False)
    again = _trainer(tiny_recipe, slices)
    again.step = lambda iteration: pytest.fail("trained")  # type: ignore[method-assign]
    assert _fit(again, validation, tmp_path, resume=True).progress.iteration == tiny_recipe.iterations


@pytest.mark.parametrize("change", [{"width": 4}, {"eps": 0.5}, {"iterations": 8}, {"gap": False}])
def test_a_checkpoint_of_another_recipe_is_refused_by_name(
    slices, validation, tiny_recipe: Recipe, tmp_path: Path, change
) -> None:
    _fit(_trainer(tiny_recipe, slices), validation, _folder(tmp_path), resume=False)
    other = _trainer(replace(tiny_recipe, **change), slices)
    with pytest.raises(InputError, match=rf"last\.pt.*{next(iter(change))}"):
        _fit(other, validation, tmp_path, resume=True)


@pytest.mark.parametrize("content", [None, b"foreign"])
def test_the_best_weights_survive_the_loss_of_best_pt(
    slices, validation, tiny_recipe: Recipe, tmp_path: Path, content: bytes | None
) -> None:
    result = _fit(_trainer(tiny_recipe, slices), validation, _folder(tmp_path), resume=False)
    (tmp_path / "best.pt").unlink()
    if content:
        (tmp_path / "best.pt").write_bytes(content)
    again = _fit(_trainer(tiny_recipe, slices), validation, tmp_path, resume=True)
    _assert_equal([*again.model.state_dict().values()], [*result.model.state_dict().values()])
    best = checkpoint.load(tmp_path / "best.pt", CPU)
    assert (best["iteration"], best["dice"]) == (result.progress.best_iteration, result.progress.best_dice)
    _assert_equal([*best["model"].values()], [*result.model.state_dict().values()])


@pytest.mark.parametrize("spoil", ["identity", "progress", "state", "best_weights"])
def test_a_checkpoint_with_a_damaged_part_is_refused_at_once(
    slices, validation, tiny_recipe: Recipe, tmp_path: Path, spoil: str
) -> None:
    recipe = replace(tiny_recipe, iterations=2)
    _fit(_trainer(recipe, slices), validation, _folder(tmp_path), resume=False)
    content = checkpoint.load(tmp_path / "last.pt", CPU)
    if spoil == "best_weights":
        content["progress"][spoil].popitem()
    else:
        content[spoil] = [1]
    checkpoint.save(tmp_path / "last.pt", content)
    with pytest.raises(InputError, match=r"last\.pt"):
        train.resume(_trainer(recipe, slices), tmp_path, identity("ACDC", recipe, [], None, {}))


def test_ctrl_c_in_the_last_validation_is_not_swallowed(
    slices, validation, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(tiny_recipe, iterations=2)
    mean_dice = train.mean_dice

    def press_ctrl_c(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return mean_dice(*arguments)

    monkeypatch.setattr(train, "mean_dice", press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        _fit(_trainer(recipe, slices), validation, _folder(tmp_path), resume=False)
    resumed = _trainer(recipe, slices)
    assert _fit(resumed, validation, tmp_path, resume=True).progress.validated == 2


@pytest.mark.parametrize("name", ["loss_labelled", "loss_unlabelled"])
def test_a_loss_that_is_not_finite_stops_the_run(
    slices, validation, tiny_recipe: Recipe, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = _trainer(tiny_recipe, slices)
    step = trainer.step
    spoilt = torch.tensor(torch.nan)
    monkeypatch.setattr(trainer, "step", lambda t: {**step(t), name: spoilt} if t == 2 else step(t))
    with pytest.raises(RunError, match=rf"{name} is nan at iteration 3; lower"):
        _fit(trainer, validation, _folder(tmp_path), resume=False)
    assert (
        train.resume(_trainer(tiny_recipe, slices), tmp_path, identity("ACDC", tiny_recipe, [], None, {})).iteration
        == 2
    )


def test_the_rate_leaves_validation_out(
    slices, validation, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mean_dice = train.mean_dice
    monkeypatch.setattr(train, "mean_dice", lambda *arguments: time.sleep(1) or mean_dice(*arguments))
    trainer = _trainer(replace(tiny_recipe, iterations=4), slices)
    values = trainer.step(0)
    monkeypatch.setattr(trainer, "step", lambda t: time.sleep(0.01) or values)
    result = _fit(trainer, validation, _folder(tmp_path), resume=False)
    rates = [float(line.split(",")[-1]) for line in (tmp_path / "train.csv").read_text().splitlines()[1:]]
    assert len(rates) == 4
    assert all(1 < rate <= 100 for rate in rates)
    assert 0.04 < result.progress.seconds < 2  # validation slept that long


def test_the_learning_rate_is_polynomial(slices, tiny_recipe: Recipe) -> None:
    trainer = _trainer(tiny_recipe, slices)
    logged = [trainer.to_host(trainer.step(t))["learning_rate"] for t in range(6)]
    base = torch.optim.SGD([torch.zeros(1, requires_grad=True)], tiny_recipe.lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(base, lambda t: (1 - t / 6) ** tiny_recipe.power)
    for rate in logged:
        assert rate == scheduler.get_last_lr()[0]  # bit for bit
        base.step(), scheduler.step()


@pytest.mark.filterwarnings("error")
def test_float16_skips_a_step_that_overflows_and_goes_on(slices, tiny_recipe: Recipe) -> None:
    trainer = Trainer(ACDC, tiny_recipe, *slices, CPU, torch.float16)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.step(0)
    assert trainer.scaler.get_scale() == 2.0**29
    _assert_equal([*trainer.model.parameters()], before)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    values = trainer.to_host(trainer.step(1))
    assert not any(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), before, strict=True) if a.ndim == 4)

    twin = Trainer(ACDC, tiny_recipe, *slices, CPU, torch.float16)
    twin.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1)  # another scale after the step
    assert twin.to_host(twin.step(1))["grad_norm"] == pytest.approx(values["grad_norm"], rel=1e-2)


def test_statistics_are_of_the_same_slices_every_time(slices, tiny_recipe: Recipe) -> None:
    trainer = _trainer(tiny_recipe, slices)
    pool = torch.cat([part.images for part in slices])
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(tiny_recipe.seed))
    assert torch.equal(trainer.statistics_images, pool[order[:4]])
    assert _trainer(replace(tiny_recipe, statistics_samples=0), slices).statistics_images is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("run", RUNS)
def test_a_step_does_not_wait_for_the_gpu(slices, tiny_recipe: Recipe, run: str) -> None:
    if method_of(run)[0] == "bcp":
        pytest.skip("connected components are found on the host")
    trainer = Trainer(ACDC, tiny_recipe.for_run(run), *slices, torch.device("cuda"), torch.bfloat16)
    trainer.step(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for iteration in range(1, 5):  # over the end of an epoch
            trainer.step(iteration)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_second_ctrl_c_does_not_wait() -> None:
    before = signal.getsignal(signal.SIGINT)  # a job in the background may ignore it
    with interruptible() as interrupted:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_best_iteration_is_the_one_with_the_highest_validation_dice(
    slices, validation, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    result = _fit(_trainer(tiny_recipe, slices), validation, _folder(tmp_path), resume=False)
    rows = [line.split(",") for line in (tmp_path / "validation.csv").read_text().splitlines()[1:]]
    best = max(rows, key=lambda row: float(row[1]))
    assert int(best[0]) == result.progress.best_iteration
    assert [int(row[0]) for row in rows] == [2, 4, 6]


@pytest.mark.parametrize("validated", [[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
def test_the_last_iteration_s_weights_stand_beside_the_best(
    slices, validation, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, validated: list[float]
) -> None:
    """Also where a run that is over is asked for again."""
    dice = iter(validated)
    monkeypatch.setattr(train, "_dice", lambda *_: next(dice))
    trainer = _trainer(tiny_recipe, slices)
    result = _fit(trainer, validation, _folder(tmp_path), resume=False)
    again = _fit(_trainer(tiny_recipe, slices), validation, tmp_path, resume=True)
    for found in (result, again):
        _assert_equal([*found.last.state_dict().values()], [*trainer.scored_model().state_dict().values()])
        assert (found.last is found.model) == (found.progress.best_iteration == 6) == (validated[-1] == 3)


def _folder(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    return path
