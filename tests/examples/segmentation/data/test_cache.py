"""Samples that are kept are those of the files, as long as nothing has changed, and whatever becomes of the cache."""

import os
import resource
import shutil
import signal
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from segmentation.data import cache, photos, slices
from segmentation.data.files import write_case
from segmentation.data.photos import write_photo
from segmentation.data.slices import Slices, load_slices, load_unlabelled, slice_path
from segmentation.errors import InputError

NAMES = [f"patient00{patient}_frame01_slice_{number}" for patient in (1, 2) for number in (1, 2, 3)]
SIZE = (16, 32)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, name in enumerate(NAMES):
        write(tmp_path, name, number)
    return tmp_path


def write(root: Path, name: str, seed: int, shape: tuple[int, int] = (20, 24)) -> None:
    label = np.random.default_rng(seed).integers(0, 4, shape).astype(np.uint8)
    write_case(slice_path(root, name), ((label + seed % 7 / 8) / 4).astype(np.float32), label)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read, emptied between two looks."""
    read: list[str] = []
    for function in ("read_case", "read_image"):
        original = getattr(slices, function)
        monkeypatch.setattr(
            slices, function, lambda path, *a, original=original: read.append(path.stem) or original(path, *a)
        )
    return read


def load(root: Path, names: list[str] = NAMES) -> tuple[Slices, Slices]:
    return load_slices(root, names[:3], SIZE), load_unlabelled(root, names[3:], SIZE)


def afresh(root: Path, tmp_path: Path, names: list[str] = NAMES) -> tuple[Slices, Slices]:
    """As they are without a cache."""
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(root / "data", copy / "data")
    return load(copy, names)


def assert_same(ours: tuple[Slices, ...], theirs: tuple[Slices, ...]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.names == b.names
        assert torch.equal(a.images, b.images)
        assert (a.labels is None) == (b.labels is None)
        assert a.labels is None or torch.equal(a.labels, b.labels)


def seen(opened: list[str]) -> list[str]:
    names = sorted(opened)
    opened.clear()
    return names


def test_what_is_kept_is_what_was_read_and_no_file_is_opened(root, opened):
    first = load(root)
    assert seen(opened) == NAMES
    assert_same(load(root), first)
    assert seen(opened) == []
    assert sorted(path.name for path in (root / ".cache").iterdir()) == ["labelled_16x32.zip", "unlabelled_16x32.zip"]


def test_another_order_and_other_shares_are_served(root, opened, tmp_path):
    load(root)
    seen(opened)
    mixed = [*NAMES[:3][::-1], *NAMES[3:][::-1]]
    assert_same(load(root, mixed), afresh(root, tmp_path, mixed))
    opened.clear()
    load_slices(root, NAMES[2:5], SIZE)
    assert seen(opened) == NAMES[3:5]
    load_slices(root, NAMES[:5], SIZE)  # a share's samples stay when another one's come
    assert seen(opened) == []


@pytest.mark.parametrize("change", ["content", "size", "time", "missing"])
def test_a_changed_file_is_read_anew_and_no_other(root, opened, tmp_path, change):
    load(root)
    seen(opened)
    name = NAMES[4]
    path = slice_path(root, name)
    before = path.stat()
    if change in ("content", "size"):
        write(root, name, 99, (20, 24) if change == "content" else (200, 240))
        if change == "size":  # with the time of before, as an archive may have it
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
            assert path.stat().st_size != before.st_size
    elif change == "time":
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    else:
        path.unlink()
        with pytest.raises(InputError, match=rf"{name}\.h5: no such file"):
            load(root)
        return
    ours = load(root)
    assert seen(opened) == [name]
    assert_same(ours, afresh(root, tmp_path))
    opened.clear()
    load(root)
    assert seen(opened) == []
    with ZipFile(root / ".cache" / "unlabelled_16x32.zip") as file:
        assert sorted(member.split("/")[0] for member in file.namelist()) == NAMES[3:]  # nothing stale is kept


def test_sizes_do_not_meet(root, tmp_path):
    load(root)
    assert load_slices(root, NAMES, (16, 16)).images.shape == (6, 1, 16, 16)
    assert_same((load_slices(root, NAMES, SIZE),), (load_slices(root, NAMES, SIZE),))
    assert_same(load(root), afresh(root, tmp_path))


def test_checks_hold_of_what_is_kept(root):
    load_slices(root, NAMES, SIZE)
    load_unlabelled(root, NAMES, SIZE)
    with pytest.raises(InputError, match=rf"{NAMES[0]}\.h5: holds the label"):
        load_slices(root, NAMES, SIZE, num_classes=2)
    for load_them in (load_slices, load_unlabelled):
        with pytest.raises(InputError, match=rf"{NAMES[0]}\.h5: the image runs from"):
            load_them(root, NAMES, SIZE, intensities=(0.4, 1.0))


def test_a_bad_file_keeps_the_others_out_of_no_error(root):
    write_case(slice_path(root, NAMES[4]), np.full((20, 24), 2, np.float32), None)
    for _ in range(2):
        with pytest.raises(InputError, match=rf"{NAMES[4]}\.h5: the image runs from"):
            load(root)


def test_another_version_of_the_reader_reads_anew(root, opened, monkeypatch):
    load(root)
    seen(opened)
    monkeypatch.setattr(cache, "VERSION", cache.VERSION + 1)
    load(root)
    assert seen(opened) == NAMES


@pytest.mark.parametrize("damage", ["empty", "half", "text", "end", "a pixel", "a folder", "another zip"])
def test_a_damaged_cache_is_made_anew_with_one_line(root, opened, tmp_path, capsys, damage):
    load(root)
    seen(opened)
    path = root / ".cache" / "unlabelled_16x32.zip"
    content = bytearray(path.read_bytes())
    if damage == "a folder":
        path.unlink()
        path.mkdir()
    elif damage == "another zip":
        with ZipFile(path, "w") as file:
            file.writestr("../../evil", "text")
    else:
        content[3000] ^= 1
        of = {"empty": b"", "half": content[: len(content) // 2], "text": b"Sorry", "end": content[:-1]}
        path.write_bytes(of.get(damage, content))
    assert_same(load(root), afresh(root, tmp_path))
    lines = [line for line in capsys.readouterr().err.splitlines() if str(path.parent) in line]
    if damage == "another zip":
        assert lines == []
    else:
        assert lines[0].startswith(f"{path}: can't be used (")
        assert len(lines) == 1 + (damage == "a folder")  # which can't be replaced either
    opened.clear()
    if damage != "a folder":
        load(root)
        assert seen(opened) == []


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_flipped_bits_reach_the_samples(root, tmp_path, data):
    expected = load(root)
    path = root / ".cache" / "unlabelled_16x32.zip"
    content = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3)):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    assert_same(load(root), expected)


def test_a_folder_that_can_not_be_written_costs_a_line_and_nothing_else(root, opened, tmp_path, capsys):
    (root / ".cache").write_text("in the way")
    ours = load(root)
    (line,) = capsys.readouterr().err.splitlines()  # for labelled and unlabelled samples together
    assert_same(ours, afresh(root, tmp_path))
    assert line == f"{root / '.cache'}: can't be written (File exists); the data will be read anew next time"
    opened.clear()
    load(root)
    assert seen(opened) == NAMES


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_read_only_folder_too(root, capsys):
    root.chmod(0o555)
    load(root)
    root.chmod(0o755)
    assert "can't be written (Permission denied)" in capsys.readouterr().err


def test_a_full_disk_too(root, opened, tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
        ours = load(root)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert_same(ours, afresh(root, tmp_path))
    assert list((root / ".cache").iterdir()) == []  # no part of one
    assert "can't be written (File too large)" in capsys.readouterr().err


def test_several_may_start_together(root, tmp_path):
    expected = afresh(root, tmp_path)
    with ThreadPoolExecutor(4) as pool:
        for ours in pool.map(lambda _: load(root), range(12)):
            assert_same(ours, expected)
    assert len(list((root / ".cache").iterdir())) == 2


def test_what_is_kept_takes_no_memory_beside_the_samples(root, monkeypatch):
    monkeypatch.setattr(cache, "BUFFER", 4096)
    big = (512, 512)
    load_unlabelled(root, NAMES, big)
    tracemalloc.start()
    images = load_unlabelled(root, NAMES, big).images
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < images.nbytes + 2.5 * images[0].nbytes


def test_one_rank_writes(root, monkeypatch):
    monkeypatch.setattr("segmentation.ranks.is_main", lambda: False)
    load(root)
    assert not (root / ".cache").exists()


def test_photographs_are_kept_with_their_masks(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        write_photo(tmp_path, name, rng.integers(0, 256, (3, 20, 30)).astype(np.uint8), np.eye(20, 30, dtype=np.uint8))
    read: list[str] = []
    original = photos.read_photo
    monkeypatch.setattr(photos, "read_photo", lambda path, c: read.append(path.stem) or original(path, c))

    def both() -> tuple[Slices, Slices]:
        return photos.load_labelled(tmp_path, "a", SIZE, 3, 2), photos.load_unlabelled(tmp_path, "b", SIZE, 3)

    first = both()
    assert (sorted(read), read.clear()) == (["a", "b"], None)
    assert_same(both(), first)
    assert read == []
    write_photo(tmp_path, "a", np.zeros((3, 20, 30), np.uint8), np.zeros((20, 30), np.uint8))
    assert not both()[0].labels.any()
    assert photos.load_unlabelled(tmp_path, "b", SIZE, 1).images.shape == (1, 1, *SIZE)


def test_what_a_killed_process_has_left_goes_after_an_hour(root: Path) -> None:
    load(root)
    kept = next((root / ".cache").glob("labelled*.zip"))
    old, new = (kept.with_name(f"{kept.name}.{part}") for part in ("old", "new"))
    for part in (old, new):
        part.write_bytes(b"half of it")
    os.utime(old, (0, 0))
    write(root, NAMES[0], 9)  # so that the cache is written
    load(root)
    assert new.exists()
    assert not old.exists()
