"""docs/migrating.md: its numbers worked out anew, its code before and after run, and what it says of SAM."""

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gap_torch import GAPWrapper
from gap_torch.consistency import Batch, FixMatch
from gap_torch.reference import algorithm_1

PAGE = (Path(__file__).parents[1] / "docs" / "migrating.md").read_text()
MISTAKES = PAGE.split("## Two mistakes")[1].split("\n## ")[0]


# ---------------------------------------------------------------- the two mistakes


def _by_hand() -> list[list[float]]:
    """The rows of the table in plain numbers: theta = (1, 1), curvatures 3 and 4, the labelled loss (a - 3)^2 / 2."""
    theta, curvature, eps, alpha = [1.0, 1.0], [3.0, 4.0], 0.5, 0.5
    g1 = [c * t for c, t in zip(curvature, theta, strict=True)]
    length = sum(g**2 for g in g1) ** 0.5
    star = [t + eps * g / length for t, g in zip(theta, g1, strict=True)]
    g2 = [c * t for c, t in zip(curvature, star, strict=True)]
    labelled = [theta[0] - 3, 0.0]
    right = [a + alpha * b + c for a, b, c in zip(g1, g2, labelled, strict=True)]
    plain = [a + c for a, c in zip(g1, labelled, strict=True)]
    stale = [a + alpha * a + c for a, c in zip(g1, labelled, strict=True)]
    return [right, plain, plain, stale]


def _table() -> list[list[float]]:
    number = r"(-?\d+\.\d\d)"
    rows = re.findall(rf"\| {number} \| {number} \|$", MISTAKES, re.MULTILINE)
    return [[float(n) for n in row] for row in rows]


def test_the_table_is_what_comes_out_by_hand() -> None:
    assert _table() == [[round(n, 2) for n in row] for row in _by_hand()]


def _blocks() -> dict[int, str]:
    """The code of rows 1 and 2, and of row 3, which is row 2's without `detach()`."""
    kept, detached = re.findall(r"```python\n(.*?)```", MISTAKES, re.DOTALL)
    assert detached.count(".detach() +") == 1
    return {1: kept, 2: detached, 3: detached.replace(".detach() +", " +")}


@pytest.mark.parametrize("row", [1, 2, 3])
def test_each_block_applies_the_gradient_of_its_row(row: int, capsys: pytest.CaptureFixture) -> None:
    block = _blocks()[row]
    names: dict = {"torch": torch}
    exec(compile(block, f"docs/migrating.md, row {row}", "exec"), names)
    theta = names["theta"]
    torch.testing.assert_close(theta.grad.tolist(), _by_hand()[row])
    assert theta.tolist() == [1.0, 1.0]
    (shown,) = re.findall(r"print\(.*\)  # (.*), (.*)\n", block)
    assert row == 3 or [float(n) for n in shown] == _table()[row]
    assert capsys.readouterr().out.startswith("tensor([")


def test_the_wrapper_applies_the_gradient_of_the_first_row() -> None:
    theta = torch.ones(2, dtype=torch.float64, requires_grad=True)
    optimizer = GAPWrapper(torch.optim.SGD([theta], lr=0.1), eps=0.5, alpha=0.5)
    consistency = lambda: (3 * theta[0] ** 2 + 4 * theta[1] ** 2) / 2  # noqa: E731
    consistency().backward()
    with optimizer.perturbed():
        consistency().backward()
    ((theta[0] - 3) ** 2 / 2).backward()
    assert theta.grad is not None
    torch.testing.assert_close(theta.grad.tolist(), _by_hand()[0])


def _port_in_usb(retain: bool) -> list[float]:
    theta = torch.ones(2, dtype=torch.float64, requires_grad=True)
    curvature = torch.tensor([3.0, 4.0], dtype=torch.float64)

    def consistency() -> Tensor:
        return (curvature * theta**2).sum() / 2

    (g1,) = torch.autograd.grad(consistency(), theta)
    old = theta.detach().clone()
    theta.data.add_(0.5 * g1 / g1.norm())
    perturbed = consistency()
    perturbed.backward(retain_graph=retain)  # g2, which stays in .grad
    theta.data.copy_(old)
    (consistency() + 0.5 * perturbed + (theta[0] - 3) ** 2 / 2).backward()
    assert theta.grad is not None
    return theta.grad.tolist()


def test_mistake_1_in_usbs_loop() -> None:
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        _port_in_usb(retain=False)
    (shown,) = re.findall(r"comes on top: \((.*), (.*)\)", MISTAKES)
    torch.testing.assert_close(_port_in_usb(retain=True), [float(n) for n in shown])
    g2, stale = [3 * 1.3, 4 * 1.4], _by_hand()[3]
    assert [float(n) for n in shown] == pytest.approx([a + b for a, b in zip(g2, stale, strict=True)])


def test_the_list_of_gradients_is_algorithm_1s() -> None:
    theta = torch.ones(2, dtype=torch.float64, requires_grad=True)
    curvature = torch.tensor([3.0, 4.0], dtype=torch.float64)
    seen: list[Tensor] = []

    def consistency() -> Tensor:
        seen.append(theta.detach().clone())
        return (curvature * theta**2).sum() / 2

    (g_u,) = algorithm_1([theta], consistency, eps=0.5, alpha=0.5)
    star, g2 = (
        [float(n) for n in re.search(rf"- {name} = .*= \(([\d.]+), ([\d.]+)\)", MISTAKES).groups()]  # type: ignore[union-attr]
        for name in (r"theta\*", "g2")
    )
    torch.testing.assert_close(seen[1].tolist(), star)
    torch.testing.assert_close(g_u.tolist(), [3 + 0.5 * g2[0], 4 + 0.5 * g2[1]])  # type: ignore[union-attr]


def _moved(params: list[nn.Parameter], g1: list[Tensor]) -> list[Tensor]:
    """Move to theta* as the ports do; returns theta."""
    old, norm = [p.detach().clone() for p in params], torch.stack([g.norm() for g in g1]).norm()
    for p, g in zip(params, g1, strict=True):
        p.data.add_(0.1 * g / norm)
    return old


def _back(params: list[nn.Parameter], old: list[Tensor]) -> None:
    for p, value in zip(params, old, strict=True):
        p.data.copy_(value)


def plain(consistency: Callable[[], Tensor], supervised: Callable[[], Tensor], params: list[nn.Parameter]) -> None:
    (consistency() + supervised()).backward()


def unused(consistency: Callable[[], Tensor], supervised: Callable[[], Tensor], params: list[nn.Parameter]) -> None:
    old = _moved(params, list(torch.autograd.grad(consistency(), params)))
    consistency().backward()
    _back(params, old)
    for p in params:
        p.grad = None
    (consistency() + supervised()).backward()


def detached(consistency: Callable[[], Tensor], supervised: Callable[[], Tensor], params: list[nn.Parameter]) -> None:
    old = _moved(params, list(torch.autograd.grad(consistency(), params)))
    perturbed = consistency()
    _back(params, old)
    (consistency() + perturbed.detach() + supervised()).backward()


def right(consistency: Callable[[], Tensor], supervised: Callable[[], Tensor], params: list[nn.Parameter]) -> None:
    gradients = algorithm_1(params, consistency, supervised, eps=0.1)
    for p, gradient in zip(params, gradients, strict=True):
        p.grad = gradient


def _trained(step: Callable[..., None]) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    x, y, u = torch.randn(4, 3).double(), torch.tensor([0, 1, 0, 1]), torch.randn(16, 3).double()
    method = FixMatch(lambda x: x, lambda x: 0.8 * x, tau=0.0)
    params, base = list(model.parameters()), torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(20):
        views = method.prepare(model, Batch(u))
        step(
            lambda v=views: F.cross_entropy(model(v.inputs[0]), v.target), lambda: F.cross_entropy(model(x), y), params
        )
        base.step()
        base.zero_grad()
    return [p.detach() for p in params]


@pytest.mark.parametrize("mistake", [unused, detached])
def test_training_with_a_mistake_is_plain_fixmatch(mistake: Callable[..., None]) -> None:
    assert all(map(torch.equal, _trained(mistake), _trained(plain)))


def test_training_by_algorithm_1_is_not() -> None:
    assert not any(map(torch.allclose, _trained(right), _trained(plain)))


# ---------------------------------------------------------------- before and after

SIDES = {"before": "- ", "after": "+ "}


def _sides(diff: str) -> dict[str, str]:
    return {
        side: "\n".join(line[2:] for line in diff.splitlines() if line[:2] in ("  ", mark))
        for side, mark in SIDES.items()
    }


DIFFS = [_sides(diff) for diff in re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL)]


def _names() -> dict:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))
    method = FixMatch(lambda x: x, lambda x: 0.9 * x, tau=0.2)
    x, y = torch.rand(2, 1, 8, 8), torch.randint(3, (2, 8, 8))
    return {
        "torch": torch,
        "GAPWrapper": GAPWrapper,
        "model": model,
        "method": method,
        "views": method.prepare(model, Batch(torch.rand(2, 1, 8, 8))),
        "x": x,
        "y": y,
        "supervised": F.cross_entropy,
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
    }


def _run(code: str, **names: object) -> dict:
    everything = _names() | names
    exec(code, everything)
    return everything


@pytest.mark.parametrize("index", [0, 1])
def test_the_lines_of_sam_and_those_that_replace_them_run(index: int) -> None:
    sam = pytest.importorskip("pytorch_optimizer").SAM
    start = _names()["model"].state_dict()
    ends = [_run(DIFFS[index][side], SAM=sam)["model"].state_dict() for side in SIDES]
    for end in ends:
        assert not any(torch.equal(end[key], start[key]) for key in start)


def test_a_right_gapmatch_by_hand_and_the_two_lines_train_alike() -> None:
    before = _run(DIFFS[2]["before"])["model"]
    names = _names()
    wrapped = GAPWrapper(names["optimizer"], eps=0.1)
    after = _run(DIFFS[2]["after"], **{k: names[k] for k in ("model", "views")}, optimizer=wrapped)["model"]
    torch.testing.assert_close(after.state_dict(), before.state_dict())
    assert not torch.equal(after[0].weight, _names()["model"][0].weight)


def test_a_zero_gradient_is_nan_by_hand_and_harmless_in_the_two_lines() -> None:
    nothing = FixMatch(lambda x: x, lambda x: 0.9 * x, tau=1.0)  # no pixel is that confident
    names = _names()
    model, views = names["model"], nothing.prepare(names["model"], Batch(torch.rand(2, 1, 8, 8)))
    by_hand = _run(DIFFS[2]["before"], method=nothing, views=views)["model"]
    assert by_hand[0].weight.isnan().all()
    wrapped = GAPWrapper(names["optimizer"], eps=0.1)
    _run(DIFFS[2]["after"], method=nothing, views=views, model=model, optimizer=wrapped)
    assert all(p.isfinite().all() for p in model.parameters())


# ---------------------------------------------------------------- what SAM does


@pytest.fixture
def sam() -> type:
    return pytest.importorskip("pytorch_optimizer").SAM


def _problem() -> tuple[nn.Linear, Callable[[nn.Module], Tensor]]:
    torch.manual_seed(0)
    x = torch.randn(5, 3).double()
    return nn.Linear(3, 2).double(), lambda model: model(x).square().mean()


@pytest.mark.parametrize("adaptive", [False, True])
def test_eps_is_rho(sam: type, adaptive: bool) -> None:
    model, loss = _problem()
    twin = copy.deepcopy(model)
    theirs = sam(model.parameters(), torch.optim.SGD, rho=0.3, adaptive=adaptive, lr=0.1)
    ours = GAPWrapper(torch.optim.SGD(twin.parameters(), lr=0.1), eps=0.3, adaptive=adaptive)
    for network, optimizer in ((model, theirs), (twin, ours)):
        loss(network).backward()
        optimizer.first_step()
    torch.testing.assert_close(twin.state_dict(), model.state_dict(), rtol=1e-6, atol=1e-8)  # their norm is a float32


def test_sam_applies_g2_alone_and_gap_the_sum(sam: type) -> None:
    model, loss = _problem()
    twin = copy.deepcopy(model)
    g1 = torch.autograd.grad(loss(model), list(model.parameters()))
    theirs = sam(model.parameters(), torch.optim.SGD, rho=0.3, lr=0.1)
    loss(model).backward()
    theirs.first_step(zero_grad=True)
    loss(model).backward()
    theirs.second_step()
    ours = GAPWrapper(torch.optim.SGD(twin.parameters(), lr=0.1), eps=0.3, alpha=0.5)
    loss(twin).backward()
    with ours.perturbed(twin):
        loss(twin).backward()
    for p, q, first in zip(twin.parameters(), model.parameters(), g1, strict=True):
        assert isinstance(p.grad, Tensor)
        assert isinstance(q.grad, Tensor)
        torch.testing.assert_close(p.grad, first + 0.5 * q.grad)


def test_weight_decay_is_no_part_of_the_direction() -> None:
    stars = []
    for decay in (0.0, 10.0):
        model, loss = _problem()
        optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=decay), eps=0.3)
        loss(model).backward()
        optimizer.first_step()
        stars.append(model.state_dict())
    torch.testing.assert_close(*stars, rtol=0, atol=0)


def test_sams_zeroing_first_step_is_a_type_error() -> None:
    model, loss = _problem()
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    loss(model).backward()
    with pytest.raises(TypeError, match="zero_grad"):
        optimizer.first_step(zero_grad=True)  # type: ignore[call-arg]


def test_sams_closure_is_plain_training() -> None:
    model, loss = _problem()
    twin = copy.deepcopy(model)
    wrapped = GAPWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    bare = torch.optim.SGD(twin.parameters(), lr=0.1)
    for network, optimizer in ((model, wrapped), (twin, bare)):

        def closure(network: nn.Module = network, optimizer: torch.optim.Optimizer = optimizer) -> float:
            optimizer.zero_grad()
            value = loss(network)
            value.backward()
            return value.item()

        closure()
        optimizer.step(closure)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)


def test_a_sam_object_inside_the_wrapper_asks_for_a_closure(sam: type) -> None:
    model, loss = _problem()
    optimizer = GAPWrapper(sam(model.parameters(), torch.optim.SGD, lr=0.1))
    loss(model).backward()
    with optimizer.perturbed(model):
        loss(model).backward()
    with pytest.raises(Exception, match="closure"):
        optimizer.step()


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("source", ["sam", "its base"])
def test_a_sam_runs_checkpoint_goes_on_in_the_wrapper(sam: type, base: type, source: str) -> None:
    options = {"lr": 0.1, "momentum": 0.9} if base is torch.optim.SGD else {"lr": 0.1}
    model, loss = _problem()
    before = sam(model.parameters(), base, rho=0.05, **options)
    for _ in range(3):
        loss(model).backward()
        before.first_step(zero_grad=True)
        loss(model).backward()
        before.second_step(zero_grad=True)
    saved = before.state_dict() if source == "sam" else before.base_optimizer.state_dict()

    optimizer = GAPWrapper(base(model.parameters(), **options), eps=0.1)
    optimizer.load_state_dict(saved)
    twin = copy.deepcopy(model)
    bare = base(twin.parameters(), **options)
    bare.load_state_dict(copy.deepcopy(before.base_optimizer.state_dict()))

    gradients = algorithm_1(list(twin.parameters()), lambda: loss(twin), eps=0.1)
    for p, gradient in zip(twin.parameters(), gradients, strict=True):
        p.grad = gradient
    bare.step()
    loss(model).backward()
    with optimizer.perturbed(model):
        loss(model).backward()
    optimizer.step()
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    assert optimizer.param_groups[0]["gap_eps"] == 0.1
    assert optimizer.param_groups[0]["rho"] == 0.05


def test_a_norm_for_each_tensor_moves_n_tensors_by_eps_times_the_root_of_n() -> None:
    model = nn.ParameterList(torch.randn(4).double() for _ in range(9))
    old = [p.detach().clone() for p in model]
    sum(p.pow(3).sum() for p in model).backward()
    with torch.no_grad():
        for p in model:
            p += 0.1 * p.grad / p.grad.norm()
    distance = torch.cat([p.detach() - q for p, q in zip(model, old, strict=True)]).norm()
    torch.testing.assert_close(distance.item(), 0.1 * 9**0.5)
