import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_core.config import IGNORE_INDEX
from gpt2_core.data.tokenizer import BytesTokenizer
from gpt2_core.evaluation.scoring import (
    SHORTEST,
    Request,
    Score,
    TokenScores,
    encode_pair,
    make_batch,
    rolling_requests,
    score,
)

BYTES = BytesTokenizer()


def by_sums(batch):
    """A backend whose log-probability of a target is minus the sum of all inputs up to it: it depends on the whole
    context. The likeliest token is always 1."""
    return TokenScores(-np.cumsum(batch.inputs, axis=1).astype(float), batch.targets == 1)


@pytest.mark.parametrize(
    ("context", "continuation", "expected"),
    [
        ("ab", " c", (b"ab", b" c")),
        ("ab  ", "c", (b"ab", b"  c")),  # GPT-2's tokens begin with their space
        ("", "c", ([256], b"c")),
        ("  ", "c", ([256], b"  c")),
    ],
)
def test_a_pair_is_divided_before_the_spaces_between(context, continuation, expected):
    assert encode_pair(BYTES, context, continuation) == tuple(map(list, expected))


@given(length=st.integers(0, 60), block_size=st.integers(1, 20))
@settings(max_examples=200, deadline=None)
def test_rolling_windows_predict_each_token_once_after_all_that_fits(length, block_size):
    ids = list(range(length))
    requests = list(rolling_requests(ids, 999, block_size))
    assert [token for request in requests for token in request.continuation] == ids
    whole, done = [999, *ids], 0
    for number, (context, continuation) in enumerate(requests):
        assert whole[done + 1 - len(context) : done + 1] == context  # what really stands before
        positions = len(context) + len(continuation) - 1
        is_last = number == len(requests) - 1
        assert positions == (min(length, block_size) if number == 0 else block_size)
        assert len(context) == 1 or is_last
        done += len(continuation)


def test_a_pair_that_is_too_long_loses_its_beginning_and_only_the_continuation_counts():
    batch = make_batch([Request(range(10, 20), [1, 2, 3])], block_size=4, batch_size=2)
    assert batch.inputs.tolist() == [[19 - 1, 19, 1, 2], [0] * 4]
    assert batch.targets.tolist() == [[IGNORE_INDEX, 1, 2, 3], [IGNORE_INDEX] * 4]
    # The last token is only predicted, so a block of four holds pairs of five.
    fits = make_batch([Request([8, 9], [1, 2, 3])], block_size=4, batch_size=1)
    assert fits.inputs.tolist() == [[8, 9, 1, 2]] and fits.targets.tolist() == [[IGNORE_INDEX, 1, 2, 3]]


def test_few_lengths_are_ever_computed():
    lengths = {
        make_batch([Request([1], [1] * count)], block_size=1000, batch_size=1).inputs.shape[1]
        for count in range(1, 1500)
    }
    assert lengths == {32, 64, 128, 256, 512, 1000} and min(lengths) == SHORTEST


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_scores_come_in_the_order_of_the_requests_whatever_the_batches(batch_size):
    generator = np.random.default_rng(0)
    requests = [
        Request(*(generator.integers(0, 2, size).tolist() for size in generator.integers(1, 60, 2))) for _ in range(20)
    ]
    told: list[int] = []
    scores = score(requests, by_sums, block_size=1000, batch_size=batch_size, advance=told.append)
    for (context, continuation), (log_prob, is_greedy) in zip(requests, scores, strict=True):
        sums = np.cumsum([*context, *continuation])
        assert log_prob == -sums[len(context) - 1 : -1].sum()
        assert is_greedy == (set(continuation) == {1})
    assert sum(told) == len(requests)
    assert score([], by_sums, block_size=8, batch_size=4) == []


def test_a_score_is_a_sum_in_float64():
    def in_float32(batch):
        return TokenScores(np.full(batch.targets.shape, -0.1, np.float32), np.ones(batch.targets.shape, bool))

    [answer] = score([Request([1], [1] * 4096)], in_float32, block_size=4096, batch_size=1)
    assert answer == Score(4096 * float(np.float32(-0.1)), True)
