"""Where text comes from: named corpora and the user's own files, as documents in a fixed order.

A document comes in pieces, so that no text need fit in memory and all cores can work on one. Pieces are cut where
every tokenizer begins a new token anyway: between a letter or digit and the space or line break after it.
"""

import codecs
import contextlib
import gzip
import hashlib
import importlib
import io
import json
import os
import platform
import re
import sysconfig
import urllib.request
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from gpt2_core.config import DataConfig
from gpt2_core.data.network import network_error
from gpt2_core.errors import UserError
from gpt2_core.files import write_atomically

PIECE = 1 << 16  # characters, at least, unless the text ends
LONGEST_PIECE = 1 << 18  # a stretch this long without a place to cut is cut here all the same
_BLOCK = 1 << 18
_LONGEST_LINE = 1 << 28
_BOUNDARY = re.compile(r"[^\W_](?=[ \n])")
_DOWNLOAD_SECONDS = 30

SUFFIXES = {
    "text": (".txt", ".text", ".md"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet",),
}
_COMPRESSED = (".gz", ".zst")


class _OnTheHub(NamedTuple):
    dataset: str
    config: str | None
    splits: dict[str, str]
    """The dataset's own name of each split that it has; without `val`, documents are drawn for it."""
    streaming: bool
    """Tokenised while it is downloaded, instead of a copy on disk first."""
    articles: bool = False
    """Rows are lines, and a document begins at a line like ' = Title = '."""


_HUB = {
    "openwebtext": _OnTheHub("Skylion007/openwebtext", None, {"train": "train"}, True),
    "tinystories": _OnTheHub("roneneldan/TinyStories", None, {"train": "train", "val": "validation"}, True),
    "wikitext2": _OnTheHub(
        "Salesforce/wikitext", "wikitext-2-raw-v1", {"train": "train", "val": "validation"}, False, articles=True
    ),
    "wikitext103": _OnTheHub(
        "Salesforce/wikitext", "wikitext-103-raw-v1", {"train": "train", "val": "validation"}, False, articles=True
    ),
    "fineweb-edu-10b": _OnTheHub("HuggingFaceFW/fineweb-edu", "sample-10BT", {"train": "train"}, True),
}

# 1,115,394 characters, in public since char-rnn; nanoGPT and minGPT train on the same file.
_SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

NAMES = ("stdlib", "shakespeare", *_HUB, *SUFFIXES)

# Folders of the standard library that aren't its source, or that some distributions leave out.
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "__pycache__", "idlelib", "idle_test"})


class UnreachableError(UserError):
    """A source that can't be read now and may be later: what has been written so far is worth keeping."""


class Document(NamedTuple):
    """`split` is train or val where the corpus says so, None where it is to be drawn. `pieces` together are the text;
    they must be read before the next document is asked for."""

    split: str | None
    pieces: Iterator[str]


class Corpus(ABC):
    """`name` as in `data.corpus`; `source`: what it is and where it lies, in words."""

    name: str
    source: str

    @abstractmethod
    def documents(self, start: int = 0) -> Iterator[Document]:
        """The documents from number `start` on, the same at every call. Raises UserError for what can't be read."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes whenever the documents may have changed."""

    def progress(self) -> float | None:
        """The share of the corpus that the newest iteration has read, or None where that isn't known."""
        return None


class Files(Corpus):
    """Files of one kind. A text file is one document; a line of a JSONL file or a row of a Parquet file is one.

    A text file that stands alone is cut instead of drawn: its last `fraction` is validation.
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
        """The text between two bytes."""
        with _reading(path), self._open(path) as file:
            _skip(file, begin)
            yield from in_pieces(_decoded(file, path, begin, end, self._errors))

    def _text_size(self, path: Path) -> int:
        if path.suffix not in _COMPRESSED:
            return path.stat().st_size
        with self._open(path) as file:
            return sum(map(len, iter(lambda: file.read(_BLOCK), b"")))

    def _character_start(self, path: Path, offset: int) -> int:
        """`offset`, or the byte after it where a character begins."""
        with self._open(path) as file:
            _skip(file, offset)
            following = file.read(4)
        return offset + next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), 0)

    def _lines(self, path: Path) -> Iterator[Document]:
        with self._open(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE), b""), start=1):
                where = f"{path}, line {number}"
                if len(line) == _LONGEST_LINE:
                    raise UserError(f"{where}: longer than {_LONGEST_LINE >> 20} MB; expected one JSON object a line")
                text = "" if line.isspace() else self._field_of(line, where)
                yield Document(None, in_pieces(_blocks(text)))

    def _field_of(self, line: bytes, where: str) -> str:
        try:
            row = json.loads(line)
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 text (byte {error.start})") from error
        except ValueError as error:
            raise UserError(f"{where}: not JSON ({error}); expected one JSON object a line") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
        return _text_of(row, self._field, where)

    def _rows(self, path: Path) -> Iterator[Document]:
        parquet = _import("pyarrow.parquet", "Parquet files")
        arrow = _import("pyarrow", "Parquet files")
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
                        yield Document(None, in_pieces(_blocks(_text_of(row, self._field, str(path)))))
        except arrow.ArrowException as error:
            raise UserError(f"{path}: not a whole Parquet file ({error})") from error

    def _open(self, path: Path) -> BinaryIO:
        self._file = path.open("rb")
        if path.suffix == ".gz":
            return _ClosingBoth(gzip.GzipFile(fileobj=self._file), self._file)
        if path.suffix == ".zst":
            return _ClosingBoth(_Zstd(self._file), self._file)
        return self._file


class Hub(Corpus):
    """A corpus of Hugging Face's hub, by `datasets`."""

    def __init__(self, name: str, *, validation: bool) -> None:
        self.name, self._where = name, _HUB[name]
        self._splits = {ours: theirs for ours, theirs in self._where.splits.items() if validation or ours == "train"}
        self.source = f"{self._where.dataset} of the Hugging Face hub"
        self._read, self._total = 0, None
        _import("datasets", f"the corpus {name}")

    def documents(self, start: int = 0) -> Iterator[Document]:
        loaded = {ours: self._load(theirs) for ours, theirs in self._splits.items()}
        counts = [getattr(data.info.splits.get(self._splits[ours]), "num_examples", None)
                  for ours, data in loaded.items() if data.info.splits]  # fmt: skip
        self._total = sum(counts) if counts and all(counts) else None
        self._read, number = 0, 0
        for ours, data in loaded.items():
            split = ours if "val" in self._where.splits else None
            if self._where.articles:
                for text in _articles(self._rows(data)):
                    if number >= start:
                        yield Document(split, in_pieces(_blocks(text)))
                    number += 1
                continue
            # Without articles a row is a document, and datasets skips rows faster than we could.
            skipped = max(0, start - number) if len(loaded) == 1 else 0
            self._read += skipped
            number += skipped
            for text in self._rows(data.skip(skipped) if skipped else data):
                if number >= start:
                    yield Document(split, in_pieces(_blocks(text)))
                number += 1

    def fingerprint(self) -> str:
        return hashlib.sha256(repr((self.name, self._where, sorted(self._splits))).encode()).hexdigest()

    def progress(self) -> float | None:
        return self._read / self._total if self._total else None

    def _load(self, split: str) -> Any:
        datasets = _import("datasets", f"the corpus {self.name}")
        where = self._where
        no_network = None if datasets.config.HF_HUB_OFFLINE else network_error(datasets.config.HF_ENDPOINT)
        try:
            with _offline() if no_network else contextlib.nullcontext():
                return datasets.load_dataset(where.dataset, where.config, split=split, streaming=where.streaming)
        except Exception as error:  # what it raises without a network differs from version to version
            raise self._unreachable(no_network or error) from error

    def _rows(self, data: Any) -> Iterator[str]:
        rows = iter(data)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:
                raise self._unreachable(error) from error
            self._read += 1
            yield _text_of(row, "text", self.source)

    def _unreachable(self, error: Exception) -> UnreachableError:
        return UnreachableError(
            f"--data.corpus {self.name}: {self._where.dataset} can't be read from the Hugging Face hub "
            f"({' '.join(str(error).split())[:200]}); check the network, or use your own text: --data.corpus "
            f"{' or '.join(SUFFIXES)} with --data.path"
        )


def get_corpus(config: DataConfig) -> Corpus:
    """The corpus that `data.corpus` and `data.path` name; raises UserError if there is none."""
    name = config.corpus
    if name not in NAMES:
        raise UserError(f"--data.corpus {name}: no such corpus; use {', '.join(NAMES[:-1])} or {NAMES[-1]}")
    if name in SUFFIXES:
        return _users_files(config)
    if config.path is not None:
        raise UserError(
            f"--data.path {config.path}: the corpus {name} brings its own text; add --data.corpus text (or jsonl, "
            "parquet)"
        )
    if name == "stdlib":
        return _stdlib()
    if name == "shakespeare":
        file = _shakespeare(Path(config.cache_dir))
        return Files(name, "Shakespeare, as char-rnn has it", [file], fraction=config.validation_fraction)
    return Hub(name, validation=config.validation_fraction > 0)


def kind_of(path: str) -> str | None:
    """text, jsonl or parquet, by a file's suffix."""
    name = Path(path).name.lower()
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    return next((kind for kind, suffixes in SUFFIXES.items() if name.endswith(suffixes)), None)


def _users_files(config: DataConfig) -> Files:
    kind, path = config.corpus, config.path
    if path is None:
        raise UserError(f"--data.corpus {kind}: name the file, folder or pattern with --data.path")
    if Path(path).is_dir():
        found = (Path(path, name) for name in _files_below(path))
        files = [file for file in found if kind_of(file.name) == kind]
        endings = ", ".join(SUFFIXES[kind])
        missing = f"no file below it ends in {endings} (or these with .gz or .zst)"
    elif any(character in path for character in "*?[") and not Path(path).exists():
        base = Path(path).anchor or "."
        files = [file for file in Path(base).glob(str(Path(path).relative_to(base))) if file.is_file()]
        missing = "no file matches"
    else:
        files = [Path(path)] if Path(path).is_file() else []
        missing = "no such file"
    if not files:
        raise UserError(f"--data.path {path}: {missing}")
    files = sorted(file.resolve() for file in files)
    if len(files) == 1 and kind == "text" and files[0].stat().st_size == 0:
        raise UserError(f"--data.path {path}: the file is empty; give a file with text")
    source = path if len(files) == 1 else f"{path} ({len(files)} files)"
    return Files(kind, source, files, kind=kind, field=config.field, fraction=config.validation_fraction)


def _files_below(folder: str) -> Iterator[str]:
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.relpath(os.path.join(root, name), folder) for name in names if not name.startswith("."))


def _stdlib() -> Files:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = (path for path in root.rglob("*.py") if path.is_file() and path.stat().st_size > 0)
    files = [path for path in found if not _NOT_STDLIB.intersection(path.relative_to(root).parts)]
    if not files:
        raise UserError(f"--data.corpus stdlib: no Python sources under {root}; use --data.corpus text")
    files.sort(key=lambda path: path.relative_to(root).as_posix())
    source = f"sources of Python {platform.python_version()}'s standard library"
    return Files("stdlib", source, files, errors="replace")


def _shakespeare(cache: Path) -> Path:
    path = cache / "shakespeare.txt"
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == _SHAKESPEARE_SHA256:
        return path
    try:
        with urllib.request.urlopen(_SHAKESPEARE_URL, timeout=_DOWNLOAD_SECONDS) as response:
            content = response.read()
    except OSError as error:
        raise UserError(
            f"--data.corpus shakespeare: {_SHAKESPEARE_URL} can't be reached ({error}); put that file at {path}, or "
            "use another text: --data.corpus text --data.path FILE"
        ) from error
    if hashlib.sha256(content).hexdigest() != _SHAKESPEARE_SHA256:
        raise UserError(f"--data.corpus shakespeare: {_SHAKESPEARE_URL} sent another file than expected; try again")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise UserError(f"--data.cache_dir {cache}: can't write there ({error.strerror})") from error
    return path


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Have `datasets` look in its cache alone, where it would otherwise try to connect for half a minute.

    HF_HUB_OFFLINE in the environment does the same, but is read when the packages are first imported.
    """
    settings = [importlib.import_module(name) for name in ("datasets.config", "huggingface_hub.constants")]
    before = [module.HF_HUB_OFFLINE for module in settings]
    for module in settings:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(settings, before, strict=True):
            module.HF_HUB_OFFLINE = value


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What goes wrong with a file, in words."""
    try:
        yield
    except OSError as error:
        # gzip reports a damaged file as an OSError without an errno.
        raise UserError(f"{path}: can't be read ({error.strerror or error})") from error
    except (EOFError, zlib.error) as error:
        raise UserError(f"{path}: the compressed file is cut short or damaged ({error})") from error


def in_pieces(blocks: Iterable[str]) -> Iterator[str]:
    """The text that `blocks` make together, cut again into pieces that depend on the text alone."""
    rest = ""
    for block in blocks:
        rest += block
        while (cut := _first_cut(rest)) is not None:
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def _first_cut(text: str) -> int | None:
    if len(text) <= PIECE:
        return None
    found = _BOUNDARY.search(text, PIECE, LONGEST_PIECE)
    if found:
        return found.end()
    return LONGEST_PIECE if len(text) >= LONGEST_PIECE else None


def _blocks(text: str) -> Iterator[str]:
    return (text[i : i + _BLOCK] for i in range(0, len(text), _BLOCK))


def _decoded(file: BinaryIO, path: Path, begin: int, end: int | None, errors: str) -> Iterator[str]:
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
            return
        offset += len(content)


def _skip(file: BinaryIO, count: int) -> None:
    while count:
        count -= len(file.read(min(count, _BLOCK)))


def _articles(lines: Iterator[str]) -> Iterator[str]:
    """Lines joined into articles; a heading of the first level (' = Title = ') begins one."""
    article: list[str] = []
    for line in lines:
        if re.fullmatch(r" = [^=].*[^=] = \n?", line) and article:
            yield "".join(article)
            article = []
        article.append(line)
    if article:
        yield "".join(article)


def _text_of(row: dict[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise UserError(f"--data.field {field}: {where} has no such field; it has {', '.join(row)}")
    text = row[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"--data.field {field}: {where} holds {type(text).__name__} there; expected text")
    return text


def _import(module: str, purpose: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{purpose} need the package {module.split('.')[0]}: pip install 'gpt2-jax[data]'") from error


class _ClosingBoth(io.BufferedIOBase):
    """A decompressing reader that closes the file below it too."""

    def __init__(self, stream: Any, file: BinaryIO) -> None:
        self._stream, self._below = io.BufferedReader(stream), file

    def read(self, size: int = -1, /) -> bytes:
        return self._stream.read(size)

    def readline(self, size: int = -1, /) -> bytes:
        return self._stream.readline(size)

    def close(self) -> None:
        self._stream.close()
        self._below.close()
        super().close()


class _Zstd(io.RawIOBase):
    """Decompresses frame after frame; a file that ends within one is an error, which zstandard's own reader hides."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._zstandard = file, _import("zstandard", "zstd files")
        self._frame, self._ready, self._compressed = None, b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            content = self._compressed or self._file.read(_BLOCK)
            if not content:
                if self._frame is not None:
                    raise EOFError("it ends within a zstd frame")
                return 0
            self._frame = self._frame or self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._ready = self._frame.decompress(content)
            except self._zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
            self._compressed = b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count
