"""Atomic writes: a reader never sees an incomplete file, nor does a power cut leave one."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, under a temporary name in the folder of `path`, renamed to `path` when it is complete.

    After an error nothing is left behind and the old file at `path` stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a whole file: a reader finds the old content or the new, never a part."""
    with writing(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


def publish(temporary: Path, path: Path) -> None:
    """Rename a complete folder to `path`, which isn't there: all its files are on disk before it has that name."""
    for folder, _, names in os.walk(temporary):
        for name in names:
            _sync(Path(folder) / name)
        _sync(Path(folder))
    temporary.rename(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Return when the disk holds a file's content, or a folder's names: a rename may reach it before what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
