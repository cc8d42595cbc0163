import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gpt2_jax.layers import LayerNorm, Linear


def reference_layer_norm(x):
    x = x.astype(np.float64)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def test_layer_norm_keeps_its_accuracy_far_from_zero():
    # At a mean of 30, E[x^2] - E[x]^2 in float32 loses about two digits; the centred form none.
    x = 30 + np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    layer = LayerNorm(256, epsilon=1e-5, bias=True, dtype="float32", param_dtype="float32")
    ours = np.abs(np.asarray(layer(x)) - reference_layer_norm(x)).max()
    fast = nnx.LayerNorm(256, epsilon=1e-5, use_fast_variance=True, rngs=nnx.Rngs(0))
    assert ours < 1e-5
    assert np.abs(np.asarray(fast(x)) - reference_layer_norm(x)).max() > 10 * ours


def test_layer_norm_in_bfloat16_computes_in_float32():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 64)), jnp.bfloat16)
    layer = LayerNorm(64, epsilon=1e-5, bias=True, dtype="bfloat16", param_dtype="float32")
    expected = reference_layer_norm(np.asarray(x.astype(jnp.float32)))
    assert layer(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(layer(x)), expected.astype(jnp.bfloat16))


@pytest.mark.parametrize("shape", [(8, 5), (8, 3, 5)])
def test_linear_applies_each_projection_to_every_leading_axis(x64, shape):
    layer = Linear(
        shape, ("embed", *[None] * (len(shape) - 1)), std=1.0, bias=True, param_dtype="float64", rngs=nnx.Rngs(0)
    )
    layer.bias[...] = jax.random.normal(jax.random.key(1), shape[1:], "float64")
    x = np.random.default_rng(0).standard_normal((2, 4, 8))
    expected = np.einsum("btd,d...->bt...", x, np.asarray(layer.weight[...])) + np.asarray(layer.bias[...])
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, rtol=1e-12)
