"""examples/integrations/semilearn_gap.py in semilearn's own classes and training loop, with a tiny network."""
# ruff: noqa: E402 (semilearn can be imported only once torchaudio can)

import copy
import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gap_torch
from gap_torch import GAPWrapper
from gap_torch.reference import algorithm_1

REASON = "pip install 'gap-torch[recipes]'"
pytest.importorskip("transformers", reason=REASON)  # before the stand-in, which it would take for the real one
try:
    importlib.import_module("torchaudio")
except (ImportError, RuntimeError, OSError):
    # semilearn imports it for its audio data sets; its wheels may lag behind torch's
    sys.modules["torchaudio"] = ModuleType("torchaudio")
    sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)
pytest.importorskip("semilearn", reason=REASON)

import semilearn_gap
from semilearn.algorithms.fixmatch import FixMatch
from semilearn.algorithms.flexmatch import FlexMatch
from semilearn.algorithms.freematch import FreeMatch
from semilearn.core.hooks import Hook, ParamUpdateHook
from semilearn.core.utils import ALGORITHMS

EPS, ALPHA, LAMBDA, CUTOFF, CLASSES, BATCH, RATIO = 0.3, 0.5, 0.7, 0.4, 3, 4, 2


class Net(nn.Module):
    """Features and logits under semilearn's names."""

    def __init__(self, num_classes: int, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Linear(8, num_classes)
        self.double()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.body(x)
        return {"logits": self.head(features), "feat": features}


def _args(algorithm: str, **options: Any) -> SimpleNamespace:
    common = {"algorithm": algorithm, "num_classes": CLASSES, "ema_m": 0.9, "epoch": 1, "num_train_iter": 3}
    common |= {"num_eval_iter": 100, "num_log_iter": 100, "ulb_loss_ratio": LAMBDA, "use_cat": True, "amp": False}
    common |= {"clip_grad": 0, "save_name": "run", "save_dir": ".", "resume": False, "gpu": None, "rank": 0}
    common |= {"distributed": False, "world_size": 1, "use_pretrain": False, "pretrain_path": "", "optim": "SGD"}
    common |= {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "layer_decay": 1.0, "num_warmup_iter": 0}
    common |= {"use_wandb": False, "use_aim": False, "T": 0.5, "p_cutoff": CUTOFF, "hard_label": True}
    common |= {"thresh_warmup": True, "ulb_dest_len": 20, "ema_p": 0.99, "use_quantile": False, "clip_thresh": False}
    common |= {"ent_loss_ratio": 0.1, "num_labels": 12, "dataset": "none", "lb_imb_ratio": 1, "ulb_imb_ratio": 1}
    return SimpleNamespace(**{**common, "gap_eps": EPS, "gap_alpha": ALPHA, **options})


class _OnCPU:
    """No data set, no CUDA timer, batches that stay where they are: the rest is semilearn's."""

    def set_dataset(self) -> None:
        return None

    def set_data_loader(self) -> dict[str, list]:
        generator = torch.Generator().manual_seed(1)
        data: dict[str, list] = {"train_lb": [], "train_ulb": []}
        for _ in range(3):
            x, w = (torch.randn(n, 5, generator=generator).double() for n in (BATCH, BATCH * RATIO))
            labels = torch.randint(CLASSES, (BATCH,), generator=generator)
            data["train_lb"].append({"x_lb": x, "y_lb": labels})
            data["train_ulb"].append({"idx_ulb": torch.arange(len(w)), "x_ulb_w": w, "x_ulb_s": 0.8 * w + 0.1})
        return data

    def set_hooks(self) -> None:
        super().set_hooks()
        for hook in [h for h in self._hooks if h.name in ("EvaluationHook", "CheckpointHook", "TimerHook")]:
            self._hooks.remove(hook)
            del self.hooks_dict[hook.name]


@pytest.fixture(autouse=True)
def _no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "cuda", lambda tensor, *_: tensor)


def _algorithm(kind: type, **options: Any) -> Any:
    return type("OnCPU", (_OnCPU, kind), {})(_args("test", **options), Net)


def test_the_name_is_registered() -> None:
    assert ALGORITHMS["gapmatch"] is semilearn_gap.GapMatch
    assert issubclass(semilearn_gap.GapMatch, FixMatch)


def test_the_pages_lines_make_another_algorithm(lines: Any) -> None:
    names: dict[str, Any] = {}
    exec(*lines("usb", "Change these lines"), names)
    algorithm = _algorithm(names["GapFlexMatch"], num_train_iter=1)
    algorithm.train()
    assert isinstance(algorithm, FlexMatch)
    assert algorithm.optimizer.grad_norm > 0


def test_the_hook_takes_the_place_of_semilearns() -> None:
    hooks = _algorithm(semilearn_gap.GapMatch).hooks_dict
    assert [type(h) for h in hooks.values() if isinstance(h, ParamUpdateHook)] == [semilearn_gap.GAPUpdateHook]
    assert next(iter(hooks)) == "ParamUpdateHook"  # before EMA, which averages the new weights


@pytest.mark.parametrize("use_cat", [True, False])
def test_the_step_is_that_of_gap(updated_with: Any, use_cat: bool) -> None:
    algorithm = _algorithm(semilearn_gap.GapMatch, use_cat=use_cat, num_train_iter=1)
    twin = copy.deepcopy(algorithm.model).train()
    lb, ulb = algorithm.loader_dict["train_lb"][0], algorithm.loader_dict["train_ulb"][0]
    x, w, s = lb["x_lb"], ulb["x_ulb_w"], ulb["x_ulb_s"]

    def logits() -> tuple[Tensor, ...]:
        if use_cat:
            return twin(torch.cat((x, w, s)))["logits"].split((len(x), len(w), len(s)))
        return twin(x)["logits"], twin(w)["logits"], twin(s)["logits"]

    p = logits()[1].detach().softmax(1)

    def supervised() -> Tensor:
        return F.cross_entropy(logits()[0], lb["y_lb"])

    def unsupervised() -> Tensor:
        each = F.cross_entropy(logits()[2], p.argmax(1), reduction="none")
        return LAMBDA * (each * (p.amax(1) >= CUTOFF)).mean()

    expected = algorithm_1(list(twin.parameters()), unsupervised, supervised, eps=EPS, alpha=ALPHA)
    order = {p: i for i, p in enumerate(algorithm.model.parameters())}  # semilearn groups them by weight decay
    grouped = [expected[order[p]] for group in algorithm.optimizer.param_groups for p in group["params"]]
    seen = updated_with(algorithm.optimizer)
    with gap_torch.check(algorithm.optimizer, algorithm.model, show=None) as report:
        algorithm.train()
    assert report.ok, report.problems
    torch.testing.assert_close(seen, grouped)
    assert algorithm.it == 1


@pytest.mark.parametrize("kind", [FixMatch, FlexMatch, FreeMatch])
def test_with_eps_and_alpha_0_it_is_the_plain_algorithm(kind: type) -> None:
    gapped = type("Gapped", (semilearn_gap.GAP, kind), {})
    pair = [_algorithm(k, gap_eps=0.0, gap_alpha=0.0) for k in (kind, gapped)]
    logged: list[list] = [[], []]
    for algorithm, log in zip(pair, logged, strict=True):
        algorithm.register_hook(_Noting(log), None, "LOWEST")
        algorithm.train()
    assert isinstance(pair[1].optimizer, GAPWrapper)
    assert logged[0] == pytest.approx(logged[1], rel=1e-12)
    torch.testing.assert_close(*(a.model.state_dict() for a in pair), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(*(a.ema.shadow for a in pair), rtol=1e-10, atol=1e-12)


class _Noting(Hook):
    def __init__(self, log: list) -> None:
        self.log = log

    def after_train_step(self, algorithm: Any) -> None:
        self.log.append(algorithm.log_dict["train/total_loss"])


def test_clipping_comes_after_the_last_backward(updated_with: Any) -> None:
    algorithm = _algorithm(semilearn_gap.GapMatch, clip_grad=1e-3, num_train_iter=1)
    seen = updated_with(algorithm.optimizer)
    algorithm.train()
    assert torch.cat([g.flatten() for g in seen]).norm() == pytest.approx(1e-3, rel=1e-3)
    assert algorithm.scheduler.last_epoch == 1
