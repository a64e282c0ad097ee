"""The trainers in nnU-Net itself: its plans, loaders, networks, loop and checkpoints."""

import functools
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("nnunetv2", reason="pip install 'gap-torch[nnunet]'")

from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.training_length.nnUNetTrainer_Xepochs import nnUNetTrainer_5epochs

import gap_torch
from gap_nnunet import folders
from gap_nnunet.fixmatch import FixMatchTrainer, GapMatchTrainer
from gap_nnunet.gap import WithGAP
from gap_nnunet.mean_teacher import MeanTeacherGAPTrainer, MeanTeacherTrainer
from gap_nnunet.unimatch import UniMatchGAPTrainer, UniMatchTrainer

from .conftest import RAW, Build
from .data import SHAPE, write

ALL = (
    FixMatchTrainer,
    GapMatchTrainer,
    MeanTeacherTrainer,
    MeanTeacherGAPTrainer,
    UniMatchTrainer,
    UniMatchGAPTrainer,
)
SURE = {"tau": 0.5, "warm_up": 0}  # nearly everything confident, from the start
in_one_process = pytest.mark.usefixtures("in_one_process")


@pytest.fixture
def finished() -> Iterator[list[Any]]:
    """Trainers whose loaders are to be shut down."""
    trainers: list[Any] = []
    yield trainers
    for trainer in trainers:
        trainer.on_train_end()


def _batch(trainer: Any, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """One as nnU-Net's loader makes them, of the labelled cases."""
    batch = next(trainer.dataloader_train)
    return {"data": batch["data"].to(dtype), "target": batch["target"]}


@in_one_process
@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_a_run_is_right_and_ends_with_a_checkpoint_that_resumes(
    kind: type, heart: Path, build: Build, capsys: pytest.CaptureFixture
) -> None:
    trainer = build(heart, kind, **SURE)
    trainer.initialize()
    if isinstance(trainer, WithGAP):
        gap_torch.check(trainer.optimizer, trainer.network)
    trainer.run_training()
    out = capsys.readouterr().out
    assert f"{kind.__name__} learns from 3 scans without labels, from epoch 0 on." in out
    assert ("GAP ran as Algorithm 1 in this update" in out) == isinstance(trainer, WithGAP)
    assert "consistency_loss" in out
    checkpoint = torch.load(Path(trainer.output_folder) / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["trainer_name"] == "nnUNetTrainer"
    resumed = build(heart, kind, **SURE)
    resumed.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    torch.testing.assert_close(resumed.network.state_dict(), trainer.network.state_dict(), rtol=0, atol=0)
    assert resumed.current_epoch == 2
    resumed.on_train_start()
    torch.testing.assert_close(resumed.method.state_dict(), trainer.method.state_dict(), rtol=0, atol=0)
    resumed.train_step(_batch(resumed))


@in_one_process
@pytest.mark.parametrize("configuration", ["3d_fullres", "3d_lowres"])
def test_a_run_in_3d(configuration: str, heart: Path, build: Build, capsys: pytest.CaptureFixture) -> None:
    trainer = build(heart, UniMatchGAPTrainer, configuration, **SURE)
    trainer.num_epochs = 1
    trainer.run_training()
    assert "consistency_loss" in capsys.readouterr().out
    assert trainer.optimizer.grad_norm > 0


@in_one_process
def test_a_run_with_regions(regions: Path, build: Build, capsys: pytest.CaptureFixture) -> None:
    for kind in (GapMatchTrainer, MeanTeacherTrainer, UniMatchTrainer):
        trainer = build(regions, kind, **SURE)
        trainer.num_epochs = 1
        trainer.run_training()
        assert "consistency_loss" in capsys.readouterr().out


@in_one_process
@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_in_the_warm_up_it_is_nnunets_own_step(kind: type, heart: Path, build: Build) -> None:
    weights, batches = [], []
    for each in (nnUNetTrainer, kind):
        trainer = build(heart, each, warm_up=1)
        trainer.on_train_start()
        batches = batches or [_batch(trainer) for _ in range(2)]
        for batch in batches:
            trainer.train_step(batch)
        weights.append(trainer.network.state_dict())
    torch.testing.assert_close(*weights, rtol=0, atol=0)


@in_one_process
@pytest.mark.parametrize("folder", ["heart", "regions"])
def test_the_step_is_g1_plus_alpha_g2_plus_g_l(
    folder: str, build: Build, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, with gradients and losses by other means than the trainer's."""
    trainer = build(request.getfixturevalue(folder), GapMatchTrainer, gap_eps=0.05, gap_alpha=0.5, weight=0.7, **SURE)
    trainer.on_train_start()
    network = trainer.network.double()
    batch = _batch(trainer, torch.float64)
    both = next(trainer.dataloader_unlabelled)["data"].double()
    trainer.dataloader_unlabelled = iter([{"data": both}])
    limits = []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, limit: limits.append(limit))
    weak, strong = both.chunk(2, dim=1)
    of_regions = folder == "regions"
    with torch.no_grad():
        logits = network(weak)[0]
        p = logits.sigmoid() if of_regions else logits.softmax(1)
    if of_regions:
        target, mask = (p > 0.5).double(), torch.ones_like(p)  # tau is 0.5
    else:
        target = torch.nn.functional.one_hot(p.argmax(1), p.shape[1]).movedim(-1, 1).double()
        mask = (p.amax(1, keepdim=True) >= 0.5).double().expand_as(p)
    weights = trainer.loss.weight_factors

    def consistency() -> Tensor:
        loss = torch.zeros((), dtype=torch.float64)
        for i, (w, z) in enumerate(zip(weights, network(strong), strict=True)):
            step = 2**i  # nearest-exact takes the pixel behind the middle of each block
            y, m = (t[:, :, step // 2 :: step, step // 2 :: step] for t in (target, mask))
            loss = loss + (w * _by_hand(z, y, m, of_regions) if w else 0)
        return 0.7 * loss

    params = list(network.parameters())

    def gradient(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, params, materialize_grads=True))  # nnU-Net's last head has no weight

    g1 = gradient(consistency())
    norm = torch.cat([g.flatten() for g in g1]).norm()
    with torch.no_grad():
        for param, g in zip(params, g1, strict=True):
            param += 0.05 * g / norm
    g2 = gradient(consistency())
    with torch.no_grad():
        for param, g in zip(params, g1, strict=True):
            param -= 0.05 * g / norm
    g_l = gradient(trainer.loss(network(batch["data"]), batch["target"]))
    trainer.optimizer.base_optimizer.register_step_pre_hook(lambda *_: seen.extend(map(_gradient, params)))
    seen: list[Tensor] = []
    trainer.train_step(batch)
    expected = [a + 0.5 * b + c for a, b, c in zip(g1, g2, g_l, strict=True)]
    torch.testing.assert_close(seen, expected)
    assert limits == [12]


def _gradient(param: Tensor) -> Tensor:
    return torch.zeros_like(param) if param.grad is None else param.grad.clone()


def _by_hand(logits: Tensor, target: Tensor, mask: Tensor, of_regions: bool) -> Tensor:
    """Cross-entropy over all pixels and Dice, in the mask, of targets with a channel each; both summed up."""
    if of_regions:
        p = logits.sigmoid()
        entropy = -(target * p.log() + (1 - target) * (1 - p).log()) * mask
        ce = entropy.mean()
    else:
        p = logits.softmax(1)
        ce = -(target * p.log() * mask).sum(1).mean()
    p, y = p * mask, target * mask
    over = (0, 2, 3)
    return ce + 1 - ((2 * (p * y).sum(over) + 1e-5) / (p.square().sum(over) + y.sum(over) + 1e-5)).mean()


@in_one_process
def test_mean_teacher_follows_the_student_and_compares_with_it_in_every_resolution(heart: Path, build: Build) -> None:
    trainer = build(heart, MeanTeacherTrainer, warm_up=0, decay=0.5, ramp_up=0.0)
    trainer.on_train_start()
    teacher = trainer.method.teacher
    both = next(trainer.dataloader_unlabelled)["data"]
    trainer.dataloader_unlabelled = iter([{"data": both}])
    with torch.no_grad():
        weak, strong = both.chunk(2, dim=1)
        pairs = zip(trainer.network(strong), trainer.network(weak), trainer.loss.weight_factors, strict=True)
        expected = sum(w * (s.softmax(1) - t.softmax(1)).square().mean() for s, t, w in pairs)
    seen = trainer.train_step(_batch(trainer))
    assert seen["consistency"] == pytest.approx(float(expected), rel=1e-5)
    first = [p.detach().clone() for p in trainer.network.parameters()]
    torch.testing.assert_close(list(teacher.model.parameters()), first)  # the first update takes all
    trainer.current_epoch, trainer.warm_up = 0, 1
    trainer.train_step(_batch(trainer))  # in the warm-up it follows, too
    for before, now, average in zip(first, trainer.network.parameters(), teacher.model.parameters(), strict=True):
        torch.testing.assert_close(average, 0.5 * before + 0.5 * now)
    assert not teacher.training


@in_one_process
def test_unimatch_is_half_of_perturbed_features_and_a_quarter_of_each_strong_view(heart: Path, build: Build) -> None:
    trainer = build(heart, UniMatchTrainer, **SURE)
    trainer.on_train_start()
    method, network = trainer.method, trainer.network
    patches = next(trainer.dataloader_unlabelled)["data"]
    assert patches.shape == (2 * trainer.batch_size, 3, 32, 32)
    method.cutmix.p = 1.0
    views = method.prepare(network, gap_torch.consistency.Batch(patches))
    weak, first, second = views.inputs[0].chunk(3)
    torch.testing.assert_close(weak, patches[: len(weak), :1], rtol=0, atol=0)
    for strong, column in ((first, 1), (second, 2)):  # of its own, or, in the box, of the other half's patch
        own, partner = patches[: len(weak), column : column + 1], patches[len(weak) :, column : column + 1]
        assert ((strong == own) | (strong == partner)).all()
        assert not torch.equal(strong, own)

    generator = torch.get_rng_state()
    loss = method.loss(network, views).detach()
    torch.set_rng_state(generator)
    with torch.no_grad():
        features = network.encoder(views.inputs[0])
        dropped = network.decoder([method.features.drop(f[: len(weak)]) for f in features])
        plain = network.decoder(features)
    depths = range(len(plain))
    logits = [[z.chunk(3)[i] for z in plain] for i in (1, 2)] + [dropped]
    expected = 0.0
    for share, z, view in zip((0.25, 0.25, 0.5), logits, (1, 2, 0), strict=True):
        target, mask = views.target.chunk(3)[view], views.mask.chunk(3)[view]
        for d, w in zip(depths, trainer.loss.weight_factors, strict=True):
            step = 2**d
            y, m = (t[:, step // 2 :: step, step // 2 :: step] for t in (target, mask))
            y = torch.nn.functional.one_hot(y, 3).movedim(-1, 1).float()
            expected += share * w * float(_by_hand(z[d], y, m[:, None].float().expand_as(y), False))
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    assert len(network(patches[:, :1])[0]) == len(patches)  # outside of the loss the decoder's hook does nothing


@in_one_process
def test_without_scans_it_is_nnunets_own(
    heart: Path, build: Build, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.delenv("nnUNet_raw")
    monkeypatch.setattr(folders, "cases", lambda folder: [])
    weights, batches = [], []
    for kind in (nnUNetTrainer, GapMatchTrainer):
        trainer = build(heart, kind, warm_up=0)
        trainer.on_train_start()
        batches = batches or [_batch(trainer) for _ in range(2)]
        for batch in batches:
            assert set(trainer.train_step(batch)) == {"loss"}
        weights.append(trainer.network.state_dict())
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    assert "No scans in imagesUn: training goes as nnU-Net's own." in capsys.readouterr().out


@in_one_process
def test_scans_that_are_not_prepared_are_an_error(heart: Path, build: Build) -> None:
    scan = RAW / heart.name / "imagesUn" / "new_0000.nii.gz"
    write(scan, torch.ones(SHAPE).numpy())
    try:
        with pytest.raises(ValueError, match=r"1 scans are not in .*: new\.\.\. Run: gap-nnunet prepare"):
            build(heart, FixMatchTrainer).on_train_start()
    finally:
        scan.unlink()


@in_one_process
def test_scans_that_were_taken_out_are_not_learnt_from(heart: Path, build: Build, tmp_path: Path) -> None:
    scan = RAW / heart.name / "imagesUn" / "scan1_0000.nii.gz"
    shutil.move(scan, tmp_path)
    try:
        with pytest.raises(ValueError, match=r"1 scans in .* are not in imagesUn any more: scan1\.\.\. Run: "):
            build(heart, FixMatchTrainer).on_train_start()
    finally:
        shutil.move(tmp_path / scan.name, scan)


@in_one_process
def test_scans_of_another_plan_or_with_a_label_are_an_error(heart: Path, build: Build) -> None:
    trainer = build(heart, FixMatchTrainer)
    trainer.configuration_manager.configuration["spacing"] = [2.0, 2.0]
    with pytest.raises(ValueError, match="was made by another plan than nnUNetPlans is now"):
        trainer.on_train_start()
    labelled = heart / "nnUNetPlans_2d"
    shutil.copy(labelled / "case0.b2nd", labelled / "scan0.b2nd")
    try:
        with pytest.raises(ValueError, match="scan0 has a label and is in"):
            build(heart, FixMatchTrainer).on_train_start()
    finally:
        (labelled / "scan0.b2nd").unlink()


@in_one_process
def test_the_second_stage_of_a_cascade_is_refused(heart: Path, build: Build) -> None:
    with pytest.raises(ValueError, match="reads the first stage's predictions"):
        build(heart, FixMatchTrainer, "3d_cascade_fullres").unlabelled_cases()


@in_one_process
def test_unimatch_needs_an_encoder_and_a_decoder(heart: Path, build: Build) -> None:
    trainer = build(heart, UniMatchTrainer)
    trainer.network = torch.nn.Conv2d(1, 2, 1)
    with pytest.raises(ValueError, match=r"which Conv2d does not have\. Take FixMatchTrainer"):
        trainer.build_method()


@in_one_process
def test_a_trainer_of_nnunets_may_stand_behind_ours(heart: Path, build: Build) -> None:
    class Mine(GapMatchTrainer, nnUNetTrainer_5epochs):
        tau = 0.9

    trainer = build(heart, Mine)
    assert trainer.__init__.__qualname__.startswith("nnUNetTrainer_5epochs")
    trainer.initialize()
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "mine.pth"))
    checkpoint = torch.load(Path(trainer.output_folder) / "mine.pth", weights_only=False)
    assert checkpoint["trainer_name"] == "nnUNetTrainer_5epochs"


@in_one_process
def test_a_checkpoint_of_another_architecture_names_the_trainer_that_builds_it(heart: Path, build: Build) -> None:
    class WithItsOwnNetwork(FixMatchTrainer):
        build_network_architecture = staticmethod(functools.partial(nnUNetTrainer.build_network_architecture))

    trainer = build(heart, WithItsOwnNetwork)
    trainer.initialize()
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "own.pth"))
    checkpoint = torch.load(Path(trainer.output_folder) / "own.pth", weights_only=False)
    assert checkpoint["trainer_name"] == "WithItsOwnNetwork"


@in_one_process
def test_the_teacher_starts_from_pretrained_weights(heart: Path, build: Build) -> None:
    source = build(heart, nnUNetTrainer)
    source.initialize()
    with torch.no_grad():
        for p in source.network.parameters():
            p.fill_(0.1)
    file = str(Path(source.output_folder) / "pretrained.pth")
    source.save_checkpoint(file)
    trainer = build(heart, MeanTeacherTrainer)
    trainer.initialize()
    load_pretrained_weights(trainer.network, file)
    trainer.on_train_start()
    torch.testing.assert_close(trainer.method.teacher.model.state_dict(), trainer.network.state_dict(), rtol=0, atol=0)
    assert (trainer.network.encoder.stages[0][0].convs[0].conv.weight == 0.1).all()


@in_one_process
@pytest.mark.parametrize("kind", [GapMatchTrainer, MeanTeacherTrainer, UniMatchTrainer], ids=lambda kind: kind.__name__)
def test_compiled_it_takes_the_same_step(
    kind: type, heart: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torch's compiler without its code generator: graphs, guards and hooks are those of any."""
    losses = []
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module: compile_(module, backend="eager"))
    batches: list[Any] = []
    for compiled in (False, True):
        monkeypatch.setattr(kind, "_do_i_compile", lambda self, compiled=compiled: compiled)
        trainer = build(heart, kind, **SURE)
        trainer.on_train_start()
        batches = batches or [(_batch(trainer), next(trainer.dataloader_unlabelled)) for _ in range(2)]
        trainer.dataloader_unlabelled = iter([unlabelled for _, unlabelled in batches])
        torch.manual_seed(1)
        losses.append([list(trainer.train_step(batch).values()) for batch, _ in batches])
        assert hasattr(trainer.network, "_orig_mod") == compiled
    torch._dynamo.reset()
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=1e-5)


def test_batches_come_from_worker_processes(
    heart: Path, build: Build, monkeypatch: pytest.MonkeyPatch, finished: list[Any]
) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    trainer = build(heart, GapMatchTrainer, **SURE)
    finished.append(trainer)
    trainer.on_train_start()
    processes = trainer.dataloader_unlabelled._processes
    assert len(processes) == 2
    assert all(process.is_alive() for process in processes)
    assert next(trainer.dataloader_unlabelled)["data"].shape == (trainer.batch_size, 2, 32, 32)
    trainer.train_step(_batch(trainer))
    trainer.on_train_end()
    assert trainer.dataloader_unlabelled._processes == []


@in_one_process
def test_the_weight_ramps_up(heart: Path, build: Build) -> None:
    trainer = build(heart, MeanTeacherTrainer)
    trainer.num_epochs = 100
    weights = []
    for trainer.current_epoch in (0, 50, 100):
        weights.append(trainer.consistency_weight())
    assert weights == pytest.approx([0.1 * 0.006737947, 0.1 * 0.2865048, 0.1])
    assert build(heart, FixMatchTrainer).consistency_weight() == 1


@in_one_process
@pytest.mark.parametrize("kind", [FixMatchTrainer, GapMatchTrainer], ids=lambda kind: kind.__name__)
def test_with_a_scaler_it_takes_the_same_step_or_none(kind: type, heart: Path, build: Build) -> None:
    """nnU-Net's scaler on the CPU: a power of two changes no digit, and an overflow no weight."""
    weights, batches = [], []
    for scaler in (None, torch.GradScaler("cpu", init_scale=2.0**10), torch.GradScaler("cpu", init_scale=math.inf)):
        trainer = build(heart, kind, **SURE)
        trainer.on_train_start()
        trainer.grad_scaler = scaler
        start = [p.detach().clone() for p in trainer.network.parameters()]
        batches = batches or [_batch(trainer), next(trainer.dataloader_unlabelled)]
        trainer.dataloader_unlabelled = iter(batches[1:])
        trainer.train_step(batches[0])
        weights.append([p.detach() for p in trainer.network.parameters()])
    torch.testing.assert_close(weights[1], weights[0])
    torch.testing.assert_close(weights[2], start)  # but for the rounding of theta + step - step
    assert not torch.equal(weights[0][0], start[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@in_one_process
@pytest.mark.parametrize("kind", [GapMatchTrainer, MeanTeacherGAPTrainer, UniMatchGAPTrainer], ids=lambda k: k.__name__)
def test_on_a_gpu_with_its_scaler(kind: type, heart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_compile", "f")
    plans = json.loads((heart / "nnUNetPlans.json").read_text()) | {"continue_training": False}
    described = json.loads((heart / "dataset.json").read_text())
    knobs = {"__module__": kind.__module__, **SURE}
    trainer = type(kind.__name__, (kind,), knobs)(plans, "2d", 0, described, torch.device("cuda"))
    trainer.on_train_start()
    for _ in range(3):
        assert all(v == v for v in trainer.train_step(_batch(trainer)).values())
    assert trainer.grad_scaler.get_scale() > 0
