"""The lines of docs/recipes/unimatch.md in a loop of the structure of UniMatch's medical part."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gap_torch import GAPWrapper, RNGState
from gap_torch.reference import algorithm_1

EPS, ALPHA, LABELLED, UNLABELLED, TAU = 0.3, 0.5, 2, 3, 0.36


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
    sums = [(counts * a * b).sum((0, 2, 3)) for a, b in ((p, y), (p, p), (y, y))]
    return 1 - ((2 * sums[0] + 1e-5) / (sums[1] + sums[2] + 1e-5)).mean()


class Loop:
    def __init__(self, network: nn.Sequential, dropout: float, wrap: Callable[[Any], Any]) -> None:
        inner = WithPerturbedFeatures(network, dropout)
        self.optimizer = wrap(torch.optim.SGD(inner.parameters(), 0.1, 0.9, weight_decay=1e-4))
        self.model = DistributedDataParallel(inner)
        generator = torch.Generator().manual_seed(1)
        x, *u = torch.randn(5 * UNLABELLED, 1, 6, 6, generator=generator, dtype=network[0].weight.dtype).chunk(5)
        self.x, (self.u_w, self.u_w_mix, self.u_s1, self.u_s2) = x[:LABELLED], u
        self.y = torch.randint(3, (LABELLED, 6, 6), generator=generator)
        self.box = torch.zeros(UNLABELLED, 6, 6, dtype=torch.bool)
        self.box[:, 1:4, 2:5] = True

    def names(self) -> dict[str, Any]:
        model = self.model
        with torch.no_grad():
            model.eval()
            mix = model(self.u_w_mix).softmax(1)
        model.train()
        preds, fp = model(torch.cat((self.x, self.u_w)), True)
        s1, s2 = model(torch.cat((self.u_s1, self.u_s2))).chunk(2)
        weak = preds[LABELLED:].detach().softmax(1)
        cutmixed = torch.where(self.box.unsqueeze(1), mix, weak)
        conf, mask = cutmixed.max(1)
        return {
            "torch": torch,
            "cfg": {"conf_thresh": TAU},
            "criterion_dice": dice,
            "model": model,
            "optimizer": self.optimizer,
            **{"img_x": self.x, "img_u_w": self.u_w, "img_u_s1": self.u_s1, "img_u_s2": self.u_s2},
            **{"mask_u_w_cutmixed1": mask, "conf_u_w_cutmixed1": conf},
            **{"mask_u_w_cutmixed2": mask, "conf_u_w_cutmixed2": conf},
            **{"mask_u_w": weak.argmax(1), "conf_u_w": weak.amax(1), "num_lb": LABELLED},
            **{"pred_u_w_fp": fp[LABELLED:], "pred_u_s1": s1, "pred_u_s2": s2},
            "loss_x": nn.functional.cross_entropy(preds[:LABELLED], self.y),
        }

    def unsupervised(self, model: nn.Module, names: dict[str, Any]) -> Tensor:
        """Theirs: a fourth, a fourth, a half, and half of it all."""
        fp = model(torch.cat((self.x, self.u_w)), True)[1][LABELLED:].softmax(1)
        strong = model(torch.cat((self.u_s1, self.u_s2))).softmax(1)
        boxed, sure = names["mask_u_w_cutmixed1"].unsqueeze(1), names["conf_u_w_cutmixed1"] >= TAU
        total = 0.5 * dice(fp, names["mask_u_w"].unsqueeze(1), 1.0 - (names["conf_u_w"] >= TAU).double())
        for view in strong.chunk(2):
            total = total + 0.25 * dice(view, boxed, 1.0 - sure.double())
        return total / 2


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_step_is_that_of_gap(lines: Any, network: Any, updated_with: Any, dropout: float) -> None:
    loop = Loop(network(), dropout, lambda base: GAPWrapper(base, EPS, ALPHA))
    twin = copy.deepcopy(loop.model.module).train()
    torch.manual_seed(3)
    rng = RNGState.now()
    names = loop.names()
    code = lines("unimatch", "The lines")
    if dropout:
        names["optimizer"] = _Replaying(loop.optimizer, rng)
    share = float((names["conf_u_w"] >= TAU).double().mean())
    assert 0 < share < 1  # the mask does something

    def seeded() -> Tensor:
        torch.manual_seed(3)
        return loop.unsupervised(twin, names)

    def supervised() -> Tensor:
        logits, _ = twin(torch.cat((loop.x, loop.u_w)), True)
        return nn.functional.cross_entropy(logits[:LABELLED], loop.y) / 2

    expected = algorithm_1(list(twin.parameters()), seeded, supervised, eps=EPS, alpha=ALPHA)
    seen = updated_with(loop.optimizer)
    exec(code, names)
    torch.testing.assert_close(seen, expected)


class _Replaying:
    """The optimizer with `rng=rng` in `perturbed`, as the page advises."""

    def __init__(self, optimizer: GAPWrapper, rng: RNGState) -> None:
        self.optimizer, self.rng = optimizer, rng

    def perturbed(self, model: nn.Module) -> Any:
        return self.optimizer.perturbed(model, rng=self.rng)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


def test_without_the_lines_it_is_the_plain_loop(network: Any) -> None:
    weights = []
    for wrap in (lambda base: base, GAPWrapper):
        loop = Loop(network(0, torch.float32), 0.5, wrap)
        torch.manual_seed(3)
        for _ in range(3):
            names = loop.names()
            loss = names["loss_x"] / 2 + loop.unsupervised(loop.model, names)
            dist.barrier()
            loop.optimizer.zero_grad()
            loss.backward()
            loop.optimizer.step()
        weights.append(loop.model.state_dict())
    torch.testing.assert_close(*weights, rtol=0, atol=0)
