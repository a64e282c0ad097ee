"""docs/integrations.md shows the examples as they are: each block is in the file of its section, word for word."""

import re
import textwrap
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[3] / "docs" / "integrations.md"
SECTIONS = PAGE.read_text().split("\n## ")[1:]


def _file(section: str) -> Path:
    """The example that the section links to."""
    link = re.search(r"\]\((\.\./examples/integrations/\w+\.py)\)", section)
    assert link is not None
    return PAGE.parent / link[1]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.splitlines()[0])
def test_the_sections_blocks_are_in_its_file(section: str) -> None:
    lines = _file(section).read_text().splitlines()
    blocks = re.findall(r"```python\n(.*?)\n```", section, re.DOTALL)
    assert blocks
    for block in blocks:
        length = len(block.splitlines())
        excerpts = (textwrap.dedent("\n".join(lines[i : i + length])) for i in range(len(lines)))
        assert block in excerpts, block


def test_the_page_names_every_example() -> None:
    examples = {path.name for path in (PAGE.parents[1] / "examples" / "integrations").glob("*.py")} - {"tiny.py"}
    of_recipes = {"nnunet_gap.py", "semilearn_gap.py"}  # theirs: tests/recipes
    assert {_file(section).name for section in SECTIONS} == examples - of_recipes
