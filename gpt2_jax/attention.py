"""Causal attention: cuDNN's flash kernel where there is one, and a form that runs everywhere in every dtype.

Shapes: B batch, T queries, S keys, H heads, K head size, C queries of a block, P bytes of a packed dropout mask. The
XLA form works on (B, H, T, K), on CPU three times faster than jax.nn.dot_product_attention on (B, T, H, K), and takes
its softmax in float64 for float64 inputs, which that function doesn't.
"""

import functools
import itertools
import math
from typing import Literal

import jax
import jax.numpy as jnp

from gpt2_core.config import ModelConfig
from gpt2_core.errors import UserError
from gpt2_jax.alibi import Slopes, alibi_bias
from gpt2_jax.capture import tap
from gpt2_jax.dropout import drop, dropout_mask, unpack
from gpt2_jax.products import wide_einsum
from gpt2_jax.runtime import has_accelerator, why_not_ampere
from gpt2_jax.sharding import constrain, per_head_shard

# The last two are one computation. "xla" keeps the weights for the backward pass, B H T T of them; "recompute" keeps
# inputs and output alone and computes the weights again.
Kernel = Literal["cudnn", "recompute", "xla"]

# The XLA form computes long sequences in blocks of queries. More blocks save little more and compile longer.
BLOCKS = 4
SHORTEST_IN_BLOCKS = 64


def choose_kernel(requested: str, *, precision: str, model: ModelConfig) -> Kernel:
    """The kernel that `--attention` means here; raises UserError if the one asked for can't do the work."""
    reason = _why_not_cudnn(precision, model)
    if requested == "auto":
        # On a CPU arithmetic is what is scarce; on an accelerator memory is.
        return "cudnn" if reason is None else "recompute" if has_accelerator() else "xla"
    if requested == "cudnn" and reason:
        raise UserError(f"--attention cudnn: {reason}; use --attention recompute, xla or auto")
    return requested


def _why_not_cudnn(precision: str, model: ModelConfig) -> str | None:
    if (reason := why_not_ampere()) is not None:
        return reason
    if model.head_size % 8 or model.head_size > 128:
        return f"needs a head size that is a multiple of 8 and at most 128, and n_embd / n_head is {model.head_size}"
    if precision != "bfloat16":
        return f"computes in bfloat16, not {precision}"
    if model.position == "alibi":
        # It takes biases as an array of all pairs of positions; the XLA form computes them where it adds them.
        return "is not used with biases of the scores, and model.position is alibi"
    if model.dropout > 0:
        # The kernel's own draws from a counter that the process holds: other masks after a restart, the same masks on
        # every device of a mesh, and no way to know them.
        return f"has no dropout whose masks a run could repeat, and model.dropout is {model.dropout}"
    return None


def causal_attention(
    q_BHTK: jax.Array,
    k_BHTK: jax.Array,
    v_BHTK: jax.Array,
    *,
    kernel: Kernel,
    rate: float,
    key: jax.Array | None,
    slopes: Slopes | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(K) + causal mask) v, shape (B, H, T, K); `rate` and `key` are the dropout of its weights,
    `slopes` those of ALiBi's biases, which are added to the scores (None: no biases)."""
    if kernel == "cudnn":
        assert key is None or rate == 0, "choose_kernel gives cuDNN no dropout"
        assert slopes is None, "choose_kernel gives cuDNN no biases"
        return per_head_shard(_cudnn)(q_BHTK, k_BHTK, v_BHTK)
    if kernel == "recompute" and key is not None:
        # Each layer's masks after its queries: left to itself XLA draws and unpacks those of all layers ahead of the
        # first, gigabytes of them.
        q_BHTK, key_data = jax.lax.optimization_barrier((q_BHTK, jax.random.key_data(key)))
        key = jax.random.wrap_key_data(key_data)
    masks = _dropout_masks(q_BHTK.shape[:3], rate, key)
    return _causal(q_BHTK, k_BHTK, v_BHTK, masks, rate, slopes, kernel == "xla")


def _cudnn(q_BHTK: jax.Array, k_BHTK: jax.Array, v_BHTK: jax.Array) -> jax.Array:
    q_BTHK, k_BTHK, v_BTHK = (x.transpose(0, 2, 1, 3) for x in (q_BHTK, k_BHTK, v_BHTK))
    out_BTHK = jax.nn.dot_product_attention(q_BTHK, k_BTHK, v_BTHK, is_causal=True, implementation="cudnn")
    return out_BTHK.transpose(0, 2, 1, 3)


def _dropout_masks(shape: tuple[int, int, int], rate: float, keys_B: jax.Array | None) -> list[jax.Array] | list[None]:
    """The packed mask (B, H, C, P) of each block's weights, if any are dropped."""
    B, H, T = shape
    ends = [end for _, end in _blocks(T)]
    if keys_B is None or rate == 0.0:
        return [None for _ in ends]
    # Drawn at once, side by side: a draw is hundreds of instructions, which XLA compiles for each.
    widths = [math.ceil(end / 8) for end in ends]
    drawn_BHCP = constrain(dropout_mask(keys_B, (B, H, ends[0], 8 * sum(widths)), rate), "batch", "heads", None, None)
    masks = jnp.split(drawn_BHCP, list(itertools.accumulate(widths))[:-1], axis=-1)
    for mask_BHCP, end in zip(masks, ends, strict=True):
        tap("dropout_mask", unpack(mask_BHCP, end))
    return masks


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _causal(
    q_BHTK: jax.Array,
    k_BHTK: jax.Array,
    v_BHTK: jax.Array,
    masks: list[jax.Array] | list[None],
    rate: float,
    slopes: Slopes | None,
    keep_weights: bool,
) -> jax.Array:
    """In blocks of queries, each with the keys up to its end, so that of the square of scores 5/8 are computed."""
    return _causal_forward(q_BHTK, k_BHTK, v_BHTK, masks, rate, slopes, keep_weights)[0]


def _causal_forward(q_BHTK, k_BHTK, v_BHTK, masks, rate, slopes, keep_weights):
    outs, kept = [], []
    for (begin, end), mask_BHCP in zip(_blocks(q_BHTK.shape[2]), masks, strict=True):
        w_BHCS = _block_weights(q_BHTK[:, :, begin:end], k_BHTK, begin, slopes)
        dropped_BHCS = _drop(w_BHCS, mask_BHCP, rate).astype(v_BHTK.dtype)
        outs.append(jnp.einsum("bhcs,bhsk->bhck", dropped_BHCS, v_BHTK[:, :, :end]))
        kept.append(w_BHCS.astype(v_BHTK.dtype) if keep_weights else None)
    out_BHTK = jnp.concatenate(outs, axis=2)
    return out_BHTK, (q_BHTK, k_BHTK, v_BHTK, out_BHTK, masks, kept)


def _causal_backward(rate, slopes, keep_weights, residuals, dout_BHTK):
    """What autodiff would do, with the softmax's sum over the keys taken over the head size instead: the weights
    times their gradients add up to the output times its own, with dropout too (Dao et al. 2022, "FlashAttention",
    appendix B)."""
    q_BHTK, k_BHTK, v_BHTK, out_BHTK, masks, kept = residuals
    if not keep_weights:
        # Without the barrier XLA finds the forward pass's weights in those computed here, and keeps them after all.
        q_BHTK, k_BHTK, dout_BHTK, masks = jax.lax.optimization_barrier((q_BHTK, k_BHTK, dout_BHTK, masks))
    dtype, wide = q_BHTK.dtype, jnp.promote_types(q_BHTK.dtype, jnp.float32)
    product = functools.partial(jnp.einsum, preferred_element_type=wide)
    sums_BHT1 = jnp.sum(dout_BHTK.astype(wide) * out_BHTK, axis=-1, keepdims=True)
    blocks = _blocks(q_BHTK.shape[2])
    dq, dk, dv = [], [[] for _ in blocks], [[] for _ in blocks]
    for (begin, end), mask_BHCP, w_BHCS in zip(blocks, masks, kept, strict=True):
        q_BHCK, dout_BHCK = q_BHTK[:, :, begin:end], dout_BHTK[:, :, begin:end]
        if not keep_weights:
            # One block after the other, so that the scores of one are in memory at a time.
            q_BHCK, dout_BHCK, dq = jax.lax.optimization_barrier((q_BHCK, dout_BHCK, dq))
            w_BHCS = _block_weights(q_BHCK, k_BHTK, begin, slopes)
        dw_BHCS = _drop(product("bhck,bhsk->bhcs", dout_BHCK, v_BHTK[:, :, :end]), mask_BHCP, rate)
        dscores_BHCS = w_BHCS * (dw_BHCS - sums_BHT1[:, :, begin:end]) / math.sqrt(q_BHTK.shape[-1])
        dscores_BHCS = dscores_BHCS.astype(dtype)
        dq.append(jnp.einsum("bhcs,bhsk->bhck", dscores_BHCS, k_BHTK[:, :, :end]))
        dk_BHSK = product("bhcs,bhck->bhsk", dscores_BHCS, q_BHCK)
        dv_BHSK = product("bhcs,bhck->bhsk", _drop(w_BHCS, mask_BHCP, rate).astype(dtype), dout_BHCK)
        # A block of keys gets its gradient from every block of queries that sees it.
        for number, (first, last) in enumerate(blocks):
            if last <= end:
                dk[number].append(dk_BHSK[:, :, first:last])
                dv[number].append(dv_BHSK[:, :, first:last])
    dk_BHTK, dv_BHTK = (jnp.concatenate([sum(parts) for parts in by], axis=2).astype(dtype) for by in (dk, dv))
    return jnp.concatenate(dq, axis=2), dk_BHTK, dv_BHTK, None


_causal.defvjp(_causal_forward, _causal_backward)


def _block_weights(q_BHCK: jax.Array, k_BHTK: jax.Array, begin: int, slopes: Slopes | None) -> jax.Array:
    """Softmax weights (B, H, C, S) of the C queries from `begin` on, over the S keys up to the last of them."""
    end = begin + q_BHCK.shape[2]
    return _weights(q_BHCK, k_BHTK[:, :, :end], _causal_mask(end)[begin:], slopes, jnp.arange(begin, end))


def _drop(x_BHCS: jax.Array, mask_BHCP: jax.Array | None, rate: float) -> jax.Array:
    return x_BHCS if mask_BHCP is None else drop(x_BHCS, mask_BHCP, rate)


def _blocks(T: int) -> list[tuple[int, int]]:
    """The queries of each block, from and to."""
    C = T if T < SHORTEST_IN_BLOCKS or T % BLOCKS else T // BLOCKS
    return [(begin, begin + C) for begin in range(0, T, C)]


def _causal_mask(T: int) -> jax.Array:
    return jnp.tril(jnp.ones((T, T), bool))


def cached_attention(
    q_BHTK: jax.Array, k_BHSK: jax.Array, v_BHSK: jax.Array, positions_BT: jax.Array, slopes: Slopes | None = None
) -> jax.Array:
    """Attention over a cache of S slots: the query at position p sees the slots 0 .. p. `slopes` are ALiBi's."""
    S = k_BHSK.shape[2]
    mask_B1TS = (jnp.arange(S) <= positions_BT[:, :, None])[:, None]
    weights_BHTS = _weights(q_BHTK, k_BHSK, mask_B1TS, slopes, positions_BT).astype(v_BHSK.dtype)
    return jnp.einsum("bhts,bhsk->bhtk", weights_BHTS, v_BHSK)


def _weights(q, k, mask, slopes, positions) -> jax.Array:
    """Softmax weights (B, H, T, S); `positions` are those of the queries, the keys' are 0 .. S - 1."""
    # The product accumulates and the softmax is taken in float32 at least, whatever the inputs.
    scores = wide_einsum("bhtk,bhsk->bhts", q, k) / math.sqrt(q.shape[-1])
    if slopes is not None:
        scores = scores + alibi_bias(slopes, positions, jnp.arange(k.shape[2]), scores.dtype)
    return jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
