"""Every recipe is in the index and has a test, which runs what the page shows or says where it is."""

import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "recipes").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_index_and_a_test_know_the_page(page: Path) -> None:
    assert f"(recipes/{page.name})" in (ROOT / "docs" / "index.md").read_text()
    assert f"`pytest tests/recipes/test_{page.stem}.py`" in page.read_text()
    assert (Path(__file__).parent / f"test_{page.stem}.py").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", page.read_text())
    assert all((page.parent / link).exists() for link in links)


def test_nnunets_lines_are_in_the_trainer() -> None:
    page = (ROOT / "docs" / "recipes" / "nnunet.md").read_text()
    block = re.findall(r"```python notest\n(.*?)```", page, re.DOTALL)[0]
    trainer = (ROOT / "examples" / "integrations" / "nnunet_gap.py").read_text()
    assert textwrap.indent(block, 8 * " ") in trainer
