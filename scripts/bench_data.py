"""Measure tokenisation and batches: python scripts/bench_data.py --help"""

import os
import sysconfig
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gpt2_core.cli import Parser, run
from gpt2_core.data_speed import batches, tokenisation
from gpt2_core.errors import UserError

SIZES = (10**6, 10**7, 10**9, 10**10)


def main(arguments: list[str]) -> None:
    parser = Parser(prog="bench_data.py", description="Measure how fast text becomes tokens, and tokens batches.")
    parser.add_argument("--path", type=str, help="UTF-8 text to tokenise. Left out: sources of Python's library.")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1, help="Threads.")
    parser.add_argument("--rounds", type=int, default=5, help="Rounds, whose medians are shown.")
    options = parser.parse(arguments)
    if options.path is not None and not Path(options.path).is_file():
        raise UserError(f"--path {options.path}: no such file")
    for name in ("cores", "rounds"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must be 1 or more")

    texts = _texts(Path(options.path) if options.path else None)
    found = tokenisation(texts, workers=options.cores, rounds=options.rounds)
    table = Table("tokenisation", "tokens/s", title=f"{found['tokens']:,} tokens, {options.cores} threads")
    table.add_row("prepare_data.py", f"{found['prepare']:,.0f}")
    table.add_row("tiktoken's encode_ordinary_batch", f"{found['encode_ordinary_batch']:,.0f}")
    table.add_row("ratio", f"{found['ratio']:.2f}")
    console = Console()
    console.print(table)
    table = Table("block size", "tokens on disk", "tokens/s", "microseconds a sequence", title="batches")
    for block_size in (1024, 256):
        for row in batches(block_size, sizes=SIZES, cores=options.cores, rounds=options.rounds):
            rate = row["tokens_per_second"]
            table.add_row(
                f"{block_size}", f"{row['bytes'] / 1e6:,.0f} MB", f"{rate:,.0f}", f"{1e6 * block_size / rate:.1f}"
            )
    console.print(table)


def _texts(path: Path | None) -> list[str]:
    """Documents of about 20 MB at least."""
    if path is not None:
        texts = [path.read_text(encoding="utf-8", errors="replace")]
    else:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(p for p in root.rglob("*.py") if "site-packages" not in p.parts)
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    return texts * max(1, round(20_000_000 / sum(map(len, texts))))


if __name__ == "__main__":
    run(main)
