"""docs/integrations.md has a section for every example, and shows it; tests/test_docs.py compares the lines."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
OF_RECIPES = {f"examples/integrations/{name}.py" for name in ("semilearn_gap",)}  # tests/recipes
OF_OTHER_PAGES = {"examples/integrations/cuda_graph.py", "examples/integrations/tiny.py"}
SECTIONS = (ROOT / "docs" / "integrations.md").read_text().split("\n## ")[1:]


def _titles(section: str) -> set[str]:
    """The files that the section's blocks are from."""
    return set(re.findall(r'```python title="([^"]+)"', section))


def test_a_section_shows_one_file() -> None:
    assert [len(_titles(section)) for section in SECTIONS] == [1] * len(SECTIONS)


def test_the_page_shows_every_example() -> None:
    examples = {p.relative_to(ROOT).as_posix() for p in (ROOT / "examples" / "integrations").glob("*.py")}
    assert set().union(*map(_titles, SECTIONS)) == examples - OF_OTHER_PAGES - OF_RECIPES
