"""Token files of other tools, read as they are: nanoGPT's, llm.c's and modded-nanogpt's, datatrove's.

| whose | what | source |
|---|---|---|
| nanoGPT | raw uint16 | karpathy/nanoGPT, data/*/prepare.py |
| llm.c, modded-nanogpt | 256 int32 (magic, version, number of tokens), then uint16 or uint32 | karpathy/llm.c, dev/data/data_common.py |
| datatrove | raw uint16 or uint32, beside .index (uint64 document ends) and .metadata (tokenizer and bytes a token) | huggingface/datatrove, pipeline/tokens/tokenizer.py |

All are little-endian. A file is validation if its name has `val` in it.
"""  # noqa: E501

import hashlib
import mmap
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from gpt2_core.data import tokenizer
from gpt2_core.data.patterns import matching
from gpt2_core.errors import UserError
from gpt2_core.parsing import read_text

_HEADER_BYTES = 256 * 4
# magic: (version, dtype of the ids)
_HEADERS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


class TokenFile(NamedTuple):
    """A file and where its ids lie in it."""

    path: Path
    dtype: np.dtype
    offset: int
    tokens: int

    def open(self) -> np.ndarray:
        return map_tokens(self.path, self.dtype, self.offset, self.tokens)


def map_tokens(path: Path, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
    """`count` ids from byte `offset` on, memory-mapped; read, with a warning, where the file system can't map."""
    if count == 0:
        return np.zeros(0, dtype)
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        # Windows are read in random order: reading ahead would fetch many times what is asked for.
        mapped.madvise(mmap.MADV_RANDOM)
        return np.frombuffer(mapped, dtype, count, offset)
    except OSError as error:
        Console(stderr=True, markup=False, highlight=False, soft_wrap=True).print(
            f"warning: {path} can't be memory-mapped here ({error.strerror}); reading its "
            f"{count * dtype.itemsize / 1e6:,.0f} MB into memory"
        )
        return np.fromfile(path, dtype, count, offset=offset)


def find(where: str, tokenizer_name: str) -> dict[str, list[TokenFile]]:
    """The token files that a path, a folder or a pattern names, by split; raises UserError for none or damaged ones."""
    path = Path(where)
    if path.is_dir():
        found = [p for p in path.iterdir() if p.suffix in (".bin", ".ds") and p.is_file()]
    elif path.is_file():
        found = [path]
    else:
        found = matching(where)
    if not found:
        raise UserError(
            f"--data.tokens {where}: no token files there; expected a folder that gpt2 prepare wrote, or .bin files "
            "of nanoGPT or llm.c, or .ds files of datatrove"
        )
    splits: dict[str, list[TokenFile]] = {"train": [], "val": []}
    for file in sorted(found):
        splits["val" if "val" in file.name else "train"].append(_describe(file, tokenizer_name))
    return splits


def sampled_digest(file: TokenFile) -> str:
    """Identifies a file by its size and 64 samples of it: nobody recorded the sha256 of a file of 100 GB."""
    size = file.path.stat().st_size
    digest = hashlib.sha256(f"{size} {file.dtype}".encode())
    with file.path.open("rb") as opened:
        for i in range(_SAMPLES):
            opened.seek(i * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
            digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _describe(path: Path, tokenizer_name: str) -> TokenFile:
    size = path.stat().st_size
    if path.suffix == ".ds":
        return _datatrove(path, size, tokenizer_name)
    with path.open("rb") as file:
        head = file.read(_HEADER_BYTES)
    header = np.frombuffer(head, "<i4") if len(head) == _HEADER_BYTES else np.zeros(256, "<i4")
    if int(header[0]) not in _HEADERS:
        return _raw(path, size, np.dtype("<u2"))
    version, dtype = _HEADERS[int(header[0])]
    if header[1] != version:
        raise UserError(f"{path}: a token file of version {header[1]}; of this kind only version {version} is known")
    dtype, count = np.dtype(dtype), int(header[2])
    if size != _HEADER_BYTES + count * dtype.itemsize:
        raise UserError(
            f"{path}: {size} bytes where its header says {count} tokens, {_HEADER_BYTES + count * dtype.itemsize} "
            "bytes; the file is truncated or damaged: download it again"
        )
    return TokenFile(path, dtype, _HEADER_BYTES, count)


def _raw(path: Path, size: int, dtype: np.dtype) -> TokenFile:
    if size % dtype.itemsize:
        raise UserError(
            f"{path}: {size} bytes are not a whole number of {dtype.name} tokens; the file is truncated or damaged"
        )
    return TokenFile(path, dtype, 0, size // dtype.itemsize)


def _datatrove(path: Path, size: int, tokenizer_name: str) -> TokenFile:
    metadata, index = Path(f"{path}.metadata"), Path(f"{path}.index")
    bytes_a_token = 2 if tokenizer.vocab_size(tokenizer_name) <= 1 << 16 else 4  # datatrove's own rule
    if metadata.is_file():
        name, _, given = read_text(metadata).split("\n")[0].partition("|")
        known = name.rpartition("/")[2]
        if known != tokenizer_name and name != "Unknown Tokenizer":
            raise UserError(
                f"--data.tokenizer {tokenizer_name}: {path} was written with the tokenizer {name}"
                + (f"; use --data.tokenizer {known}" if known in tokenizer.NAMES else ", which isn't supported here")
            )
        bytes_a_token = int(given) if given in ("2", "4") else bytes_a_token
    file = _raw(path, size, np.dtype(f"<u{bytes_a_token}"))
    if index.is_file():
        ends = np.fromfile(index, "<u8")
        if len(ends) and ends[-1] != file.tokens:
            raise UserError(
                f"{path}: {file.tokens} tokens where {index.name} says {ends[-1]}; the file is truncated or damaged"
            )
    return file
