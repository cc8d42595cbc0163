"""A corpus as documents in a fixed order, and a document as pieces of text.

A document comes in pieces so that no text has to fit in memory and several cores can work on one. Pieces are cut where
every tokenizer begins a new token anyway: between a letter or digit and the space or line break after it.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from gpt2_core.errors import UserError

PIECE = 1 << 16  # fewest characters of a piece, except the last
LONGEST_PIECE = 1 << 18  # most characters of a piece: text without a boundary is cut here anyway
_BLOCK = 1 << 18  # characters
_BOUNDARY = re.compile(r"[^\W_](?=[ \n])")


class UnreachableError(UserError):
    """A source that can't be read now but may be later, so the tokens written so far are kept."""


class Document(NamedTuple):
    """`split` is train or val if the corpus has splits, None if it is to be drawn. `pieces` joined are the text; read
    them before the next document."""

    split: str | None
    pieces: Iterator[str]


class Corpus(ABC):
    """`name` is that of `data.corpus`; `source` describes it in messages."""

    name: str
    source: str

    @abstractmethod
    def documents(self, start: int = 0) -> Iterator[Document]:
        """The documents from number `start` on, the same at every call. Raises UserError for what can't be read."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes whenever the documents may have changed."""

    def progress(self) -> float | None:
        """The share of the corpus that the newest iteration has read, from 0 to 1; None if it isn't known."""
        return None


def pieces_of(text: str) -> Iterator[str]:
    """The pieces of a text that is in memory."""
    return in_pieces(text[i : i + _BLOCK] for i in range(0, len(text), _BLOCK))


def in_pieces(blocks: Iterable[str]) -> Iterator[str]:
    """Cut a text that arrives in `blocks` into pieces; the pieces depend on the text alone, not on the blocks."""
    rest = ""
    for block in blocks:
        rest += block
        while (cut := _first_cut(rest)) is not None:
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def _first_cut(text: str) -> int | None:
    if len(text) <= PIECE:
        return None
    found = _BOUNDARY.search(text, PIECE, LONGEST_PIECE)
    if found:
        return found.end()
    return LONGEST_PIECE if len(text) >= LONGEST_PIECE else None


def text_of(row: dict[str, Any], field: str, where: str) -> str:
    """The text in a row's field, empty for null; raises UserError, which names `where`, if there is none."""
    if field not in row:
        raise UserError(f"--data.field {field}: {where} has no such field; it has {', '.join(row)}")
    text = row[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"--data.field {field}: {where} holds {type(text).__name__} there; expected text")
    return text
