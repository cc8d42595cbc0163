"""bench.py data: tokens per second of tokenisation, beside tiktoken's own, and of training batches."""

import os
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.measure import positive, write_json
from gpt2_core.cli import Parser
from gpt2_core.data.batches import TrainingBatches
from gpt2_core.data.documents import Corpus, Document, in_pieces
from gpt2_core.data.prepare import Settings, prepare
from gpt2_core.data.token_files import map_tokens
from gpt2_core.data.tokenizer import get_tokenizer
from gpt2_core.data.tokens import Source
from gpt2_core.errors import UserError

_BATCH_TOKENS = 1 << 16
_SIZES = (10**6, 10**7, 10**9, 10**10)
_BLOCK_SIZES = (1024, 256)


def main(arguments: list[str]) -> None:
    parser = Parser(prog="bench.py data", description="Measure tokenisation and training batches.")
    parser.add_argument("--path", type=str, help="UTF-8 text to tokenise. Left out: sources of Python's library.")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1, help="Threads.")
    parser.add_argument("--rounds", type=int, default=5, help="Rounds, whose medians are shown.")
    parser.add_argument("--json", type=str, help="File to write the results to, with command, machine and versions.")
    options = parser.parse(arguments)
    if options.path is not None and not Path(options.path).is_file():
        raise UserError(f"--path {options.path}: no such file")
    positive(options, "cores", "rounds")

    texts = _texts(Path(options.path) if options.path else None)
    found = tokenisation(texts, workers=options.cores, rounds=options.rounds)
    table = Table("tokenisation", "tokens/s", title=f"{found['tokens']:,} tokens, {options.cores} threads")
    table.add_row("prepare_data.py", f"{found['prepare']:,.0f}")
    table.add_row("tiktoken's encode_ordinary_batch", f"{found['encode_ordinary_batch']:,.0f}")
    table.add_row("ratio", f"{found['ratio']:.2f}")
    console = Console(markup=False)
    console.print(table)
    table = Table("block size", "tokens on disk", "tokens/s", "microseconds a sequence", title="batches")
    rows = []
    for block_size in _BLOCK_SIZES:
        rows += batches(block_size, sizes=_SIZES, cores=options.cores, rounds=options.rounds)
    for row in rows:
        rate = row["tokens_per_second"]
        each = f"{1e6 * row['block_size'] / rate:.1f}"
        table.add_row(str(row["block_size"]), f"{row['bytes'] / 1e6:,.0f} MB", f"{rate:,.0f}", each)
    console.print(table)
    write_json(options.json, ["data", *arguments], {"tokenisation": found, "batches": rows})


def _texts(path: Path | None) -> list[str]:
    """Documents of about 20 MB at least."""
    if path is not None:
        texts = [path.read_text(encoding="utf-8", errors="replace")]
    else:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(p for p in root.rglob("*.py") if "site-packages" not in p.parts)
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    return texts * max(1, round(20_000_000 / sum(map(len, texts))))


class _InMemory(Corpus):
    name, source = "memory", "documents in memory"

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts

    def documents(self, start: int = 0) -> Iterator[Document]:
        return (Document(None, in_pieces([text])) for text in self._texts[start:])

    def fingerprint(self) -> str:
        return "memory"


def tokenisation(texts: list[str], *, workers: int, rounds: int = 5) -> dict[str, Any]:
    """Tokens a second of `prepare`, including writing files, and of tiktoken's own encode_ordinary_batch on the same
    texts and threads: medians of alternating rounds, and their ratio."""
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
    """Tokens a second of training batches from sparse files of `sizes` bytes, read by `cores` threads at once: medians
    of alternating rounds."""
    batch_size = max(1, _BATCH_TOKENS // block_size)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(cores) as pool:
        streams = {}
        for size in sizes:
            path = Path(folder, f"{size}.bin")
            with path.open("wb") as file:
                file.truncate(size)
            source = Source((map_tokens(path, np.dtype("<u2"), 0, size // 2),), (str(path),), vocab_size=50257)
            streams[size] = TrainingBatches((source,), sequence_length=block_size, batch_size=batch_size, seed=0)
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
