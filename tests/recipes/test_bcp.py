"""The lines of docs/recipes/bcp.md in a loop of the structure of BCP's self-training."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gap_torch import GAPWrapper
from gap_torch.reference import algorithm_1

EPS, U_WEIGHT, SIZE, DECAY = 0.3, 0.5, 6, 0.99


def region(logits: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Dice loss and cross-entropy within `mask`."""
    p, y = logits.softmax(1), F.one_hot(labels, 3).movedim(-1, 1).to(logits.dtype)
    m = mask.unsqueeze(1)
    dice = 1 - (2 * (m * p * y).sum() + 1e-5) / ((m * p * p).sum() + (m * y).sum() + 1e-5)
    return dice, (F.cross_entropy(logits, labels, reduction="none") * mask).sum() / mask.sum()


def mix_loss(
    output: Tensor,
    image: Tensor,
    patch: Tensor,
    mask: Tensor,
    l_weight: float = 1.0,
    u_weight: float = 0.5,
    unlab: bool = False,
) -> tuple[Tensor, Tensor]:
    """Dice and cross-entropy of `image` under the mask and of `patch` beside it; `unlab`: `image` is unlabelled."""
    weights = (u_weight, l_weight) if unlab else (l_weight, u_weight)
    parts = region(output, image, mask), region(output, patch, 1 - mask)
    dice, ce = (sum(w * part[i] for w, part in zip(weights, parts, strict=True)) for i in range(2))
    return dice, ce


class Loop:
    def __init__(self, network: nn.Sequential, wrap: Callable[[Any], Any]) -> None:
        self.model, self.teacher = network, copy.deepcopy(network)
        self.optimizer = wrap(torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=1e-4))
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(8, 1, SIZE, SIZE, generator=generator, dtype=network[0].weight.dtype)
        self.a, self.b, self.ua, self.ub = images.chunk(4)
        self.lab_a, self.lab_b = torch.randint(3, (4, SIZE, SIZE), generator=generator).chunk(2)

    def names(self) -> dict[str, Any]:
        with torch.no_grad():
            plab_a, plab_b = (self.teacher(u).argmax(1) for u in (self.ua, self.ub))
        mask = torch.ones(SIZE, SIZE, dtype=torch.long)
        mask[1:5, 2:6] = 0
        net_input_unl = self.ua * mask + self.a * (1 - mask)
        net_input_l = self.b * mask + self.ub * (1 - mask)
        return {
            "args": SimpleNamespace(u_weight=U_WEIGHT),
            "mix_loss": mix_loss,
            "model": self.model,
            "optimizer": self.optimizer,
            "loss_mask": mask.expand(2, SIZE, SIZE),
            **{"plab_a": plab_a, "plab_b": plab_b, "lab_a": self.lab_a, "lab_b": self.lab_b},
            **{"net_input_unl": net_input_unl, "net_input_l": net_input_l},
            **{"out_unl": self.model(net_input_unl), "out_l": self.model(net_input_l)},
        }

    def update_teacher(self) -> None:
        new = {k: DECAY * t + (1 - DECAY) * self.model.state_dict()[k] for k, t in self.teacher.state_dict().items()}
        self.teacher.load_state_dict(new)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_the_step_is_that_of_gap(lines: Any, network: Any, updated_with: Any, alpha: float) -> None:
    loop = Loop(network(), lambda base: GAPWrapper(base, EPS, alpha))
    twin = copy.deepcopy(loop.model)
    names = loop.names()
    mask, statistics = names["loss_mask"], {k: b.clone() for k, b in loop.model.named_buffers()}

    def unsupervised() -> Tensor:
        pairs = (
            region(twin(names["net_input_unl"]), names["plab_a"], mask),
            region(twin(names["net_input_l"]), names["plab_b"], 1 - mask),
        )
        return U_WEIGHT * sum(dice + ce for dice, ce in pairs) / 2

    def supervised() -> Tensor:
        pairs = (
            region(twin(names["net_input_unl"]), names["lab_a"], 1 - mask),
            region(twin(names["net_input_l"]), names["lab_b"], mask),
        )
        return sum(dice + ce for dice, ce in pairs) / 2

    expected = algorithm_1(list(twin.parameters()), unsupervised, supervised, eps=EPS, alpha=alpha)
    seen = updated_with(loop.optimizer)
    exec(lines("bcp", "The lines"), names)
    torch.testing.assert_close(seen, expected)
    torch.testing.assert_close(dict(loop.model.named_buffers()), statistics, rtol=0, atol=0)


def test_the_parts_add_up_to_the_loss(lines: Any, network: Any) -> None:
    loop = Loop(network(), GAPWrapper)
    names = loop.names()
    unl = mix_loss(names["out_unl"], names["plab_a"], names["lab_a"], names["loss_mask"], u_weight=U_WEIGHT, unlab=True)
    lab = mix_loss(names["out_l"], names["lab_b"], names["plab_b"], names["loss_mask"], u_weight=U_WEIGHT)
    whole = (sum(unl) + sum(lab)) / 2
    outputs = names["out_unl"].detach(), names["out_l"].detach()
    exec(lines("bcp", "The lines"), names)
    parts = names["part"](*outputs, 1.0, 0.0) + names["part"](*outputs, 0.0, U_WEIGHT)
    torch.testing.assert_close(parts, whole.detach())


def test_without_the_lines_it_is_the_plain_loop(network: Any) -> None:
    weights = []
    for wrap in (lambda base: base, GAPWrapper):
        loop = Loop(network(0, torch.float32), wrap)
        for _ in range(3):
            names = loop.names()
            common = {"u_weight": U_WEIGHT}
            unl = mix_loss(names["out_unl"], names["plab_a"], names["lab_a"], names["loss_mask"], unlab=True, **common)
            lab = mix_loss(names["out_l"], names["lab_b"], names["plab_b"], names["loss_mask"], **common)
            loop.optimizer.zero_grad()
            ((sum(unl) + sum(lab)) / 2).backward()
            loop.optimizer.step()
            loop.update_teacher()
        weights += [[loop.model.state_dict(), loop.teacher.state_dict()]]
    torch.testing.assert_close(*weights, rtol=0, atol=0)
