"""Token files on disk: written once for a corpus, tokenizer and split, then memory-mapped.

A token folder holds `train.bin` and `val.bin` (raw little-endian ids, nanoGPT's layout) and `index.json`.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gpt2_core.config import DataConfig, TrainConfig
from gpt2_core.corpora import Corpus, get_corpus
from gpt2_core.errors import UserError
from gpt2_core.tokenizer import Tokenizer, get_tokenizer

_VERSION = 1
_SPLITS = ("train", "val")


@dataclasses.dataclass(frozen=True)
class TokenFolder:
    """Open token files. `train` and `val` are ids of shape (T,), memory-mapped; `val` may be empty."""

    path: Path
    train: np.ndarray
    val: np.ndarray
    tokenizer: str
    source: str
    digest: str
    """Identifies the tokens themselves: two folders with the same digest train the same."""


def open_tokens(config: TrainConfig) -> TokenFolder:
    """The tokens this configuration trains on, written first if they aren't on disk yet.

    Raises UserError if the text is too short for the model's block size or has ids beyond its vocabulary.
    """
    tokenizer = get_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"--model.vocab_size {config.model.vocab_size}: the tokenizer {tokenizer.name} has "
            f"{tokenizer.vocab_size} ids; use {tokenizer.vocab_size} or more"
        )
    folder = _read(_prepare(config.data, config.seed, tokenizer))
    needed = config.model.block_size + 1
    for split in _SPLITS if config.data.validation_fraction > 0 else ("train",):
        found = len(getattr(folder, split))
        if found < needed:
            raise UserError(
                f"--model.block_size {config.model.block_size}: the {split} split of {folder.source} has only "
                f"{found} tokens and a sequence needs {needed}; use a smaller block_size, a longer text, or another "
                "--data.validation_fraction"
            )
    return folder


def _prepare(config: DataConfig, seed: int, tokenizer: Tokenizer) -> Path:
    corpus = get_corpus(config)
    identity = f"{_VERSION} {corpus.fingerprint()} {tokenizer.name} {config.validation_fraction} {seed}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:12]
    path = Path(config.cache_dir) / f"{corpus.name}-{tokenizer.name}-{key}"
    if not path.is_dir():
        _write(path, corpus, tokenizer, config.validation_fraction, seed)
    return path


def _write(path: Path, corpus: Corpus, tokenizer: Tokenizer, fraction: float, seed: int) -> None:
    """Into a temporary folder first, so that a folder with this name is always whole."""
    dtype = np.dtype("<u2") if tokenizer.vocab_size <= 1 << 16 else np.dtype("<u4")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        counts = dict.fromkeys(_SPLITS, 0)
        with (temporary / "train.bin").open("wb") as train, (temporary / "val.bin").open("wb") as val:
            files = {"train": train, "val": val}
            for split, text in _split(corpus, fraction, seed):
                ids = np.append(tokenizer.encode(text), tokenizer.end_of_text).astype(dtype)
                files[split].write(ids.tobytes())
                counts[split] += len(ids)
        index = {
            "version": _VERSION,
            "tokenizer": tokenizer.name,
            "source": corpus.source,
            "dtype": dtype.name,
            "validation_fraction": fraction,
            "tokens": counts,
            "sha256": {split: _sha256(temporary / f"{split}.bin") for split in _SPLITS},
        }
        (temporary / "index.json").write_text(json.dumps(index, indent=2) + "\n")
        try:
            temporary.rename(path)
        except OSError:
            # Another process wrote the same tokens meanwhile; any other reason is an error.
            if not path.is_dir():
                raise
    except OSError as error:
        raise UserError(f"--data.cache_dir {path.parent}: can't write there ({error.strerror})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _split(corpus: Corpus, fraction: float, seed: int) -> Iterator[tuple[str, str]]:
    """(split, text) pairs. Whole documents go to one split, drawn from the seed; a single document is cut instead,
    its end being validation."""
    if len(corpus.files) == 1:
        (text,) = corpus.documents()
        cut = int(len(text) * (1.0 - fraction))
        yield from ((split, part) for split, part in (("train", text[:cut]), ("val", text[cut:])) if part)
        return
    generator = np.random.default_rng(seed)
    sizes = np.array([path.stat().st_size for path in corpus.files])
    order = generator.permutation(len(sizes))
    wanted = np.searchsorted(np.cumsum(sizes[order]), fraction * sizes.sum())
    validation = set(order[: max(1, wanted) if fraction > 0 else 0].tolist())
    for number, text in enumerate(corpus.documents()):
        yield ("val" if number in validation else "train"), text


def _read(path: Path) -> TokenFolder:
    try:
        index = json.loads((path / "index.json").read_text())
        dtype = np.dtype(index["dtype"]).newbyteorder("<")
        arrays = {}
        for split in _SPLITS:
            file = path / f"{split}.bin"
            if file.stat().st_size != index["tokens"][split] * dtype.itemsize:
                raise UserError(
                    f"{file}: {file.stat().st_size} bytes where index.json says "
                    f"{index['tokens'][split] * dtype.itemsize}; delete {path} to have it written anew"
                )
            empty = index["tokens"][split] == 0
            arrays[split] = np.zeros(0, dtype) if empty else np.memmap(file, dtype, mode="r")
        digest = hashlib.sha256(json.dumps(index["sha256"], sort_keys=True).encode()).hexdigest()
        return TokenFolder(path, arrays["train"], arrays["val"], index["tokenizer"], index["source"], digest)
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{path}: not a whole token folder ({error}); delete it to have it written anew") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
