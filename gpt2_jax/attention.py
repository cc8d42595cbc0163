"""Causal attention: cuDNN's flash kernel where there is one, and a form that runs everywhere in every dtype.

Shapes: B batch, T queries, S keys, H heads, K head size. The XLA form works on (B, H, T, K), which on CPU is three
times faster than jax.nn.dot_product_attention on (B, T, H, K), and takes its softmax in float64 for float64 inputs,
which that function doesn't.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp

from gpt2_core.errors import UserError
from gpt2_jax.dropout import dropout
from gpt2_jax.products import wide_einsum

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
        q, k, v = (x.transpose(0, 2, 1, 3) for x in (q_BHTK, k_BHTK, v_BHTK))
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
        return out.transpose(0, 2, 1, 3)
    T = q_BHTK.shape[2]
    mask_TS = jnp.tril(jnp.ones((T, T), bool))
    drops = key is not None and rate > 0  # by one mask for all the weights
    if T < SHORTEST_IN_BLOCKS or T % BLOCKS or drops:
        return _attend(q_BHTK, k_BHTK, v_BHTK, mask_TS, rate, key)
    # A block of queries sees no key behind its own end, so that of the square of scores 5/8 are computed.
    C = T // BLOCKS
    blocks = []
    for begin, end in zip(range(0, T, C), range(C, T + 1, C), strict=True):
        keys, values, mask = k_BHTK[:, :, :end], v_BHTK[:, :, :end], mask_TS[begin:end, :end]
        blocks.append(_attend(q_BHTK[:, :, begin:end], keys, values, mask, 0.0, None))
    return jnp.concatenate(blocks, axis=2)


def cached_attention(q_BHTK: jax.Array, k_BHSK: jax.Array, v_BHSK: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Attention over a cache of S places: the query at position p sees the places 0 .. p."""
    S = k_BHSK.shape[2]
    mask_B1TS = (jnp.arange(S) <= positions_BT[:, :, None])[:, None]
    return _attend(q_BHTK, k_BHSK, v_BHSK, mask_B1TS, 0.0, None)


def _attend(q, k, v, mask, rate, key) -> jax.Array:
    # Products accumulate and the softmax is taken in float32 at least, whatever the inputs.
    scores = wide_einsum("bhtk,bhsk->bhts", q, k) / math.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    weights = dropout(weights, rate, key).astype(v.dtype)
    return jnp.einsum("bhts,bhsk->bhtk", weights, v)
