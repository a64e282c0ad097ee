"""A run that is saved and resumed goes on as if it had not been: torch.save, and torch.distributed.checkpoint."""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from gap_torch import GAPWrapper
from gap_torch.reference import algorithm_1

if torch.distributed.is_available():
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

DISTRIBUTED = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")

# NAdam is missing: torch itself loads its float32 `mu_product` as float64 if the parameters are.
BASES: dict[str, Callable[..., Optimizer]] = {
    "SGD": lambda p, lr=0.05: torch.optim.SGD(p, lr),  # has no state at all
    "SGD momentum": lambda p, lr=0.05: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda p, lr=0.05: torch.optim.AdamW(p, lr, weight_decay=0.1, amsgrad=True),
    "AdamW fused": lambda p, lr=0.05: torch.optim.AdamW(p, lr, fused=True),
    "RMSprop": lambda p, lr=0.05: torch.optim.RMSprop(p, lr, momentum=0.5, centered=True),
    "Adafactor": lambda p, lr=0.05: torch.optim.Adafactor(p, lr),
}
SCHEDULED = ["SGD momentum", "AdamW", "RMSprop"]  # OneCycleLR wants a momentum, or betas, to cycle

KNOBS = [{"gap_eps": 0.3}, {"gap_alpha": 2.0}, {"gap_eps": 0.0, "gap_alpha": 0.0}]
"""Of the three layers' groups, whose defaults are eps 0.5 and alpha 0.5."""
RADII, WEIGHTS = [0.3, 0.5, 0.0], [0.5, 2.0, 0.0]


def make_model(device: str = "cpu", seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    return layers.to(device, torch.float64)


def groups(model: nn.Module, knobs: bool = True) -> list[dict[str, Any]]:
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return [{"params": list(m.parameters()), **(own if knobs else {})} for m, own in zip(layers, KNOBS, strict=True)]


def make_wrapper(name: str, model: nn.Module) -> GAPWrapper:
    return GAPWrapper(BASES[name](groups(model)), eps=0.5, alpha=0.5)


def strange_wrapper(name: str, model: nn.Module) -> GAPWrapper:
    """One whose every setting a checkpoint has to bring."""
    return GAPWrapper(BASES[name](groups(model, knobs=False), lr=123.0), eps=9.0, alpha=9.0)


def data(step: int, device: str | torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 4, generator=generator, dtype=torch.float64).to(device)


def unsupervised(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x).sin() - 0.3).square().mean()


def supervised(model: nn.Module, x: Tensor) -> Tensor:
    return model(x + 1).square().mean()


def train(model: nn.Module, optimizer: GAPWrapper, steps: range, rank: int = 0, ranks: int = 1) -> None:
    device = next(model.parameters()).device
    for step in steps:
        x = data(step, device).chunk(ranks)[rank]
        unsupervised(model, x).backward()
        with optimizer.perturbed(model):
            unsupervised(model, x).backward()
        supervised(model, x).backward()
        optimizer.step()
        optimizer.zero_grad()


def train_bare(model: nn.Module, base: Optimizer, steps: range) -> None:
    """With the reference gradient."""
    params = list(model.parameters())
    radii, weights = ([value for value in values for _ in range(2)] for values in (RADII, WEIGHTS))
    for step in steps:
        x = data(step, params[0].device)
        losses = (lambda x=x: unsupervised(model, x)), (lambda x=x: supervised(model, x))
        for p, g in zip(params, algorithm_1(params, *losses, eps=radii, alpha=weights), strict=True):
            p.grad = g
        base.step()


def tensors(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    """All parameters and all tensors of the optimizer's state, copied to the host.

    To the host because a step counter's device is not part of the result: an optimizer makes it on the CPU, and torch
    leaves one from a file where `map_location` has put it.
    """
    state = [v for p in model.parameters() for v in optimizer.state[p].values() if isinstance(v, Tensor)]
    return [t.detach().to("cpu", copy=True) for t in (*model.parameters(), *state)]


def settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


# ---------------------------------------------------------------- torch.save


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("name", BASES)
def test_resuming_from_a_file_equals_never_having_stopped(name: str, at: int, tmp_path: Path, device: str) -> None:
    model = make_model(device)
    optimizer = make_wrapper(name, model)
    train(model, optimizer, range(at))
    optimizer.param_groups[1].update(gap_eps=0.125, lr=0.01)  # as a schedule of one's own does
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "last.pt")

    other = make_model(device, seed=1)
    resumed = strange_wrapper(name, other)
    content = torch.load(tmp_path / "last.pt", map_location=device, weights_only=True)
    other.load_state_dict(content["model"])
    resumed.load_state_dict(content["optimizer"])
    assert settings(resumed) == settings(optimizer)
    for each in ((model, optimizer), (other, resumed)):
        train(*each, range(at, at + 3))
    assert_equal(tensors(other, resumed), tensors(model, optimizer))


@pytest.mark.parametrize("name", ["AdamW", "RMSprop", "Adafactor"])
def test_a_step_counter_from_a_file_stays_where_the_file_was_mapped_to(name: str) -> None:
    """As in the bare optimizer; the device `meta` stands for a GPU."""
    model = make_model()
    optimizer = make_wrapper(name, model)
    train(model, optimizer, range(1))
    mapped = optimizer.state_dict()
    for values in mapped["state"].values():
        values["step"] = values["step"].to("meta")
    for resumed in (BASES[name](groups(model, knobs=False)), strange_wrapper(name, model)):
        resumed.load_state_dict(mapped)
        for p in model.parameters():
            places = {key: value.device.type for key, value in resumed.state[p].items() if isinstance(value, Tensor)}
            assert places == {key: "meta" if key == "step" else "cpu" for key in places}
            assert "step" in places


@pytest.mark.parametrize("name", SCHEDULED)
def test_scheduler_and_scaler_are_resumed_with_it(name: str, tmp_path: Path) -> None:
    class Run:
        def __init__(self, seed: int) -> None:
            self.model = make_model(seed=seed)
            self.optimizer = make_wrapper(name, self.model)
            self.schedule = OneCycleLR(self.optimizer, 0.1, total_steps=10)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)

        def train(self, steps: range) -> None:
            for step in steps:
                x = data(step, "cpu")
                self.scaler.scale(unsupervised(self.model, x)).backward()
                with self.optimizer.perturbed(self.model):
                    self.scaler.scale(unsupervised(self.model, x)).backward()
                self.scaler.scale(supervised(self.model, x)).backward()
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.optimizer.zero_grad()
                self.schedule.step()

    run, resumed = Run(seed=0), Run(seed=1)
    run.train(range(3))
    torch.save({key: part.state_dict() for key, part in vars(run).items()}, tmp_path / "last.pt")
    content = torch.load(tmp_path / "last.pt", weights_only=True)
    for key, part in vars(resumed).items():
        part.load_state_dict(content[key])
    run.train(range(3, 7))
    resumed.train(range(3, 7))
    assert_equal(tensors(resumed.model, resumed.optimizer), tensors(run.model, run.optimizer))
    assert settings(resumed.optimizer) == settings(run.optimizer)
    assert resumed.scaler.get_scale() == run.scaler.get_scale() == 2.0**11


@pytest.mark.parametrize("to", ["bare", "wrapper"])
@pytest.mark.parametrize("name", BASES)
def test_a_wrappers_run_goes_on_bare_and_a_bare_one_wrapped(name: str, to: str, device: str) -> None:
    model = make_model(device)
    twin = copy.deepcopy(model)
    optimizer, bare = make_wrapper(name, model), BASES[name](groups(twin, knobs=False))
    train(model, optimizer, range(2))
    train_bare(twin, bare, range(2))
    assert_close(tensors(model, optimizer), tensors(twin, bare))
    if to == "bare":
        twin.load_state_dict(model.state_dict())
        bare.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        knobs = settings(optimizer)
        model.load_state_dict(twin.state_dict())
        optimizer.load_state_dict(copy.deepcopy(bare.state_dict()))
        assert settings(optimizer) == knobs
    assert_equal(tensors(model, optimizer), tensors(twin, bare))
    train(model, optimizer, range(2, 5))
    train_bare(twin, bare, range(2, 5))
    assert_close(tensors(model, optimizer), tensors(twin, bare))


# ---------------------------------------------------------------- torch.distributed.checkpoint, one process

FLATTEN = pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])


def get_states(model: nn.Module, optimizer: Optimizer, flatten: bool, full: bool = False) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten, full_state_dict=full)
    optimizer_state = get_optimizer_state_dict(model, optimizer, options=options)
    return {"model": get_model_state_dict(model), "optimizer": optimizer_state}


def set_states(
    model: nn.Module, optimizer: Optimizer, states: dict[str, Any], flatten: bool, full: bool = False
) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten, full_state_dict=full)
    set_model_state_dict(model, states["model"])
    set_optimizer_state_dict(model, optimizer, states["optimizer"], options=options)


@DISTRIBUTED
@FLATTEN
@pytest.mark.parametrize("name", BASES)
def test_distributed_state_dicts_carry_everything(name: str, flatten: bool, device: str) -> None:
    model = make_model(device)
    optimizer = make_wrapper(name, model)
    train(model, optimizer, range(2))
    other = make_model(device, seed=1)
    resumed = strange_wrapper(name, other)
    set_states(other, resumed, copy.deepcopy(get_states(model, optimizer, flatten)), flatten)
    assert settings(resumed) == settings(optimizer)
    for each in ((model, optimizer), (other, resumed)):
        train(*each, range(2, 5))
    assert_equal(tensors(other, resumed), tensors(model, optimizer))


@DISTRIBUTED
@FLATTEN
@pytest.mark.parametrize("name", BASES)
def test_asking_a_fresh_wrapper_for_its_state_changes_nothing(name: str, flatten: bool) -> None:
    """Torch fills the state with a step of its own, at a learning rate of zero."""
    model, twin = make_model(), make_model()
    optimizer = make_wrapper(name, model)
    bare = BASES[name](groups(twin, knobs=False))
    before, knobs = [p.detach().clone() for p in model.parameters()], settings(optimizer)
    states = get_states(model, optimizer, flatten)
    theirs = get_states(twin, bare, flatten)
    assert_equal(list(model.parameters()), before)
    assert settings(optimizer) == knobs
    assert all(p.grad is None for p in model.parameters())
    extra = {key for key in states["optimizer"] if "gap_" in key}
    assert states["optimizer"].keys() - extra == theirs["optimizer"].keys()
    assert_equal(tensors(model, optimizer), tensors(twin, bare))


def ramp(update: int) -> float:
    return 0.1 * update


COUNTING: dict[str, dict[str, Any]] = {"interval": {"interval": 2}, "schedule": {"eps": ramp}}


@DISTRIBUTED
@FLATTEN
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("options", COUNTING.values(), ids=COUNTING)
def test_the_count_of_updates_is_kept(options: dict[str, Any], trained: bool, flatten: bool) -> None:
    """Torch's own step is no update, and those of the saved run are."""

    def make(seed: int) -> tuple[nn.Module, GAPWrapper]:
        model = make_model(seed=seed)
        return model, GAPWrapper(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), **options)

    def count(pair: tuple[nn.Module, GAPWrapper], steps: int) -> list[bool]:
        model, optimizer = pair
        due = []
        for _ in range(steps):
            due.append(optimizer.due)
            supervised(model, data(0, "cpu")).backward()
            if optimizer.due:
                with optimizer.perturbed(model):
                    supervised(model, data(0, "cpu")).backward()
            optimizer.step()
            optimizer.zero_grad()
        return due

    run, whole, resumed = make(0), make(0), make(1)
    if trained:
        count(run, 3)
        count(whole, 3)
    set_states(*resumed, copy.deepcopy(get_states(*run, flatten)), flatten)
    due = count(whole, 3)
    assert count(run, 3) == due
    assert count(resumed, 3) == due
    for each in (run, resumed):
        assert_equal(list(each[0].parameters()), list(whole[0].parameters()))


@DISTRIBUTED
def test_a_perturbed_wrapper_gives_no_distributed_state_dict() -> None:
    model = make_model()
    optimizer = make_wrapper("SGD momentum", model)
    train(model, optimizer, range(1))
    before = tensors(model, optimizer)
    unsupervised(model, data(1, "cpu")).backward()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match=r"call second_step\(\) first"):
        get_optimizer_state_dict(model, optimizer)
    unsupervised(model, data(1, "cpu")).backward()
    optimizer.second_step()
    assert_equal(tensors(model, optimizer), before)


@DISTRIBUTED
@pytest.mark.filterwarnings("ignore")  # that there is but one process, in several voices
@FLATTEN
@pytest.mark.parametrize("name", BASES)
def test_a_folder_on_disk_carries_everything(name: str, flatten: bool, tmp_path: Path) -> None:
    model = make_model()
    optimizer = make_wrapper(name, model)
    train(model, optimizer, range(2))
    dcp.save(get_states(model, optimizer, flatten), checkpoint_id=tmp_path)
    other = make_model(seed=1)
    resumed = strange_wrapper(name, other)
    states = get_states(other, resumed, flatten)
    dcp.load(states, checkpoint_id=tmp_path)
    set_states(other, resumed, states, flatten)
    assert settings(resumed) == settings(optimizer)
    for each in ((model, optimizer), (other, resumed)):
        train(*each, range(2, 5))
    assert_equal(tensors(other, resumed), tensors(model, optimizer))


# ---------------------------------------------------------------- two ranks

ON_RANKS = ["SGD momentum", "AdamW"]
WAYS = ["nested", "flattened", "full", "folder"]


def _ddp(name: str, wrapper: Callable[[str, nn.Module], GAPWrapper], seed: int) -> tuple[nn.Module, GAPWrapper]:
    model = DistributedDataParallel(make_model(seed=seed))
    return model, wrapper(name, model)


def _worker(rank: int, folder: str) -> dict[tuple[str, str], list[Tensor]]:
    results = {}
    for name in ON_RANKS:
        model, optimizer = _ddp(name, make_wrapper, seed=0)
        train(model, optimizer, range(2), rank, ranks=2)
        states = {way: copy.deepcopy(get_states(model, optimizer, way == "flattened", way == "full")) for way in WAYS}
        dcp.save(states["folder"], checkpoint_id=os.path.join(folder, name))
        train(model, optimizer, range(2, 5), rank, ranks=2)
        results[name, "uninterrupted"] = tensors(model, optimizer)
        for way in WAYS:
            other, resumed = _ddp(name, strange_wrapper, seed=1)
            if way == "folder":
                states[way] = get_states(other, resumed, flatten=False)
                dcp.load(states[way], checkpoint_id=os.path.join(folder, name))
            set_states(other, resumed, states[way], way == "flattened", way == "full")
            train(other, resumed, range(2, 5), rank, ranks=2)
            results[name, way] = tensors(other, resumed)
    return results


Ranks = tuple[list[dict[tuple[str, str], list[Tensor]]], Path]


@pytest.fixture(scope="module")
def ranks(on_two_ranks: Callable[..., list[Any]], tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    folder = tmp_path_factory.mktemp("checkpoints")
    return on_two_ranks(_worker, str(folder)), folder


@DISTRIBUTED
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ON_RANKS)
def test_two_ranks_resume_as_if_they_had_not_stopped(ranks: Ranks, name: str, way: str) -> None:
    for results in ranks[0]:
        assert_equal(results[name, way], results[name, "uninterrupted"])
        assert_equal(results[name, way], ranks[0][0][name, way])


@DISTRIBUTED
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ON_RANKS)
def test_what_two_ranks_saved_goes_on_in_one_process(ranks: Ranks, name: str) -> None:
    results, folder = ranks
    twin = make_model()
    base = BASES[name](groups(twin, knobs=False))
    train_bare(twin, base, range(2))

    model = make_model(seed=1)
    optimizer = strange_wrapper(name, model)
    states = get_states(model, optimizer, flatten=False)
    dcp.load(states, checkpoint_id=folder / name)
    set_states(model, optimizer, states, flatten=False)
    assert settings(optimizer) == settings(make_wrapper(name, make_model()))
    assert_close(tensors(model, optimizer), tensors(twin, base))
    train(model, optimizer, range(2, 5))
    train_bare(twin, base, range(2, 5))
    assert_close(tensors(model, optimizer), tensors(twin, base))
    for result in results:
        assert_close(result[name, "uninterrupted"], tensors(twin, base))


def test_a_distributed_checkpoint_that_lacks_the_knobs(tmp_path: Path) -> None:
    """Of a bare base optimizer: loaded in part, the wrapper keeps its own knobs."""
    model = make_model(seed=0)
    base = torch.optim.AdamW(model.parameters(), 0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    base.step()
    dcp.save({"optimizer": get_optimizer_state_dict(model, base)}, checkpoint_id=tmp_path)

    other = make_model(seed=1)
    optimizer = GAPWrapper(torch.optim.AdamW(other.parameters(), 0.2), eps=0.3, interval=2)
    state = {"optimizer": get_optimizer_state_dict(other, optimizer)}
    dcp.load(state, checkpoint_id=tmp_path, planner=DefaultLoadPlanner(allow_partial_load=True))
    set_optimizer_state_dict(other, optimizer, state["optimizer"])
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["gap_eps"]) == (0.1, 0.3)
    assert optimizer.due
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(base.state[p]["exp_avg"], optimizer.state[q]["exp_avg"])
