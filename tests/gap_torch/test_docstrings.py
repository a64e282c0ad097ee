"""All that the reference shows has an example that runs; docstrings have one order of sections, and say their nouns."""

import ast
import doctest
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "gap_torch").rglob("*.py"))
SECTIONS = ["Args", "Returns", "Raises", "Examples"]
"""In this order, and under these names, by which mkdocstrings knows them."""
WIDTH = 88
"""Of a line of an example, without its prompt."""
OTHER_NAMES = {"Arg", "Parameters", "Return", "Yields", "Raise", "Example", "Note", "Notes"}
PRONOUN = re.compile(r"\W*(Theirs?|Those|These|Its?|That of|Of|The same)\b|.*\b[Tt]heirs\b", re.DOTALL)
"""No docstring begins with one."""


def _shown() -> Iterator[tuple[str, Any]]:
    """What the pages in docs/api show, which have every public name (tests/test_docs.py)."""
    pages = "".join(page.read_text() for page in sorted((ROOT / "docs" / "api").glob("*.md")))
    for name in re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE):
        found = pkgutil.resolve_name(name)
        if not isinstance(found, ModuleType):
            yield name, found
            continue
        for key, member in vars(found).items():
            if inspect.isfunction(member) and member.__module__ == name and not key.startswith("_"):
                yield f"{name}.{key}", member


SHOWN = {name: found for name, found in _shown() if inspect.isclass(found) or inspect.isfunction(found)}


@pytest.mark.parametrize("name", SHOWN)
def test_the_examples_run(name: str) -> None:
    """Those of a function, or of a class and its methods, as a reader copies them: with nothing imported before."""
    own, *of_methods = doctest.DocTestFinder(exclude_empty=False).find(SHOWN[name], name, globs={})
    assert own.name == name
    assert own.examples, f"{name}: its docstring has no Examples with lines of >>>"
    lines = [line for test in (own, *of_methods) for each in test.examples for line in each.source.splitlines()]
    assert max(map(len, lines)) <= WIDTH, f"{name}: on the page a line of more than {WIDTH} characters scrolls"
    told: list[str] = []
    for test in (own, *of_methods):
        doctest.DocTestRunner().run(test, out=told.append)
    assert told == [], "".join(told)


def _docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of each, those below attributes too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_have_one_form(path: Path) -> None:
    wrong = []
    for line, text in _docstrings(path):
        headings = re.findall(r"^ *(\w+)::?$", text, re.MULTILINE)
        sections = [heading for heading in headings if heading in SECTIONS]
        if sections != sorted(sections, key=SECTIONS.index) or OTHER_NAMES & {*headings}:
            wrong.append(f"{path.name}:{line}: has the sections {headings}; write {SECTIONS}, in this order")
        if PRONOUN.match(text):
            wrong.append(f"{path.name}:{line}: {text[:40]!r} leaves the reader to guess whose; say the noun")
    assert wrong == []
