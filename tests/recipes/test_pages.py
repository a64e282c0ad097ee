"""Every recipe is in the index and has a test, which runs what the page shows or says where it is."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OF_A_COMMAND = "nnunet.md"  # no lines to change: tests/gap_nnunet
PAGES = sorted(page for page in (ROOT / "docs" / "recipes").glob("*.md") if page.name != OF_A_COMMAND)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_index_and_a_test_know_the_page(page: Path) -> None:
    assert f"(recipes/{page.name})" in (ROOT / "docs" / "index.md").read_text()
    assert f"`pytest tests/recipes/test_{page.stem}.py`" in page.read_text()
    assert (Path(__file__).parent / f"test_{page.stem}.py").exists()


def test_the_index_knows_the_page_of_the_command() -> None:
    assert f"(recipes/{OF_A_COMMAND})" in (ROOT / "docs" / "index.md").read_text()
    assert "(../your_own_scans.md)" in (ROOT / "docs" / "recipes" / OF_A_COMMAND).read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_all_pages_have_the_same_parts(page: Path) -> None:
    parts = ["Change these lines", "What is particular", "Check that it works"]
    assert re.findall(r"^## (.*)$", page.read_text(), re.MULTILINE) == parts
    assert "gap_torch.check(" in page.read_text().split(parts[-1])[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_stands_alone(page: Path) -> None:
    """Who comes to it from elsewhere is told how to install, and what to import for the check."""
    text = page.read_text()
    assert "`pip install /path/to/gap-torch`" in text.split("\n## ")[0]
    assert "import gap_torch\n" in text.split("## Check that it works")[1]
