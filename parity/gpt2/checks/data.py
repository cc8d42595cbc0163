"""Check `data`: from text to token ids and windows, against what the text says.

Both trainers read the same tokens by the same code, so that a mistake in it is no difference between them, and neither
implementation is asked. What is due is computed here a second time: bytes of UTF-8 with end-of-text after each
document, and files of token ids written as the programs that they come from write them.
"""

import collections
import contextlib
import gzip
import io
import itertools
import json
import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from rich.console import Console

import gpt2_core.data.prepare
from gpt2_core.config import IGNORE_INDEX, DataConfig, ModelConfig, TrainConfig
from gpt2_core.data.batches import TrainingBatches, evaluation_batches
from gpt2_core.data.corpora import get_corpus
from gpt2_core.data.documents import PIECE, Corpus, Document, UnreachableError
from gpt2_core.data.prepare import Settings, prepare
from gpt2_core.data.tokenizer import get_tokenizer, local_file
from gpt2_core.data.tokens import Source, Split, TokenFolder, open_tokens
from gpt2_core.errors import UserError
from parity.engine.results import Result, Skipped
from parity.gpt2 import limits, plain_loop
from parity.gpt2.adapters.protocol import Adapter
from parity.gpt2.cases import Case

_END = 256  # of a text, in the tokenizer `bytes`
_BLOCK = 8

# Ids that OpenAI's own encoder gives (github.com/openai/gpt-2, src/encoder.py); a marker within a text is text.
_GPT2_IDS = {
    "Hello world": [15496, 995],
    "<|endoftext|>": [27, 91, 437, 1659, 5239, 91, 29],
    " \n\tdef f(x):": [220, 198, 197, 4299, 277, 7, 87, 2599],
}


def check(case: Case, candidate: Adapter, reference: Adapter) -> Iterator[Result | Skipped]:
    for part in (_documents, _continued, _one_text, _token_files, _windows, _mixture):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            try:
                result = part(case, Path(folder))
            except UserError as error:
                result = _result(f"{part.__name__.strip('_').replace('_', ' ')}: refused", [str(error)])
        yield result
    yield _gpt2_tokenizer()


def _result(title: str, wrong: Sequence[str]) -> Result:
    return Result("data", title, float(len(wrong)), limits.NONE, wrong[0] if wrong else "")


def _documents(case: Case, folder: Path) -> Result:
    """Documents as lines of a file: in order, each whole in one split, an end of text after each and nowhere else."""
    texts = [f"document {n}: \u00e9 \u4e16 <|endoftext|>" * (1 + n % 3) for n in range(40)]
    # Longer than what is tokenised at once, in one stretch of words and in one without a place to cut.
    texts[7], texts[21], texts[30] = "words and words " * (PIECE // 5), "\u00fc" * (5 * PIECE), ""
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    due, fraction = [text.encode() for text in texts if text], 0.2
    held_back, wrong = [], []
    for seed in (case.seed + 7, case.seed + 8):
        data = DataConfig(corpus="jsonl", path=str(path), tokenizer="bytes", validation_fraction=fraction)
        tokens = folder / f"tokens-{seed}"
        settings = Settings(fraction, seed, shard_tokens=50_000)
        prepare(tokens, get_corpus(data), get_tokenizer("bytes"), settings, console=Console(markup=False, quiet=True))
        opened = _opened(tokens)
        train, val = (_split_documents(split) for split in (opened.train, opened.val))
        numbers = [[due.index(d) if d in due else -1 for d in split] for split in (train, val)]
        if any(-1 in found for found in numbers):
            wrong.append(f"seed {seed}: a document that isn't one of the text")
        elif any(found != sorted(found) for found in numbers) or sorted(itertools.chain(*numbers)) != list(
            range(len(due))
        ):
            wrong.append(f"seed {seed}: documents {numbers[0]} and {numbers[1]} for validation")
        if len(val) not in (round(fraction * len(texts)), round(fraction * len(texts)) - 1):
            wrong.append(f"seed {seed}: {len(val)} of {len(texts)} documents for validation, at a share of {fraction}")
        held_back.append(numbers[1])
    if held_back[0] == held_back[1]:
        wrong.append("two seeds hold the same documents back")
    return _result(f"{len(texts)} documents, tokenised into shards", wrong)


class _Unreachable:
    """A corpus whose source can't be read after so many pieces."""

    def __init__(self, corpus: Corpus, pieces: int) -> None:
        self._corpus, self._left = corpus, pieces

    def __getattr__(self, name: str) -> Any:
        return getattr(self._corpus, name)

    def documents(self, start: int = 0) -> Iterator[Document]:
        for document in self._corpus.documents(start):
            yield document._replace(pieces=self._counted(document.pieces))

    def _counted(self, pieces: Iterable[str]) -> Iterator[str]:
        for piece in pieces:
            self._left -= 1
            if self._left < 0:
                raise UnreachableError("the source is away")
            yield piece


def _continued(case: Case, folder: Path) -> Result:
    """Tokens whose source was away after any number of pieces, between documents and within long ones."""
    texts = ["short", "a long one " * PIECE, "", "another long one " * PIECE, "the end", "words " * PIECE]
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    corpus = get_corpus(DataConfig(corpus="jsonl", path=str(path), tokenizer="bytes"))
    total = sum(len(list(document.pieces)) for document in corpus.documents())
    due, wrong, quiet = "".join(text + "\n" for text in texts if text), [], Console(markup=False, quiet=True)
    # A batch a piece, committed whenever the source goes away.
    with mock.patch.object(gpt2_core.data.prepare, "_BATCH", 1):
        for number, first in enumerate(range(1, total, max(1, total // 9))):
            tokens = folder / str(number)
            for pieces in (first, 3):  # away a second time, after a few pieces more
                with contextlib.suppress(UnreachableError):
                    source = _Unreachable(corpus, pieces)
                    prepare(tokens, source, get_tokenizer("bytes"), Settings(0.0, 1), workers=1, console=quiet)
            prepare(tokens, corpus, get_tokenizer("bytes"), Settings(0.0, 1), workers=1, console=quiet)
            ids = np.fromfile(tokens / "train-00000.bin", "<u2")
            if np.where(ids == _END, 10, ids).astype(np.uint8).tobytes() != due.encode():
                wrong.append(f"continued after {first} of {total} pieces: not the text")
    return _result(f"tokens of {total} pieces, whose source is away for a while", wrong)


def _one_text(case: Case, folder: Path) -> Result:
    """A single text, compressed or not, is cut where a character begins: its end is for validation."""
    text, wrong = "\u00e9\u4e16a" * 500, []
    cut = int(0.7 * len(text.encode()))
    for name, content in (("text.txt", text.encode()), ("text.txt.gz", gzip.compress(text.encode()))):
        path = folder / name
        path.write_bytes(content)
        data = DataConfig(
            corpus="text", path=str(path), tokenizer="bytes", validation_fraction=0.3, cache_dir=str(folder / "cache")
        )
        opened = open_tokens(_config(data))
        (train,), (val,) = (_split_documents(split) for split in (opened.train, opened.val))
        right = train + val == text.encode() and cut <= len(train) < cut + 4 and train.decode() + val.decode() == text
        due = f"cut after {len(train)} of {len(text.encode())} bytes, where the first character from {cut} on is due"
        wrong += [] if right else [f"{name}: {due}"]
    return _result("one text, cut for validation, compressed too", wrong)


def _token_files(case: Case, folder: Path) -> Result:
    """Files of ids as nanoGPT, llm.c, modded-nanogpt and datatrove write them."""
    ids, wrong = case.tokens[:500] % _END, []

    def headed(magic: int, version: int, dtype: str) -> bytes:
        header = np.zeros(256, "<i4")
        header[:3] = magic, version, len(ids)
        return header.tobytes() + ids.astype(dtype).tobytes()

    files = {
        "nanoGPT's train.bin": ("train.bin", ids.astype("<u2").tobytes()),
        "llm.c's version 1": ("text_train_000000.bin", headed(20240520, 1, "<u2")),
        "llm.c's version 7": ("text_train_000000.bin", headed(20240801, 7, "<u4")),
        "datatrove's in two bytes": ("00000_shuffled.ds", ids.astype("<u2").tobytes()),
        "datatrove's in four bytes": ("00000_shuffled.ds", ids.astype("<u4").tobytes()),
    }
    for number, (title, (name, content)) in enumerate(files.items()):
        where = folder / str(number)
        where.mkdir()
        (where / name).write_bytes(content)
        if name.endswith(".ds"):
            width = len(content) // len(ids)
            (where / f"{name}.metadata").write_text(f"Unknown Tokenizer|{width}\n{len(ids)}\n0.5 KT")
            np.array([100, len(ids)], "<u8").tofile(where / f"{name}.index")
        validation = where / name.replace("train", "val").replace("00000_shuffled", "00000_val")
        validation.write_bytes(content)
        for more in (".metadata", ".index") if name.endswith(".ds") else ():
            Path(f"{validation}{more}").write_bytes((where / f"{name}{more}").read_bytes())
        opened = _opened(where)
        for split in ("train", "val"):
            found = [shard for source in getattr(opened, split) for shard in source.shards]
            if len(found) != 1 or not np.array_equal(found[0], ids):
                wrong.append(f"{title}: {split} isn't the ids that were written")
    return _result(f"token files: {', '.join(files)}", wrong)


def _windows(case: Case, folder: Path) -> Result:
    """Every window of every shard once an epoch, whatever the shards' lengths: shorter than a window, and multiples of
    the block and beside them."""
    wrong = []
    for lengths in itertools.product((_BLOCK, 2 * _BLOCK, 3 * _BLOCK + 1, 3 * _BLOCK + 5), repeat=2):
        shards = tuple(np.split(case.tokens[: sum(lengths) + 5], np.cumsum(lengths)))
        due = collections.Counter(w.tobytes() for w in plain_loop.windows(shards, _BLOCK))
        batches = TrainingBatches(_split(shards), sequence_length=_BLOCK, batch_size=1, seed=case.seed)
        found = [batches[step] for step in range(due.total())]
        rows = [np.append(b.inputs[0], b.targets[0, -1:]).astype(np.int64).tobytes() for b in found]
        if collections.Counter(rows) != due:
            wrong.append(f"shards of {lengths} tokens, windows of {_BLOCK} + 1: not every window once")
    return _result("windows of shards of any length", wrong)


def _mixture(case: Case, folder: Path) -> Result:
    """Two sources, told apart by their ids: weighed 3 to 1 in training and in evaluations."""
    wrong, weights = [], (3.0, 1.0)
    tokens = [np.full(100 * _BLOCK + 1, number, np.uint16) for number in range(2)]
    split = tuple(Source((ids,), ("",), weight) for ids, weight in zip(tokens, weights, strict=True))
    batches = TrainingBatches(split, sequence_length=_BLOCK, batch_size=8, seed=case.seed)
    for step in range(25):
        if (share := batches[step].inputs[:, 0].mean()) != 0.25:
            wrong.append(f"batch {step}: a share of {share} from the source of weight 1, where 0.25 is due")
    rows = [
        row[0]
        for batch in evaluation_batches(split, sequence_length=_BLOCK, batch_size=5, sequences=12)
        for row, targets in zip(batch.inputs, batch.targets, strict=True)
        if (targets != IGNORE_INDEX).all()
    ]
    # Sources of one length, and windows that say which they are: two orders of the same numbers, and whole epochs.
    numbered = np.repeat(np.arange(101, dtype=np.uint16), _BLOCK)[: 100 * _BLOCK + 1]
    split_alike = tuple(Source((numbered + 1000 * number,), ("",), 1.0) for number in range(2))
    alike = TrainingBatches(split_alike, sequence_length=_BLOCK, batch_size=8, seed=case.seed)
    read = np.concatenate([alike[step].inputs[:, 0] for step in range(25)])
    orders = [read[read < 1000], read[read >= 1000] - 1000]
    if any(sorted(order) != list(range(100)) for order in orders):
        wrong.append("an epoch of each source isn't every window once")
    elif (orders[0] == orders[1]).all():
        wrong.append("two sources of one length are read in the same order")
    if sorted(rows) != [0] * 9 + [1] * 3:
        wrong.append(f"an evaluation of 12 sequences reads {rows.count(0)} and {rows.count(1)}, where 9 and 3 are due")
    return _result("a mixture of weights 3 and 1", wrong)


def _gpt2_tokenizer() -> Result | Skipped:
    if local_file("gpt2", "vocab.bpe") is None or local_file("gpt2", "encoder.json") is None:
        return Skipped("data", "the tokenizer gpt2: its files aren't on this machine")
    tokenizer = get_tokenizer("gpt2")
    wrong = [
        f"{text!r} becomes {tokenizer.encode(text).tolist()}, where {ids} are due"
        for text, ids in _GPT2_IDS.items()
        if tokenizer.encode(text).tolist() != ids
    ]
    generator = random.Random(0)
    text = "".join(chr(generator.choice((32, 10, 65, 97, 233, 0x4E16, 0x1F600))) for _ in range(2000))
    if tokenizer.decode(tokenizer.encode(text).tolist()) != text:
        wrong.append("a text isn't what its ids are decoded to")
    if (tokenizer.vocab_size, tokenizer.end_of_text) != (50257, 50256):
        wrong.append(f"{tokenizer.vocab_size} ids, the end of text {tokenizer.end_of_text}")
    return _result("the tokenizer gpt2: ids of OpenAI's encoder, and back", wrong)


def _config(data: DataConfig) -> TrainConfig:
    return TrainConfig(model=ModelConfig(n_layer=1, n_head=1, n_embd=4, block_size=_BLOCK, vocab_size=257), data=data)


def _opened(tokens: Path) -> TokenFolder:
    return open_tokens(_config(DataConfig(tokens=str(tokens), tokenizer="bytes")))


def _split(shards: tuple[np.ndarray, ...]) -> Split:
    return (Source(shards, ("",) * len(shards)),)


def _split_documents(split: Split) -> list[bytes]:
    """The documents of a split, whose tokens are one after the other in its shards, by their ends."""
    ids = np.concatenate([shard for source in split for shard in source.shards])
    ends = np.flatnonzero(ids == _END)
    starts = [0, *(ends + 1)]
    whole = [ids[a:b].astype(np.uint8).tobytes() for a, b in zip(starts, ends, strict=False)]
    return [*whole, ids[starts[-1] :].astype(np.uint8).tobytes()] if starts[-1] < len(ids) else whole
