"""Training samples as they are learnt from, kept beside the data from run to run.

    root/.cache/KIND_HxW.zip        one member a sample, `NAME/STAMP`: the bytes of its arrays, one behind the other

A stamp is made of all that a sample depends on: names, sizes and times of change of its files, shape and type of its
arrays, and what its reader asks for. A sample with another stamp is read anew; those of other names stay. The zip's own
checksums find damage. Whatever goes wrong with the cache, the files themselves are read; it can be deleted at any time.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from hashlib import blake2b
from pathlib import Path
from uuid import uuid4
from zipfile import ZipFile, ZipInfo

import numpy as np

from segmentation import ranks
from segmentation.data.parallel import in_parallel

FOLDER = ".cache"
BUFFER = 2**24
"""Bytes of the cache that are read at once."""
VERSION = 1
"""Of the layout, and of what readers do with a file: to be raised with a change of either."""


def read_samples(
    root: str | Path,
    kind: str,
    names: Sequence[str],
    files: Callable[[str], Sequence[Path]],
    read: Callable[[str], Sequence[np.ndarray]],
    conditions: object,
    into: Sequence[np.ndarray],
) -> None:
    """Fill each of the arrays `into` with N samples, from the cache or their files.

    Args:
        root: of the data set.
        kind: tells apart caches of different arrays.
        names: N names, which are file names.
        files: the files of a sample.
        read: a sample's arrays, one for each of `into`; raises what is wrong with its files.
        conditions: what else it depends on; of plain numbers and strings.
        into: arrays of shape (N, ..., H, W).
    """
    height, width = into[0].shape[-2:]
    path = Path(root) / FOLDER / f"{kind}_{height}x{width}.zip"
    subject = VERSION, conditions, [(array.dtype.str, array.shape[1:]) for array in into]
    stamps = in_parallel(lambda name: _stamp(subject, files(name)), names)
    members = [f"{name}/{stamp}" for name, stamp in zip(names, stamps, strict=True)]
    missing = _load(path, members, into)
    for index, sample in zip(missing, in_parallel(read, [names[index] for index in missing]), strict=True):
        for array, values in zip(into, sample, strict=True):
            array[index] = values
    if missing and ranks.is_main():
        _save(path, members, into)


def _stamp(subject: object, files: Sequence[Path]) -> str:
    try:
        stats = [(file.name, file.stat()) for file in files]
    except OSError:
        return uuid4().hex  # nothing is kept under it; to read the file will say what is wrong
    changed = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return blake2b(repr((subject, changed)).encode(), digest_size=16).hexdigest()


def _load(path: Path, members: Sequence[str], into: Sequence[np.ndarray]) -> list[int]:
    """Fill in what is kept at `path`; which of `members` are not."""
    try:
        with path.open("rb", BUFFER) as content, ZipFile(content) as file:
            kept = set(file.namelist())
            for index, member in enumerate(members):
                if member in kept:
                    _unpack(file.read(member), [array[index] for array in into])
            return [index for index, member in enumerate(members) if member not in kept]
    except (FileNotFoundError, NotADirectoryError):
        pass
    except Exception as error:  # damage leads zipfile to all kinds of them
        _say(f"{path}: can't be used ({error}); reading the data itself")
    return list(range(len(members)))


def _unpack(content: bytes, into: Sequence[np.ndarray]) -> None:
    start = 0
    for array in into:
        values = np.frombuffer(content, array.dtype, array.size, start)
        array[...] = values.reshape(array.shape)
        start += array.nbytes


def _save(path: Path, members: Sequence[str], into: Sequence[np.ndarray]) -> None:
    """Keep all samples, and of those that were kept before the ones of other names."""
    part = path.with_name(f"{path.name}.{uuid4().hex}")  # several processes may start together
    try:
        path.parent.mkdir(exist_ok=True)
        _remove_leftovers(path)
        try:
            with ZipFile(part, "w") as file:
                for index, member in enumerate(members):
                    file.writestr(ZipInfo(member), b"".join(array[index].tobytes() for array in into))
                for member, content in _others(path, {_name(member) for member in members}):
                    file.writestr(ZipInfo(member), content)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        _say(f"{path.parent}: can't be written ({error.strerror}); the data will be read anew next time")


def _remove_leftovers(path: Path) -> None:
    """What processes that were killed while they wrote have left, if it is an hour old."""
    for part in path.parent.glob(f"{path.name}.*"):
        if time.time() - part.stat().st_mtime > 3_600:
            part.unlink(missing_ok=True)


def _others(path: Path, names: set[str]) -> Iterator[tuple[str, bytes]]:
    """What is kept at `path` of other names."""
    try:
        with ZipFile(path) as file:
            for member in file.namelist():
                if _name(member) not in names:
                    yield member, file.read(member)
    except Exception:  # there is none yet, or it is damaged
        return


def _name(member: str) -> str:
    return member.split("/")[0]


@cache  # once, though labelled and unlabelled samples meet the same folder
def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
