"""The lines of docs/recipes/bcp.md in loops of the structure of BCP's self-training."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .loops import Loop, is_the_plain_loop_without_the_lines, takes_the_step_of_gap

U_WEIGHT, SIZE, DECAY = 0.4, 6, 0.99


def region(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Dice loss and cross-entropy within `mask`, (2,)."""
    p, y, m = logits.softmax(1), F.one_hot(labels, 3).movedim(-1, 1), mask.unsqueeze(1)
    dice = 1 - (2 * (m * p * y).sum() + 1e-5) / ((m * p * p).sum() + (m * y).sum() + 1e-5)
    return torch.stack([dice, (F.cross_entropy(logits, labels, reduction="none") * mask).sum() / mask.sum()])


def mix_loss(
    output: Tensor, image: Tensor, patch: Tensor, mask: Tensor, l_weight: float = 1.0, u_weight=0.5, unlab=False
) -> Tensor:
    """Dice and cross-entropy of `image` under the mask and of `patch` beside it; `unlab`: `image` is unlabelled."""
    of_image, of_patch = (u_weight, l_weight) if unlab else (l_weight, u_weight)
    return of_image * region(output, image, mask) + of_patch * region(output, patch, 1 - mask)


class ACDC(Loop):
    heading = "ACDC"

    def __init__(self, network: nn.Module) -> None:
        super().__init__(model=network)
        self.teacher = self.names["teacher"] = copy.deepcopy(network)
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(8, 1, SIZE, SIZE, generator=generator, dtype=self.dtype)
        mask = torch.ones(SIZE, SIZE, dtype=torch.long)
        mask[1:5, 2:6] = 0
        self.a, self.b, self.ua, self.ub = images.chunk(4)
        self.lab_a, self.lab_b = torch.randint(3, (4, SIZE, SIZE), generator=generator).chunk(2)
        self.img_mask, self.mask = mask, mask.expand(2, SIZE, SIZE)
        self.names |= {"args": SimpleNamespace(u_weight=U_WEIGHT), "mix_loss": mix_loss, "loss_mask": self.mask}
        self.names |= {"lab_a": self.lab_a, "lab_b": self.lab_b}

    def forward(self) -> None:
        with torch.no_grad():
            self.plab_a, self.plab_b = (self.teacher(u).argmax(1) for u in (self.ua, self.ub))
        self.names |= {"plab_a": self.plab_a, "plab_b": self.plab_b}
        self.mix()

    def mix(self) -> None:
        model = self.names["model"]
        self.unl = self.ua * self.img_mask + self.a * (1 - self.img_mask)
        self.lab = self.b * self.img_mask + self.ub * (1 - self.img_mask)
        unl, lab = model(self.unl), model(self.lab)
        self.names |= {"net_input_unl": self.unl, "net_input_l": self.lab, "out_unl": unl, "out_l": lab}
        both = mix_loss(unl, self.plab_a, self.lab_a, self.mask, u_weight=U_WEIGHT, unlab=True)
        both = both + mix_loss(lab, self.lab_b, self.plab_b, self.mask, u_weight=U_WEIGHT)
        self.names["loss"] = both.sum() / 2

    def unsupervised(self, twin: Any, optimizer: str) -> Tensor:
        both = region(twin(self.unl), self.plab_a, self.mask) + region(twin(self.lab), self.plab_b, 1 - self.mask)
        return U_WEIGHT * both.sum() / 2

    def supervised(self, twin: Any, optimizer: str) -> Tensor:
        both = region(twin(self.unl), self.lab_a, 1 - self.mask) + region(twin(self.lab), self.lab_b, self.mask)
        return both.sum() / 2

    def end(self) -> None:
        student = self.networks["optimizer"].state_dict()
        mean = {key: DECAY * value + (1 - DECAY) * student[key] for key, value in self.teacher.state_dict().items()}
        self.teacher.load_state_dict(mean)


class Pair(nn.Module):
    """As BCP's V-Net: the logits, and something else."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.network(x), x


class LA(ACDC):
    heading = "LA"

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.names["model"] = Pair(network)
        self.names["mix_loss"] = lambda *args, **options: mix_loss(*args, **options).sum() / 2

    def mix(self) -> None:
        model, mix_loss = self.names["model"], self.names["mix_loss"]
        self.lab = self.a * self.img_mask + self.ua * (1 - self.img_mask)
        self.unl = self.ub * self.img_mask + self.b * (1 - self.img_mask)
        lab, unl = model(self.lab)[0], model(self.unl)[0]
        self.names |= {"mixl_img": self.lab, "mixu_img": self.unl, "outputs_l": lab, "outputs_u": unl}
        loss = mix_loss(lab, self.lab_a, self.plab_a, self.mask, u_weight=U_WEIGHT)
        self.names["loss"] = loss + mix_loss(unl, self.plab_b, self.lab_b, self.mask, u_weight=U_WEIGHT, unlab=True)

    def unsupervised(self, twin: Any, optimizer: str) -> Tensor:
        both = region(twin(self.unl), self.plab_b, self.mask) + region(twin(self.lab), self.plab_a, 1 - self.mask)
        return U_WEIGHT * both.sum() / 2

    def supervised(self, twin: Any, optimizer: str) -> Tensor:
        both = region(twin(self.unl), self.lab_b, 1 - self.mask) + region(twin(self.lab), self.lab_a, self.mask)
        return both.sum() / 2


@pytest.mark.parametrize("kind", [ACDC, LA])
def test_the_step_is_that_of_gap(lines: Any, network: Any, updated_with: Any, kind: type[ACDC]) -> None:
    (wrap,), (backward,) = lines("bcp", "Change these lines"), lines("bcp", kind.heading)
    takes_the_step_of_gap(kind(network()), wrap, backward, updated_with)


@pytest.mark.parametrize("kind", [ACDC, LA])
def test_the_parts_add_up_to_the_loss(lines: Any, network: Any, kind: type[ACDC]) -> None:
    loop = kind(network())
    loop.forward()
    names, part = loop.names, lines("bcp", kind.heading)[0].split("with ")[0]
    exec(part, names)
    outputs = [names[name] for name in ("out_unl", "out_l", "outputs_u", "outputs_l") if name in names]
    parts = names["part"](*outputs, l_weight=1.0, u_weight=0.0) + names["part"](
        *outputs, l_weight=0.0, u_weight=U_WEIGHT
    )
    torch.testing.assert_close(parts, names["loss"])


@pytest.mark.parametrize("kind", [ACDC, LA])
def test_without_the_lines_it_is_the_plain_loop(lines: Any, network: Any, kind: type[ACDC]) -> None:
    (wrap,) = lines("bcp", "Change these lines")
    is_the_plain_loop_without_the_lines(lambda: kind(network(0, torch.float32)), wrap)
