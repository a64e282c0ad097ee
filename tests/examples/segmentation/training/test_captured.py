"""A captured step does what the ordinary one does: every method, with and without GAP, in the plane and in space.

On the CPU a recorder of operations stands in for the CUDA graph (`cpu_graph`). There a method is in the plane with
GAP and in space without, as GAP knows no dimensions; on CUDA it is all four.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from gap_torch import GAPWrapper, losses, multi_tensor
from segmentation import ranks
from segmentation.errors import CaptureError
from segmentation.recipe import RUNS, Recipe, method_of
from segmentation.training import captured
from segmentation.training.captured import CapturedStep, obstacle
from segmentation.training.loop import fit
from segmentation.training.sgd import SGD
from segmentation.training.step import Trainer

from ..problems import OPTIONS, PROBLEMS, pools
from .cpu_graph import CpuGraph

CPU = torch.device("cpu")
CAPTURED = [run for run in RUNS if method_of(run)[0] != "bcp"]  # whose connected components are found on the host
ON_CPU = [(run, "2D" if method_of(run)[1] else "3D") for run in CAPTURED] + [("supervised", "2D")]
REHEARSALS = 2
STEPS = REHEARSALS + 2


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks at a value; on the CPU, where there is nothing to wait for, the library does in three places."""
    monkeypatch.setattr(losses, "_check_range", lambda *_: None)
    monkeypatch.setattr(multi_tensor, "usable_scale", lambda eps, norm, *_: (eps / norm).float().nan_to_num(0, 0, 0))
    monkeypatch.setattr(multi_tensor, "_tensor_norms", lambda ts, _: torch.stack(torch._foreach_norm(ts, 2.0)))
    monkeypatch.setattr(captured, "REHEARSALS", REHEARSALS)


def _recipe(dims: str, run: str, **changes: Any) -> Recipe:
    recipe = PROBLEMS[dims][1].for_run(run)
    changes = {"options": OPTIONS.get(recipe.method, ()), **changes}
    return replace(recipe, iterations=20, average_decay=0.9, **changes)


def _trainer(dims: str, recipe: Recipe, graph: bool, amp: torch.dtype | None = None) -> Trainer:
    trainer = Trainer(PROBLEMS[dims][0], recipe, *pools(recipe, PROBLEMS[dims][0].num_classes), CPU, amp)
    trainer.sgd = SGD(trainer.model.parameters(), recipe, fused=True)  # as on CUDA
    trainer.optimizer = GAPWrapper(trainer.sgd, recipe.eps, recipe.alpha)
    if graph:
        trainer.run = CapturedStep(trainer.compute, CPU, lambda _: CpuGraph(lambda: _state(trainer)))
    return trainer


def _state(trainer: Trainer) -> list[Any]:
    return [trainer.state_dict(), *(vars(trainer.scaler).get(name) for name in ("_scale", "_growth_tracker"))]


def _assert_same_steps(graphed: Trainer, ordinary: Trainer, steps: range) -> None:
    for t in steps:
        ours, theirs = graphed.to_host(graphed.step(t)), ordinary.to_host(ordinary.step(t))
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    for a, b in zip(_weights(graphed), _weights(ordinary), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def _weights(trainer: Trainer) -> list[Tensor]:
    return [*trainer.model.state_dict().values(), *trainer.average.module.state_dict().values()]


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize(("run", "dims"), ON_CPU)
def test_captured_and_ordinary_steps_are_the_same(run: str, dims: str) -> None:
    recipe = _recipe(dims, run)
    graphed, ordinary = _trainer(dims, recipe, graph=True), _trainer(dims, recipe, graph=False)
    _assert_same_steps(graphed, ordinary, range(STEPS))
    assert graphed.run.recorder.replays == STEPS - REHEARSALS


VARIANTS = [(method, {"variant": "medical"}) for method in ("vat", "urpc", "cct")] + [
    ("cutmix", {"target": "probabilities"}),
    ("mcnet", {"variant": "plus"}),
]


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("dims", PROBLEMS)
@pytest.mark.parametrize(("method", "options"), VARIANTS)
def test_so_are_those_of_variants(method: str, options: dict[str, str], dims: str) -> None:
    recipe = _recipe(dims, method + "+gap" * (dims == "2D"), options=options)
    graphed, ordinary = _trainer(dims, recipe, graph=True), _trainer(dims, recipe, graph=False)
    _assert_same_steps(graphed, ordinary, range(STEPS))
    assert graphed.run.recorder.replays == STEPS - REHEARSALS


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("run", ["fixmatch", "gapmatch", "em+gap", "urpc+gap"])
@pytest.mark.parametrize("changes", [{"joint": True}, {"aligned": "pseudo_labels", "ramp_up": 0.5}])
def test_other_recipes_are_captured_too(run: str, changes: dict[str, Any]) -> None:
    recipe = _recipe("2D", run, **changes)
    _assert_same_steps(*(_trainer("2D", recipe, graph) for graph in (True, False)), range(STEPS))


@pytest.mark.usefixtures("as_on_cuda")
def test_a_weight_that_ramps_up_is_not_captured_at_its_first_value() -> None:
    trainers = [_trainer("2D", _recipe("2D", "gapmatch"), graph) for graph in (True, False)]
    for trainer in trainers:
        trainer.method.weight = lambda progress: 2 * progress
    _assert_same_steps(*trainers, range(STEPS))


@pytest.mark.usefixtures("as_on_cuda")
def test_another_graph_is_made_where_the_method_joins() -> None:
    recipe = _recipe("2D", "gapmatch", warm_up=4)
    graphed, ordinary = _trainer("2D", recipe, graph=True), _trainer("2D", recipe, graph=False)
    _assert_same_steps(graphed, ordinary, range(4))
    assert graphed.run.recorder.replays == 4 - REHEARSALS
    _assert_same_steps(graphed, ordinary, range(4, 9))
    assert graphed.run.recorder.replays == 5 - REHEARSALS


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("run", ["gapmatch", "ict+gap", "freematch"])  # with a teacher, with thresholds
def test_a_captured_run_goes_on_as_if_it_had_not_stopped(run: str) -> None:
    recipe = _recipe("2D", run)
    whole, first, resumed = (_trainer("2D", recipe, graph=True) for _ in range(3))
    for t in range(4):
        whole.step(t), first.step(t)
    resumed.step(0)  # something to forget
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    _assert_same_steps(resumed, whole, range(4, 9))
    assert resumed.run.recorder.replays == 5 - REHEARSALS


@pytest.mark.usefixtures("as_on_cuda")
def test_what_another_device_s_optimizer_has_saved_goes_on_here() -> None:
    """The kernel is this device's, and the learning rate the tensor that is filled."""
    recipe = _recipe("2D", "gapmatch")
    task = PROBLEMS["2D"][0]
    plain = Trainer(task, recipe, *pools(recipe, task.num_classes), CPU, None)
    fused, ordinary = _trainer("2D", recipe, graph=True), _trainer("2D", recipe, graph=False)
    plain.step(0)
    for trainer in (fused, ordinary):
        trainer.load_state_dict(copy.deepcopy(plain.state_dict()))
    _assert_same_steps(fused, ordinary, range(1, 6))
    assert all(group["fused"] for group in fused.optimizer.param_groups)
    plain.load_state_dict(copy.deepcopy(fused.state_dict()))
    plain.step(6)
    assert not any(group["fused"] for group in plain.optimizer.param_groups)


@pytest.mark.usefixtures("as_on_cuda")
def test_float16_with_its_scaler() -> None:
    recipe = _recipe("2D", "gapmatch")
    graphed, ordinary = (_trainer("2D", recipe, graph, torch.float16) for graph in (True, False))
    for trainer in (graphed, ordinary):
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=2)  # one that overflows
        for layer in trainer.model.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.0  # half precision has masks of its own on a CPU, for which the host looks at a value
    scales = []
    for t in range(STEPS + 3):
        graphed.step(t), ordinary.step(t)
        scales.append(graphed.scaler.get_scale())
        assert scales[-1] == ordinary.scaler.get_scale()
    assert graphed.run.recorder.replays
    assert len(set(scales)) > 1
    for ours, theirs in zip(_weights(graphed), _weights(ordinary), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_step_whose_host_waits_is_not_captured_and_says_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = _recipe("2D", "gapmatch")
    trainer, ordinary = _trainer("2D", recipe, graph=True), _trainer("2D", recipe, graph=False)
    graph = CpuGraph(lambda: _state(trainer))
    graph.rehearse = lambda function, watch: (function(), "the host waits at method.py:7" if watch else None)
    trainer.run = CapturedStep(trainer.compute, CPU, lambda _: graph)
    _assert_same_steps(trainer, ordinary, range(8))
    assert not graph.calls
    (line,) = capsys.readouterr().err.splitlines()
    assert "not captured" in line
    assert line.endswith("the host waits at method.py:7")


@pytest.mark.usefixtures("as_on_cuda")
def test_a_run_that_is_over_gives_the_graph_back(tmp_path: Path) -> None:
    recipe = _recipe("2D", "gapmatch", validate_every=20)
    trainer = _trainer("2D", recipe, graph=True)
    fit(trainer, [], tmp_path, {})
    assert trainer.run.recorder.replays == 0
    assert not trainer.run.recorder.calls
    assert trainer.run.inputs is None
    assert trainer.captured


def test_a_capture_that_fails_ends_the_run_with_what_to_do() -> None:
    trainer = _trainer("2D", _recipe("2D", "gapmatch"), graph=True)  # on the CPU the losses look at their target
    for t in range(captured.REHEARSALS):
        trainer.step(t)
    with pytest.raises(CaptureError, match=r"CUDA graph failed .*the host looks at a value.*--graph off"):
        trainer.step(captured.REHEARSALS)


@pytest.mark.parametrize(
    ("device", "changes", "reason"),
    [
        ("cpu", {}, "on CUDA alone, not on cpu"),
        ("cuda", {"replay_dropout": True}, "--replay-dropout"),
        ("cuda", {}, None),
    ],
)
def test_what_is_known_to_be_in_the_way(device: str, changes: dict[str, Any], reason: str | None) -> None:
    found = obstacle(torch.device(device), Recipe(**changes))
    assert found is None if reason is None else reason in found


def test_ranks_are_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "world", lambda: 2)
    assert "several processes" in obstacle(torch.device("cuda"), Recipe())


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")


def _on_cuda(dims: str, recipe: Recipe, graph: bool, amp: torch.dtype | None = None, compiled: bool = False) -> Trainer:
    task = PROBLEMS[dims][0]
    return Trainer(task, recipe, *pools(recipe, task.num_classes), torch.device("cuda"), amp, compiled, graph)


@pytest.fixture
def float64() -> Iterator[None]:
    """In which rounding stays rounding; that of kernels that add in any order grows tenfold in a few iterations."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def _assert_same_on_cuda(graphed: Trainer, ordinary: Trainer, steps: range) -> None:
    for t in steps:
        ours, theirs = graphed.to_host(graphed.step(t)), ordinary.to_host(ordinary.step(t))
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


@needs_cuda
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("run", ["fixmatch", "gapmatch"])
def test_a_cuda_graph_and_ordinary_steps_agree_over_50_iterations(run: str) -> None:
    recipe = replace(_recipe("2D", run), iterations=100, lr=0.01)
    graphed, ordinary = (_on_cuda("2D", recipe, graph) for graph in (True, False))
    _assert_same_on_cuda(graphed, ordinary, range(50))
    assert graphed.run.recorder.graph is not None
    for a, b in zip(_weights(graphed), _weights(ordinary), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@needs_cuda
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("dims", PROBLEMS)
@pytest.mark.parametrize("run", CAPTURED)
def test_every_run_is_captured_on_cuda(run: str, dims: str) -> None:
    recipe = _recipe(dims, run)
    graphed, ordinary = (_on_cuda(dims, recipe, graph) for graph in (True, False))
    _assert_same_on_cuda(graphed, ordinary, range(8))
    assert graphed.run.recorder.graph is not None


@needs_cuda
@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
def test_every_precision_is_captured_on_cuda_compiled_too(amp: torch.dtype | None, compiled: bool) -> None:
    recipe = replace(_recipe("2D", "gapmatch"), lr=0.001, eps=0.01)
    graphed, ordinary = (_on_cuda("2D", recipe, graph, amp, compiled) for graph in (True, False))
    counts = []
    for t in range(9):
        ours, theirs = graphed.to_host(graphed.step(t)), ordinary.to_host(ordinary.step(t))
        counts.append(counters["stats"]["unique_graphs"])
    assert graphed.run.recorder.graph is not None
    assert counts[-1] == counts[captured.REHEARSALS - 1]
    assert ours["loss_labelled"] == pytest.approx(theirs["loss_labelled"], rel=0.05)


@needs_cuda
@pytest.mark.usefixtures("float64")
def test_a_captured_run_on_cuda_goes_on_as_if_it_had_not_stopped() -> None:
    recipe = _recipe("2D", "ict+gap")
    whole, first, resumed = (_on_cuda("2D", recipe, graph=True) for _ in range(3))
    for t in range(8):
        whole.step(t), first.step(t)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    _assert_same_on_cuda(resumed, whole, range(8, 16))


@needs_cuda
@pytest.mark.parametrize("dims", PROBLEMS)
def test_connected_components_on_the_host_are_noticed_before(dims: str) -> None:
    trainer = _on_cuda(dims, _recipe(dims, "bcp+gap"), graph=True)
    for t in range(8):
        trainer.step(t)
    assert not trainer.captured


@needs_cuda
def test_a_method_that_looks_at_a_value_on_cuda_is_noticed_before(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = _on_cuda("2D", _recipe("2D", "gapmatch"), graph=True)
    compare = trainer.method.compare

    def looks(*arguments: Any) -> Tensor:
        loss = compare(*arguments)
        assert loss.item() >= 0
        return loss

    trainer.method.compare = looks
    for t in range(8):
        trainer.step(t)
    assert not trainer.captured
    assert f"{__file__}:" in capsys.readouterr().err
