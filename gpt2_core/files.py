"""Atomic writes: a reader never sees an incomplete file."""

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
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a whole file: a reader finds the old content or the new, never a part."""
    with writing(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
