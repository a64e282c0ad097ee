"""Two ranks that share a batch, against one process that has all of it.

In float64, where the two differ by rounding alone after many iterations too: training multiplies float32's by ten every
few iterations, as it does with that of another number of threads.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acdc_gapmatch import ACDC
from gap_torch import frozen_running_stats
from gap_torch.consistency import VAT, Batch
from gap_torch.consistency.targets import Mode
from la_gapmatch import LA
from segmentation import cli, ranks
from segmentation.data.crops import Crops
from segmentation.data.files import Volume, read_list, split_by_patients
from segmentation.data.slices import Slices, load_slices, load_volumes
from segmentation.errors import InputError
from segmentation.networks.dropout import Dropout
from segmentation.networks.unet import UNet
from segmentation.recipe import Recipe
from segmentation.scoring.dice import mean_dice
from segmentation.scoring.evaluate import evaluate
from segmentation.training import loop as train
from segmentation.training.identity import identity
from segmentation.training.joint import JointBatchNorm, JointDropout, _Gather, joint, require_even_shares
from segmentation.training.loop import fit
from segmentation.training.step import Trainer, refuse_joint_gap_on_ranks

EXACT = {"atol": 1e-11, "rtol": 1e-11}
CPU = torch.device("cpu")
NORMS: dict[str, Callable[[], nn.Module]] = {
    "as in the UNet": lambda: nn.BatchNorm2d(3),
    "cumulative": lambda: nn.BatchNorm2d(3, momentum=None),
    "no affine": lambda: nn.BatchNorm2d(3, affine=False),
    "no statistics": lambda: nn.BatchNorm2d(3, track_running_stats=False),
    "frozen": lambda: nn.BatchNorm2d(3),
    "evaluation": lambda: nn.BatchNorm2d(3).eval(),
    "float32": lambda: nn.BatchNorm2d(3).float(),
}
MASKED = {
    "channels_last": ((4, 3, 5, 5), torch.channels_last, torch.float64),
    "contiguous": ((4, 3, 5, 5), torch.contiguous_format, torch.float32),
    "bfloat16": ((4, 8, 16, 16), torch.channels_last, torch.bfloat16),
    "one pixel": ((4, 32, 1, 1), torch.channels_last, torch.float32),
    "one sample a rank": ((2, 8, 4, 4), torch.channels_last, torch.float32),
    "vectors": ((4, 7), torch.contiguous_format, torch.float32),
}
RECIPES = {
    "batch": {},
    "eval": {"targets": "eval"},
    "train": {"targets": "train"},
    "fixmatch, cross-entropy": {"gap": False, "unlabelled_loss": "ce_dice"},
    "supervised, not averaged": {"method": "supervised", "gap": False, "average_decay": 0.0},
    "in 3D": {"size": (16, 16, 16)},
    "a gradient in the images": {"method": "vat", "targets": "train"},
    "a teacher": {"method": "ict", "targets": "train", "replay_dropout": True, "aligned": "predictions"},
    "heads": {"method": "urpc"},
    "decoders": {"method": "cct"},
    "decoders without GAP": {"method": "cct", "gap": False},
    # FeatureDrop takes away all of a single voxel, and rounding decides on the signs that batch norm makes of constants
    "decoders in 3D": {"method": "cct", "size": (32, 32, 16)},
    "adaptive thresholds": {"method": "flexmatch"},
    "perturbed heads": {"method": "urpc", "options": {"variant": "medical"}},
    "decoders that learn from labels": {"method": "cct", "options": {"variant": "medical"}},
    "a gradient of Dice in the images": {"method": "vat", "options": {"variant": "medical"}},
    "a mean of noisy passes": {"method": "uamt", "targets": "train", "options": {"bound": 3.0}},
    "two networks": {"method": "cps"},
    "decoders that learn from all images": {"method": "mcnet"},
    "three decoders": {"method": "mcnet", "options": {"variant": "plus"}},
    "turned images": {"method": "dct"},
    "two networks and their adversaries": {"method": "dct_views"},
    "two networks and their adversaries in 3D": {"method": "dct_views", "size": (32, 32, 16)},
    "two passes": {"method": "unimatch", "joint": False},
    "one batch with labelled images": {"method": "unimatch", "gap": False},
    "one batch that begins with them": {"method": "mcnet", "gap": False, "joint": True},
    "mixtures": {"method": "bcp", "gap": False},
    "mixtures in two passes": {"method": "bcp", "joint": False},
    "mixtures in two passes in 3D": {"method": "bcp", "joint": False, "size": (32, 32, 16)},
    # 1,500, its own, multiplies rounding: by a thousand or more in an iteration with GAP
    "signed distances": {"method": "dtc", "options": {"k": 1.5}},
    "signed distances in 3D": {"method": "dtc", "options": {"k": 1.5}, "size": (32, 32, 16)},
    "an adversary": {"method": "dan"},
    "an adversary of distances": {"method": "sassnet"},
    # masks of whole channels behind the decoder
    "two passes in 3D": {"method": "unimatch", "joint": False, "size": (32, 32, 16)},
}
STEPS = 2


@pytest.fixture(scope="module", autouse=True)
def _in_float64():
    with _default_dtype(torch.float64):
        yield


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture(scope="module")
def slices(tiny_data: Path) -> tuple[Slices, Slices]:
    names = split_by_patients(read_list(tiny_data / "train_slices.list"), 1)
    labelled, unlabelled = (load_slices(tiny_data, part, (32, 32)) for part in names)
    return _in_dtype(torch.float64, (labelled, unlabelled))


def _in_dtype(dtype: torch.dtype, slices: tuple[Slices, Slices]) -> tuple[Slices, Slices]:
    labelled, unlabelled = (replace(part, images=part.images.to(dtype)) for part in slices)
    return labelled, unlabelled


@pytest.fixture(scope="module")
def volumes(tiny_data: Path) -> list[Volume]:
    whole = load_volumes(tiny_data, [*read_list(tiny_data / "val.list"), *read_list(tiny_data / "test.list")])
    three = whole[:3]  # which two ranks can't share out evenly
    return [replace(volume, image=volume.image.astype(np.float64)) for volume in three]


@pytest.fixture(scope="module")
def half_done(slices, volumes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that one process began."""
    folder = tmp_path_factory.mktemp("alone")
    _interrupted_at(2, _recipe(), slices, volumes, folder)
    return folder


@pytest.fixture(scope="module")
def both(on_two_ranks, slices, volumes, half_done, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("joint")
    return on_two_ranks(_worker, slices, volumes, half_done, folder)


def _worker(rank: int, slices, volumes: list[Volume], half_done: Path, folder: Path) -> dict[str, Any]:
    torch.set_default_dtype(torch.float64)
    return {
        "norms": {name: _norm(name) for name in NORMS},
        "masked": {name: _masked(name) for name in MASKED},
        "gathered": _gathered_gradient(),
        "outputs": _several_outputs(),
        "adversarial": {mode: _adversarial(mode) for mode in get_args(Mode)},
        "steps": {name: _steps(name, slices) for name in RECIPES},
        "float32": _float32_step(slices),
        "scores": _scores(volumes),
        "errors": _errors(volumes),
        "began": _began(slices, volumes, folder),
        "resumed": _resumed(slices, volumes, half_done),
        "flags": [ranks.any_rank(ranks.rank() == 1), ranks.any_rank(False)],
    }


def _rows(tensor: Tensor) -> Tensor:
    """This rank's."""
    return tensor.chunk(ranks.world())[ranks.rank()]


def _norm(name: str) -> dict[str, Tensor]:
    """Output and gradients of the joint batch, and buffers. The mean is large beside the deviation."""
    torch.manual_seed(0)
    layer = NORMS[name]()
    dtype = torch.float32 if name == "float32" else torch.float64
    batch = (torch.randn(4, 3, 5, 6) + 5).to(dtype).contiguous(memory_format=torch.channels_last)
    loss_weight = torch.randn(4, 3, 5, 6).to(dtype)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, 0.5, 2.0)
    if ranks.world() > 1:
        layer.__class__ = JointBatchNorm
    own = _rows(batch).detach().requires_grad_()
    layer(_rows(2 * batch))  # so that the statistics are not the initial ones
    if name == "frozen":
        with frozen_running_stats(layer):
            output = layer(own)
    else:
        output = layer(own)
    (output * _rows(loss_weight)).sum().backward()
    affine = {f"gradient of {n}": ranks.stacked(p.grad).sum(0) for n, p in layer.named_parameters()}
    rows = {"output": _all_rows(output), "gradient of input": _all_rows(own.grad)}
    return {**rows, **affine, **dict(layer.named_buffers())}


def _masked(name: str) -> dict[str, Tensor]:
    """Two dropouts one after the other, their gradient, and where the generator is then."""
    shape, memory_format, dtype = MASKED[name]
    torch.manual_seed(0)
    batch = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
    dropout: nn.Module = Dropout(0.3) if ranks.world() == 1 else JointDropout(0.3)
    own = _rows(batch).detach().requires_grad_()
    output = dropout(dropout(own))
    output.sum().backward()
    state = torch.get_rng_state()
    return {"output": _all_rows(output), "gradient": _all_rows(own.grad), "state": state}


def _all_rows(own: Tensor) -> Tensor:
    return ranks.stacked(own).flatten(0, 1)


def _gathered_gradient() -> list[Tensor]:
    own = torch.full((1, 2), float(ranks.rank()), requires_grad=True)
    rows = _Gather.apply(own)
    (rows * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
    return [rows.detach(), own.grad]


class _SeveralOutputs(nn.Module):
    """A number, a vector, nothing and a map for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.layer(x)
        return y, y.sum(1), y[:, :0], y[:, :0].unflatten(1, (2, 0)), y.unflatten(1, (2, 2))


def _several_outputs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    network = _SeveralOutputs()
    model = joint(network)  # lives until the gradients are those of all ranks
    outputs = model(torch.randn(4, 3))
    torch.stack([output.square().sum() * (1 + place) for place, output in enumerate(outputs)]).sum().backward()
    gradient = {f"gradient of {name}": p.grad for name, p in network.named_parameters()}
    return {**{str(place): output.detach() for place, output in enumerate(outputs)}, **gradient}


def _adversarial(mode: Mode) -> dict[str, Tensor]:
    """VAT's views, its loss, and the gradient and statistics that it leaves; two rounds, as DDP minds what came before.

    Its step of power iteration is a gradient in the joint batch's images.
    """
    torch.manual_seed(0)
    network = UNet(width=2, dropout=(0.3,) * 5)
    model, method = joint(network), VAT(lambda images: images.flip(-1), radius=0.5, iterations=2, mode=mode)
    for _ in range(2):
        network.zero_grad()
        views = method.prepare(model, Batch(torch.randn(4, 1, 32, 32)))
        assert all(p.grad is None for p in network.parameters())
        loss = method.loss(model, views)
        loss.backward()
    assert views.target is not None
    made = {"inputs": views.inputs, "target": views.target, "loss": loss.detach()}
    gradient = {f"gradient of {name}": p.grad for name, p in network.named_parameters() if p.grad is not None}
    return {**made, **gradient, **dict(network.named_buffers())}


def _recipe(**changes: Any) -> Recipe:
    """Dropout, moving average and joint batch norm, pixels that are confident and pixels that are not."""
    return Recipe(
        **{
            "size": (32, 32),
            "width": 2,
            "labelled_batch": 4,
            "unlabelled_batch": 4,
            "iterations": 4,
            "validate_every": 2,
            "log_every": 1,
            "tau": 0.3,
            "unlabelled_loss": "dice",
            "average_decay": 0.5,
            "statistics_samples": 4,
            **changes,
        }
    )


def _steps(name: str, slices: tuple[Slices, Slices], steps: int = STEPS) -> dict[str, Tensor]:
    """Everything that training changes, and what it logs, after a few iterations."""
    recipe = _recipe(**RECIPES[name])
    task, pools = (LA, _crops(recipe.size)) if name.endswith("in 3D") else (ACDC, slices)
    trainer = Trainer(task, recipe, *pools, CPU, None)
    logged = [trainer.step(iteration) for iteration in range(steps)]
    of_method = {} if trainer.method is None else trainer.method.state_dict()
    return {
        **trainer.model.state_dict(),
        **{f"method {n}": v for n, v in of_method.items()},
        **{f"average {n}": v for n, v in trainer.average.module.state_dict().items()},
        **{f"scored {n}": v for n, v in trainer.scored_model().state_dict().items()},
        **{f"{n} of {t}": v for t, values in enumerate(logged) for n, v in values.items()},
    }


def _crops(size: tuple[int, ...]) -> tuple[Crops, Crops]:
    """Noise: two labelled volumes and three without, whose dropout masks are of whole channels."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(34, 33, 17, generator=generator, dtype=torch.float64) for _ in range(5)]
    labels = [(image > 0.5).byte() for image in images]
    parts = [slice(2), slice(2, 5)]
    labelled, unlabelled = (Crops(["case"] * len(images[p]), images[p], labels[p], size) for p in parts)
    return labelled, unlabelled


def _float32_step(slices: tuple[Slices, Slices]) -> dict[str, Tensor]:
    with _default_dtype(torch.float32):
        return _steps("batch", _in_dtype(torch.float32, slices), steps=1)


def _scores(volumes: list[Volume]) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Conv2d(1, 4, 1)
    each = partial(ACDC.segment_each, model, recipe=_recipe(), stride=None, device=CPU)
    return {**evaluate(_segment(model), volumes, num_classes=4).to_dict(), "mean": mean_dice(each, volumes, 4)}


def _segment(model: nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    return partial(ACDC.segment, model, recipe=_recipe(), stride=None, device=CPU)


def _errors(volumes: list[Volume]) -> list[str]:
    """A volume that one rank meets, a folder that rank 0 can't write, and a batch that two can't share."""
    spoilt, segment = replace(volumes[1], image=volumes[1].image[0]), _segment(nn.Conv2d(1, 4, 1))
    texts = []
    for work in (
        lambda: evaluate(segment, [volumes[0], spoilt], num_classes=4),
        lambda: cli.job(ACDC, cli.parse(ACDC, "", ["--device", "cpu", "--out", __file__])),
        lambda: require_even_shares(_recipe(unlabelled_batch=5)),
    ):
        with pytest.raises(InputError) as caught:
            work()
        texts.append(str(caught.value))
    return texts


def _interrupted_at(iteration: int, recipe: Recipe, slices, validation: list[Volume], folder: Path) -> Trainer:
    """A run whose last rank alone gets Ctrl-C while it trains iteration `iteration`."""
    trainer = Trainer(ACDC, recipe, *slices, CPU, None)
    step = trainer.step

    def press_ctrl_c(t: int) -> dict[str, Tensor]:
        if t == iteration and ranks.rank() == ranks.world() - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(t)

    trainer.step = press_ctrl_c  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        fit(trainer, validation, folder, identity("ACDC", recipe, [], None, {}))
    return trainer


def _began(slices, volumes: list[Volume], folder: Path) -> dict[str, Any]:
    _interrupted_at(2, _recipe(), slices, volumes, folder)
    return {"folder": str(folder), "files": sorted(path.name for path in folder.iterdir())}


def _resumed(slices, validation: list[Volume], folder: Path) -> dict[str, Tensor]:
    """The rest of the run in `folder`: all its weights, and what validation made of them."""
    recipe = _recipe()
    run = identity("ACDC", recipe, [], None, {})
    trainer = Trainer(ACDC, recipe, *slices, CPU, None)
    progress = train.resume(trainer, folder, run)
    assert progress is not None
    assert progress.iteration == 3
    result = fit(trainer, validation, folder, run, progress)
    dice = torch.tensor(result.progress.best_dice)
    return {**trainer.model.state_dict(), **trainer.average.module.state_dict(prefix="average."), "dice": dice}


def _assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], **tolerance: float) -> None:
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("name", NORMS)
def test_batch_norm_is_that_of_the_joint_batch(both, name: str) -> None:
    expected = _norm(name)
    for one in both:
        _assert_close(one["norms"][name], expected, **({"atol": 2e-5, "rtol": 1e-5} if name == "float32" else EXACT))


def test_joint_batch_norm_has_the_keys_of_batch_norm() -> None:
    assert list(JointBatchNorm(3).state_dict()) == list(nn.BatchNorm2d(3).state_dict())


@pytest.mark.parametrize("mode", get_args(Mode))
def test_an_adversarial_perturbation_is_that_of_the_joint_batch(both, mode: Mode) -> None:
    expected = _adversarial(mode)
    for one in both:
        _assert_close(one["adversarial"][mode], expected, **EXACT)


@pytest.mark.parametrize("name", MASKED)
def test_dropout_is_that_of_the_joint_batch_bit_for_bit(both, name: str) -> None:
    expected = _masked(name)
    for one in both:
        assert all(torch.equal(one["masked"][name][key], value) for key, value in expected.items())


def test_dropout_draws_nothing_where_pytorchs_does_not() -> None:
    x = torch.randn(2, 3)
    for layer in (JointDropout(0.0), JointDropout(0.5).eval()):
        state = torch.get_rng_state()
        assert torch.equal(layer(x), F.dropout(x, layer.p, layer.training))
        assert torch.equal(state, torch.get_rng_state())


def test_gathered_rows_and_their_gradient(both) -> None:
    for rank, expected in enumerate([[[1.0, 2.0]], [[3.0, 4.0]]]):
        rows, gradient = both[rank]["gathered"]
        assert rows.tolist() == [[0, 0], [1, 1]]
        assert gradient.tolist() == (2 * torch.tensor(expected)).tolist()  # DDP takes the mean over two


def test_outputs_of_any_shape_are_those_of_the_joint_batch(both) -> None:
    expected = _several_outputs()
    for one in both:
        _assert_close(one["outputs"], expected, **EXACT)


@pytest.mark.parametrize("name", RECIPES)
def test_training_is_that_of_one_process(both, name: str, slices) -> None:
    expected = _steps(name, slices)
    for one in both:
        _assert_close(one["steps"][name], expected, **EXACT)
    if name == "batch":
        assert 0 < expected["confident of 0"] < 1
        assert expected["grad_norm of 0"] > 0


def test_training_in_float32_is_that_of_one_process_up_to_rounding(both, slices) -> None:
    expected = _float32_step(slices)
    for one in both:
        _assert_close(one["float32"], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", RECIPES)
def test_the_ranks_stay_equal_bit_for_bit(both, name: str) -> None:
    first, second = (one["steps"][name] for one in both)
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_shared_out_scores_are_those_of_one_process(both, volumes) -> None:
    expected = _scores(volumes)
    assert list(expected["volumes"]) == [volume.name for volume in volumes]
    assert all(one["scores"] == expected for one in both)


def test_an_error_of_one_rank_is_that_of_all(both, volumes) -> None:
    for one in both:
        spoilt, main, uneven = one["errors"]
        assert volumes[1].name in spoilt
        assert "test_joint.py/phantom: can't be written" in main
        assert "unlabelled_batch: 5 samples" in uneven
        assert "2 processes" in uneven


def test_a_flag_of_one_rank_counts_for_all(both) -> None:
    assert all(one["flags"] == [True, False] for one in both)


def test_ctrl_c_on_one_rank_stops_all_and_one_process_goes_on(both, slices, volumes, tmp_path: Path) -> None:
    began = both[0]["began"]
    assert {"last.pt", "best.pt", "train.csv", "validation.csv"} <= set(began["files"])
    folder = Path(began["folder"])
    assert len((folder / "train.csv").read_text().splitlines()) == 4  # a header and one row an iteration
    _assert_close(_resumed(slices, volumes, folder), _whole(slices, volumes, tmp_path), **EXACT)


def test_two_ranks_go_on_with_the_run_of_one_process(both, slices, volumes, tmp_path: Path) -> None:
    expected = _whole(slices, volumes, tmp_path)
    for one in both:
        _assert_close(one["resumed"], expected, **EXACT)


def _whole(slices, validation: list[Volume], folder: Path) -> dict[str, Tensor]:
    """One process, interrupted or not."""
    _interrupted_at(2, _recipe(), slices, validation, folder)
    return _resumed(slices, validation, folder)


def test_alone_there_is_no_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for world in (None, "1"):
        if world:
            monkeypatch.setenv("RANK", "0")
            monkeypatch.setenv("WORLD_SIZE", world)
        with ranks.joined():
            assert not torch.distributed.is_initialized()
            assert (ranks.rank(), ranks.world(), ranks.is_main()) == (0, 1, True)
            assert ranks.gathered("mine") == ["mine"]
            assert ranks.shared_out(np.sqrt, [4.0, 9.0]) == [2.0, 3.0]


def test_a_joint_pass_with_gap_is_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(method="unimatch")
    refuse_joint_gap_on_ranks(recipe)
    monkeypatch.setattr(ranks, "world", lambda: 2)
    with pytest.raises(InputError, match=r"unimatch\+gap: a joint pass .* add --no-joint"):
        refuse_joint_gap_on_ranks(recipe)
    for changes in ({"gap": False}, {"joint": False}):
        refuse_joint_gap_on_ranks(replace(recipe, **changes))
