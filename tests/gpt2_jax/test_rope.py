import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_core.config import ModelConfig
from gpt2_jax.rope import rotate

PAIRS = {"half": [(i, i + 4) for i in range(4)], "interleaved": [(2 * i, 2 * i + 1) for i in range(4)]}


def config(pairs):
    return ModelConfig(1, 1, 8, 16, 11, position="rope", rope_pairs=pairs, rope_theta=100.0)


@pytest.mark.parametrize("pairs", PAIRS)
def test_each_pair_turns_by_its_own_angle_times_the_position(x64, pairs):
    x = np.random.default_rng(0).standard_normal((2, 1, 16, 8))
    out = np.asarray(rotate(jnp.asarray(x), jnp.arange(16), config(pairs)))
    for i, (a, b) in enumerate(PAIRS[pairs]):
        turned = (x[..., a] + 1j * x[..., b]) * np.exp(1j * np.arange(16) * 100.0 ** (-2 * i / 8))
        np.testing.assert_allclose(out[..., a], turned.real, atol=1e-14)
        np.testing.assert_allclose(out[..., b], turned.imag, atol=1e-14)


def test_scores_depend_on_the_distance_alone(x64):
    q, k = np.random.default_rng(0).standard_normal((2, 1, 1, 1, 8))

    def score(t, s):
        turned = [rotate(jnp.asarray(x), jnp.array([p]), config("half")) for x, p in ((q, t), (k, s))]
        return float((turned[0] * turned[1]).sum())

    assert score(9, 4) == pytest.approx(score(14, 9), abs=1e-14) != pytest.approx(score(9, 5), abs=1e-3)


@pytest.mark.long
def test_sequences_may_stand_at_positions_of_their_own(x64):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 1, 3, 8)))
    together = rotate(x, jnp.array([[0, 1, 2], [5, 6, 7]]), config("half"))
    for row, positions in enumerate(([0, 1, 2], [5, 6, 7])):
        alone = rotate(x[row : row + 1], jnp.array(positions), config("half"))
        np.testing.assert_array_equal(together[row : row + 1], alone)
