"""Text, JSONL and Parquet files as a corpus, plain or compressed."""

import codecs
import contextlib
import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from gpt2_core.config import DataConfig
from gpt2_core.data.compression import COMPRESSED, decompressed
from gpt2_core.data.documents import Corpus, Document, UnreachableError, in_pieces, pieces_of, text_of
from gpt2_core.data.extras import import_extra
from gpt2_core.data.patterns import matching
from gpt2_core.errors import UserError
from gpt2_core.parsing import json_object

_BLOCK = 1 << 18  # bytes
_LONGEST_LINE = 1 << 28

SUFFIXES = {
    "text": (".txt", ".text", ".md"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet",),
}


class Files(Corpus):
    """Files of one kind. A text file is one document; a line of a JSONL file or a row of a Parquet file is one.

    A single text file has no documents to draw from: its last `fraction` is the validation split.
    """

    def __init__(
        self,
        name: str,
        source: str,
        files: Iterable[Path],
        *,
        kind: str = "text",
        field: str = "text",
        fraction: float = 0.0,
        errors: str = "strict",
    ) -> None:
        self.name, self.source, self.files = name, source, tuple(files)
        self.kind, self._field, self._fraction, self._errors = kind, field, fraction, errors
        self._sizes = [path.stat().st_size for path in self.files]
        self._before, self._file = 0, None  # bytes of the files already read, and the file being read

    def documents(self, start: int = 0) -> Iterator[Document]:
        read = {"text": self._texts, "jsonl": self._lines, "parquet": self._rows}[self.kind]
        self._before, number = 0, 0
        for path, size in zip(self.files, self._sizes, strict=True):
            with _reading(path):
                for document in read(path):
                    if number >= start:
                        yield document
                    number += 1
            self._before, self._file = self._before + size, None

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.name} {self.kind} {self._field}".encode())
        for path in self.files:
            stat = path.stat()
            digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def progress(self) -> float | None:
        within = self._file.tell() if self._file and not self._file.closed else 0
        return (self._before + within) / max(1, sum(self._sizes))

    def _texts(self, path: Path) -> Iterator[Document]:
        if len(self.files) > 1 or self._fraction == 0:
            yield Document(None if len(self.files) > 1 else "train", self._pieces(path, 0, None))
            return
        size = self._text_size(path)
        if size == 0:
            raise UserError(f"--data.path {path}: the file is empty; give a file with text")
        cut = self._character_start(path, int(size * (1.0 - self._fraction)))
        yield Document("train", self._pieces(path, 0, cut))
        yield Document("val", self._pieces(path, cut, None))

    def _pieces(self, path: Path, begin: int, end: int | None) -> Iterator[str]:
        """The text from byte `begin` to byte `end`."""
        with _reading(path), self._open(path) as file:
            _skip(file, begin, path)
            yield from in_pieces(_decoded(file, path, begin, end, self._errors))

    def _text_size(self, path: Path) -> int:
        if path.suffix not in COMPRESSED:
            return path.stat().st_size
        with self._open(path) as file:
            return sum(map(len, iter(lambda: file.read(_BLOCK), b"")))

    def _character_start(self, path: Path, offset: int) -> int:
        """The first byte at or after `offset` at which a UTF-8 character begins."""
        with self._open(path) as file:
            _skip(file, offset, path)
            following = file.read(4)
        return offset + next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), 0)

    def _lines(self, path: Path) -> Iterator[Document]:
        with self._open(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE), b""), start=1):
                where = f"{path}, line {number}"
                if len(line) == _LONGEST_LINE:
                    raise UserError(f"{where}: longer than {_LONGEST_LINE >> 20} MB; expected one JSON object a line")
                text = "" if line.isspace() else self._field_of(line, where)
                yield Document(None, pieces_of(text))

    def _field_of(self, line: bytes, where: str) -> str:
        return text_of(json_object(line, where), self._field, where)

    def _rows(self, path: Path) -> Iterator[Document]:
        parquet = import_extra("pyarrow.parquet", "Parquet files")
        arrow = import_extra("pyarrow", "Parquet files")
        try:
            with path.open("rb") as self._file, parquet.ParquetFile(self._file) as file:
                if self._field not in file.schema_arrow.names:
                    raise UserError(
                        f"--data.field {self._field}: {path} has no such column; it has "
                        f"{', '.join(file.schema_arrow.names)}"
                    )
                for batch in file.iter_batches(batch_size=1024, columns=[self._field]):
                    for text in batch.column(0).to_pylist():
                        row = {self._field: text}
                        yield Document(None, pieces_of(text_of(row, self._field, str(path))))
        except arrow.ArrowException as error:
            raise UserError(f"{path}: not a complete Parquet file ({error})") from error

    def _open(self, path: Path) -> BinaryIO:
        self._file = path.open("rb")
        return decompressed(self._file, path.suffix)


def kind_of(path: str) -> str | None:
    """text, jsonl or parquet, by a file's suffix."""
    name = Path(path).name.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return next((kind for kind, suffixes in SUFFIXES.items() if name.endswith(suffixes)), None)


def users_files(config: DataConfig) -> Files:
    """The files that `data.path` names: one file, those in a folder, or those that match a pattern; raises UserError if
    there are none."""
    kind, path = config.corpus, config.path
    if path is None:
        raise UserError(f"--data.corpus {kind}: name the file, folder or pattern with --data.path")
    if Path(path).is_dir():
        found = (Path(path, name) for name in _files_below(path))
        files = [file for file in found if kind_of(file.name) == kind]
        endings = ", ".join(SUFFIXES[kind])
        missing = (
            f"no file in it ends in {endings} (or these with .gz or .zst); for other files use another --data.corpus"
        )
    elif any(character in path for character in "*?[") and not Path(path).exists():
        files = matching(path)
        missing = "no file matches"
    else:
        files = [Path(path)] if Path(path).is_file() else []
        missing = 'no such file; give a file, a folder or a pattern such as "*.txt"'
    if not files:
        raise UserError(f"--data.path {path}: {missing}")
    for file in files:
        if not file.exists():
            raise UserError(f"--data.path {path}: {file} is a link to a file that isn't there")
    files = sorted(file.resolve() for file in files)
    if len(files) == 1 and kind == "text" and files[0].stat().st_size == 0:
        raise UserError(f"--data.path {path}: the file is empty; give a file with text")
    source = path if len(files) == 1 else f"{path} ({len(files)} files)"
    return Files(kind, source, files, kind=kind, field=config.field, fraction=config.validation_fraction)


def _files_below(folder: str) -> Iterator[str]:
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.relpath(os.path.join(root, name), folder) for name in names if not name.startswith("."))


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn errors of reading a file into a UserError: UnreachableError where it may be readable again later."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # as gzip reports a damaged file
            raise UserError(f"{path}: can't be read ({error})") from error
        raise UnreachableError(f"{path}: can't be read ({error.strerror}); give the same command again") from error
    except (EOFError, zlib.error) as error:
        raise UserError(f"{path}: the compressed file is truncated or damaged ({error})") from error


def _decoded(file: BinaryIO, path: Path, begin: int, end: int | None, errors: str) -> Iterator[str]:
    """The text from the file's place, byte `begin`, to byte `end`, or to its end."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    offset = begin
    while True:
        content = file.read(_BLOCK if end is None else min(_BLOCK, end - offset))
        pending = len(decoder.getstate()[0])
        try:
            yield decoder.decode(content, final=not content)
        except UnicodeDecodeError as error:
            raise UserError(
                f"--data.path {path}: not UTF-8 text (byte {offset - pending + error.start} is "
                f"0x{error.object[error.start]:02x}); convert it first, with iconv for instance"
            ) from error
        if not content:
            if end is not None and offset < end:
                raise _truncated(path)
            return
        offset += len(content)


def _skip(file: BinaryIO, count: int, path: Path) -> None:
    while count:
        content = file.read(min(count, _BLOCK))
        if not content:
            raise _truncated(path)
        count -= len(content)


def _truncated(path: Path) -> UserError:
    return UserError(f"{path}: has become shorter while it was read; give the same command again")
