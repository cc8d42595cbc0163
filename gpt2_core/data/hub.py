"""Corpora of the Hugging Face Hub, read by the package `datasets`."""

import contextlib
import hashlib
import importlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from gpt2_core.data.documents import Corpus, Document, UnreachableError, pieces_of, text_of
from gpt2_core.data.extras import import_extra
from gpt2_core.data.network import network_error
from gpt2_core.data.text_files import SUFFIXES


class _OnTheHub(NamedTuple):
    dataset: str
    config: str | None
    splits: dict[str, str]
    """The dataset's own name of each split that it has; without `val`, documents are drawn for it."""
    streaming: bool
    """Whether it is tokenised while it is downloaded, without a copy on disk."""
    articles: bool = False
    """Whether rows are lines, of which one like ' = Title = ' begins a document."""


DATASETS = {
    "openwebtext": _OnTheHub("Skylion007/openwebtext", None, {"train": "train"}, True),
    "tinystories": _OnTheHub("roneneldan/TinyStories", None, {"train": "train", "val": "validation"}, True),
    "wikitext2": _OnTheHub(
        "Salesforce/wikitext", "wikitext-2-raw-v1", {"train": "train", "val": "validation"}, False, articles=True
    ),
    "wikitext103": _OnTheHub(
        "Salesforce/wikitext", "wikitext-103-raw-v1", {"train": "train", "val": "validation"}, False, articles=True
    ),
    "fineweb-edu-10b": _OnTheHub("HuggingFaceFW/fineweb-edu", "sample-10BT", {"train": "train"}, True),
}


class Hub(Corpus):
    """A corpus of the Hugging Face Hub."""

    def __init__(self, name: str, *, validation: bool) -> None:
        self.name, self._where = name, DATASETS[name]
        self._splits = {ours: theirs for ours, theirs in self._where.splits.items() if validation or ours == "train"}
        self.source = f"{self._where.dataset} of the Hugging Face Hub"
        self._read, self._total = 0, None
        import_extra("datasets", f"the corpus {name}")

    def documents(self, start: int = 0) -> Iterator[Document]:
        loaded = {ours: self._load(theirs) for ours, theirs in self._splits.items()}
        counts = [getattr(data.info.splits.get(self._splits[ours]), "num_examples", None)
                  for ours, data in loaded.items() if data.info.splits]  # fmt: skip
        self._total = sum(counts) if counts and all(counts) else None
        self._read, number = 0, 0
        for ours, data in loaded.items():
            split = ours if "val" in self._where.splits else None
            if self._where.articles:
                for text in _articles(self._rows(data)):
                    if number >= start:
                        yield Document(split, pieces_of(text))
                    number += 1
                continue
            # A row is a document: `datasets` skips rows faster than reading them.
            skipped = max(0, start - number) if len(loaded) == 1 else 0
            self._read += skipped
            number += skipped
            for text in self._rows(data.skip(skipped) if skipped else data):
                if number >= start:
                    yield Document(split, pieces_of(text))
                number += 1

    def fingerprint(self) -> str:
        # Prepared tokens record it, and it is made of names in this file too: of the row's class and of its fields.
        return hashlib.sha256(repr((self.name, self._where, sorted(self._splits))).encode()).hexdigest()

    def progress(self) -> float | None:
        return self._read / self._total if self._total else None

    def _load(self, split: str) -> Any:
        where = self._where
        return load_from_hub(
            f"--data.corpus {self.name}", _ADVICE, where.dataset, where.config, split, streaming=where.streaming
        )

    def _rows(self, data: Any) -> Iterator[str]:
        rows = iter(data)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:
                raise _unreachable(f"--data.corpus {self.name}", self._where.dataset, error, _ADVICE) from error
            self._read += 1
            yield text_of(row, "text", self.source)


_ADVICE = f"check the network, or use your own text: --data.corpus {' or '.join(SUFFIXES)} with --data.path"


def load_from_hub(typed: str, advice: str, name: str, config: str | None, split: str, *, streaming: bool) -> Any:
    """A split of a data set of the Hub, by the package `datasets`; raises UnreachableError, which begins with what was
    `typed` and ends with the `advice`, if it can't be read."""
    datasets = import_extra("datasets", f"data sets of the Hugging Face Hub ({typed})")
    no_network = None if datasets.config.HF_HUB_OFFLINE else network_error(datasets.config.HF_ENDPOINT)
    try:
        with _offline() if no_network else contextlib.nullcontext():
            return datasets.load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:  # what it raises without a network differs from version to version
        raise _unreachable(typed, name, no_network or error, advice) from error


def _unreachable(typed: str, name: str, error: Exception, advice: str) -> UnreachableError:
    said = " ".join(str(error).split())[:200]
    return UnreachableError(f"{typed}: {name} can't be read from the Hugging Face Hub ({said}); {advice}")


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Make `datasets` use its cache only; otherwise it would try to connect for half a minute.

    HF_HUB_OFFLINE in the environment does the same, but is read only when the packages are first imported.
    """
    settings = [importlib.import_module(name) for name in ("datasets.config", "huggingface_hub.constants")]
    before = [module.HF_HUB_OFFLINE for module in settings]
    for module in settings:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(settings, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _articles(lines: Iterator[str]) -> Iterator[str]:
    """Lines joined into articles; a first-level heading (' = Title = ') begins one."""
    article: list[str] = []
    for line in lines:
        if re.fullmatch(r" = [^=].*[^=] = \n?", line) and article:
            yield "".join(article)
            article = []
        article.append(line)
    if article:
        yield "".join(article)
