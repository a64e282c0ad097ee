"""The teacher: a moving average by hand, its checkpoint, that it is never trained, and what methods do with it."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gap_torch import GAPWrapper
from gap_torch.consistency import ICT, Batch, CutMixSeg, MeanTeacher, Method, Teacher
from gap_torch.consistency.targets import Mode, probabilities


def _scalar(value: float) -> nn.Linear:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def _network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 3, 1))


def _values(module: nn.Module) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in [*module.parameters(), *module.buffers()]]


def test_the_average_by_hand() -> None:
    """decay 0.6: a = 0, 1/2, 0.6 (which 2/3 exceeds), 0.6, so 8, 6, 0.6 * 6 + 0.4 * 2, 0.6 * 4.4 + 0.4 * 10."""
    teacher = Teacher(_scalar(100.0), decay=0.6)
    seen = []
    for value in (8.0, 4.0, 2.0, 10.0):
        teacher.update(_scalar(value))
        seen.append(teacher.model.weight.item())
    assert seen == pytest.approx([8, 6, 4.4, 6.64])


def test_the_initial_weights_are_gone_after_one_update() -> None:
    teacher, model = Teacher(_network(), decay=0.999), _network()
    teacher.update(model)
    for ours, theirs in zip(teacher.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_while_warming_up_it_is_the_mean_of_all_models_so_far() -> None:
    values = torch.randn(20, dtype=torch.float64).tolist()
    teacher = Teacher(_scalar(0.0).double(), decay=0.999)
    for value in values:
        teacher.update(_scalar(value).double())
    assert teacher.model.weight.item() == pytest.approx(sum(values) / 20)


def test_without_decay_it_is_the_model() -> None:
    teacher = Teacher(_scalar(1.0), decay=0.0)
    for value in (3.0, 5.0):
        teacher.update(_scalar(value))
        assert teacher.model.weight.item() == value


@pytest.mark.parametrize(("update", "kept"), [(0, 0), (1, 1 / 2), (2, 2 / 3), (9, 0.9), (98, 0.98990), (99, 0.99)])
def test_how_much_of_it_stays_in_each_update(update: int, kept: float) -> None:
    teacher = Teacher(_scalar(1.0), decay=0.99)
    for _ in range(update):
        teacher.update(_scalar(1.0))
    teacher.update(_scalar(0.0))
    assert teacher.model.weight.item() == pytest.approx(kept, abs=1e-5)


def test_without_a_warm_up_the_first_weights_stay_as_long_as_any() -> None:
    teacher = Teacher(_scalar(1.0), decay=0.9, warm_up=False)
    seen = []
    for _ in range(3):
        teacher.update(_scalar(0.0))
        seen.append(teacher.model.weight.item())
    assert seen == pytest.approx([0.9, 0.81, 0.729])
    restored = Teacher(_scalar(0.0), decay=0.9, warm_up=False)
    restored.load_state_dict(teacher.state_dict())
    restored.update(_scalar(0.0))
    assert restored.model.weight.item() == pytest.approx(0.6561)


def test_buffers_are_copies_of_the_latest() -> None:
    model = _network().train()
    teacher = Teacher(model)
    for _ in range(3):
        model(torch.randn(4, 1, 5, 5))
        teacher.update(model)
    for ours, theirs in zip(teacher.model.buffers(), model.buffers(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr()


def test_it_is_a_copy_of_its_own() -> None:
    model = _network()
    teacher, before = Teacher(model), _values(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert all(map(torch.equal, _values(teacher.model), before))


def test_the_model_is_left_alone() -> None:
    model = _network()
    teacher, before = Teacher(model), _values(model)
    teacher.update(model)
    assert all(map(torch.equal, _values(model), before))
    assert all(p.requires_grad for p in model.parameters())


def test_no_gradient_reaches_it() -> None:
    model = _network().eval()
    teacher, images = Teacher(model), torch.randn(2, 1, 5, 5, requires_grad=True)
    (teacher(images) - model(images)).square().sum().backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.grad is not None for p in model.parameters())


def test_a_checkpoint_brings_everything_back(tmp_path: Path) -> None:
    """The number of updates as well: while it is warming up, the next update depends on it."""
    models = [_network() for _ in range(5)]
    teacher, restored = Teacher(models[0], decay=0.9), Teacher(models[4], decay=0.9)
    for model in models[1:3]:
        teacher.update(model)
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    restored.load_state_dict(torch.load(tmp_path / "teacher.pt", weights_only=True))
    assert restored.updates == 2
    for each in (teacher, restored):
        each.update(models[3])
    assert all(map(torch.equal, _values(teacher), _values(restored)))


def test_a_copy_counts_for_itself() -> None:
    teacher = Teacher(_scalar(0.0))
    teacher.update(_scalar(1.0))
    twin = copy.deepcopy(teacher)
    twin.update(_scalar(3.0))
    assert (teacher.updates, teacher.model.weight.item()) == (1, 1.0)
    assert (twin.updates, twin.model.weight.item()) == (2, 2.0)


def test_a_model_in_the_midst_of_a_perturbation_can_be_copied() -> None:
    """The hooks that `GAPWrapper` has on its parameters then stay with the model."""
    model, images = _network().eval(), torch.randn(2, 1, 5, 5)
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1))
    model(images).square().sum().backward()
    with optimizer.perturbed(model):
        teacher = Teacher(model)
        assert all(p.grad is None and not p._backward_hooks for p in teacher.parameters())
        model(images).square().sum().backward()
    optimizer.step()
    teacher.update(model)
    assert all(map(torch.equal, _values(teacher.model), _values(model)))


@pytest.mark.parametrize("mode", ["eval", "batch", "train"])
def test_it_has_its_mode_again_after_predicting(mode: Mode) -> None:
    teacher = Teacher(_network().train())
    probabilities(teacher, torch.randn(4, 1, 5, 5), mode)
    assert all(module.training for module in teacher.modules())


def test_another_architecture_is_refused() -> None:
    teacher = Teacher(nn.Linear(3, 1))
    for other in (nn.Linear(3, 1, bias=False), nn.Linear(1, 1), nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1))):
        with pytest.raises(ValueError, match="model"):
            teacher.update(other)


WITH_TEACHER: dict[str, Callable[[Teacher], Method]] = {
    "cutmix": lambda teacher: CutMixSeg(torch.clone, teacher=teacher),
    "ict": lambda teacher: ICT(teacher, torch.clone),
    "mean teacher": lambda teacher: MeanTeacher(teacher, torch.clone),
}


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_a_method_lets_it_follow_and_has_it_in_its_checkpoint(name: str) -> None:
    teacher, restored, model = Teacher(_network()), Teacher(_network()), _network()
    method = WITH_TEACHER[name](teacher)
    method.update(model, Batch(torch.zeros(1)))  # the first update takes the model over
    assert all(map(torch.equal, _values(teacher.model), _values(model)))
    WITH_TEACHER[name](restored).load_state_dict(method.state_dict())
    assert restored.updates == 1
    assert all(map(torch.equal, _values(restored.model), _values(model)))


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_bad_arguments_are_named(decay: float) -> None:
    with pytest.raises(ValueError, match="decay"):
        Teacher(nn.Linear(1, 1), decay)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_average_in_16_bits_is_refused(dtype: torch.dtype) -> None:
    model = _network()
    model[3].to(dtype)
    with pytest.raises(ValueError, match=rf"model must have parameters of float32 .* 3\.weight is {dtype}"):
        Teacher(model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_an_update_does_not_wait_for_the_gpu() -> None:
    model = _network().cuda()
    teacher = Teacher(model)
    torch.cuda.set_sync_debug_mode("error")
    try:
        teacher.update(model)
    finally:
        torch.cuda.set_sync_debug_mode("default")
