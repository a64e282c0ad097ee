"""The tests can be collected beside torch, NumPy, pytest and hypothesis alone; what needs more is skipped."""

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
THERE = ["torch", "numpy", "pytest", "hypothesis"]
COLLECT = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[1:]))  # importing one of them is a ModuleNotFoundError
import pytest
sys.exit(pytest.main(["tests", "--collect-only", "-q", "-rs", "-p", "no:cacheprovider"]))
"""


def _with_what_they_need(names: list[str]) -> set[str]:
    """Names of distributions, without extras."""
    found: set[str] = set()
    while names:
        name = re.split(r"[^\w.-]", names.pop())[0].lower().replace("_", "-")
        if name not in found:
            found.add(name)
            try:
                names += [need for need in metadata.requires(name) or [] if "extra ==" not in need]
            except metadata.PackageNotFoundError:  # for another platform
                continue
    return found


def test_the_collection_ends_well_without_the_extras() -> None:
    there = _with_what_they_need([*THERE, "setuptools"])  # setuptools comes with Python, or with torch
    missing = [
        module
        for module, owners in metadata.packages_distributions().items()
        if module != "gap_torch"
        and module not in sys.stdlib_module_names  # an old `argparse` of the registry comes with nnU-Net
        and not any(owner.lower().replace("_", "-") in there for owner in owners)
    ]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", COLLECT, *missing],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "tests/gap_torch/test_wrapper.py" in done.stdout
    if "nibabel" in missing:
        assert "test_convert_acdc.py needs nibabel" in done.stdout
