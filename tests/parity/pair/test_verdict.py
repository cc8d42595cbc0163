"""Whether two models are the same: right ports of every kind, and what is a difference."""

import jax
import jax.numpy as jnp
import optax
import pytest
import torch
from flax import linen, nnx
from squares import EMPTY, Linear, Square, X, failed, linear, parameters, square

import parity


@pytest.mark.long
def test_two_right_ports_are_the_same_in_every_check(right):
    assert right.passed and right.verdict == "same" and right.first_divergence is None
    assert {r.check for r in right.results} == {"weights", "forward", "gradients", "optimizer", "loss_curve"}
    # Embeddings of Flax round to float32, and the report says where.
    assert any("tiny.py" in r.where and "float32" in r.where for r in right.results)
    right.assert_same()


@pytest.mark.long
def test_each_kind_of_jax_model_is_compared():
    import equinox
    import haiku

    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = jnp.tanh(linen.Dense(6)(x))
            return linen.Dense(6)(jnp.tanh(linen.Dense(6)(x)))

    linen_model = Linen()
    equinox_model = equinox.nn.MLP(6, 6, 6, 2, activation=jnp.tanh, key=jax.random.key(0))
    transformed = haiku.transform(lambda x: haiku.nets.MLP([6, 6, 6], activation=jnp.tanh)(x))
    for candidate in (
        (linen_model, linen_model.init(jax.random.key(0), X)),
        (lambda m, x: jax.vmap(m)(x), equinox_model),
        (transformed, transformed.init(jax.random.key(0), X)),
        nnx.Sequential(*(nnx.Linear(6, 6, rngs=nnx.Rngs(0)) if i % 2 == 0 else jnp.tanh for i in range(5))),
    ):
        report = parity.compare(Square(), candidate, inputs=X)
        assert report.passed, report.in_words()


def test_pairs_within_one_framework_are_compared_with_roles():
    assert parity.compare(Square(), Square(), inputs=X).passed
    report = parity.compare((square, parameters()), (lambda p, x: square(p, x) * 2, parameters()), inputs=X)
    assert report.verdict == "different" and any("2" in h for h in report.hints), report.in_words()


def test_an_output_that_only_the_reference_has_is_a_difference():
    reference = Linear(lambda y: (y, torch.tanh(y).sum(-1)))
    assert failed(parity.compare(reference, (linear, EMPTY), inputs=X)) == {"forward"}
    both = (lambda p, x: (linear(p, x), jnp.tanh(linear(p, x)).sum(-1))), EMPTY
    assert parity.compare(reference, both, inputs=X).passed


def test_another_shape_for_a_generated_input_is_a_difference():
    report = parity.compare(Linear(), (lambda p, x: linear(p, x)[: len(X)], EMPTY), inputs=X)
    assert failed(report) == {"forward"} and any("generated input: an odd batch" in r.case for r in report.results)


def test_an_output_that_is_one_number_shows_nothing():
    """Both are zero everywhere, whatever comes before."""
    reference = Linear(lambda y: torch.relu(y - 1e6))
    report = parity.compare(reference, (lambda p, x: jnp.maximum(jnp.tanh(linear(p, x)) - 1e6, 0.0), EMPTY), inputs=X)
    assert report.verdict == "inconclusive" and not report.passed and "one number" in report.doubts[0]


@pytest.mark.parametrize("checks", [("weights",), ("optimizer",)])
def test_nan_in_one_tensor_is_not_hidden_by_the_next(checks):
    """The tensor that is compared first is NaN in the candidate; the other one is right."""
    reference = Linear()
    if checks == ("weights",):
        _, written = parity.transfer(reference, (linear, EMPTY), inputs=X)
        candidate = linear, {"b": written["b"], "w": written["w"].at[0, 0].set(jnp.nan)}
        table = [{"source": "l.weight", "transform": "transpose", "target": "w"}, {"source": "l.bias", "target": "b"}]
        report = parity.compare(reference, candidate, inputs=X, weights="own", checks=checks, mapping=table)
    else:
        wrong = optax.chain(optax.sgd(0.1), optax.stateless(lambda u, p: {**u, "b": u["b"] * jnp.nan}))
        optimizers = (lambda p: torch.optim.SGD(p, lr=0.1)), wrong
        report = parity.compare(reference, (linear, EMPTY), inputs=X, checks=checks, optimizer=optimizers)
    named = {"weights": "w:", "optimizer": "b:"}[checks[0]]
    assert failed(report) == set(checks) and any(r.where.startswith(named) for r in report.results if not r.passed)
