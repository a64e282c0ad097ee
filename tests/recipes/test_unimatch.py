"""The lines of docs/recipes/unimatch.md in a loop of the structure of UniMatch's medical part."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gap_torch import RNGState

from .loops import Loop, is_the_plain_loop_without_the_lines, takes_the_step_of_gap

LABELLED, UNLABELLED, TAU = 2, 3, 0.36


@pytest.fixture(scope="module", autouse=True)
def _one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    rendezvous = tmp_path_factory.mktemp("ddp") / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class WithPerturbedFeatures(nn.Module):
    """Features and a head; on request the logits of features with dropped channels, too."""

    def __init__(self, network: nn.Sequential, dropout: float) -> None:
        super().__init__()
        self.features, self.head, self.dropout = network[:-1], network[-1], nn.Dropout2d(dropout)

    def forward(self, x: Tensor, need_fp: bool = False) -> Any:
        features = self.features(x)
        if need_fp:
            return self.head(torch.cat((features, self.dropout(features)))).chunk(2)
        return self.head(features)


def dice(p: Tensor, target: Tensor, ignore: Tensor) -> Tensor:
    """Soft Dice of the pixels that are not to be ignored, mean over classes."""
    counts = (1 - ignore).unsqueeze(1)
    y = (target == torch.arange(3).view(1, 3, 1, 1)).to(p.dtype)
    pairs = [(counts * a * b).sum((0, 2, 3)) for a, b in ((p, y), (p, p), (y, y))]
    return 1 - ((2 * pairs[0] + 1e-5) / (pairs[1] + pairs[2] + 1e-5)).mean()


class UniMatch(Loop):
    def __init__(self, network: nn.Sequential, dropout: float) -> None:
        inner = WithPerturbedFeatures(network, dropout)
        super().__init__(model=inner)
        generator = torch.Generator().manual_seed(1)
        x, *views = torch.randn(5 * UNLABELLED, 1, 6, 6, generator=generator, dtype=self.dtype).chunk(5)
        self.x, self.y = x[:LABELLED], torch.randint(3, (LABELLED, 6, 6), generator=generator)
        self.weak, self.mix, *self.strong = views
        self.boxes = torch.zeros(2, UNLABELLED, 6, 6, dtype=torch.bool)
        self.boxes[0, :, 1:4, 2:5] = self.boxes[1, :, 3:, :2] = True
        model = DistributedDataParallel(inner, broadcast_buffers=False)  # as there
        self.names |= {"model": model, "criterion_dice": dice, "num_lb": LABELLED}
        self.names |= {"cfg": {"conf_thresh": TAU}, "img_x": self.x, "img_u_w": self.weak}
        self.names |= {"img_u_s1": self.strong[0], "img_u_s2": self.strong[1]}

    def forward(self) -> None:
        model = self.names["model"]
        with torch.no_grad():
            mix = model.eval()(self.mix).softmax(1)
        model.train()
        self.names["rng"] = RNGState.now()
        preds, fp = model(torch.cat((self.x, self.weak)), True)
        strong = model(torch.cat(self.strong)).chunk(2)
        weak = preds[LABELLED:].detach().softmax(1)
        self.pseudo = [weak, *(torch.where(box.unsqueeze(1), mix, weak) for box in self.boxes)]
        for name, p in zip(("u_w", "u_w_cutmixed1", "u_w_cutmixed2"), self.pseudo, strict=True):
            self.names |= {f"conf_{name}": p.amax(1), f"mask_{name}": p.argmax(1)}
        self.names |= {"pred_u_w_fp": fp[LABELLED:], "pred_u_s1": strong[0], "pred_u_s2": strong[1]}
        self.names["loss_x"] = F.cross_entropy(preds[:LABELLED], self.y)
        self.names["loss"] = self.names["loss_x"] / 2 + self.compared([fp[LABELLED:], *strong])

    def compared(self, logits: list[Tensor]) -> Tensor:
        """Half of: a half for the perturbed features, a fourth for each strong view."""
        assert all(0 < (p.amax(1) >= TAU).double().mean() < 1 for p in self.pseudo)  # the threshold does something
        terms = (
            dice(z.softmax(1), p.argmax(1).unsqueeze(1), 1.0 - (p.amax(1) >= TAU).to(p.dtype))
            for z, p in zip(logits, self.pseudo, strict=True)
        )
        return sum(weight * term for weight, term in zip((0.5, 0.25, 0.25), terms, strict=True)) / 2

    def unsupervised(self, twin: Any, optimizer: str) -> Tensor:
        torch.set_rng_state(self.names["rng"].cpu)
        fp = twin(torch.cat((self.x, self.weak)), True)[1][LABELLED:]
        return self.compared([fp, *twin(torch.cat(self.strong)).chunk(2)])

    def supervised(self, twin: Any, optimizer: str) -> Tensor:
        return F.cross_entropy(twin(torch.cat((self.x, self.weak)), True)[0][:LABELLED], self.y) / 2


class WeakViewsAlone(UniMatch):
    """In the perturbed pass: the loss asked for a second time."""

    passes = 0

    def unsupervised(self, twin: Any, optimizer: str) -> Tensor:
        self.passes += 1
        if self.passes == 1:
            return super().unsupervised(twin, optimizer)
        return self.compared([twin(self.weak, True)[1], *twin(torch.cat(self.strong)).chunk(2)])


def test_the_step_is_that_of_gap(lines: Any, network: Any, updated_with: Any) -> None:
    wrap, backward = lines("unimatch", "Change these lines")
    takes_the_step_of_gap(UniMatch(network(), dropout=0.0), wrap, backward, updated_with)


def test_with_rng_the_dropout_masks_are_those_of_g1(lines: Any, network: Any, updated_with: Any) -> None:
    wrap, backward = lines("unimatch", "Change these lines")
    with_rng = backward.replace("perturbed(model)", "perturbed(model, rng=rng)")
    assert with_rng != backward
    takes_the_step_of_gap(UniMatch(network(), dropout=0.5), wrap, with_rng, updated_with)


def test_the_cheaper_line(lines: Any, network: Any, updated_with: Any) -> None:
    wrap, backward = lines("unimatch", "Change these lines")
    cheaper = "star_fp = model(img_u_w, True)[1]"
    assert cheaper in (Path(__file__).parents[2] / "docs" / "recipes" / "unimatch.md").read_text()
    changed = backward.replace("star_fp = model(torch.cat((img_x, img_u_w)), True)[1][num_lb:]", cheaper)
    assert changed != backward
    takes_the_step_of_gap(WeakViewsAlone(network(), dropout=0.0), wrap, changed, updated_with)


def test_without_the_lines_it_is_the_plain_loop(lines: Any, network: Any) -> None:
    wrap, _ = lines("unimatch", "Change these lines")
    is_the_plain_loop_without_the_lines(lambda: UniMatch(network(0, torch.float32), dropout=0.5), wrap)
