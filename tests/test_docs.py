"""Every Python block of the README and the docs runs as it stands, or is an excerpt of a file that is run elsewhere.

An excerpt says which file it is from, in its title: ```python title="examples/integrations/ddp.py". What can't run
here, because it needs what a reader alone has, is titled "not run by the tests". The recipes' blocks run in
tests/recipes, each in a loop of the structure that it belongs to.
"""

import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gap_torch
from gap_torch import GAPWrapper, consistency
from gap_torch.consistency import Batch, FixedThreshold, FixMatch, Method, Threshold
from gap_torch.losses import ce_dice_loss

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = [
    path
    for name in ("gap_torch", "gap_nnunet", "examples", "benchmarks")
    for path in sorted((ROOT / name).rglob("*.py"))
]
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", *SOURCES]
BLOCK = re.compile(r"^( *)```python *(.*)\n((?:.*\n)*?)\1```$", re.MULTILINE)
CODE = re.compile(r"^ *```.*?^ *```$", re.DOTALL | re.MULTILINE)
TITLE = re.compile(r'title="(\S+)"')
NOT_RUN = 'title="not run by the tests"'


def _blocks(page: Path) -> list[tuple[str, str]]:
    """What stands behind each block's ```python, and its code."""
    return [(options, textwrap.dedent(code)) for _, options, code in BLOCK.findall(page.read_text())]


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


ALL = [(_name(page), i, *block) for page in PAGES for i, block in enumerate(_blocks(page))]
RUN = [
    pytest.param(page, i, code, id=f"{page}-{i}")
    for page, i, options, code in ALL
    if not options and not page.startswith("docs/recipes/")
]
EXCERPTS = [
    pytest.param(options, code, id=f"{page}-{i}") for page, i, options, code in ALL if options and options != NOT_RUN
]


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
    views = method.prepare(model, Batch(unlabelled))
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
        "Batch": Batch,
        "weak": method.weak,
        "strong": method.strong,
        "unlabelled": unlabelled,
        "progress": 0.5,
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


@pytest.mark.parametrize(("page", "index", "code"), RUN)
def test_the_block_runs(page: str, index: int, code: str, names: dict) -> None:
    if "import segmentation" in code or "from segmentation" in code:
        pytest.importorskip("h5py")  # of the extra `examples`
    if "no_sync" in code:
        names["model"] = DistributedDataParallel(names["model"])
    exec(compile(code, f"{page}, block {index}", "exec"), names)
    names["optimizer"].state_dict()  # an error while perturbed
    assert all(torch.isfinite(p).all() for p in names["model"].parameters())


@pytest.mark.parametrize(("options", "code"), EXCERPTS)
def test_the_excerpt_is_in_its_file(options: str, code: str) -> None:
    title = TITLE.fullmatch(options)
    assert title is not None, f'"{options}": a block runs, or has the title="FILE" that it is from'
    lines, length = (ROOT / title[1]).read_text().splitlines(), len(code.splitlines())
    excerpts = (textwrap.dedent("\n".join(lines[i : i + length])) for i in range(len(lines)))
    assert code.rstrip("\n") in excerpts


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_the_site_sees_the_pages_blocks(page: Path) -> None:
    """In lists Python-Markdown wants fences by four spaces, and behind the language nothing but a title."""
    fence = re.compile(r'(    )*```(\w*( title="[^"]+")?)')
    lines = [line for line in page.read_text().splitlines() if line.lstrip().startswith("```")]
    assert [line for line in lines if not fence.fullmatch(line)] == []


def test_few_blocks_are_not_run() -> None:
    assert sum(options == NOT_RUN for _, _, options, _ in ALL) <= 0.1 * len(ALL)


def test_algorithm_1_in_plain_pytorch_gives_the_wrappers_gradient(names: dict) -> None:
    algorithm_1, _ = _blocks(ROOT / "docs" / "how_it_works.md")
    model, optimizer = names["model"], GAPWrapper(names["base"], eps=0.1, alpha=1.0)
    names["consistency_loss"](model).backward()
    with optimizer.perturbed(model):
        names["consistency_loss"](model).backward()
    names["supervised_loss"](model).backward()
    ours = [p.grad for p in model.parameters()]
    exec(algorithm_1[1], names)
    torch.testing.assert_close([p.grad for p in model.parameters()], ours)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", CODE.sub("", page.read_text()))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_what_is_named_exists() -> None:
    """Modules of ours behind `python -m`, and files by their path. An editable install needs no PYTHONPATH."""
    bases = (ROOT, ROOT / "examples")  # where it looks for modules
    ours = "|".join(path.parent.name for base in bases for path in base.glob("*/__init__.py"))
    wrong = []
    for text in TEXTS:
        content = text.read_text()
        modules = re.findall(rf"python3? -m ((?:{ours})\b(?:\.\w+)*)", content)
        files = re.findall(r"(?<![\w/.])(?:gap_torch|gap_nnunet|examples|benchmarks|tests)/[\w/]+\.py\b", content)
        paths = [*files, *(f"{module.replace('.', '/')}.py" for module in modules)]
        gone = [path for path in paths if "NAME" not in path and not any((base / path).is_file() for base in bases)]
        wrong += [f"{_name(text)}: {what}" for what in gone + re.findall("PYTHONPATH=", content)]
    assert wrong == []


@pytest.mark.parametrize("index", [0, 1])
def test_the_report_is_what_the_page_shows(index: int, names: dict, capsys: pytest.CaptureFixture) -> None:
    page = ROOT / "docs" / "check.md"
    _, block = _blocks(page)[index]
    exec(compile(block, "train.py", "exec"), names)
    printed = re.sub(r"\S*/train.py", "train.py", capsys.readouterr().out).splitlines()
    shown = re.findall(r"^```text\n(gap_torch.check:.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    assert set(shown[index].splitlines()) <= set(printed), "\n".join(printed)


def _methods() -> list[str]:
    exported = [getattr(consistency, name) for name in consistency.__all__]
    classes = [c for c in exported if isinstance(c, type) and issubclass(c, (Method, Threshold))]
    return [c.__name__ for c in classes if not inspect.isabstract(c) and c is not FixedThreshold]


@pytest.mark.parametrize("name", _methods())
def test_the_table_has_every_method(name: str) -> None:
    table = (ROOT / "docs" / "methods.md").read_text().split("\n## ")[0]
    assert re.search(rf"\| [^|]*`[^`|]*\b{name}\b[^`|]*`[^|]* \|", table)


@pytest.mark.parametrize("module", [gap_torch, consistency])
def test_the_reference_has_every_public_name(module: ModuleType) -> None:
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    shown = re.findall(rf"^::: {re.escape(module.__name__)}\.(?:\w+\.)*(\w+)$", pages, re.MULTILINE)
    missing = sorted(set(module.__all__) - {"__version__", *shown})
    page = "consistency" if module is consistency else "wrapper"
    assert not missing, f"docs/api/{page}.md lacks " + ", ".join(f"::: {module.__name__}.{name}" for name in missing)
