"""Causal attention: cuDNN's flash kernel where there is one, and a form that runs everywhere in every dtype.

Shapes: B batch, T queries, S keys, H heads, K head size, C queries of a block. The XLA form works on (B, H, T, K),
on CPU three times faster than jax.nn.dot_product_attention on (B, T, H, K), and takes its softmax in float64 for
float64 inputs, which that function doesn't.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp

from gpt2_core.errors import UserError
from gpt2_jax.dropout import dropout
from gpt2_jax.products import wide_einsum
from gpt2_jax.sharding import per_head_shard

Kernel = Literal["cudnn", "xla"]

# The XLA form computes long sequences in blocks of queries. More blocks save little more and compile longer.
BLOCKS = 4
SHORTEST_IN_BLOCKS = 64


def choose_kernel(requested: str, *, precision: str, dropout: float, head_size: int) -> Kernel:
    """The kernel that `--attention` means here; raises UserError if the one asked for can't do the work."""
    reason = _why_not_cudnn(precision, dropout, head_size)
    if requested == "auto":
        return "xla" if reason else "cudnn"
    if requested == "cudnn" and reason:
        raise UserError(f"--attention cudnn: {reason}; use --attention xla or auto")
    return requested


def _why_not_cudnn(precision: str, dropout: float, head_size: int) -> str | None:
    device = jax.devices()[0]
    if jax.default_backend() != "gpu" or "NVIDIA" not in device.device_kind:
        return "needs an NVIDIA GPU, and JAX finds none here"
    if float(device.compute_capability) < 8.0:
        return f"needs compute capability 8.0, and this {device.device_kind} has {device.compute_capability}"
    if head_size % 8 or head_size > 128:
        return f"needs a head size that is a multiple of 8 and at most 128, and n_embd / n_head is {head_size}"
    if precision != "bfloat16":
        return f"computes in bfloat16, not {precision}"
    if dropout > 0:
        return f"has no dropout, and model.dropout is {dropout}"
    return None


def causal_attention(
    q_BHTK: jax.Array, k_BHTK: jax.Array, v_BHTK: jax.Array, *, kernel: Kernel, rate: float, key: jax.Array | None
) -> jax.Array:
    """softmax(q k^T / sqrt(K) + causal mask) v, shape (B, H, T, K); `rate` and `key` are the dropout of its weights."""
    if kernel == "cudnn":
        return per_head_shard(_cudnn)(q_BHTK, k_BHTK, v_BHTK)
    if key is not None and rate > 0:
        return _attend(q_BHTK, k_BHTK, v_BHTK, _causal_mask(q_BHTK.shape[2]), rate, key)
    return _causal(q_BHTK, k_BHTK, v_BHTK)


def _cudnn(q_BHTK: jax.Array, k_BHTK: jax.Array, v_BHTK: jax.Array) -> jax.Array:
    q_BTHK, k_BTHK, v_BTHK = (x.transpose(0, 2, 1, 3) for x in (q_BHTK, k_BHTK, v_BHTK))
    out_BTHK = jax.nn.dot_product_attention(q_BTHK, k_BTHK, v_BTHK, is_causal=True, implementation="cudnn")
    return out_BTHK.transpose(0, 2, 1, 3)


@jax.custom_vjp
def _causal(q_BHTK: jax.Array, k_BHTK: jax.Array, v_BHTK: jax.Array) -> jax.Array:
    """In blocks of queries: one sees no key behind its own end, so that of the square of scores 5/8 are computed."""
    return _causal_forward(q_BHTK, k_BHTK, v_BHTK)[0]


def _causal_forward(q_BHTK, k_BHTK, v_BHTK):
    mask_TS = _causal_mask(q_BHTK.shape[2])
    outs, weights = [], []
    for begin, end in _blocks(q_BHTK.shape[2]):
        w_BHCS = _weights(q_BHTK[:, :, begin:end], k_BHTK[:, :, :end], mask_TS[begin:end, :end]).astype(v_BHTK.dtype)
        outs.append(jnp.einsum("bhcs,bhsk->bhck", w_BHCS, v_BHTK[:, :, :end]))
        weights.append(w_BHCS)
    out_BHTK = jnp.concatenate(outs, axis=2)
    return out_BHTK, (q_BHTK, k_BHTK, v_BHTK, out_BHTK, weights)


def _causal_backward(saved, g_BHTK):
    """What autodiff would do, with the softmax's sum over the keys taken over the head size in its place: the weights
    times their gradients add up to the output times its own (Dao et al. 2022, "FlashAttention", appendix B)."""
    q_BHTK, k_BHTK, v_BHTK, out_BHTK, weights = saved
    dtype, wide = q_BHTK.dtype, jnp.promote_types(q_BHTK.dtype, jnp.float32)
    product = functools.partial(jnp.einsum, preferred_element_type=wide)
    sums_BHT1 = jnp.sum(g_BHTK.astype(wide) * out_BHTK, axis=-1, keepdims=True)
    blocks = _blocks(q_BHTK.shape[2])
    by_q, by_k, by_v = [], [[] for _ in blocks], [[] for _ in blocks]
    for (begin, end), w_BHCS in zip(blocks, weights, strict=True):
        q_BHCK, g_BHCK = q_BHTK[:, :, begin:end], g_BHTK[:, :, begin:end]
        by_w_BHCS = product("bhck,bhsk->bhcs", g_BHCK, v_BHTK[:, :, :end])
        by_scores_BHCS = w_BHCS * (by_w_BHCS - sums_BHT1[:, :, begin:end]) / math.sqrt(q_BHTK.shape[-1])
        by_scores_BHCS = by_scores_BHCS.astype(dtype)
        by_q.append(jnp.einsum("bhcs,bhsk->bhck", by_scores_BHCS, k_BHTK[:, :, :end]))
        of_k_BHSK = product("bhcs,bhck->bhsk", by_scores_BHCS, q_BHCK)
        of_v_BHSK = product("bhcs,bhck->bhsk", w_BHCS, g_BHCK)
        # A block of keys gets its gradient from every block of queries that sees it.
        for number, (first, last) in enumerate(blocks):
            if last <= end:
                by_k[number].append(of_k_BHSK[:, :, first:last])
                by_v[number].append(of_v_BHSK[:, :, first:last])
    by_k_BHTK, by_v_BHTK = (jnp.concatenate([sum(parts) for parts in by], axis=2).astype(dtype) for by in (by_k, by_v))
    return jnp.concatenate(by_q, axis=2), by_k_BHTK, by_v_BHTK


_causal.defvjp(_causal_forward, _causal_backward)


def _blocks(T: int) -> list[tuple[int, int]]:
    """The queries of each block, from and to."""
    C = T if T < SHORTEST_IN_BLOCKS or T % BLOCKS else T // BLOCKS
    return [(begin, begin + C) for begin in range(0, T, C)]


def _causal_mask(T: int) -> jax.Array:
    return jnp.tril(jnp.ones((T, T), bool))


def cached_attention(q_BHTK: jax.Array, k_BHSK: jax.Array, v_BHSK: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Attention over a cache of S places: the query at position p sees the places 0 .. p."""
    S = k_BHSK.shape[2]
    mask_B1TS = (jnp.arange(S) <= positions_BT[:, :, None])[:, None]
    return _attend(q_BHTK, k_BHSK, v_BHSK, mask_B1TS, 0.0, None)


def _attend(q, k, v, mask, rate, key) -> jax.Array:
    weights = dropout(_weights(q, k, mask), rate, key).astype(v.dtype)
    return jnp.einsum("bhts,bhsk->bhtk", weights, v)


def _weights(q, k, mask) -> jax.Array:
    # The product accumulates and the softmax is taken in float32 at least, whatever the inputs.
    scores = wide_einsum("bhtk,bhsk->bhts", q, k) / math.sqrt(q.shape[-1])
    return jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
