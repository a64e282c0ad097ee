"""Every code block of the pages in PAGES runs, and leaves theta and the gradients in order."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gap_torch
from gap_torch import GAPWrapper, consistency
from gap_torch.consistency import FixedThreshold, FixMatch, Method, Threshold
from gap_torch.losses import ce_dice_loss

ROOT = Path(__file__).parents[1]


def _blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", _read(page), re.DOTALL)


def _read(page: str) -> str:
    return (ROOT / page).read_text()


PAGES = ("README.md", "docs/wrapper.md", "docs/methods.md", "docs/check.md")
BLOCKS = [(page, i) for page in PAGES for i in range(len(_blocks(page)))]


@pytest.fixture(scope="module", autouse=True)
def _one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    rendezvous = tmp_path_factory.mktemp("docs") / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def names() -> dict:
    """What the pages take for granted: a model, an optimizer, a method and some data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1))
    method = FixMatch(lambda x: x, lambda x: 0.9 * x, tau=0.2)
    x, y, unlabelled = torch.rand(2, 1, 8, 8), torch.randint(3, (2, 8, 8)), torch.rand(2, 1, 8, 8)
    views = method.prepare(model, unlabelled)
    return {
        "torch": torch,
        "gap_torch": gap_torch,
        "GAPWrapper": GAPWrapper,
        "model": model,
        "base": torch.optim.SGD(model.parameters(), 0.1),
        "encoder": model[:3].parameters(),
        "head": model[3:].parameters(),
        "optimizer": GAPWrapper(torch.optim.SGD(model.parameters(), 0.1), eps=0.1, alpha=0.5),
        "scaler": torch.amp.GradScaler("cpu"),
        "method": method,
        "weak": method.weak,
        "strong": method.strong,
        "unlabelled": unlabelled,
        "views": views,
        "micro_batches": [views, views],
        "labelled_micro_batches": [(x, y), (x, y)],
        "x": x,
        "y": y,
        "supervised": F.cross_entropy,
        "supervised_loss": lambda model: F.cross_entropy(model(x), y),
        "consistency_loss": lambda model: method.loss(model, views),
        "consistency": lambda logits, views: ce_dice_loss(logits, views.target, views.mask),
    }


@pytest.mark.parametrize(("page", "index"), BLOCKS)
def test_the_block_runs(page: str, index: int, names: dict) -> None:
    if "no_sync" in _blocks(page)[index]:
        names["model"] = DistributedDataParallel(names["model"])
    exec(compile(_blocks(page)[index], f"{page}, block {index}", "exec"), names)
    names["optimizer"].state_dict()  # an error while perturbed
    assert all(torch.isfinite(p).all() for p in names["model"].parameters())


@pytest.mark.parametrize("index", [0, 1])
def test_the_report_is_what_the_page_shows(index: int, names: dict, capsys: pytest.CaptureFixture) -> None:
    block = _blocks("docs/check.md")[index]
    exec(compile(block, "train.py", "exec"), names)
    printed = re.sub(r"\S*/train.py", "train.py", capsys.readouterr().out).splitlines()
    shown = re.findall(r"^```\n(gap_torch.check:.*?|  WRONG.*?)^```", _read("docs/check.md"), re.DOTALL | re.MULTILINE)
    assert set(shown[index].splitlines()) <= set(printed), "\n".join(printed)


def _methods() -> list[str]:
    exported = [getattr(consistency, name) for name in consistency.__all__]
    classes = [c for c in exported if isinstance(c, type) and issubclass(c, (Method, Threshold))]
    return [c.__name__ for c in classes if not inspect.isabstract(c) and c is not FixedThreshold]


@pytest.mark.parametrize("name", _methods())
def test_the_table_has_every_method(name: str) -> None:
    table = _read("docs/methods.md").split("\n## ")[0]
    assert re.search(rf"\| `[^`|]*\b{name}\b[^`|]*` \|", table)
