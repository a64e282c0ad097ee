"""What holds for every consistency method: who gets a gradient, what stays fixed, what a batch's order may change.

Each method of the examples' table is here. What is its own (values by hand, where its loss is least) is in a file of
its own.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from gap_torch.consistency import BCP, DCT, VAT, Batch, CutMixSeg, FixMatch, Method, Teacher, Views
from gap_torch.losses import ce_dice_loss
from segmentation.methods import TABLE, Setting
from segmentation.networks.attachments import SignedDistances


def _weak(images: Tensor) -> Tensor:
    return images.flip(-1)


def _strong(images: Tensor) -> Tensor:
    return 0.8 * images + 0.1


def _of_table(name: str, **options: str | float) -> Callable[[nn.Module, int], Method]:
    """Builds the method of the examples' table called `name` from a model and its number of classes."""

    def build(model: nn.Module, classes: int) -> Method:
        dims = next(model.parameters()).ndim - 2
        return TABLE[name].build(Setting(model, _weak, _strong, 1, dims, classes, 0.6, ce_dice_loss, "eval"), **options)

    return build


class HalfTurn(DCT):
    """Always turns: where it does not, the two predictions are one, and there is no loss."""

    def draw(self, device: torch.device) -> Tensor:
        return torch.full((), 2, device=device)


METHODS: dict[str, Callable[[nn.Module, int], Method]] = {
    **{name: _of_table(name) for name, entry in TABLE.items() if entry.build is not None},
    "uamt": _of_table("uamt", bound=2.0),  # or five classes would be nowhere certain
    "dct": lambda model, classes: HalfTurn(_weak),
    "cutmix, no teacher": lambda model, classes: CutMixSeg(_weak, tau=0.6),
    "fixmatch, no cutmix": lambda model, classes: FixMatch(_weak, _strong, tau=0.6),
    "bcp, not cleaned": lambda model, classes: BCP(Teacher(model), _weak, lambda labels: labels),
    "vat, confident": lambda model, classes: VAT(_weak, tau=0.6),
    "cutmix, probabilities": _of_table("cutmix", target="probabilities"),
    **{f"{name}, medical": _of_table(name, variant="medical") for name in ("vat", "urpc", "cct")},
}
AUXILIARY = {  # learn from further logits
    name for name in METHODS if (entry := TABLE.get(name.removesuffix(", medical"))) and entry.attachment is not None
}
DISTANCES = {name for name in AUXILIARY if TABLE[name.removesuffix(", medical")].attachment is SignedDistances}
ADVERSARIAL = {"dan", "sassnet"}  # whose discriminator halves the images four times
BY_HALVES = {"bcp", "bcp, not cleaned"}
ON_THE_HOST = {"bcp": "connected components are found on the host"}
SPATIAL = [(6, 8), (4, 6, 8)]
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")

pytestmark = [
    pytest.mark.parametrize("name", METHODS),
    pytest.mark.parametrize("spatial", SPATIAL, ids=["2D", "3D"]),
    pytest.mark.parametrize("classes", [2, 5]),
]


class Tiny(nn.Module):
    """Convolution, batch norm and a head; three heads in training mode for methods with auxiliary logits.

    For those that want signed distances the second makes them, of all classes but the first.
    """

    def __init__(self, dims: int, classes: int) -> None:
        super().__init__()
        convolution = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
        norm = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
        self.body = nn.Sequential(convolution(1, 6, 3, padding=1), norm(6), nn.ReLU())
        self.heads = nn.ModuleList(convolution(6, classes, 1) for _ in range(3))
        for head in self.heads:
            nn.init.normal_(head.weight)  # predictions of every confidence
        self.auxiliary = self.distances = False

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        features = self.body(images)
        if self.training and self.distances:
            return self.heads[0](features), self.heads[1](features)[:, 1:].tanh()
        if self.training and self.auxiliary:
            return tuple(head(features) for head in self.heads)
        return self.heads[0](features)


def _problem(name: str, spatial: tuple[int, ...], classes: int) -> tuple[nn.Module, Method, Tensor]:
    """A model, the method called `name`, and unlabelled images for four views, in float64."""
    model = Tiny(len(spatial), classes).double()
    method = METHODS[name](model, classes)
    model.auxiliary, model.distances = name in AUXILIARY, name in DISTANCES
    spatial = tuple(max(side, 16) for side in spatial) if name in ADVERSARIAL else spatial
    draws = 2 if name in BY_HALVES else TABLE[name].draws if name in TABLE else 1
    return model, method, torch.randn(4 * draws, 1, *spatial, dtype=torch.float64)


def _batch(images: Tensor) -> Batch:
    """As many labelled ones as unlabelled ones."""
    labels = (images[:, 0] > 0).long()
    return Batch(images, images.detach().flip(0), labels.flip(0), progress=0.5)


def _tensors(views: Views) -> list[Tensor]:
    return [t for t in tree_leaves(vars(views)) if isinstance(t, Tensor)]


def _learning(name: str, model: nn.Module) -> tuple[Tensor, Tensor]:
    """A weight of the body and one of a head that the loss trains: not CCT's main one, which learns from labels."""
    return model.body[0].weight, model.heads[1 if name in AUXILIARY else 0].weight


def _without_gradient(module: nn.Module) -> bool:
    return all(p.grad is None for p in module.parameters())


def test_prepare_leaves_no_gradient(name: str, spatial: tuple[int, ...], classes: int) -> None:
    model, method, images = _problem(name, spatial, classes)
    views = method.prepare(model, _batch(images))
    assert _without_gradient(model)
    assert not any(t.requires_grad for t in _tensors(views))
    assert all(p.requires_grad for p in model.parameters())


def test_prepare_leaves_the_model_in_its_mode(name: str, spatial: tuple[int, ...], classes: int) -> None:
    model, method, images = _problem(name, spatial, classes)
    model.body[1].eval()
    before = [m.training for m in model.modules()]
    method.prepare(model, _batch(images))
    assert [m.training for m in model.modules()] == before


def test_the_loss_reaches_the_model_and_nothing_else(name: str, spatial: tuple[int, ...], classes: int) -> None:
    model, method, images = _problem(name, spatial, classes)
    images.requires_grad_()
    loss = method.loss(model, method.prepare(model, _batch(images)))
    loss.backward()
    assert loss.shape == ()
    assert torch.isfinite(loss)
    assert all(p.grad.isfinite().all() and p.grad.any() for p in _learning(name, model))
    assert images.grad is None
    assert _without_gradient(method)
    assert not any(p.requires_grad for p in method.parameters())


def test_the_views_stay_fixed(name: str, spatial: tuple[int, ...], classes: int) -> None:
    model, method, images = _problem(name, spatial, classes)
    views = method.prepare(model, _batch(images))
    before, first = [t.clone() for t in _tensors(views)], method.loss(model, views)
    first.backward()
    torch.testing.assert_close(method.loss(model, views), first, rtol=0, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(_tensors(views), before, strict=True))


def test_the_loss_moves_with_the_model(name: str, spatial: tuple[int, ...], classes: int) -> None:
    model, method, images = _problem(name, spatial, classes)
    views = method.prepare(model, _batch(images))
    before = method.loss(model, views).item()
    with torch.no_grad():
        _learning(name, model)[1].mul_(-3)
    assert method.loss(model, views).item() != pytest.approx(before)


def test_the_order_of_the_batch_does_not_matter(name: str, spatial: tuple[int, ...], classes: int) -> None:
    model, method, images = _problem(name, spatial, classes)
    views, order = method.prepare(model, _batch(images)), torch.tensor([2, 0, 3, 1])

    def in_order(leaf: object) -> object:
        """Of each four samples: a second strong view has another four."""
        return torch.cat([four[order] for four in leaf.split(4)]) if isinstance(leaf, Tensor) and leaf.ndim else leaf

    shuffled = replace(views, **tree_map(in_order, vars(views)))
    torch.testing.assert_close(method.loss(model, shuffled), method.loss(model, views))


def test_the_state_comes_back(name: str, spatial: tuple[int, ...], classes: int) -> None:
    model, method, images = _problem(name, spatial, classes)
    for _ in range(3):
        method.loss(model, method.prepare(model, _batch(images))).backward()
        with torch.no_grad():
            weight = _learning(name, model)[1]
            weight.sub_(0.1 * weight.grad)
        method.update(model, _batch(images))
    restored = METHODS[name](Tiny(len(spatial), classes).double(), classes)
    restored.load_state_dict(method.state_dict())
    assert all(map(torch.equal, restored.buffers(), method.buffers()))
    torch.manual_seed(1)
    views = method.prepare(model, _batch(images))
    torch.manual_seed(1)
    again = restored.prepare(model, _batch(images))
    assert all(torch.equal(a, b) for a, b in zip(_tensors(views), _tensors(again), strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(name: str, spatial: tuple[int, ...], classes: int, dtype: torch.dtype) -> None:
    model, method, images = _problem(name, spatial, classes)
    model, method, images = model.float(), method.float(), images.float()
    with torch.autocast("cpu", dtype):
        loss = method.loss(model, method.prepare(model, _batch(images)))
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad.isfinite().all() and p.grad.any() for p in _learning(name, model))


def test_no_value_is_looked_at(name: str, spatial: tuple[int, ...], classes: int) -> None:
    if name in ("mixup", "ict") and torch.__version__.startswith("2.6."):
        pytest.skip("torch 2.6 can't draw from a Gamma distribution on the meta device")
    if name in ON_THE_HOST:
        pytest.skip(ON_THE_HOST[name])
    model, method, images = (x.to("meta") for x in _problem(name, spatial, classes))  # there are no values there
    method.loss(model, method.prepare(model, _batch(images))).backward()
    method.update(model, _batch(images))


def test_one_logit_is_refused(name: str, spatial: tuple[int, ...], classes: int) -> None:
    """A network for a sigmoid: softmax over one channel is 1 everywhere, and nothing would be trained."""
    model, method, images = _problem(name, spatial, classes)
    model.heads = nn.ModuleList(type(head)(6, 1, 1).double() for head in model.heads)
    if hasattr(method, "teacher") and method.teacher is not None:
        method.teacher = Teacher(model)
    with pytest.raises(ValueError, match=r"logits must be of 2 classes or more, .* a network with one output channel"):
        method.loss(model, method.prepare(model, _batch(images)))


def test_a_tensor_in_place_of_a_batch_is_named(name: str, spatial: tuple[int, ...], classes: int) -> None:
    model, method, images = _problem(name, spatial, classes)
    with pytest.raises(TypeError, match=r"got Tensor; write Batch\(unlabelled\)"):
        method.prepare(model, images)


def test_outputs_that_are_not_one_for_each_view_are_named(name: str, spatial: tuple[int, ...], classes: int) -> None:
    model, method, images = _problem(name, spatial, classes)
    views = method.prepare(model, _batch(images))
    outputs = tuple(model(images) for images in views.inputs)
    logits = outputs[0][0] if name in AUXILIARY else outputs[0]
    wrong = {"a Tensor": logits, f"a tuple of {2 * len(outputs)}": 2 * outputs, "a tuple of 0": ()}
    if name in AUXILIARY and len(outputs) != len(outputs[0]):
        wrong |= {f"a tuple of {len(outputs[0])}": outputs[0]}
    for got, given in wrong.items():
        with pytest.raises(TypeError, match=rf"compare takes a tuple, .*, got {got};"):
            method.compare(given, views)
    assert torch.equal(method.compare(list(outputs), views), method.compare(outputs, views))


@CUDA
def test_nothing_waits_for_the_gpu(name: str, spatial: tuple[int, ...], classes: int) -> None:
    if name in ON_THE_HOST:
        pytest.skip(ON_THE_HOST[name])
    model, method, images = (x.to("cuda", torch.float32) for x in _problem(name, spatial, classes))

    def step() -> None:
        method.loss(model, method.prepare(model, _batch(images))).backward()
        method.update(model, _batch(images))

    step()  # warm-up
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
