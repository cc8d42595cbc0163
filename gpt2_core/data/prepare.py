"""Tokenising text into shards on disk, on all cores; it can be killed at any time and continues from there.

What is written is a function of the documents, the tokenizer, the fraction and the seed: batches of pieces are
tokenised by threads (tiktoken releases the GIL, so no processes are needed) and written in order. `progress.json`
records how much of the files is valid; the rest is truncated on the next start.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from gpt2_core.data.documents import Corpus, Document, UnreachableError
from gpt2_core.data.tokenizer import Tokenizer
from gpt2_core.errors import UserError
from gpt2_core.files import write_atomically
from gpt2_core.parsing import read_json

VERSION = 2
SPLITS = ("train", "val")
SHARD_TOKENS = 100_000_000  # llm.c's and modded-nanogpt's size
_BATCH = 1 << 20  # characters tokenised at once by a thread
_COMMIT_SECONDS = 2.0
_LINE_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """What determines the bytes written, in addition to the corpus and the tokenizer."""

    fraction: float
    seed: int
    shard_tokens: int = SHARD_TOKENS

    def __post_init__(self) -> None:
        if self.shard_tokens < 1:
            raise UserError(f"--shard_tokens {self.shard_tokens}: must be 1 or more")


class _Piece(NamedTuple):
    split: str
    text: str
    ends: bool
    """Whether its document ends with it."""


class _Cursor(NamedTuple):
    """How far the corpus has been read: whole documents, and pieces of the next."""

    documents: int
    pieces: int


class _Batch(NamedTuple):
    pieces: list[_Piece]
    cursor: _Cursor
    """After the batch."""
    empty: int
    """Documents without text among those it passed, which are left out."""


class _Tokens(NamedTuple):
    ids: dict[str, np.ndarray]
    documents: dict[str, int]


def prepare(
    path: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    settings: Settings,
    *,
    workers: int | None = None,
    console: Console | None = None,
) -> None:
    """Write the token folder `path`, or what is still missing of it.

    Raises UserError if the corpus can't be read, if `path` holds something else, or if the disk is full.
    """
    dtype = np.dtype("<u2") if tokenizer.vocab_size <= 1 << 16 else np.dtype("<u4")
    identity = {
        "version": VERSION,
        "corpus": corpus.name,
        "fingerprint": corpus.fingerprint(),
        "tokenizer": tokenizer.name,
        "dtype": dtype.name,
        "validation_fraction": settings.fraction,
        "seed": settings.seed,
        "shard_tokens": settings.shard_tokens,
    }
    console = console or Console(markup=False, highlight=False, soft_wrap=True)
    with _alone_in(path, console), _writing(path):
        for name in ("progress", "index"):
            for leftover in path.glob(f".{name}.json.*.tmp"):  # of a killed process
                leftover.unlink()
        if (path / "index.json").is_file():
            (path / "progress.json").unlink(missing_ok=True)
            _refuse_another(path, read_json(path / "index.json"), identity)
            return
        state = _started(path, identity)
        writers = {split: _ShardWriter(path, split, dtype, settings.shard_tokens, state[split]) for split in SPLITS}
        try:
            _write(path, corpus, tokenizer, settings, dtype, state, writers, workers or os.cpu_count() or 1, console)
            _finish(path, corpus, state, writers)
        except UserError as error:
            # An error in the corpus itself can't be resumed from: once corrected it is another corpus.
            if not isinstance(error, UnreachableError) or state["place"] == [0, 0]:
                shutil.rmtree(path, ignore_errors=True)
            raise
        finally:
            for writer in writers.values():
                writer.close()


def is_unfinished(path: Path) -> bool:
    return (path / "progress.json").is_file() and not (path / "index.json").is_file()


def _write(
    path: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    settings: Settings,
    dtype: np.dtype,
    state: dict[str, Any],
    writers: dict[str, "_ShardWriter"],
    workers: int,
    console: Console,
) -> None:
    def commit() -> None:
        for split, writer in writers.items():
            state[split] = writer.commit()
        write_atomically(path / "progress.json", json.dumps(state))

    cursor = _Cursor(*state["place"])
    batches = _batches(_pieces(corpus, cursor, settings), cursor)
    committed = time.monotonic()
    waiting: deque[tuple[_Batch, Future[_Tokens]]] = deque()
    with ThreadPoolExecutor(workers) as pool, _Display(console, corpus, state) as display:
        try:
            while True:
                while len(waiting) < 2 * workers and (batch := next(batches, None)) is not None:
                    waiting.append((batch, pool.submit(_tokenise, batch.pieces, tokenizer, dtype)))
                if not waiting:
                    break
                batch, future = waiting.popleft()
                tokens = future.result()
                for split in SPLITS:
                    writers[split].write(tokens.ids[split])
                    state["documents"][split] += tokens.documents[split]
                state["place"], state["empty"] = list(batch.cursor), state["empty"] + batch.empty
                display.update(sum(writer.tokens for writer in writers.values()))
                if time.monotonic() - committed > _COMMIT_SECONDS:
                    commit()
                    committed = time.monotonic()
        except UnreachableError:
            commit()
            raise
        finally:
            for _, future in waiting:
                future.cancel()
    commit()


def _finish(path: Path, corpus: Corpus, state: dict[str, Any], writers: dict[str, "_ShardWriter"]) -> None:
    documents = state["documents"]
    if corpus.fingerprint() != state["identity"]["fingerprint"]:
        raise UserError(f"{corpus.source}: has changed while it was read; give the same command again")
    if not sum(documents.values()):
        raise UserError(f"--data.corpus {corpus.name}: there is no text in {corpus.source}")
    fraction = state["identity"]["validation_fraction"]
    if fraction > 0 and not documents["val"]:
        raise UserError(
            f"--data.validation_fraction {fraction}: {corpus.source} has only {documents['train']} documents, too few "
            f"to hold one in {math.ceil(1 / fraction)} back for validation; use a larger fraction, or 0 to train on "
            "everything"
        )
    index = state["identity"] | {
        "source": corpus.source,
        "documents": documents,
        "empty_documents": state["empty"],
        "tokens": {split: writers[split].tokens for split in SPLITS},
        "shards": {split: writers[split].finish() for split in SPLITS},
    }
    write_atomically(path / "index.json", json.dumps(index, indent=2) + "\n")
    (path / "progress.json").unlink()


def _pieces(corpus: Corpus, cursor: _Cursor, settings: Settings) -> Iterator[tuple[_Cursor, _Piece | None]]:
    """Every piece from `cursor` on, each with the cursor after it; None for a document without text."""
    for number, document in enumerate(corpus.documents(cursor.documents), start=cursor.documents):
        # Where the corpus doesn't say which split a document belongs to, it is drawn.
        split = document.split or ("val" if is_validation(number, settings.fraction, settings.seed) else "train")
        skipped = cursor.pieces if number == cursor.documents else 0
        yield from _pieces_of(document, number, split, skipped)


def _pieces_of(document: Document, number: int, split: str, skipped: int) -> Iterator[tuple[_Cursor, _Piece | None]]:
    before: str | None = None  # a piece is held back until it is known whether it is the last
    for read, text in enumerate(document.pieces):
        if read > skipped:
            yield _Cursor(number, read), _Piece(split, before, False)
        before = text
    yield _Cursor(number + 1, 0), None if before is None else _Piece(split, before, True)


def _batches(pieces: Iterator[tuple[_Cursor, _Piece | None]], cursor: _Cursor) -> Iterator[_Batch]:
    batch: list[_Piece] = []
    empty = size = 0
    for cursor, piece in pieces:
        if piece is None:
            empty += 1
        else:
            batch.append(piece)
            size += len(piece.text)
        if size >= _BATCH:
            yield _Batch(batch, cursor, empty)
            batch, empty, size = [], 0, 0
    if batch or empty:
        yield _Batch(batch, cursor, empty)


def _tokenise(pieces: list[_Piece], tokenizer: Tokenizer, dtype: np.dtype) -> _Tokens:
    end = np.array([tokenizer.end_of_text], dtype)
    ids: dict[str, list[np.ndarray]] = {split: [np.zeros(0, dtype)] for split in SPLITS}
    documents = dict.fromkeys(SPLITS, 0)
    for split, text, ends in pieces:
        ids[split].append(_encode(tokenizer, text).astype(dtype))
        if ends:
            ids[split].append(end)
            documents[split] += 1
    return _Tokens({split: np.concatenate(ids[split]) for split in SPLITS}, documents)


def _encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    try:
        return tokenizer.encode(text)
    except UnicodeEncodeError:
        # Half of a surrogate pair, which JSON can hold and UTF-8 can't.
        return tokenizer.encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


def is_validation(number: int, fraction: float, seed: int) -> bool:
    """Whether a document is held back: one of every 1/fraction successive documents, drawn from the seed.

    So the share is exact to one document, however few there are, and a document's split needs no other document.
    """
    if fraction == 0:
        return False
    group = math.floor(number * fraction)
    first, following = math.ceil(group / fraction), math.ceil((group + 1) / fraction)
    drawn = int.from_bytes(hashlib.sha256(f"{seed} {group}".encode()).digest()[:8], "little")
    return number == first + drawn % max(1, following - first)


class _ShardWriter:
    """Appends ids to the shards of a split, each of `shard_tokens` ids but for the last."""

    def __init__(self, path: Path, split: str, dtype: np.dtype, shard_tokens: int, state: dict[str, Any]) -> None:
        self._path, self._split, self._dtype, self._limit = path, split, dtype, shard_tokens
        self._whole: list[dict[str, Any]] = list(state["whole"])
        self._count = state["open_tokens"]
        self._digest = hashlib.sha256()
        self._file = None
        for stray in path.glob(f"{split}-*.bin"):
            if int(stray.stem.rpartition("-")[2]) > len(self._whole):
                stray.unlink()
        if self._count == 0:
            self._current.unlink(missing_ok=True)
        else:
            needed = self._count * dtype.itemsize
            if not self._current.is_file() or self._current.stat().st_size < needed:
                raise UserError(f"{self._current}: missing or truncated; delete {path} and start again")
            self._file = self._current.open("r+b")
            self._file.truncate(needed)
            while content := self._file.read(1 << 24):
                self._digest.update(content)

    @property
    def tokens(self) -> int:
        return self._limit * len(self._whole) + self._count

    @property
    def _current(self) -> Path:
        return self._path / f"{self._split}-{len(self._whole):05d}.bin"

    def write(self, ids: np.ndarray) -> None:
        while len(ids):
            part, ids = ids[: self._limit - self._count], ids[self._limit - self._count :]
            if self._file is None:
                self._file = self._current.open("wb")
            content = part.tobytes()
            self._file.write(content)
            self._digest.update(content)
            self._count += len(part)
            if self._count == self._limit:
                self._end_shard()

    def commit(self) -> dict[str, Any]:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        return {"whole": list(self._whole), "open_tokens": self._count}

    def finish(self) -> list[dict[str, Any]]:
        """All shards: their files, numbers of tokens and sha256."""
        if self._count:
            self._end_shard()
        return self._whole

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # on a full disk even closing fails
                self._file.close()
            self._file = None

    def _end_shard(self) -> None:
        shard = {"file": self._current.name, "tokens": self._count, "sha256": self._digest.hexdigest()}
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._whole.append(shard)
        self._file, self._count, self._digest = None, 0, hashlib.sha256()


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn errors of the disk into a UserError."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else f"can't write there ({error.strerror})"
        raise UserError(
            f"{path}: {reason}; what has been written is kept: free some space and run the same command again to "
            "continue"
        ) from error


@contextlib.contextmanager
def _alone_in(path: Path, console: Console) -> Iterator[None]:
    """Create the folder if needed, and lock it against other processes meanwhile."""
    while True:
        try:
            path.mkdir(parents=True, exist_ok=True)
            folder = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{path}: can't write there ({error.strerror})") from error
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                console.print(f"{path}: another process is writing these tokens; waiting for it")
                fcntl.flock(folder, fcntl.LOCK_EX)
            # The other may have given up and removed the folder.
            if path.is_dir() and path.stat().st_ino == os.fstat(folder).st_ino:
                yield
                return
        finally:
            os.close(folder)


def _started(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The state to continue from, read from progress.json; the initial state in an empty folder."""
    file = path / "progress.json"
    if file.is_file():
        state = _state_in(file)
        _refuse_another(path, state["identity"], identity)
        return state
    if any(path.iterdir()):
        raise UserError(f"{path}: exists and is not a token folder; name a folder that is new or empty")
    nothing = {"whole": [], "open_tokens": 0}
    state = {"identity": identity, "place": [0, 0], "empty": 0, "documents": dict.fromkeys(SPLITS, 0)}
    state |= {split: dict(nothing) for split in SPLITS}
    write_atomically(file, json.dumps(state))
    return state


def _refuse_another(path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    for name, value in ours.items():
        if theirs.get(name) != value:
            what = "the text has changed since" if name == "fingerprint" else f"with {name} {theirs.get(name)}"
            more = "" if name == "fingerprint" else f", not {value}"
            raise UserError(f"{path}: these tokens were written {what}{more}; name another folder, or delete this one")


def _state_in(path: Path) -> dict[str, Any]:
    """The state that a progress.json holds; raises UserError if it isn't one."""
    state = read_json(path)
    try:
        counts = [*state["place"], state["empty"], *(state["documents"][split] for split in SPLITS)]
        counts += [state[split]["open_tokens"] for split in SPLITS]
        shards = [shard for split in SPLITS for shard in state[split]["whole"]]
        counts += [shard["tokens"] for shard in shards]
        named = all(isinstance(shard[name], str) for shard in shards for name in ("file", "sha256"))
        whole = named and isinstance(state["identity"], dict) and len(state["place"]) == 2
    except (KeyError, TypeError) as error:
        raise _not_progress(path) from error
    if not whole or not all(type(count) is int and count >= 0 for count in counts):
        raise _not_progress(path)
    return state


def _not_progress(path: Path) -> UserError:
    return UserError(f"{path}: doesn't hold how far the tokens have been written; delete {path.parent} to start again")


class _Display:
    """Documents, tokens, tokens a second and the time left: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, corpus: Corpus, state: dict[str, Any]) -> None:
        self._console, self._corpus, self._state = console, corpus, state
        self._progress = Progress(
            TextColumn("tokenising"),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[status]}", markup=False),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("", total=None, status="")
        self._begun: tuple[float, int, float | None] | None = None
        self._said = time.monotonic()

    def __enter__(self) -> "_Display":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, tokens: int) -> None:
        now, share = time.monotonic(), self._corpus.progress()
        # Rates are of this process: what an earlier one wrote took none of its time.
        self._begun = self._begun or (now, tokens, share)
        begun, first, share_first = self._begun
        rate = (tokens - first) / (now - begun) if now > begun else 0.0
        documents = sum(self._state["documents"].values())
        words = f"{documents:,} documents  {tokens:,} tokens  {rate:,.0f} tokens/s"
        if share is not None and share_first is not None and share > share_first:
            words += f"  {_duration((now - begun) * (1.0 - share) / (share - share_first))} left"
        self._progress.update(self._task, total=1.0 if share is not None else None, completed=share or 0, status=words)
        if self._progress.disable and now - self._said > _LINE_SECONDS:
            self._said = now
            self._console.print(f"tokenising: {words}")


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(max(0.0, seconds)), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
