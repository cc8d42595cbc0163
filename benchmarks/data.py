"""How fast text becomes tokens and tokens become batches, each beside a yardstick in the same run."""

import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_core.batches import TrainingBatches
from gpt2_core.corpora import Corpus, Document, in_pieces
from gpt2_core.prepare import Settings, prepare
from gpt2_core.token_files import map_tokens
from gpt2_core.tokenizer import get_tokenizer
from gpt2_core.tokens import Source

_BATCH_TOKENS = 1 << 16


class _InMemory(Corpus):
    name, source = "memory", "documents in memory"

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts

    def documents(self, start: int = 0) -> Iterator[Document]:
        return (Document(None, in_pieces([text])) for text in self._texts[start:])

    def fingerprint(self) -> str:
        return "memory"


def tokenisation(texts: list[str], *, workers: int, rounds: int = 5) -> dict[str, Any]:
    """Tokens a second of `prepare`, files written and all, and of tiktoken's own encode_ordinary_batch on the same
    texts and threads: medians of interleaved rounds, and their ratio."""
    tokenizer = get_tokenizer("gpt2")
    seconds: dict[str, list[float]] = {"prepare": [], "encode_ordinary_batch": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            out, settings = Path(folder, str(number)), Settings(fraction=0.0, seed=0)
            begin = time.perf_counter()
            prepare(out, _InMemory(texts), tokenizer, settings, workers=workers)
            middle = time.perf_counter()
            encoded = tokenizer.encoding.encode_ordinary_batch(texts, num_threads=workers)
            seconds["prepare"].append(middle - begin)
            seconds["encode_ordinary_batch"].append(time.perf_counter() - middle)
    tokens = sum(map(len, encoded))
    rates = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    return {"tokens": tokens, "workers": workers, **rates, "ratio": rates["prepare"] / rates["encode_ordinary_batch"]}


def batches(block_size: int, *, sizes: tuple[int, ...], cores: int, rounds: int = 5) -> list[dict[str, Any]]:
    """Tokens a second of training batches from files of `sizes` bytes (sparse ones), `cores` threads asking at once;
    the sizes take turns, and the rates are medians."""
    batch_size = max(1, _BATCH_TOKENS // block_size)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(cores) as pool:
        streams = {}
        for size in sizes:
            path = Path(folder, f"{size}.bin")
            with path.open("wb") as file:
                file.truncate(size)
            source = Source((map_tokens(path, np.dtype("<u2"), 0, size // 2),), (str(path),), vocab_size=50257)
            streams[size] = TrainingBatches((source,), block_size=block_size, batch_size=batch_size, seed=0)
        steps = 40 * cores
        rates: dict[int, list[float]] = {size: [] for size in sizes}
        for number in range(rounds):
            for size, stream in streams.items():
                wanted = range(number * steps, (number + 1) * steps)
                begin = time.perf_counter()
                list(pool.map(stream.__getitem__, wanted))
                spent = time.perf_counter() - begin
                rates[size].append(steps * batch_size * block_size / spent)
    return [
        {"block_size": block_size, "bytes": size, "cores": cores, "tokens_per_second": statistics.median(rates[size])}
        for size in sizes
    ]
