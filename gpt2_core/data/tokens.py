"""The tokens that a run trains on: opened, checked, and written first if a corpus isn't on disk yet.

A token folder holds `train-00000.bin`, `val-00000.bin`, ... (raw little-endian ids) and `index.json`
(`gpt2_core.data.prepare` writes it); `verified.json` notes which of its files have been checked against their sha256.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import operator
from pathlib import Path

import numpy as np

from gpt2_core.config import ResolvedConfig, TrainConfig, parse_mixture
from gpt2_core.config.checks import LARGEST
from gpt2_core.data import token_files
from gpt2_core.data.corpora import get_corpus
from gpt2_core.data.prepare import SPLITS, VERSION, Settings, is_unfinished, prepare
from gpt2_core.data.tokenizer import get_tokenizer, vocab_size
from gpt2_core.errors import UserError
from gpt2_core.files import write_atomically
from gpt2_core.parsing import read_json

_SAMPLE = 1 << 20  # tokens checked for ids beyond the vocabulary, in each shard of unknown origin


@dataclasses.dataclass(frozen=True)
class Source:
    """Shards of one origin: ids of shape (tokens,), memory-mapped, and the name of each."""

    shards: tuple[np.ndarray, ...]
    names: tuple[str, ...]
    weight: float = 1.0
    """Share of the windows in a mixture, relative to the other weights."""
    vocab_size: int | None = None
    """Ids from this number on are an error; None: all ids are valid."""

    def __len__(self) -> int:
        return sum(map(len, self.shards))

    def windows(self, sequence_length: int) -> int:
        """Number of windows of sequence_length + 1 tokens that overlap by one and cross no shard."""
        return sum(max(0, len(shard) - 1) // sequence_length for shard in self.shards)


# One source; several in a mixture; none where there is no validation.
Split = tuple[Source, ...]


@dataclasses.dataclass(frozen=True)
class TokenFolder:
    """Open tokens; `val` may be empty."""

    path: Path
    train: Split
    val: Split
    source: str
    """The text, and the folder that its tokens are in; a mixture's parts."""
    digest: str
    """Identifies the tokens themselves: two folders with the same digest train the same."""


def open_tokens(config: TrainConfig) -> TokenFolder:
    """The tokens this configuration trains on, written first if they aren't on disk yet.

    Raises UserError if the text is too short for the model's block size, has ids beyond its vocabulary, or was written
    with another tokenizer; if a file is truncated or damaged; if there is nothing to validate on.
    """
    data, needed = config.data, vocab_size(config.data.tokenizer)
    if needed > config.model.vocab_size:
        raise UserError(
            f"--model.vocab_size {config.model.vocab_size}: the tokenizer {data.tokenizer} has "
            f"{needed} ids; use {needed} or more"
        )
    if data.mixture is not None:
        folder = _mixed([(_named(name, config), weight) for name, weight in parse_mixture(data.mixture).items()])
    elif data.tokens is not None:
        folder = _named(data.tokens, config)
    else:
        folder = _of_corpus(config)
    if data.validation_fraction == 0:
        folder = dataclasses.replace(folder, val=())
    elif not folder.val:
        raise UserError(
            f"--data.validation_fraction {data.validation_fraction}: {folder.source} has no validation split; add "
            "--data.validation_fraction 0 to train without one"
        )
    for split in SPLITS:
        for source in getattr(folder, split):
            _refuse_too_short(source, split, config, folder.source)
    return folder


def with_steps(config: ResolvedConfig, tokens: TokenFolder) -> ResolvedConfig:
    """The configuration with its number of steps, where that was given in epochs (rounded up to a whole step)."""
    if config.epochs is None:
        return config
    if len(tokens.train) > 1:
        raise UserError(f"--epochs {config.epochs}: a mixture has no epochs of its own; give --steps")
    steps = config.epochs * tokens.train[0].windows(config.tokens_per_sequence) / config.batch_size
    if steps > LARGEST:
        raise UserError(f"--epochs {config.epochs}: {steps:.3g} steps; at most {LARGEST} can be counted")
    return dataclasses.replace(config, steps=math.ceil(steps))


def _of_corpus(config: TrainConfig) -> TokenFolder:
    data = config.data
    corpus, tokenizer = get_corpus(data), get_tokenizer(data.tokenizer)
    identity = f"{VERSION} {corpus.fingerprint()} {tokenizer.name} {data.validation_fraction} {config.seed}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:12]
    path = Path(data.cache_dir) / f"{corpus.name}-{tokenizer.name}-{key}"
    if not (path / "index.json").is_file():
        prepare(path, corpus, tokenizer, Settings(data.validation_fraction, config.seed))
    return _open(path, config)


def _named(name: str, config: TrainConfig) -> TokenFolder:
    path = Path(name)
    if (path / "index.json").is_file():
        return _open(path, config)
    if is_unfinished(path):
        raise UserError(f"--data.tokens {path}: gpt2 prepare hasn't finished it; run its command again first")
    return _foreign(name, config)


def _open(path: Path, config: TrainConfig) -> TokenFolder:
    file = path / "index.json"
    try:
        index = read_json(file)
        if index["version"] != VERSION:
            raise UserError(f"{path}: written by another version; delete it to have it written again")
        dtype = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}[index["dtype"]]
        shards = {
            split: [(str(s["file"]), operator.index(s["tokens"]), s["sha256"]) for s in index["shards"][split]]
            for split in SPLITS
        }
        tokenizer, source = index["tokenizer"], f"{index['source']} ({path})"
    except (KeyError, TypeError) as error:
        raise UserError(f"{file}: not of a token folder ({error}); delete {path} to have it written again") from error
    if tokenizer != config.data.tokenizer:
        raise UserError(
            f"--data.tokenizer {config.data.tokenizer}: {path} was written with {tokenizer}; "
            f"use --data.tokenizer {tokenizer}"
        )
    every = [shard for split in SPLITS for shard in shards[split]]
    for name, tokens, _ in every:
        if Path(name).name != name:
            raise UserError(
                f"{file}: names {name}, which isn't a file of this folder; delete {path} to have it written again"
            )
        _refuse_other_size(path / name, tokens * dtype.itemsize)
    _verify(path, {name: sha256 for name, _, sha256 in every}, config.data.verify == "always")
    splits = {
        split: Source(
            tuple(token_files.map_tokens(path / name, dtype, 0, tokens) for name, tokens, _ in shards[split]),
            tuple(str(path / name) for name, _, _ in shards[split]),
            vocab_size=config.model.vocab_size,
        )
        for split in SPLITS
    }
    digest = hashlib.sha256(json.dumps(shards).encode()).hexdigest()
    val = (splits["val"],) if shards["val"] else ()
    return TokenFolder(path, (splits["train"],), val, source, digest)


def _foreign(name: str, config: TrainConfig) -> TokenFolder:
    found = token_files.find(name, config.data.tokenizer)
    splits: dict[str, Split] = {}
    for split, files in found.items():
        shards = tuple(file.open() for file in files)
        names = tuple(str(file.path) for file in files)
        splits[split] = (Source(shards, names, vocab_size=config.model.vocab_size),) if files else ()
        for shard, path in zip(shards, names, strict=True):
            check_ids(shard[:_SAMPLE], path, 0, config.model.vocab_size)
    if not splits["train"]:
        raise UserError(f"--data.tokens {name}: only validation files there (their names have val in them)")
    digest = hashlib.sha256(" ".join(token_files.sampled_digest(f) for s in SPLITS for f in found[s]).encode())
    return TokenFolder(Path(name), splits["train"], splits["val"], name, digest.hexdigest())


def _mixed(parts: list[tuple[TokenFolder, float]]) -> TokenFolder:
    def weighed(split: str) -> Split:
        return tuple(dataclasses.replace(s, weight=weight) for folder, weight in parts for s in getattr(folder, split))

    digest = hashlib.sha256(" ".join(f"{folder.digest} {weight}" for folder, weight in parts).encode()).hexdigest()
    source = " + ".join(f"{weight:g} x {folder.source}" for folder, weight in parts)
    return TokenFolder(parts[0][0].path, weighed("train"), weighed("val"), source, digest)


def check_ids(ids: np.ndarray, name: str, first: int, vocab_size: int) -> None:
    """Raises UserError if one of `ids`, tokens `first` and following of the file `name`, is beyond the vocabulary."""
    if len(ids) and (largest := int(ids.max())) >= vocab_size:
        raise UserError(
            f"--model.vocab_size {vocab_size}: token {first + int(ids.argmax())} of {name} is id {largest}; these "
            "tokens are another tokenizer's, or the file is damaged"
        )


def _refuse_other_size(file: Path, expected: int) -> None:
    try:
        size = file.stat().st_size
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; delete {file.parent} to have it written again") from error
    if size != expected:
        raise UserError(
            f"{file}: {size} bytes where index.json says {expected}; delete {file.parent} to have it written again"
        )


def _verify(path: Path, expected: dict[str, str], all_files: bool) -> None:
    """Compare sha256 of the files that are new or have changed since they were last compared, or of all."""
    stamps = {name: [(stat := (path / name).stat()).st_size, stat.st_mtime_ns] for name in expected}
    note = path / "verified.json"
    try:
        before = read_json(note)
    except UserError:  # not there, or damaged: it only says what needn't be compared
        before = {}
    for name in expected:
        if before.get(name) == stamps[name] and not all_files:
            continue
        with (path / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected[name]:
                raise UserError(
                    f"{path / name}: its sha256 isn't the one in index.json, so the file is damaged or has been "
                    f"changed; delete {path} to have it written again"
                )
    if before != stamps:
        with contextlib.suppress(OSError):  # a folder that can only be read is compared at every start
            write_atomically(note, json.dumps(stamps) + "\n")


def _refuse_too_short(source: Source, split: str, config: TrainConfig, described: str) -> None:
    if not source.windows(config.tokens_per_sequence):
        option = "model.block_size" if config.sequence_length is None else "sequence_length"
        raise UserError(
            f"--{option} {config.tokens_per_sequence}: the {split} split of {described} has only "
            f"{max(map(len, source.shards), default=0)} tokens and a sequence needs {config.tokens_per_sequence + 1}; "
            "use a smaller --sequence_length, a longer text, or another --data.validation_fraction"
        )
