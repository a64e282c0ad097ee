"""UA-MT: its threshold and loss by hand, which passes of the teacher make the mask, and where it is empty."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gap_torch.consistency import UAMT, Batch, Teacher, Views


def _identity(images: Tensor) -> Tensor:
    return images


class Fixed(nn.Module):
    """Predicts `p` everywhere, whatever it sees; notes how many images it saw at a time."""

    def __init__(self, p: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(p).log())
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images)
        logits = self.logits.view(1, -1, *[1] * (images.ndim - 2))
        return logits.expand(len(images), -1, *images.shape[2:])


def _method(p: list[float], **options: Any) -> UAMT:
    return UAMT(Teacher(Fixed(p)), _identity, **options)


@pytest.mark.parametrize("as_given", [float, torch.tensor])
@pytest.mark.parametrize(("progress", "expected"), [(0.0, 0.52103), (0.5, 0.56951), (1.0, 0.69315)])
def test_the_threshold(progress: float, expected: float, as_given: Any) -> None:
    assert float(_method([0.5, 0.5]).threshold(as_given(progress))) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("p", "progress", "counts"),
    [
        ([0.78, 0.22], 0.0, False),
        ([0.79, 0.21], 0.0, True),
        ([0.5, 0.5], 0.99999, True),  # of two classes all count in the end
        ([0.872, *[0.128 / 3] * 3], 0.0, False),  # of four they don't
        ([0.874, *[0.126 / 3] * 3], 0.0, True),
        ([0.81, *[0.19 / 3] * 3], 0.99999, False),
        ([0.812, *[0.188 / 3] * 3], 0.99999, True),
    ],
)
def test_who_is_sure(p: list[float], progress: float, counts: bool) -> None:
    method = _method(p)
    views = method.prepare(method.teacher, Batch(torch.rand(2, 1, 3, 3), progress=progress))
    assert views.mask.tolist() == torch.full((2, 3, 3), counts).tolist()


def test_the_loss_by_hand() -> None:
    """One pixel: ((0.7 - 0.9)^2 + (0.3 - 0.1)^2) / 2."""
    student, teacher = torch.tensor([0.7, 0.3]), torch.tensor([0.9, 0.1])
    views = Views((), teacher.view(1, 2, 1, 1), torch.ones(1, 1, 1, dtype=torch.bool))
    assert _method([0.5, 0.5]).compare((student.log().view(1, 2, 1, 1),), views).item() == pytest.approx(0.04)


@pytest.mark.parametrize("classes", [2, 4])
def test_the_loss_in_plain_python(classes: int) -> None:
    """2 is the divisor of four classes too."""
    logits, teachers = torch.randn(2, 2, classes, 4, 4, dtype=torch.float64)
    target, mask = teachers.softmax(1), torch.rand(2, 4, 4) < 0.6
    total = count = 0.0
    for b in range(2):
        for x in range(4):
            for y in range(4):
                if mask[b, x, y]:
                    powers = [math.exp(value) for value in logits[b, :, x, y].tolist()]
                    pairs = zip(powers, target[b, :, x, y].tolist(), strict=True)
                    total += sum((power / sum(powers) - q) ** 2 for power, q in pairs)
                    count += 1
    loss = _method([0.5, 0.5]).compare((logits,), Views((), target, mask))
    assert loss.item() == pytest.approx(total / (2 * count))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_where_none_is_sure_the_loss_is_nothing_and_so_is_its_gradient(dtype: torch.dtype) -> None:
    logits = torch.randn(1, 2, 3, 3).to(dtype).requires_grad_()
    mask = torch.zeros(1, 3, 3, dtype=torch.bool)
    loss = _method([0.5, 0.5]).compare((logits,), Views((), torch.rand(1, 2, 3, 3), mask))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.tolist() == torch.zeros(1, 2, 3, 3).tolist()


def test_the_student_sees_the_clean_view_and_the_teacher_noise_two_and_two() -> None:
    method, images = _method([0.6, 0.4], noise=0.1, pairs=3), torch.rand(2, 1, 64, 64)
    method.weak = lambda x: x.flip(-1)
    views = method.prepare(method.teacher, Batch(images))
    assert torch.equal(views.inputs[0], images.flip(-1))
    first, *others = method.teacher.model.seen
    assert [len(first), *map(len, others)] == [2, 4, 4, 4]
    noise = [seen - images.flip(-1) for batch in (first, *others) for seen in batch.split(2)]
    assert len(noise) == 7
    assert all(0.08 < n.std() < 0.1 and n.abs().max() <= 0.2 + 1e-6 for n in noise)
    assert all((noise[i] - noise[j]).std() > 0.1 for i in range(7) for j in range(i))  # drawn anew


class Turns(nn.Module):
    """Says another thing each time, and of the second half of its images the opposite."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.calls = nn.Parameter(torch.zeros(())), 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        p = torch.full((len(images), 1, *images.shape[2:]), 0.5 + 0.1 * self.calls) + self.bias
        if self.calls > 1:
            p[len(p) // 2 :] = 1 - p[len(p) // 2 :]
        return torch.cat([p, 1 - p], dim=1).log()


def test_the_mean_is_over_all_passes_but_the_target_is_of_one() -> None:
    """Halves of 0.7 and 0.3, 0.8 and 0.2 are 0.5 in the mean, though each pass was sure."""
    method = UAMT(Teacher(Turns()), _identity, pairs=2)
    views = method.prepare(method.teacher, Batch(torch.rand(2, 1, 3, 3), progress=0.9))
    assert views.target[0, :, 0, 0].tolist() == pytest.approx([0.6, 0.4])
    assert not views.mask.any()
    sure = UAMT(Teacher(Turns()), _identity, pairs=2, bound=0.72)
    assert sure.prepare(sure.teacher, Batch(torch.rand(2, 1, 3, 3), progress=0.9)).mask.all()


def test_without_dropout_and_noise_the_mean_is_the_prediction() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1)).double()
    nn.init.normal_(model[-1].weight, std=3)
    method, images = UAMT(Teacher(model), _identity, noise=0.0), torch.randn(3, 1, 6, 6, dtype=torch.float64)
    views = method.prepare(model, Batch(images))
    p = model(images).softmax(1).detach()
    torch.testing.assert_close(views.target, p)
    entropy = -(p * (p + 1e-6).log()).sum(1)
    assert torch.equal(views.mask, entropy < method.threshold(0.0))
    assert 0 < views.mask.float().mean() < 1


def test_dropout_makes_passes_differ_in_training_mode_alone() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Dropout(0.5))
    for mode, differ in (("train", True), ("batch", False), ("eval", False)):
        method, images = UAMT(Teacher(model), _identity, noise=0.0, mode=mode), torch.randn(2, 1, 6, 6)
        targets = [method.prepare(model, Batch(images)).target for _ in range(2)]
        assert torch.equal(*targets) != differ


@pytest.mark.parametrize(
    "bad", [{"noise": -0.1}, {"noise": math.nan}, {"pairs": 0}, {"pairs": 1.5}, {"bound": 0.0}, {"mode": "test"}]
)
def test_bad_arguments_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        _method([0.5, 0.5], **bad)
