"""torch.compile of the model, of the wrapper's steps and of a whole training step; CUDA graphs."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import list_mode_options

from gap_torch import GAPWrapper

STEPS = 5
TRACES_STEPS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 15)
needs_newer_dynamo = pytest.mark.skipif(
    not TRACES_STEPS, reason="torch.compile of the wrapper's steps was written for and tested on torch 2.15"
)

# On a CPU these two are `max-autotune` and `default`, from which they differ in CUDA graphs alone.
MODES = sorted(list_mode_options().keys() - {"max-autotune-no-cudagraphs", "reduce-overhead"})


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _model(device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.LeakyReLU(inplace=True), nn.Conv2d(4, 2, 3, padding=1)
    return nn.Sequential(*layers).to(device)


def _batch(step: int, device: str = "cpu") -> Tensor:
    return torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(step)).to(device)


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def _step(model: nn.Module, optimizer: GAPWrapper, x: Tensor) -> None:
    _loss(model, x).backward()
    with optimizer.perturbed(model):
        _loss(model, x).backward()
    _loss(model, x + 1).backward()
    optimizer.step()
    optimizer.zero_grad()


def _sgd(model: nn.Module, lr: float | Tensor = 0.1, **knobs: Any) -> GAPWrapper:
    return GAPWrapper(torch.optim.SGD(model.parameters(), lr, momentum=0.9), eps=0.1, **knobs)


def _train(model: nn.Module, seen: nn.Module | None = None) -> dict[str, Tensor]:
    """`model` trained eagerly, or by way of `seen`, its compiled self."""
    optimizer = _sgd(model)
    for step in range(STEPS):
        _step(seen or model, optimizer, _batch(step))
    return model.state_dict()


def _assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_model(mode: str) -> None:
    model = _model()
    _assert_same(_train(model, torch.compile(model, mode=mode)), _train(_model()))


def test_a_compiled_model_is_compiled_once() -> None:
    """For training at theta; holding batch norm's statistics still makes one more, and none from step to step."""
    model, counter = _model(), CompileCounterWithBackend("aot_eager")
    _train(model, torch.compile(model, backend=counter))
    assert counter.frame_count == 2


@needs_newer_dynamo
@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"alpha": 0.5},
        {"adaptive": True},
        {"foreach": False},
        {"eps": torch.tensor(0.1)},
        {"eps": lambda t: 0.1 / (1 + t)},
    ],
    ids=["plain", "alpha", "adaptive", "for-loop", "tensor", "schedule"],
)
def test_compiled_steps_of_the_wrapper(knobs: dict[str, Any]) -> None:
    """No graph breaks (`fullgraph`), and no recompilation once everything has been seen, as the rate changes."""
    expected = _with_steps(knobs, lambda step: step)
    counter = CompileCounterWithBackend("aot_eager")
    counts: list[int] = []
    weights = _with_steps(knobs, lambda step: torch.compile(step, fullgraph=True, backend=counter), counter, counts)
    _assert_same(weights, expected)
    assert len(set(counts[2:])) == 1


def _with_steps(
    knobs: dict[str, Any],
    compiled: Callable[[Callable[[], None]], Callable[[], None]],
    counter: CompileCounterWithBackend | None = None,
    counts: list[int] | None = None,
) -> dict[str, Tensor]:
    model, lr = _model(), torch.tensor(0.1)
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), lr, momentum=0.9), **{"eps": 0.1, **knobs})
    first_step, second_step = compiled(optimizer.first_step), compiled(optimizer.second_step)
    for step in range(STEPS):
        lr.fill_(0.1 / (1 + step))
        _loss(model, _batch(step)).backward()
        first_step()
        _loss(model, _batch(step)).backward()
        second_step()
        optimizer.step()
        optimizer.zero_grad()
        if counter is not None and counts is not None:
            counts.append(counter.frame_count)
    return model.state_dict()


@needs_newer_dynamo
def test_misuse_of_compiled_steps_is_still_an_error() -> None:
    model = _model()
    optimizer = _sgd(model)
    first_step = torch.compile(optimizer.first_step, backend="aot_eager")
    second_step = torch.compile(optimizer.second_step, backend="aot_eager")
    with pytest.raises(Exception, match="found no gradient"):
        first_step()
    _loss(model, _batch(0)).backward()
    before = [p.detach().clone() for p in model.parameters()]
    first_step()
    with pytest.raises(Exception, match="no backward pass"):
        second_step()
    assert all(map(torch.equal, before, model.parameters()))


@needs_newer_dynamo
def test_a_compiled_training_step() -> None:
    model = _model()
    optimizer = _sgd(model)
    step = torch.compile(_step, backend="aot_eager")  # breaks at each backward, as torch will have it
    for i in range(STEPS):
        step(model, optimizer, _batch(i))
    _assert_same(model.state_dict(), _train(_model()))


@needs_newer_dynamo
def test_compiled_autograd() -> None:
    model = _model()
    optimizer = _sgd(model)
    for i in range(3):
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
            _step(model, optimizer, _batch(i))
    reference = _model()
    optimizer = _sgd(reference)
    for i in range(3):
        _step(reference, optimizer, _batch(i))
    _assert_same(model.state_dict(), reference.state_dict())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_whole_step_as_a_cuda_graph(alpha: float) -> None:
    def fresh() -> tuple[nn.Module, GAPWrapper, Tensor]:
        model, eps = _model("cuda"), torch.tensor(0.1, device="cuda")
        base = torch.optim.Adam(model.parameters(), 0.01, capturable=True)
        return model, GAPWrapper(base, eps=eps, alpha=alpha), eps

    model, optimizer, eps = fresh()
    x = torch.empty(2, 1, 8, 8, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in range(3):
            x.copy_(_batch(step))
            _step(model, optimizer, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _step(model, optimizer, x)
    for step in range(3, 6):
        x.copy_(_batch(step))
        eps.fill_(0.1 * step)
        graph.replay()

    reference, optimizer, eps = fresh()
    for step in range(6):
        if step >= 3:
            eps.fill_(0.1 * step)
        _step(reference, optimizer, _batch(step, "cuda"))
    _assert_same(model.state_dict(), reference.state_dict())
