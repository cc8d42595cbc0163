"""Where text comes from: named corpora and the user's own files, as documents in a fixed order."""

import dataclasses
import hashlib
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from gpt2_core.config import DataConfig
from gpt2_core.errors import UserError

NAMES = ("stdlib", "text")

# Folders of the standard library that aren't its source, or that some distributions leave out.
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "__pycache__", "idlelib", "idle_test"})


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A named, ordered set of text files; each file is one document."""

    name: str
    source: str
    """What it is and where it lies, in words."""
    files: tuple[Path, ...]

    def documents(self) -> Iterator[str]:
        """The text of each file. Raises UserError for one that is empty or isn't UTF-8 (`text` only)."""
        for path in self.files:
            try:
                content = path.read_bytes()
            except OSError as error:
                raise UserError(f"--data.corpus {self.name}: can't read {path} ({error.strerror})") from error
            if self.name == "stdlib":
                yield content.decode("utf-8", errors="replace")
                continue
            try:
                text = content.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"--data.path {path}: not UTF-8 text (byte {error.start} is 0x{content[error.start]:02x}); "
                    "convert it first, with iconv for instance"
                ) from error
            if not text:
                raise UserError(f"--data.path {path}: the file is empty; give a file with text")
            yield text

    def fingerprint(self) -> str:
        """Changes whenever a file is added, removed, resized or rewritten."""
        digest = hashlib.sha256(self.name.encode())
        for path in self.files:
            stat = path.stat()
            digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()


def get_corpus(config: DataConfig) -> Corpus:
    """The corpus that `data.corpus` and `data.path` name; raises UserError if there is none."""
    if config.corpus == "stdlib":
        if config.path is not None:
            raise UserError(
                f"--data.path {config.path}: the corpus stdlib reads Python's own files; add --data.corpus text"
            )
        return _stdlib()
    if config.corpus == "text":
        if config.path is None:
            raise UserError("--data.corpus text: name the file with --data.path FILE")
        path = Path(config.path)
        if not path.is_file():
            raise UserError(f"--data.path {path}: no such file")
        return Corpus("text", str(path), (path.resolve(),))
    raise UserError(f"--data.corpus {config.corpus}: no such corpus; use {' or '.join(NAMES)}")


def _stdlib() -> Corpus:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = (path for path in root.rglob("*.py") if path.is_file() and path.stat().st_size > 0)
    files = [path for path in found if not _NOT_STDLIB.intersection(path.relative_to(root).parts)]
    if not files:
        raise UserError(f"--data.corpus stdlib: no Python sources under {root}; use --data.corpus text")
    files.sort(key=lambda path: path.relative_to(root).as_posix())
    return Corpus("stdlib", f"sources of Python {platform.python_version()}'s standard library", tuple(files))
