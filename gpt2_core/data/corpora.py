"""The corpora that `--data.corpus` names."""

import hashlib
import platform
import sysconfig
import urllib.request
from pathlib import Path

from gpt2_core.config import DataConfig
from gpt2_core.data.documents import Corpus
from gpt2_core.data.hub import DATASETS, Hub
from gpt2_core.data.text_files import SUFFIXES, Files, users_files
from gpt2_core.errors import UserError
from gpt2_core.files import write_atomically

NAMES = ("stdlib", "shakespeare", *DATASETS, *SUFFIXES)

# 1,115,394 characters, published with char-rnn; nanoGPT and minGPT train on the same file.
_SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
_DOWNLOAD_SECONDS = 30

# Folders of the standard library that aren't its source, or that some distributions leave out.
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "__pycache__", "idlelib", "idle_test"})


def get_corpus(config: DataConfig) -> Corpus:
    """The corpus that `data.corpus` and `data.path` name; raises UserError if there is none."""
    name = config.corpus
    if name not in NAMES:
        raise UserError(f"--data.corpus {name}: no such corpus; use {', '.join(NAMES[:-1])} or {NAMES[-1]}")
    if name in SUFFIXES:
        return users_files(config)
    if config.path is not None:
        raise UserError(
            f"--data.path {config.path}: the corpus {name} has its own text and takes no path; for your own files add "
            "--data.corpus text (or jsonl, parquet)"
        )
    if name == "stdlib":
        return _stdlib()
    if name == "shakespeare":
        file = _shakespeare(Path(config.cache_dir))
        return Files(name, "Shakespeare, as char-rnn has it", [file], fraction=config.validation_fraction)
    return Hub(name, validation=config.validation_fraction > 0)


def _stdlib() -> Files:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = (path for path in root.rglob("*.py") if path.is_file() and path.stat().st_size > 0)
    files = [path for path in found if not _NOT_STDLIB.intersection(path.relative_to(root).parts)]
    if not files:
        raise UserError(f"--data.corpus stdlib: no Python sources under {root}; use --data.corpus text")
    files.sort(key=lambda path: path.relative_to(root).as_posix())
    source = f"sources of Python {platform.python_version()}'s standard library"
    return Files("stdlib", source, files, errors="replace")


def _shakespeare(cache: Path) -> Path:
    path = cache / "shakespeare.txt"
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == _SHAKESPEARE_SHA256:
        return path
    try:
        with urllib.request.urlopen(_SHAKESPEARE_URL, timeout=_DOWNLOAD_SECONDS) as response:
            content = response.read()
    except OSError as error:
        raise UserError(
            f"--data.corpus shakespeare: {_SHAKESPEARE_URL} can't be reached ({error}); put that file at {path}, or "
            "use another text: --data.corpus text --data.path FILE"
        ) from error
    if hashlib.sha256(content).hexdigest() != _SHAKESPEARE_SHA256:
        raise UserError(f"--data.corpus shakespeare: {_SHAKESPEARE_URL} sent a file with another sha256; try again")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise UserError(f"--data.cache_dir {cache}: can't write there ({error.strerror})") from error
    return path
