"""What is in the wheel and the sdist, and that both work beside torch alone; of `gap_nnunet`, what asks for nnU-Net.

    python .ci/check_dist.py DIST [--tag v0.1.0]

DIST holds what `python -m build` made. Every fault is printed, and the exit status is 1 if there is one.
"""

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Container, Iterable, Iterator, Mapping
from email import message_from_bytes
from email.message import Message
from pathlib import Path, PurePosixPath

WHEEL_LIMIT = 200_000  # bytes, compressed; the package is code alone
SDIST_LIMIT = 1_000_000
NEEDED = ("gap_torch/py.typed", "LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "tests/conftest.py")
PACKAGES = ("gap_torch", "gap_nnunet")
SOURCE_FOLDERS = ("gap_torch", "gap_nnunet", "examples", "benchmarks", "tests")
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
RELATIVE = re.compile(r"(?:\]\(|(?:src|srcset|href)=\")(?!https?:|#)[^)\"]*")

# Imports every module as if torch were the only package installed: importing one of the others is an error.
IMPORT = """
import importlib, pkgutil, sys
folder, version, *others = sys.argv[1:]
sys.path.insert(0, folder)
sys.modules.update(dict.fromkeys(others))
import gap_torch
assert gap_torch.__file__.startswith(folder), f"imported {gap_torch.__file__}"
assert gap_torch.__version__ == version, f"gap_torch.__version__ is {gap_torch.__version__}, the archive's {version}"
for module in pkgutil.walk_packages(gap_torch.__path__, "gap_torch."):
    importlib.import_module(module.name)
assert not any(name.startswith("gap_nnunet") for name in sys.modules), "gap_torch imports gap_nnunet"
from gap_nnunet.cli import main
assert main(["path"]) == 0
assert main(["train"]) == 1, "gap-nnunet does not say that nnunetv2 is missing"
"""
OTHERS = (
    "accelerate h5py ignite lightning matplotlib monai nibabel nnunetv2 nrrd rich scipy skimage tensorboard torchvision"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dist", type=Path)
    parser.add_argument("--tag", help="must be v and the version")
    options = parser.parse_args()

    wheels, sdists = list(options.dist.glob("*.whl")), list(options.dist.glob("*.tar.gz"))
    if len(wheels) != 1 or len(sdists) != 1:
        parser.error(f"{options.dist} holds {len(wheels)} wheels and {len(sdists)} sdists, not one of each")
    (wheel,), (sdist,) = wheels, sdists
    in_wheel, in_sdist = files_of_wheel(wheel), files_of_sdist(sdist)
    metadata = message_from_bytes(in_sdist["PKG-INFO"])
    faults = [
        *wheel_faults(in_wheel),
        *sdist_faults(in_sdist),
        *source_faults(in_sdist, tracked_sources()),
        *page_faults(metadata, in_sdist.get("README.md", b"").decode()),
        *tag_faults(options.tag, metadata["Version"]),
        *(fault for path, limit in ((wheel, WHEEL_LIMIT), (sdist, SDIST_LIMIT)) for fault in size_faults(path, limit)),
        *(fault for path in (wheel, sdist) for fault in import_faults(path, metadata["Version"])),
    ]
    for fault in faults:
        print("error:", fault, file=sys.stderr)
    if not faults:
        print(f"{wheel.name}: {len(in_wheel)} files; {sdist.name}: {len(in_sdist)} files")
    return int(bool(faults))


def files_of_wheel(path: Path) -> dict[str, bytes]:
    """Content by name."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def files_of_sdist(path: Path) -> dict[str, bytes]:
    """Content by name, the top folder left out."""
    with tarfile.open(path) as archive:
        opened = ((member.name, archive.extractfile(member)) for member in archive)
        return {PurePosixPath(*PurePosixPath(name).parts[1:]).as_posix(): file.read() for name, file in opened if file}


def wheel_faults(files: Mapping[str, bytes]) -> Iterator[str]:
    """The packages, their markers of types and the licence; nothing beside them."""
    for name in files:
        if not re.match(r"gap_(torch|nnunet)/(\w+/)*(\w+\.py|py\.typed)$|gap_torch-[^/]*\.dist-info/", name):
            yield f"the wheel holds {name}, which is not of the packages"
    for package in PACKAGES:
        if f"{package}/py.typed" not in files:
            yield f"the wheel lacks {package}/py.typed: type checkers would ignore the annotations"
    if not any(name.endswith(".dist-info/licenses/LICENSE") for name in files):
        yield "the wheel lacks the LICENSE"


def sdist_faults(files: Mapping[str, bytes]) -> Iterator[str]:
    """Sources and tests; no pictures, data or results."""
    for name in NEEDED:
        if name not in files:
            yield f"the sdist lacks {name}"
    for name, content in files.items():
        if b"\0" in content:
            yield f"the sdist holds {name}, which is not text: exclude it in pyproject.toml"
        if name.endswith((".json", ".csv", ".svg")) and not name.startswith("tests/"):
            yield f"the sdist holds {name}, a result or picture: exclude it in pyproject.toml"


def tracked_sources() -> list[str]:
    """Every Python file of the repository in a folder that the sdist is made of."""
    command = ["git", "ls-files", "-z", *(f":(glob){folder}/**/*.py" for folder in SOURCE_FOLDERS)]
    root = Path(__file__).parents[1]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]


def source_faults(files: Container[str], sources: Iterable[str]) -> Iterator[str]:
    """Code that is tracked is in the sdist."""
    for name in sources:
        if name not in files:
            yield f"the sdist lacks {name}: include it in pyproject.toml"


def page_faults(metadata: Message, readme: str) -> Iterator[str]:
    """PyPI's page has no folder to which a relative path could lead, and shows the README's code as it is."""
    page = str(metadata.get_payload())
    for link in RELATIVE.findall(CODE.sub("", page)):
        yield f"PyPI's page would have a dead link, {link}: see the substitutions in pyproject.toml"
    if CODE.findall(page) != CODE.findall(readme):
        yield "the substitutions in pyproject.toml change code of the README on PyPI's page"


def tag_faults(tag: str | None, version: str) -> Iterator[str]:
    if tag is not None and tag != f"v{version}":
        yield f"the tag is {tag}, the version {version}: the tag must be v{version}"


def size_faults(path: Path, limit: int) -> Iterator[str]:
    if path.stat().st_size > limit:
        yield f"{path.name} has {path.stat().st_size:,} bytes, more than {limit:,}"


def import_faults(path: Path, version: str) -> Iterator[str]:
    """Installs the wheel or sdist in a folder of its own and imports all of it."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, str(path.resolve())]
        check = [sys.executable, "-c", IMPORT, folder, version, *OTHERS.split()]
        for what, command in (("install", pip), ("import", check)):
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if done.returncode != 0:
                yield f"{path.name} does not {what}:\n{done.stderr}"
                return


if __name__ == "__main__":
    sys.exit(main())
