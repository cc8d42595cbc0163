"""Independent arrays are not suspected, and each way of not being independent is seen."""

import numpy as np
import pytest

from parity.engine.independence import Displaceable, aligned, displaced, first_surprise, surprise, two_sided

LIMIT = 6.0


def _largest(scores: np.ndarray) -> float:
    return float(surprise(two_sided(scores), scores.size).max())


def _scores(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return displaced(Displaceable(a), Displaceable(b))


@pytest.fixture(params=range(5))
def draw(request):
    generator = np.random.default_rng(request.param)
    rate = 0.4

    def draw(*shape: int) -> np.ndarray:
        return ((generator.random(shape) >= rate) - (1 - rate)) / np.sqrt(rate * (1 - rate))

    return draw


def test_independent_masks_are_not_suspected_and_their_scores_are_standard_normal(draw):
    a, b = draw(6, 4, 68, 40), draw(6, 4, 68, 40)
    scores = _scores(a, b)
    measured = scores[scores != 0.0]
    assert _largest(scores) < LIMIT and abs(measured.std() - 1.0) < 0.05
    streams = aligned([draw(2048 + 8 * number) for number in range(60)])
    assert _largest(streams) < LIMIT and abs(streams[np.triu_indices(60, 1)].std() - 1.0) < 0.06


def test_an_array_in_several_pairs_is_compared_with_each_as_if_it_were_alone(draw):
    a, b, c = draw(3, 40, 24), draw(3, 40, 24), draw(3, 30, 50)
    kept = Displaceable(a)
    for other in (b, c, a):
        np.testing.assert_array_equal(displaced(kept, Displaceable(other)), _scores(a, other))


def test_what_has_no_element_is_left_out(draw):
    mask = draw(3, 64, 64)
    mask[..., 60:] = np.nan
    assert _largest(_scores(mask, draw(3, 64, 64))) < LIMIT
    assert aligned([mask, np.full(mask.shape, np.nan)])[0, 1] == 0.0


def test_a_copy_and_a_prefix_are_correlated_element_by_element(draw):
    a = draw(4096)
    scores = aligned([a, draw(5000), a[:1500], np.concatenate([a, draw(300)])])
    assert {(i, j) for i, j in np.argwhere(surprise(two_sided(scores), 6) > LIMIT) if i < j} == {(0, 2), (0, 3), (2, 3)}


@pytest.mark.parametrize(
    ("spoil", "vector"),
    [
        (lambda x: np.roll(x, (2, 3), (1, 2)), (2, 3)),
        (lambda x: np.roll(x, -5, 2), (0, -5)),
        (lambda x: x, (0, 0)),
    ],
)
def test_a_displaced_copy_is_found_and_by_how_much(draw, spoil, vector):
    a = draw(4, 48, 48)
    scores = _scores(spoil(a), a)
    assert np.unravel_index(np.abs(scores).argmax(), scores.shape) == tuple(np.array(vector) % scores.shape)
    assert _largest(scores) > LIMIT


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_a_mask_broadcast_along_any_axis_is_correlated_with_itself(draw, axis):
    mask = np.repeat(draw(*(1 if number == axis else size for number, size in enumerate((6, 4, 16, 16)))), 4, axis)
    scores = _scores(mask, mask)
    scores.flat[0] = 0.0
    assert _largest(scores) > LIMIT


def test_the_first_test_beyond_the_limit_is_named_or_the_largest():
    log_p = np.log([0.5, 1e-9, 1e-12])
    assert first_surprise(log_p, "abc", 6.0) == (pytest.approx(12 - np.log10(3)), "b")
    assert first_surprise(log_p, "abc", 20.0)[1] == "c"
    assert first_surprise(log_p, "abc", 6.0, 10**9)[0] == pytest.approx(3.0)
