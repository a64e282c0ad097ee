"""`.ci/check_dist.py` finds what does not belong in a release."""

import runpy
import zipfile
from email.message import Message
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
check = SimpleNamespace(**runpy.run_path(str(ROOT / ".ci" / "check_dist.py")))
WHEEL = {"gap_torch/__init__.py": b"", "gap_torch/consistency/vat.py": b"", "gap_torch/py.typed": b""}
WHEEL |= {"gap_nnunet/cli.py": b"", "gap_nnunet/trainers/gap_nnunet_trainers.py": b"", "gap_nnunet/py.typed": b""}
WHEEL |= {"gap_torch-0.1.0.dist-info/METADATA": b"", "gap_torch-0.1.0.dist-info/licenses/LICENSE": b""}


def _page(text: str) -> Message:
    metadata = Message()
    metadata.set_payload(text)
    return metadata


def test_a_wheel_of_the_package_alone_is_right() -> None:
    assert list(check.wheel_faults(WHEEL)) == []


@pytest.mark.parametrize("name", ["tests/test_wrapper.py", "examples/toy.py", "gap_torch/notes.md", "gap_torch/x.so"])
def test_a_wheel_with_anything_else_is_not(name: str) -> None:
    (fault,) = check.wheel_faults(WHEEL | {name: b""})
    assert name in fault


@pytest.mark.parametrize(
    "name", ["gap_torch/py.typed", "gap_nnunet/py.typed", "gap_torch-0.1.0.dist-info/licenses/LICENSE"]
)
def test_a_wheel_without_its_types_or_licence_is_not(name: str) -> None:
    (fault,) = check.wheel_faults({key: content for key, content in WHEEL.items() if key != name})
    assert name.split("/")[-1] in fault


def test_an_sdist_is_text_without_results() -> None:
    files = dict.fromkeys(check.NEEDED, b"text")
    assert list(check.sdist_faults(files)) == []
    (missing,) = check.sdist_faults({name: b"" for name in check.NEEDED if name != "CITATION.cff"})
    assert "CITATION.cff" in missing
    (picture,) = check.sdist_faults(files | {"docs/toy.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"})
    assert "docs/toy.png" in picture
    (result,) = check.sdist_faults(files | {"benchmarks/results/memory.json": b"{}"})
    assert "memory.json" in result


def test_an_sdist_has_all_tracked_code() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no git repository, as in an sdist")
    sources = check.tracked_sources()
    assert {"gap_torch/wrapper.py", "benchmarks/lab/grid.py", "tests/test_check_dist.py"} <= {*sources}
    assert list(check.source_faults(sources, sources)) == []
    (fault,) = check.source_faults([name for name in sources if name != "benchmarks/lab/grid.py"], sources)
    assert "benchmarks/lab/grid.py" in fault


@pytest.mark.parametrize("link", ["[a](docs/a.md)", "[`a`](docs/a.md#b)", "![](docs/p.png)", '<img src="docs/p.png">'])
def test_a_relative_link_is_dead_on_pypi(link: str) -> None:
    (fault,) = check.page_faults(_page(f"See {link}."), readme=f"See {link}.")
    assert "docs/" in fault


def test_code_and_absolute_links_stay() -> None:
    readme = "[site](https://example.org/a.md)\n```python\nTABLE[name](a.b)\n```\n`TABLE[0](a.b)`"
    assert list(check.page_faults(_page(readme), readme)) == []
    (fault,) = check.page_faults(_page(readme.replace("[name](a.b)", "name")), readme)
    assert "code" in fault


def test_the_tag_is_the_version() -> None:
    assert list(check.tag_faults("v0.1.0", "0.1.0")) == []
    assert list(check.tag_faults(None, "0.1.0")) == []
    (fault,) = check.tag_faults("0.1.0", "0.1.0")
    assert "must be v0.1.0" in fault


def test_a_size_beyond_the_limit(tmp_path: Path) -> None:
    file = tmp_path / "gap.whl"
    file.write_bytes(b"12345")
    assert list(check.size_faults(file, limit=5)) == []
    (fault,) = check.size_faults(file, limit=4)
    assert "5 bytes, more than 4" in fault


@pytest.mark.parametrize(
    ("code", "version", "fault"),
    [
        ("import torch", "0.1.0", None),
        ("import scipy", "0.1.0", "scipy"),
        ("", "0.2.0", "gap_torch.__version__ is 0.1.0, the archive's 0.2.0"),
    ],
)
def test_the_package_imports_beside_torch_alone(
    code: str, version: str, fault: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = Path("gap_torch-0.1.0-py3-none-any.whl")
    info = "gap_torch-0.1.0.dist-info"
    monkeypatch.chdir(tmp_path)  # a relative path, as in the release workflow
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("gap_torch/__init__.py", '__version__ = "0.1.0"\n')
        archive.writestr("gap_torch/part.py", code)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: gap-torch\nVersion: 0.1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    faults = list(check.import_faults(wheel, version))
    assert len(faults) == (fault is not None)
    assert fault is None or fault in faults[0]
