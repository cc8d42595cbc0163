import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_core.config import ModelConfig
from gpt2_jax.alibi import alibi_bias, alibi_slopes
from gpt2_jax.attention import cached_attention, causal_attention
from gpt2_jax.definition import define
from gpt2_jax.mesh import parse_mesh
from gpt2_jax.model import Execution
from gpt2_jax.sharding import constrain, make_mesh


def by_definition(q, k, slopes):
    """Softmax weights (B, H, T, T) in numpy, one query at a time."""
    weights = np.zeros((*q.shape[:3], k.shape[2]))
    for b, h, t in np.ndindex(q.shape[:3]):
        scores = [q[b, h, t] @ k[b, h, s] / math.sqrt(q.shape[-1]) - slopes[h] * (t - s) for s in range(t + 1)]
        exponentials = np.exp(np.array(scores) - max(scores))
        weights[b, h, t, : t + 1] = exponentials / exponentials.sum()
    return weights


def test_eight_heads_have_the_slopes_that_the_paper_lists():
    assert alibi_slopes(8) == (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256)


@pytest.mark.parametrize("n", [1, 2, 4, 16, 32])
def test_slopes_of_a_power_of_two_are_a_geometric_sequence_from_its_own_ratio(n):
    np.testing.assert_allclose(alibi_slopes(n), (2 ** (-8 / n)) ** np.arange(1, n + 1), rtol=1e-13)


@pytest.mark.parametrize("n, below", [(3, 2), (12, 8), (20, 16), (25, 16)])
def test_other_numbers_of_heads_take_every_other_slope_of_twice_the_power_of_two_below(n, below):
    assert alibi_slopes(n) == alibi_slopes(below) + alibi_slopes(2 * below)[::2][: n - below]
    assert len(set(alibi_slopes(n))) == n


def test_sequences_may_stand_at_positions_of_their_own(x64):
    keys, slopes = jnp.arange(9), alibi_slopes(3)
    together = alibi_bias(slopes, jnp.array([[0, 1], [5, 6]]), keys, jnp.float64)
    for row, positions in enumerate(([0, 1], [5, 6])):
        alone = alibi_bias(slopes, jnp.array(positions), keys, jnp.float64)
        assert alone.shape == (3, 2, 9) and (together[row] == alone).all()
        assert float(alone[2, 1, 4]) == -slopes[2] * (positions[1] - 4)


@pytest.mark.parametrize(("kernel", "T"), [("xla", 6), ("xla", 64), ("recompute", 64)])
def test_attention_and_its_gradients_are_exact(x64, kernel, T):
    q, k, v = 2 * np.random.default_rng(0).standard_normal((3, 2, 3, T, 4))
    slopes = alibi_slopes(3)

    def ours(q, k, v):
        return causal_attention(q, k, v, kernel=kernel, rate=0.0, key=None, slopes=slopes)

    def whole(q, k, v):
        bias = alibi_bias(slopes, jnp.arange(T), jnp.arange(T), jnp.float64)
        scores = jnp.where(jnp.tril(jnp.ones((T, T), bool)), q @ k.swapaxes(-1, -2) / 2 + bias, -jnp.inf)
        return jax.nn.softmax(scores, axis=-1) @ v

    np.testing.assert_allclose(jax.jit(ours)(q, k, v), by_definition(q, k, slopes) @ v, rtol=0, atol=1e-14)
    ours_by, whole_by = (
        jax.jit(jax.grad(lambda q, k, v, attend=attend: (attend(q, k, v) ** 2).sum(), argnums=(0, 1, 2)))(q, k, v)
        for attend in (ours, whole)
    )
    for a, b in zip(ours_by, whole_by, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shift", [1, 5])
def test_a_window_that_is_shifted_gives_the_same_output(x64, shift):
    """What stands before the window is hidden from it by keys that no query likes."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 3, 6, 4))
    q[..., 0] = 1.0
    before = np.zeros((1, 3, shift, 4))
    before[..., 0] = -1e9
    shifted = (jnp.concatenate([before, x], axis=2) for x in (k, v))
    positions, slopes = jnp.arange(6)[None], alibi_slopes(3)
    out = cached_attention(jnp.asarray(q), *shifted, positions + shift, slopes)
    np.testing.assert_allclose(out, by_definition(q, k, slopes) @ v, rtol=0, atol=1e-14)


@pytest.mark.parametrize("mesh", ["tensor=2", "tensor=4", "data=2,tensor=2"])
@pytest.mark.parametrize("kernel", ["xla", "recompute"])
def test_each_shard_of_heads_has_the_slopes_of_its_own_heads(x64, mesh, kernel):
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 4, 6, 4))
    slopes = alibi_slopes(4)

    def attend(q, k, v):
        q, k, v = (constrain(x, "batch", "heads", None, None) for x in (q, k, v))
        return causal_attention(q, k, v, kernel=kernel, rate=0.0, key=None, slopes=slopes)

    with jax.set_mesh(make_mesh(parse_mesh(mesh))):
        out = jax.jit(attend)(q, k, v)
    assert out.addressable_shards[0].data.shape[1] == 4 // parse_mesh(mesh)["tensor"]
    np.testing.assert_allclose(out, by_definition(q, k, slopes) @ v, rtol=0, atol=1e-14)


@pytest.mark.long
def test_a_trained_length_is_no_limit(x64):
    """No parameter depends on block_size: a longer text is read with the same weights, its beginning alike."""
    short, long = (define(ModelConfig(2, 2, 16, T, 31, position="alibi"), Execution("float64")) for T in (8, 16))
    params = jax.jit(short.initialize)(jax.random.key(0))
    assert {n: p.shape for n, p in long.abstract.items()} == {n: p.shape for n, p in params.items()}
    tokens_BT = np.random.default_rng(0).integers(31, size=(2, 16))
    whole, beginning = (
        jax.jit(lambda params, tokens_BT, d=d: d.merge(params)(tokens_BT))(params, tokens_BT[:, :T])
        for d, T in ((long, 16), (short, 8))
    )
    np.testing.assert_allclose(whole[:, :8], beginning, rtol=0, atol=1e-14)
