import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_core.config import ModelConfig
from gpt2_core.errors import UserError
from gpt2_jax.attention import cached_attention, causal_attention, choose_kernel
from gpt2_jax.capture import tapping


def by_definition(q, k, v):
    out = np.zeros_like(q)
    for index in np.ndindex(q.shape[:3]):
        b, h, t = index
        scores = k[b, h, : t + 1] @ q[index] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[index] = weights @ v[b, h, : t + 1] / weights.sum()
    return out


@pytest.fixture
def qkv():
    return 2 * np.random.default_rng(0).standard_normal((3, 2, 3, 6, 4))


def test_causal_attention_is_exact_in_float64(x64, qkv):
    out = causal_attention(*map(jnp.asarray, qkv), kernel="xla", rate=0.0, key=None)
    assert out.dtype == jnp.float64
    np.testing.assert_allclose(out, by_definition(*qkv), rtol=0, atol=1e-14)


@pytest.mark.long
@pytest.mark.parametrize("T", [64, 66, 68])
def test_long_sequences_in_blocks_of_queries_and_their_gradients_are_exact(x64, T):
    qkv = 2 * np.random.default_rng(0).standard_normal((3, 1, 2, T, 4))

    def whole(q, k, v):
        scores = jnp.where(jnp.tril(jnp.ones((T, T), bool)), q @ k.swapaxes(-1, -2) / 2, -jnp.inf)
        return jax.nn.softmax(scores, axis=-1) @ v

    def ours(q, k, v):
        return causal_attention(q, k, v, kernel="xla", rate=0.0, key=None)

    np.testing.assert_allclose(ours(*map(jnp.asarray, qkv)), by_definition(*qkv), rtol=0, atol=1e-14)
    ours_by, whole_by = (
        jax.grad(lambda q, k, v, attend=attend: (attend(q, k, v) ** 2).sum(), argnums=(0, 1, 2))(*qkv)
        for attend in (ours, whole)
    )
    for a, b in zip(ours_by, whole_by, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def attend_with_dropout(q, k, v, kernel):
    return causal_attention(q, k, v, kernel=kernel, rate=0.3, key=jax.random.split(jax.random.key(0), len(q)))


@pytest.mark.parametrize(("kernel", "T"), [("xla", 68), ("recompute", 68), ("recompute", 62)])
def test_dropout_of_weights_and_its_gradients_are_exact_for_the_masks_that_taps_show(x64, kernel, T):
    qkv = 2 * np.random.default_rng(0).standard_normal((3, 2, 2, T, 4))

    @jax.jit
    def tapped(*qkv):
        found = []
        with tapping(lambda name, mask: found.append(mask) or mask):
            attend_with_dropout(*qkv, kernel)
        return found

    masks, mask = tapped(*qkv), np.zeros((2, 2, T, T))
    begins = np.cumsum([0, *(m.shape[2] for m in masks)])
    for begin, m in zip(begins, masks, strict=False):
        mask[:, :, begin : begin + m.shape[2], : m.shape[3]] = m
    assert begins[-1] == T and 0.65 < mask[:, :, np.tri(T, dtype=bool)].mean() < 0.75

    def whole(q, k, v):
        scores = jnp.where(jnp.tril(jnp.ones((T, T), bool)), q @ k.swapaxes(-1, -2) / 2, -jnp.inf)
        return jax.nn.softmax(scores, axis=-1) * mask / 0.7 @ v

    def by(attend):
        return jax.jit(jax.value_and_grad(lambda *qkv: (attend(*qkv) ** 2).sum(), argnums=(0, 1, 2)))(*qkv)

    (ours, ours_by), (theirs, theirs_by) = by(lambda *qkv: attend_with_dropout(*qkv, kernel)), by(whole)
    np.testing.assert_allclose(ours, theirs, rtol=1e-13)
    for a, b in zip(ours_by, theirs_by, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-11)


def test_recompute_keeps_no_weights_for_the_backward_pass_and_a_bit_of_each_mask():
    qkv = [jax.ShapeDtypeStruct((2, 2, 256, 16), jnp.float32)] * 3

    def kept(kernel):
        back = jax.eval_shape(lambda *qkv: jax.vjp(lambda *qkv: attend_with_dropout(*qkv, kernel), *qkv)[1], *qkv)
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(back))

    inputs_and_output, weights = 4 * 2 * 2 * 256 * 16, 2 * 2 * 256 * 256 * 10 // 16
    assert kept("recompute") == 4 * inputs_and_output + weights // 8
    assert kept("xla") == 4 * inputs_and_output + weights // 8 + 4 * weights


def test_blocks_spare_the_scores_that_no_query_sees():
    """Of four blocks' T x T scores 10/16 are computed, forward and backward."""
    T, K = 256, 64
    shape = jax.ShapeDtypeStruct((1, 1, T, K), jnp.float32)

    def attend(q, k, v):
        return causal_attention(q, k, v, kernel="xla", rate=0.0, key=None)

    flops = jax.jit(attend).lower(shape, shape, shape).compile().cost_analysis()["flops"]
    assert flops < 0.66 * 4 * T * T * K + 20 * T * T


def test_cached_attention_sees_the_cache_up_to_its_own_position(x64, qkv):
    q, k, v = map(jnp.asarray, qkv)
    positions = np.array([[3, 4], [1, 2]])  # each sequence at a place of its own
    rubbish = np.full((2, 3, 4, 4), 1e6)
    k, v = (jnp.concatenate([x, rubbish], axis=2) for x in (k, v))
    queries = jnp.stack([q[b][:, positions[b]] for b in range(2)])
    expected = by_definition(*qkv)
    out = cached_attention(queries, k, v, jnp.asarray(positions))
    np.testing.assert_allclose(out, np.stack([expected[b][:, positions[b]] for b in range(2)]), atol=1e-14)


def test_a_kernel_that_is_not_here_is_an_error_and_auto_takes_another():
    assert choose_kernel("auto", precision="bfloat16", model=ModelConfig()) == "xla"
    with pytest.raises(UserError, match="--attention cudnn: needs an NVIDIA GPU"):
        choose_kernel("cudnn", precision="bfloat16", model=ModelConfig())


def test_cudnn_is_taken_where_it_can_do_the_work_and_only_there(monkeypatch):
    import jax

    class Gpu:
        device_kind = "NVIDIA H200"
        compute_capability = "9.0"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Gpu()])
    dropping, alibi = ModelConfig(dropout=0.1), ModelConfig(position="alibi")
    assert choose_kernel("auto", precision="bfloat16", model=ModelConfig()) == "cudnn"
    assert choose_kernel("auto", precision="float64", model=ModelConfig()) == "recompute"
    assert choose_kernel("auto", precision="bfloat16", model=ModelConfig(n_embd=240)) == "recompute"
    assert choose_kernel("auto", precision="bfloat16", model=dropping) == "recompute"
    assert choose_kernel("xla", precision="bfloat16", model=dropping) == "xla"
    with pytest.raises(UserError, match="no dropout .* model.dropout is 0.1; use --attention recompute"):
        choose_kernel("cudnn", precision="bfloat16", model=dropping)
    assert choose_kernel("auto", precision="bfloat16", model=alibi) == "recompute"
    with pytest.raises(UserError, match="biases of the scores, and model.position is alibi; use --attention recompute"):
        choose_kernel("cudnn", precision="bfloat16", model=alibi)
