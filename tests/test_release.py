"""The version, its date and the citation say the same wherever they stand."""

import datetime
import re
from pathlib import Path

import yaml
from packaging.requirements import Requirement

import gap_torch

ROOT = Path(__file__).parents[1]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
RELEASES = re.findall(r"^## (\d\S*) - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
"""Version and date, the newest first."""


def test_the_version_is_the_changelogs_and_the_citations() -> None:
    version, date = RELEASES[0]
    assert gap_torch.__version__ == version == CITATION["version"]
    assert datetime.date.fromisoformat(date) == CITATION["date-released"]


def test_the_changelog_goes_back_in_time() -> None:
    versions = [tuple(map(int, version.split("."))) for version, _ in RELEASES]
    dates = [date for _, date in RELEASES]
    assert versions == sorted(set(versions), reverse=True)
    assert dates == sorted(dates, reverse=True)


def test_the_citation_has_what_its_format_requires() -> None:
    """https://github.com/citation-file-format/citation-file-format, schema 1.2.0."""
    assert CITATION["cff-version"] == "1.2.0"
    assert CITATION["type"] == "software"
    for entry in (CITATION, CITATION["preferred-citation"]):
        assert entry["title"]
        assert all(set(author) in ({"name"}, {"family-names", "given-names"}) for author in entry["authors"])
    assert CITATION["message"]
    assert f'license = "{CITATION["license"]}"' in (ROOT / "pyproject.toml").read_text()


def test_no_extra_takes_the_malicious_releases_of_lightning() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    (requirement,) = map(Requirement, re.findall(r'"(lightning\b[^"]*)"', text))
    assert list(requirement.specifier.filter(["2.6.1", "2.6.2", "2.6.3", "2.6.6"])) == ["2.6.1", "2.6.6"]
