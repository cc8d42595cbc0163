"""The tasks: which rows they read, what they ask of a model about each, and what its answers come to.

A task's variant is part of its name, because a figure means nothing without it: HellaSwag is asked in one form by
lm-evaluation-harness and in another by llm.c, and LAMBADA's text is published as it was made and as OpenAI detokenised
it.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpt2_core.data.tokenizer import Tokenizer
from gpt2_core.evaluation.scoring import Request, Score, encode_pair, perplexity, rolling_requests

Row = dict[str, Any]
Rows, Scores, Requests = Sequence[Row], Sequence[list[Score]], Sequence[list[Request]]
"""Of a data set; the second and third are those of each row."""


class Field(NamedTuple):
    """What stands in a field of a row."""

    expected: str
    is_valid: Callable[[Any], bool]


class Dataset(NamedTuple):
    """Where a task's rows are on the Hugging Face Hub, and the fields that it reads."""

    name: str
    config: str | None
    split: str
    fields: dict[str, Field]


class Figure(NamedTuple):
    """One number that a task comes to, and how it is defined."""

    name: str
    value: float
    meaning: str


class Task(NamedTuple):
    """`requests` asks about one row, given the model's block size; `figures` are of all rows and the scores of each."""

    dataset: Dataset
    variant: str
    requests: Callable[[Row, Tokenizer, int], list[Request]]
    figures: Callable[[Rows, Scores, Requests], list[Figure]]


# --- HellaSwag (Zellers et al. 2019): which of four endings?

_TEXT = Field("text", lambda value: isinstance(value, str))
_ENDINGS = Field(
    "a list of four texts",
    lambda value: isinstance(value, list) and len(value) == 4 and all(isinstance(one, str) for one in value),
)
_LABEL = Field("the number of the right ending, 0 to 3", lambda value: str(value) in ("0", "1", "2", "3"))
_HELLASWAG = Dataset(
    "Rowan/hellaswag",
    None,
    "validation",
    {name: _TEXT for name in ("activity_label", "ctx_a", "ctx_b", "ctx")} | {"endings": _ENDINGS, "label": _LABEL},
)


def _cleaned(text: str) -> str:
    """Without what extracting WikiHow's articles left behind (lm_eval/tasks/hellaswag/utils.py)."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _hellaswag_harness(row: Row, tokenizer: Tokenizer, block_size: int) -> list[Request]:
    query = _cleaned(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    return [encode_pair(tokenizer, query, f" {_cleaned(ending)}") for ending in row["endings"]]


def _hellaswag_llmc(row: Row, tokenizer: Tokenizer, block_size: int) -> list[Request]:
    context = tokenizer.encode(row["ctx"]).tolist()
    return [Request(context, tokenizer.encode(f" {ending}").tolist()) for ending in row["endings"]]


def _accuracy(rows: Rows, scores: Scores, lengths: Sequence[Sequence[float]]) -> float:
    """How often the right ending has the highest log-probability for its length; of equals the first is taken."""
    log_probs = np.array([[score.log_prob for score in of_row] for of_row in scores])
    with np.errstate(divide="ignore"):  # an ending that cleaning left empty is infinitely improbable
        chosen = np.argmax(log_probs / np.array(lengths), axis=1)
    return _mean([choice == int(row["label"]) for choice, row in zip(chosen, rows, strict=True)])


def _figures_of_hellaswag_harness(rows: Rows, scores: Scores, requests: Requests) -> list[Figure]:
    endings = [[_cleaned(ending) for ending in row["endings"]] for row in rows]

    def by(length: Callable[[str], int]) -> float:
        return _accuracy(rows, scores, [[length(ending) for ending in of_row] for of_row in endings])

    return [
        Figure("acc", by(lambda ending: 1), "highest log-probability"),
        Figure("acc_norm", by(len), "highest log-probability per character"),
        Figure("acc_bytes", by(lambda ending: len(ending.encode())), "highest log-probability per byte"),
    ]


def _figures_of_hellaswag_llmc(rows: Rows, scores: Scores, requests: Requests) -> list[Figure]:
    tokens = [[len(request.continuation) for request in of_row] for of_row in requests]
    return [
        Figure("acc", _accuracy(rows, scores, [[1] * len(of_row) for of_row in tokens]), "highest log-probability"),
        Figure("acc_norm", _accuracy(rows, scores, tokens), "highest log-probability per token"),
    ]


# --- LAMBADA (Paperno et al. 2016): the last word of a passage


def _lambada(row: Row, tokenizer: Tokenizer, block_size: int) -> list[Request]:
    context, _, word = row["text"].rpartition(" ")
    return [encode_pair(tokenizer, context, f" {word}")]


def _figures_of_lambada(rows: Rows, scores: Scores, requests: Requests) -> list[Figure]:
    words = [score for (score,) in scores]
    return [
        Figure("acc", _mean([word.is_greedy for word in words]), "every token of the last word is the likeliest"),
        Figure(
            "perplexity", _perplexity([word.log_prob for word in words], len(words)), "of the last word, as a whole"
        ),
    ]


# --- WikiText (Merity et al. 2016): the perplexity of whole articles


def _detokenised(page: str) -> str:
    """The text as it was before it was tokenised (lm_eval/tasks/wikitext/preprocess_wikitext.py)."""
    text = page.replace("s '", "s'")
    text = re.sub(r"/' [0-9]/", r"/'[0-9]/", text)
    for joined in "-,.":
        text = text.replace(f" @{joined}@ ", joined)
    for mark in ":;.!?,":
        text = text.replace(f" {mark} ", f"{mark} ")
    for pattern, replacement in (
        (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
        (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
        (r"{\s*([^}]*?)\s*}", r"{\1}"),
        (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
        (r"'\s*([^']*?)\s*'", r"'\1'"),
    ):
        text = re.sub(pattern, replacement, text)
    for old, new in (
        ("= = = =", "===="),
        ("= = =", "==="),
        ("= =", "=="),
        (" ° ", "°"),
        (" \n", "\n"),
        ("\n ", "\n"),
        (" N ", " 1 "),
        (" 's", "'s"),
    ):
        text = text.replace(old, new)
    return text


def _wikitext(row: Row, tokenizer: Tokenizer, block_size: int) -> list[Request]:
    ids = tokenizer.encode(_detokenised(row["page"])).tolist()
    return list(rolling_requests(ids, tokenizer.end_of_text, block_size))


def _figures_of_wikitext(rows: Rows, scores: Scores, requests: Requests) -> list[Figure]:
    log_probs = [score.log_prob for of_row in scores for score in of_row]
    words = sum(len(re.split(r"\s+", row["page"])) for row in rows)
    size = sum(len(row["page"].encode()) for row in rows)
    tokens = sum(len(request.continuation) for of_row in requests for request in of_row)
    return [
        Figure("word_perplexity", _perplexity(log_probs, words), "per word of the page before it was detokenised"),
        Figure("token_perplexity", _perplexity(log_probs, tokens), "per token"),
        Figure("byte_perplexity", _perplexity(log_probs, size), "per byte of the page before it was detokenised"),
        Figure("bits_per_byte", -math.fsum(log_probs) / size / math.log(2), "of the page before it was detokenised"),
    ]


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def _perplexity(log_probs: Sequence[float], count: int) -> float:
    return perplexity(math.fsum(log_probs), count)


TASKS = {
    "hellaswag_harness": Task(
        _HELLASWAG,
        "lm-eval's hellaswag: the activity and both parts of the context, cleaned; no examples before it",
        _hellaswag_harness,
        _figures_of_hellaswag_harness,
    ),
    "hellaswag_llmc": Task(
        _HELLASWAG,
        "llm.c's: the context as it is, tokenised apart from the ending",
        _hellaswag_llmc,
        _figures_of_hellaswag_llmc,
    ),
    "lambada_openai": Task(
        Dataset("EleutherAI/lambada_openai", "default", "test", {"text": _TEXT}),
        "lm-eval's lambada_openai: OpenAI's detokenised text; no filter of stop words",
        _lambada,
        _figures_of_lambada,
    ),
    "lambada_standard": Task(
        Dataset("cimec/lambada", None, "test", {"text": _TEXT}),
        "lm-eval's lambada_standard: the text as published; no filter of stop words",
        _lambada,
        _figures_of_lambada,
    ),
    "wikitext103": Task(
        Dataset("EleutherAI/wikitext_document_level", "wikitext-103-raw-v1", "test", {"page": _TEXT}),
        "lm-eval's wikitext on the test split of WikiText-103: articles detokenised, in rolling windows",
        _wikitext,
        _figures_of_wikitext,
    ),
}

# What `--tasks` takes beside the tasks themselves.
GROUPS = {
    "hellaswag": ("hellaswag_harness", "hellaswag_llmc"),
    "lambada": ("lambada_openai", "lambada_standard"),
}
