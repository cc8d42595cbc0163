import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_core.config import IGNORE_INDEX, ModelConfig
from gpt2_jax.definition import define
from gpt2_jax.dropout import dropout, dropout_mask, unpack
from gpt2_jax.model import Execution, padded_vocab_size

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=31)
TOKENS = np.random.default_rng(0).integers(31, size=(2, 8))
TARGETS = np.where(np.arange(8) < 6, np.roll(TOKENS, -1, axis=1), IGNORE_INDEX)


def build(config=CONFIG, **execution):
    definition = define(config, Execution(**execution))
    return definition, jax.jit(definition.initialize)(jax.random.key(0))


@pytest.mark.long
def test_parameters_have_the_canonical_names_and_count():
    definition, params = build()
    assert set(params) == set(CONFIG.parameter_shapes)
    padding = (padded_vocab_size(31) - 31) * 16
    assert sum(p.size for p in params.values()) == CONFIG.parameter_count + padding
    assert {n: (a.shape, a.dtype) for n, a in definition.abstract.items()} == {
        n: (p.shape, p.dtype) for n, p in params.items()
    }


@pytest.mark.long
def test_no_position_sees_what_follows_it(x64):
    definition, params = build(dtype="float64")

    def output(wpe, t):
        return jnp.square(definition.merge(params | {"wpe.weight": wpe})(TOKENS)[0, t]).sum()

    gradient = jax.jit(jax.grad(output))
    for t in (0, 3, 7):
        grad = gradient(params["wpe.weight"], t)
        assert (jnp.abs(grad).sum(axis=1) > 0).tolist() == [position <= t for position in range(8)]


@pytest.mark.long
def test_initial_weights_have_gpt2s_standard_deviations_in_every_precision(x64):
    config = ModelConfig(n_layer=8, n_head=2, n_embd=128, block_size=128, vocab_size=512)
    _, params = build(config)
    _, doubles = build(config, dtype="float64")
    for name, p in params.items():
        if name.endswith(".bias"):
            assert (p == 0).all()
        elif "ln_" in name:
            assert (p == 1).all()
        else:
            expected = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02  # sqrt(2 x 8) = 4
            assert float(p.std()) == pytest.approx(expected, rel=0.03), name
        assert doubles[name].dtype == jnp.float64 and (doubles[name].astype(jnp.float32) == p).all()


@pytest.mark.long
@pytest.mark.parametrize("how", [{"scan_layers": True}, {"remat": True}, {"scan_layers": True, "remat": True}])
def test_scanning_and_recomputing_change_nothing_but_rounding(x64, how):
    config = dataclasses.replace(CONFIG, dropout=0.2)

    def loss_and_grads(**how):
        definition, params = build(config, dtype="float64", **how)
        keys_B = jax.random.split(jax.random.key(3), len(TOKENS))
        loss = jax.value_and_grad(lambda p: definition.merge(p).loss(TOKENS, TARGETS, dropout_keys_B=keys_B))
        return jax.jit(loss)(params)

    (a_loss, a), (b_loss, b) = loss_and_grads(), loss_and_grads(**how)
    assert float(a_loss) == pytest.approx(float(b_loss), rel=1e-13)
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=0, atol=1e-12 * np.abs(a[name]).max())


@pytest.mark.parametrize("scan_layers", [False, True])
def test_recomputing_keeps_one_array_of_a_block(scan_layers):
    """Its input: not the two parts in which the residual stream comes and goes."""
    config = dataclasses.replace(CONFIG, n_layer=4)
    definition = define(config, Execution("bfloat16", remat=True, scan_layers=scan_layers))
    params = jax.eval_shape(definition.initialize, jax.random.key(0))
    _, pullback = jax.eval_shape(lambda p: jax.vjp(lambda p: definition.merge(p).hidden(TOKENS), p), params)
    kept = [x for x in jax.tree.leaves(pullback) if x.shape[-3:] == (2, 8, config.n_embd)]
    arrays = {dtype: sum(x.size for x in kept if x.dtype == dtype) / TOKENS.size / config.n_embd for dtype in
              (jnp.float32, jnp.bfloat16)}  # fmt: skip
    # Four inputs in float32; the rest is the last norm's.
    assert 4 <= arrays[jnp.float32] <= 6 and arrays[jnp.bfloat16] <= 2


@pytest.mark.long
def test_the_padding_of_the_vocabulary_is_invisible(x64):
    definition, params = build(dtype="float64")
    logits = jax.jit(lambda p: definition.merge(p)(TOKENS))(params)
    assert logits.shape == (2, 8, 31)

    def loss(wte):
        return definition.merge(params | {"wte.weight": wte}).loss(TOKENS, TARGETS)

    value_and_grad = jax.jit(jax.value_and_grad(loss))
    value, grad = value_and_grad(params["wte.weight"])
    logp = np.asarray(jax.nn.log_softmax(logits))
    expected = -sum(logp[b, t, TARGETS[b, t]] for b in range(2) for t in range(6))
    assert float(value) == pytest.approx(float(expected), rel=1e-13)
    assert (grad[31:] == 0).all() and (grad[:31] != 0).any()
    # Whatever the padding holds, it plays no part.
    assert value_and_grad(params["wte.weight"].at[31:].set(50.0))[0] == value


def test_bfloat16_is_for_products_and_float32_for_what_is_kept():
    definition, params = build(dtype="bfloat16")
    assert {p.dtype for p in params.values()} == {jnp.dtype("float32")}

    def outputs(params):
        model = definition.merge(params)
        residual, branch, _ = model.h[0](jnp.ones((1, 8, 16), jnp.float32), None, jnp.arange(8))
        return model.hidden(TOKENS), model(TOKENS), model.loss(TOKENS, TARGETS), residual, branch

    dtypes = [str(x.dtype) for x in jax.eval_shape(outputs, params)]
    assert dtypes == ["bfloat16", "float32", "float32", "float32", "bfloat16"]


def test_no_float64_hides_in_a_float32_model(x64):
    # With x64 on, a stray numpy scalar would turn arrays into float64; Python's own scalars stay scalars.
    definition, params = build()
    batch = TOKENS.astype(np.int32), TARGETS.astype(np.int32)
    keys_B = jax.random.split(jax.random.key(0), len(TOKENS))
    jaxpr = jax.make_jaxpr(lambda p: definition.merge(p).loss(*batch, dropout_keys_B=keys_B))(params)
    assert not re.search(r"f64\[\d", str(jaxpr))


@pytest.mark.long
def test_dropout_keeps_the_share_it_should_and_the_mean():
    keys_B = jax.random.split(jax.random.key(0), 1000)
    kept = unpack(dropout_mask(keys_B, (1000, 999), 0.3), 999)
    assert kept.shape == (1000, 999)
    # So many are kept in all, and of the elements that lie at the same bit of their bytes.
    for some in (kept, *(kept[:, place::8] for place in range(8))):
        assert abs(float(some.mean()) - 0.7) < 5 * (0.7 * 0.3 / some.size) ** 0.5
    out = dropout(jnp.ones((1000, 1000)), 0.3, keys_B)
    assert set(np.unique(np.asarray(out))) == {0.0, np.float32(1 / 0.7)}
    assert dropout(out, 0.3, None) is out


@pytest.mark.long
def test_the_gradient_of_dropout_is_dropped_by_the_same_mask():
    x = jnp.arange(1.0, 401.0).reshape(20, 20)
    keys_B = jax.random.split(jax.random.key(0), 20)
    out, back = jax.vjp(lambda x: dropout(x, 0.3, keys_B), x)
    np.testing.assert_array_equal(back(x)[0], out)
    # What is kept for it is the mask, a bit for each element.
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(back)) == 20 * 3


@pytest.mark.long
def test_a_mask_is_the_same_with_float64_on_as_without():
    keys_B = jax.random.split(jax.random.key(0), 4)
    mask = dropout_mask(keys_B, (4, 3, 20), 0.3)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(dropout_mask(keys_B, (4, 3, 20), 0.3), mask)


@pytest.mark.long
def test_dropout_differs_between_layers_sites_sequences_and_keys(monkeypatch):
    config = dataclasses.replace(CONFIG, dropout=0.5)
    masks = []
    for module in ("dropout", "attention"):
        monkeypatch.setattr(
            f"gpt2_jax.{module}.dropout_mask",
            lambda keys_B, shape, rate: (
                masks.extend(jax.random.key_data(keys_B))
                or jnp.zeros((*shape[:-1], math.ceil(shape[-1] / 8)), jnp.uint8)
            ),
        )
    definition, params = build(config)
    with jax.disable_jit():
        for key in (0, 1):
            keys_B = jax.random.split(jax.random.key(key), len(TOKENS))
            definition.merge(params).loss(TOKENS, TARGETS, dropout_keys_B=keys_B)
    # Embedding, and in each layer attention weights and two residual branches; each with a key of its own, and each
    # sequence too.
    assert len(masks) == 2 * (1 + 3 * 2) * len(TOKENS)
    assert len({tuple(np.asarray(m).tolist()) for m in masks}) == len(masks)
