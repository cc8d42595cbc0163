import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gpt2_jax.layers import LayerNorm, Linear, _layer_norm, _project, rounded_once


def reference_layer_norm(x):
    x = x.astype(np.float64)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def test_layer_norm_keeps_its_accuracy_far_from_zero():
    # At a mean of 30, E[x^2] - E[x]^2 in float32 loses about two digits; the centred form none.
    x = 30 + np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    layer = LayerNorm(256, epsilon=1e-5, bias=True, dtype="float32", param_dtype="float32", kernel="xla")
    ours = np.abs(np.asarray(layer(x)) - reference_layer_norm(x)).max()
    fast = nnx.LayerNorm(256, epsilon=1e-5, use_fast_variance=True, rngs=nnx.Rngs(0))
    assert ours < 1e-5
    assert np.abs(np.asarray(fast(x)) - reference_layer_norm(x)).max() > 10 * ours


def test_layer_norm_in_bfloat16_computes_in_float32():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 64)), jnp.bfloat16)
    layer = LayerNorm(64, epsilon=1e-5, bias=True, dtype="bfloat16", param_dtype="float32", kernel="xla")
    expected = reference_layer_norm(np.asarray(x.astype(jnp.float32)))
    assert layer(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(layer(x)), expected.astype(jnp.bfloat16))


def make_linear(*shape: int) -> Linear:
    axes = ("embed", *[None] * (len(shape) - 1))
    layer = Linear(shape, axes, std=1.0, bias=True, param_dtype="float64", rngs=nnx.Rngs(0))
    layer.bias[...] = jax.random.normal(jax.random.key(1), shape[1:], "float64")
    return layer


def test_linear_applies_to_every_leading_axis(x64):
    layer, x = make_linear(8, 5), np.random.default_rng(0).standard_normal((2, 4, 8))
    expected = np.einsum("btd,do->bto", x, np.asarray(layer.weight[...])) + np.asarray(layer.bias[...])
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, rtol=1e-12)


def test_projections_of_one_input_come_apart_and_their_gradients_together(x64):
    layer, x = make_linear(8, 3, 5), np.random.default_rng(0).standard_normal((2, 4, 8))
    weight, bias = np.asarray(layer.weight[...]), np.asarray(layer.bias[...])
    outs, pullback = jax.vjp(lambda x, w, b: _project(x, w, b), x.reshape(8, 8), weight, bias)
    for n, out in enumerate(layer.split(jnp.asarray(x))):
        np.testing.assert_allclose(out, x @ weight[:, n] + bias[n], rtol=1e-12)
        np.testing.assert_array_equal(out.reshape(8, 5), outs[n])
    douts = np.random.default_rng(1).standard_normal((3, 8, 5))
    dx, dw, db = pullback(list(douts))
    np.testing.assert_allclose(dx, np.einsum("nmo,ino->mi", douts, weight), rtol=1e-12)
    np.testing.assert_allclose(dw, np.einsum("mi,nmo->ino", x.reshape(8, 8), douts), rtol=1e-12)
    np.testing.assert_allclose(db, douts.sum(axis=1), rtol=1e-12)


def test_gradients_of_a_bfloat16_layer_are_made_in_float32():
    """Not rounded to bfloat16 on their way: that would lose the digits that many parts of a batch add up to."""
    generator = np.random.default_rng(0)
    x, dout = (jnp.asarray(generator.standard_normal((4096, 4)), jnp.bfloat16) for _ in range(2))
    w, b = jnp.ones((4, 1, 4)), jnp.zeros((1, 4))
    _, pullback = jax.vjp(_project, x, w, b)
    dx, dw, db = pullback([dout])
    assert (dx.dtype, dw.dtype, db.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    exact = [np.asarray(a, np.float64) for a in (x, dout)]
    assert np.abs(dw[:, 0] - exact[0].T @ exact[1]).max() < 1e-5 * np.abs(dw).max()
    assert np.abs(db[0] - exact[1].sum(axis=0)).max() < 1e-5 * np.abs(db).max()


@pytest.mark.long
def test_layer_norms_gradients_are_autodiffs(x64):
    generator = np.random.default_rng(0)
    x, w, b = generator.standard_normal((6, 10)), generator.standard_normal(10), generator.standard_normal(10)

    def plain(x, w, b):
        centred = x - x.mean(axis=-1, keepdims=True)
        return centred / jnp.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5) * w + b

    theirs, ours = (
        jax.grad(lambda *a, norm=norm: (norm(*a) ** 3).sum(), argnums=(0, 1, 2))(x, w, b)
        for norm in (plain, lambda *a: _layer_norm(*a, 1e-5, jnp.float64))
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * np.abs(a).max())


def test_on_cpu_what_is_computed_in_bfloat16_is_rounded_once():
    gelu = functools.partial(jax.nn.gelu, approximate=True)
    x = jnp.linspace(-2, 4, 999, dtype=jnp.bfloat16)
    exact = np.asarray(gelu(x.astype(jnp.float32)))
    half_a_digit = 2.0**-8
    assert (
        np.abs(np.asarray(jax.jit(rounded_once(gelu))(x), np.float32) - exact) <= 1.01 * half_a_digit * np.abs(exact)
    ).all()
