"""How probable a model finds a continuation of a context: the tokens that this asks for, and their batches.

Shapes: B sequences of a batch, T time. The definitions are those of the model `hf` of EleutherAI's
lm-evaluation-harness, so that figures can be compared with published ones.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpt2_core.config import IGNORE_INDEX
from gpt2_core.data.batches import Batch
from gpt2_core.data.tokenizer import Tokenizer

# Batches of shorter sequences are padded to this, or to a power of two above: a length is compiled once.
SHORTEST = 32


class Request(NamedTuple):
    """Token ids: how probable is the continuation after the context, which has one token at least?"""

    context: Sequence[int]
    continuation: Sequence[int]


class Score(NamedTuple):
    """Of a continuation: the sum of its tokens' log-probabilities (nats), and whether each is the likeliest there."""

    log_prob: float
    is_greedy: bool


class TokenScores(NamedTuple):
    """Of each target of a batch (B, T): its log-probability, and whether it is the likeliest token.

    Of equally likely tokens the first counts. What stands at targets that are IGNORE_INDEX has no meaning. These are
    arrays of numpy, or of a framework that may still be computing them.
    """

    log_probs: Any
    is_likeliest: Any


ScoreBatch = Callable[[Batch], TokenScores]
"""What a backend does."""


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """The pair as tokens of the whole text, divided where the context's own tokens end.

    Spaces at the end of the context belong to the continuation, since GPT-2's tokens begin with their space. An empty
    context is end-of-text.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    context_ids = tokenizer.encode(stripped).tolist()
    ids = tokenizer.encode(stripped + continuation).tolist()
    if context_ids:
        return Request(context_ids, ids[len(context_ids) :])
    if ids[:1] != [tokenizer.end_of_text]:
        ids = [tokenizer.end_of_text, *ids]
    return Request(ids[:1], ids[1:])


def rolling_requests(ids: Sequence[int], end_of_text: int, block_size: int) -> Iterator[Request]:
    """Requests whose continuations make up a document, each token once, with as much context as fits.

    The first window begins after end-of-text. Each of the others but the last has one token of context; the last is
    moved back until it fills the block, so that what it shares with the window before is context.
    """
    for begin in range(0, len(ids), block_size):
        end = min(begin + block_size, len(ids))
        first = max(0, end - block_size)
        before = [end_of_text] if first == 0 else [ids[first - 1]]
        yield Request([*before, *ids[first:begin]], ids[begin:end])


def score(
    requests: Sequence[Request],
    score_batch: ScoreBatch,
    *,
    block_size: int,
    batch_size: int,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Score]:
    """The score of each request, in their order; `advance` is told how many more are done.

    The longest are computed first, so that a batch too large for the memory is known at once.
    """
    order = sorted(range(len(requests)), key=lambda i: -_length(requests[i], block_size))
    groups = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    scores: list[Score | None] = [None] * len(requests)
    pending: tuple[list[int], Batch, TokenScores] | None = None

    def fetch() -> None:
        group, batch, computed = pending
        log_probs_BT, is_likeliest_BT = map(np.asarray, computed)
        for number, targets_T, log_probs_T, is_likeliest_T in zip(
            group, batch.targets, log_probs_BT, is_likeliest_BT, strict=False
        ):
            counts_T = targets_T != IGNORE_INDEX
            total = log_probs_T[counts_T].sum(dtype=np.float64)
            scores[number] = Score(float(total), bool(is_likeliest_T[counts_T].all()))
        advance(len(group))

    for group in groups:
        batch = make_batch([requests[i] for i in group], block_size=block_size, batch_size=batch_size)
        computed = score_batch(batch)
        if pending is not None:
            fetch()  # while the device computes the next
        pending = group, batch, computed
    if pending is not None:
        fetch()
    return scores


def make_batch(requests: Sequence[Request], *, block_size: int, batch_size: int) -> Batch:
    """The requests as `batch_size` sequences of one length, a power of two or the block size.

    Of a pair that is too long the beginning is cut off. Targets that aren't of a continuation are IGNORE_INDEX.
    """
    longest = max(_length(request, block_size) for request in requests)
    T = min(block_size, max(SHORTEST, 1 << (longest - 1).bit_length()))
    inputs_BT = np.zeros((batch_size, T), np.int32)
    targets_BT = np.full((batch_size, T), IGNORE_INDEX, np.int32)
    for inputs_T, targets_T, (context, continuation) in zip(inputs_BT, targets_BT, requests, strict=False):
        ids = [*context, *continuation][-(block_size + 1) :]
        count = min(len(continuation), len(ids) - 1)
        inputs_T[: len(ids) - 1] = ids[:-1]
        targets_T[len(ids) - 1 - count : len(ids) - 1] = ids[len(ids) - count :]
    return Batch(inputs_BT, targets_BT)


def _length(request: Request, block_size: int) -> int:
    """Positions that a request takes: its last token is only predicted."""
    return min(block_size, len(request.context) + len(request.continuation) - 1)


def perplexity(log_prob: float, count: int) -> float:
    """Of `count` words, tokens or bytes whose log-probabilities add up to `log_prob`; infinite beyond float's range."""
    mean = -log_prob / count
    return math.exp(mean) if mean < 700 else math.inf
