"""Checkpoints: whole or not at all."""

from pathlib import Path

import pytest
import torch

from segmentation.errors import InputError
from segmentation.training import checkpoint

CPU = torch.device("cpu")


def test_round_trip(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a.pt", {"x": torch.arange(3), "n": 1})
    content = checkpoint.load(tmp_path / "a.pt", CPU)
    assert torch.equal(content["x"], torch.arange(3))
    assert content["n"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_a_crash_while_writing_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pt"
    checkpoint.save(path, {"n": 1})

    def half(content, file) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, {"n": 2})
    assert checkpoint.load(path, CPU) == {"n": 1}


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut off"])
def test_damage_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.pt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"broken\.pt"):
        checkpoint.load(path, CPU)


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such"):
        checkpoint.load(tmp_path / "none.pt", CPU)
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(InputError, match="list"):
        checkpoint.load(tmp_path / "list.pt", CPU)


def test_whatever_torch_raises_is_one_short_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments, **keywords):
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "pages\nof\ntext")

    (tmp_path / "a.pt").write_bytes(b"x")
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(InputError, match=r"a\.pt: not a readable checkpoint; it is damaged") as raised:
        checkpoint.load(tmp_path / "a.pt", CPU)
    assert "\n" not in str(raised.value)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        checkpoint.load(tmp_path, CPU)


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match=r"evil\.pt"):
        checkpoint.load(tmp_path / "evil.pt", CPU)
    assert not (tmp_path / "ran").exists()
