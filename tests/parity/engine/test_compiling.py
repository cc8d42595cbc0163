"""Quick compilation computes the same, and leaves every other program as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parity.engine import compiling
from parity.engine.compiling import compiled_quickly, known


def _functions(x):
    return jnp.tanh(x) @ jax.nn.softmax(x).T + jax.lax.rsqrt(x**2 + 1) @ jnp.exp(jnp.sin(x)).T, jax.lax.erf(x).sum()


def test_float64_is_computed_to_rounding_error():
    with jax.enable_x64(True):
        x = np.random.default_rng(0).standard_normal((64, 64))
        with compiled_quickly():
            quick = jax.jit(_functions)(x)
        for a, b in zip(quick, jax.jit(_functions)(x), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-13)


def test_the_options_reach_the_compiler_inside_and_not_outside(monkeypatch):
    monkeypatch.setattr(compiling, "known", lambda _: {"xla_cpu_option_of_another_version": True})
    with compiling.compiled_quickly(), pytest.raises(jax.errors.JaxRuntimeError, match="option_of_another_version"):
        jax.jit(lambda x: x + 1)(np.float32(1))
    assert jax.jit(lambda x: x + 1)(np.float32(1)) == 2


def test_an_option_that_xla_does_not_have_is_left_out_and_a_wrong_value_is_an_error():
    option = "xla_cpu_parallel_codegen_split_count"
    assert known({"xla_cpu_option_of_another_version": True, option: 1}) == {option: 1}
    with pytest.raises(jax.errors.JaxRuntimeError, match=option):
        known({option: "many"})
