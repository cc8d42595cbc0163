import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.einsum import einsum_f32

SPECS = [("md,vd->mv", (5, 4), (7, 4)), ("bhtk,bhsk->bhts", (2, 3, 5, 4), (2, 3, 6, 4))]


@pytest.mark.parametrize(("spec", "x_shape", "y_shape"), SPECS)
def test_the_gradient_is_einsums_own(x64, spec, x_shape, y_shape):
    x, y = (jax.random.normal(jax.random.key(i), s, "float64") for i, s in enumerate((x_shape, y_shape)))

    def loss(product):
        return lambda x, y: jnp.sin(product(spec, x, y)).sum()

    ours, theirs = (jax.grad(loss(p), argnums=(0, 1))(x, y) for p in (einsum_f32, jnp.einsum))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13)


def test_bfloat16_goes_into_every_product_forward_and_backward():
    x, y = jnp.ones((8, 4), jnp.bfloat16), jnp.ones((6, 4), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(jax.grad(lambda x: jnp.sin(einsum_f32("md,vd->mv", x, y)).sum()))(x)
    products = [e for e in jaxpr.jaxpr.eqns if e.primitive.name == "dot_general"]
    assert len(products) == 2
    assert {v.aval.dtype for e in products for v in e.invars} == {jnp.dtype(jnp.bfloat16)}
    assert einsum_f32("md,vd->mv", x, y).dtype == jnp.float32
