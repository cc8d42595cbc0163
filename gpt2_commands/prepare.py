"""gpt2 prepare: a corpus into token shards on disk."""

from pathlib import Path

from gpt2_core.cli import Parser
from gpt2_core.config import DataConfig, check_seed
from gpt2_core.data import corpora, tokenizer
from gpt2_core.data.prepare import SHARD_TOKENS, Settings, prepare
from gpt2_core.data.text_files import kind_of
from gpt2_core.errors import UserError
from gpt2_core.parsing import read_json


def main(arguments: list[str], command: str = "gpt2 prepare") -> None:
    options = parser(command).parse(arguments)

    if options.workers is not None and options.workers < 1:
        raise UserError(f"--workers {options.workers}: must be 1 or more")
    check_seed(options.seed)
    name, path = options.corpus, options.path
    if name not in corpora.NAMES and path is None and kind_of(name):
        name, path = kind_of(name), name
    data = DataConfig(
        corpus=name,
        path=path,
        tokenizer=options.tokenizer,
        validation_fraction=held_back(options.corpus, options.validation_fraction),
        field=options.field,
        cache_dir=options.cache_dir,
    )
    settings = Settings(data.validation_fraction, options.seed, options.shard_tokens)
    out = Path(options.out)
    corpus = corpora.get_corpus(data)
    prepare(out, corpus, tokenizer.get_tokenizer(options.tokenizer), settings, workers=options.workers)
    print(describe(out))


def held_back(corpus: str, fraction: float | None) -> float:
    """The share of a corpus' documents to hold back for validation, given or by default."""
    if fraction is not None:
        return fraction
    return 0.0005 if corpus == "openwebtext" else 0.01


def describe(path: Path) -> str:
    """What a finished token folder holds, in a line."""
    index = read_json(path / "index.json")
    tokens, documents = index["tokens"], index["documents"]
    empty = f", {index['empty_documents']:,} empty ones left out" if index["empty_documents"] else ""
    return (
        f"{path}: {sum(tokens.values()):,} tokens of {index['tokenizer']} ({tokens['val']:,} for validation) from "
        f"{sum(documents.values()):,} documents{empty}, in {sum(map(len, index['shards'].values()))} shards"
    )


def parser(command: str) -> Parser:
    made = Parser(
        prog=command,
        description="Turn a corpus into token shards on disk. If it is interrupted, the same command continues it.",
    )
    made.add_argument(
        "corpus",
        type=str,
        help=f"One of {', '.join(corpora.NAMES)}; or the path of a text, JSONL or Parquet file, whose kind is known by "
        "its suffix.",
    )
    made.add_argument("--path", type=str, help="File, folder or pattern, for text, jsonl and parquet.")
    made.add_argument(
        "--field", type=str, default="text", help="Field or column that holds the text, in JSONL and Parquet."
    )
    made.add_argument("--tokenizer", type=str, default="gpt2", help=f"One of {', '.join(tokenizer.NAMES)}.")
    made.add_argument(
        "--out", type=str, required=True, help="Folder for the tokens: new, empty, or this command's own."
    )
    made.add_argument(
        "--validation_fraction",
        type=float,
        help="Share of the documents held back. Left out: 0.0005 of openwebtext, as in its recipe, 0.01 of any other.",
    )
    made.add_argument("--seed", type=int, default=1337, help="Seed that chooses the documents held back.")
    made.add_argument("--shard_tokens", type=int, default=SHARD_TOKENS, help="Tokens in a shard.")
    made.add_argument("--workers", type=int, help="Threads that tokenise. Left out: one for each core.")
    made.add_argument("--cache_dir", type=str, default="data", help="Where a downloaded text is kept.")
    return made
