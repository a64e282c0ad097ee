"""The workflows can't run here; what would break one unseen, or give it more rights than it needs, is looked up."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/workflows").glob("*.yml")}
PYPROJECT = (ROOT / "pyproject.toml").read_text()

every_workflow = pytest.mark.parametrize("name", WORKFLOWS)


def _steps(workflow: dict) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job.get("steps", [])]


def _commands(name: str) -> list[str]:
    return [step["run"] for step in _steps(WORKFLOWS[name]) if "run" in step]


@every_workflow
def test_a_workflow_may_read_and_no_more(name: str) -> None:
    assert WORKFLOWS[name]["permissions"] == {"contents": "read"}
    writers = {job for job, content in WORKFLOWS[name]["jobs"].items() if "write" in str(content.get("permissions"))}
    assert writers == {"tests": set(), "docs": {"deploy"}, "release": {"publish"}}[name]


@every_workflow
def test_a_job_that_may_write_runs_none_of_our_code(name: str) -> None:
    for job in WORKFLOWS[name]["jobs"].values():
        if "permissions" in job:
            assert all("uses" in step and "checkout" not in step["uses"] for step in job["steps"])


def test_no_two_workflows_share_a_concurrency_group() -> None:
    """Release calls tests: in one group they would wait for each other for ever."""
    groups = [workflow["concurrency"]["group"] for workflow in WORKFLOWS.values()]
    assert len(set(groups)) == len(groups)


@every_workflow
def test_actions_are_pinned_to_a_major_version(name: str) -> None:
    actions = [step["uses"] for step in _steps(WORKFLOWS[name]) if "uses" in step]
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@(release/)?v\d+", action) for action in actions)


@every_workflow
def test_what_a_command_names_exists(name: str) -> None:
    words = [word for command in _commands(name) for word in command.split()]
    paths = [word for word in words if re.match(r"\.ci/|docs/", word)]
    extras = [extra for word in words for found in re.findall(r'"\.\[(.*)\]"', word) for extra in found.split(",")]
    assert [path for path in paths if not (ROOT / path).is_file()] == []
    assert [extra for extra in extras if f"\n{extra} = [" not in PYPROJECT] == []


def test_what_is_run_by_its_name_is_executable() -> None:
    """Of what begins a line; others are given to `python`."""
    lines = [line for name in WORKFLOWS for command in _commands(name) for line in command.splitlines()]
    scripts = {line.split()[0] for line in lines if line.startswith(".ci/")}
    assert scripts == {".ci/run"}
    assert [script for script in scripts if not os.access(ROOT / script, os.X_OK)] == []


@every_workflow
def test_what_a_job_needs_or_calls_exists(name: str) -> None:
    jobs = WORKFLOWS[name]["jobs"]
    for job in jobs.values():
        assert job.get("needs", next(iter(jobs))) in jobs
        assert "uses" not in job or (ROOT / job["uses"]).is_file()


def test_the_oldest_and_the_newest_that_pyproject_promises_are_tested() -> None:
    oldest, newest = WORKFLOWS["tests"]["jobs"]["versions"]["strategy"]["matrix"]["include"]
    promised = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT)
    assert (oldest["python"], newest["python"]) == (promised[0], promised[-1])
    assert f'requires-python = ">={oldest["python"]}"' in PYPROJECT
    assert oldest["torch"].replace("==", ">=").replace(".*", "") in PYPROJECT
    assert newest["torch"] == "torch"


def test_nothing_is_published_that_was_not_tested() -> None:
    jobs = WORKFLOWS["release"]["jobs"]
    assert (jobs["build"]["needs"], jobs["publish"]["needs"]) == ("tests", "build")
