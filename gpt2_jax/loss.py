"""The head and its cross-entropy, fused: logits exist for one chunk of tokens at a time.

Shapes: B sequences, T time, D embedding, V vocabulary (padded). A chunk is C tokens of every sequence; n chunks of C
tokens make T.
"""

import functools
import math

import jax
import jax.numpy as jnp

from gpt2_core.config import IGNORE_INDEX, VOCABULARY_MULTIPLE
from gpt2_jax.sharding import constrain, is_tensor_parallel

# Of a chunk's logits. Larger chunks need more memory; smaller ones read and write the head's gradient more often.
CHUNK_BYTES = 512 << 20

# Rows of the head that the gradient by x is summed over at a time, on CPU: the padded vocabulary is a multiple.
BLOCK = VOCABULARY_MULTIPLE


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def summed_cross_entropy(x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, vocab_size: int) -> jax.Array:
    """Sum over the targets that aren't IGNORE_INDEX of -log softmax(x head^T)[target], in float32 at least.

    The products take operands of x's dtype and accumulate in float32 at least. Rows of `head` from `vocab_size` on are
    padding and get no probability. Under differentiation the gradient is computed together with the loss, from the same
    logits of a chunk: these are computed once, as without chunks.
    """
    narrow_VD = _narrowed(head_VD, x_BTD.dtype)

    def add(total, chunk):
        return total + _chunk_loss(*chunk, narrow_VD, vocab_size)[0], None

    return jax.lax.scan(add, jnp.zeros((), _wide(x_BTD)), _chunks(x_BTD, targets_BT, len(head_VD)))[0]


def log_probabilities(
    x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, vocab_size: int
) -> tuple[jax.Array, jax.Array]:
    """Of each target log softmax(x head^T)[target], in float32 at least, and whether it is the likeliest token, of
    equals the first; both (B, T), without a meaning where the target is IGNORE_INDEX."""
    narrow_VD = _narrowed(head_VD, x_BTD.dtype)
    x_nBCD, targets_nBC = _chunks(x_BTD, targets_BT, len(head_VD))
    of_chunk = functools.partial(_chunk_log_probabilities, head_VD=narrow_VD, vocab_size=vocab_size)
    both_nBC = jax.lax.map(lambda chunk: of_chunk(*chunk), (x_nBCD, targets_nBC))
    B, T = targets_BT.shape
    return tuple(array_nBC.transpose(1, 0, 2).reshape(B, -1)[:, :T] for array_nBC in both_nBC)


def _chunk_log_probabilities(x_BCD: jax.Array, targets_BC: jax.Array, head_VD: jax.Array, vocab_size: int):
    logits_BCV, is_target_BCV = _chunk_logits(x_BCD, targets_BC, head_VD, vocab_size)
    normalizer_BC1, target_BC1 = _normalizer_and_target(logits_BCV, is_target_BCV)
    # Not argmax: the partitioner can shard a maximum over the vocabulary, but no reduction to a pair.
    is_largest_BCV = logits_BCV == logits_BCV.max(axis=-1, keepdims=True)
    first_BC = jnp.where(is_largest_BCV, jnp.arange(len(head_VD)), len(head_VD)).min(axis=-1)
    return (target_BC1 - normalizer_BC1)[..., 0], first_BC == targets_BC


def _forward(x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, vocab_size: int):
    """The loss, and its gradients by x and by the head."""
    narrow_VD = _narrowed(head_VD, x_BTD.dtype)

    def add(totals, chunk):
        total, dhead_VD = totals
        x_BCD, targets_BC = chunk
        loss, dlogits = _chunk_loss(x_BCD, targets_BC, narrow_VD, vocab_size)
        dlogits_BCV = dlogits().astype(x_BCD.dtype)
        dx_BCD = _times_head(dlogits_BCV, narrow_VD)
        dhead_VD += jnp.einsum("bcv,bcd->vd", dlogits_BCV, x_BCD, preferred_element_type=dhead_VD.dtype)
        return (total + loss, constrain(dhead_VD, "vocab", None)), dx_BCD

    start = (jnp.zeros((), _wide(x_BTD)), jnp.zeros(head_VD.shape, _wide(x_BTD)))
    (loss, dhead_VD), dx_nBCD = jax.lax.scan(add, start, _chunks(x_BTD, targets_BT, len(head_VD)))
    B, T, D = x_BTD.shape
    dx_BTD = dx_nBCD.transpose(1, 0, 2, 3).reshape(B, -1, D)[:, :T]
    return loss, (dx_BTD, dhead_VD.astype(head_VD.dtype))


def _backward(vocab_size: int, grads, g: jax.Array):
    dx_BTD, dhead_VD = grads
    # Scaled in g's dtype: g is one over a count of tokens, and rounded to bfloat16 it would be off by up to 0.2%.
    return (dx_BTD * g).astype(dx_BTD.dtype), (dhead_VD * g).astype(dhead_VD.dtype), None


summed_cross_entropy.defvjp(_forward, _backward)


def _narrowed(head_VD: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The head as the products take it: rounded once, and not in every chunk."""
    return head_VD.astype(dtype)


def _chunk_loss(x_BCD: jax.Array, targets_BC: jax.Array, head_VD: jax.Array, vocab_size: int):
    """The summed loss of a chunk, and a function that gives its gradient by the logits."""
    logits_BCV, is_target_BCV = _chunk_logits(x_BCD, targets_BC, head_VD, vocab_size)
    counts_BC1 = (targets_BC != IGNORE_INDEX)[..., None]
    normalizer_BC1, target_BC1 = _normalizer_and_target(logits_BCV, is_target_BCV)
    loss = jnp.sum(jnp.where(counts_BC1, normalizer_BC1 - target_BC1, 0.0))

    def dlogits() -> jax.Array:
        return jnp.where(counts_BC1, jnp.exp(logits_BCV - normalizer_BC1) - is_target_BCV, 0.0)

    return loss, dlogits


def _chunk_logits(
    x_BCD: jax.Array, targets_BC: jax.Array, head_VD: jax.Array, vocab_size: int
) -> tuple[jax.Array, jax.Array]:
    """The logits of a chunk (B, C, V), -inf in the padding, and which of them are the targets'."""
    head_VD = head_VD.astype(x_BCD.dtype)
    logits_BCV = jnp.einsum("bcd,vd->bcv", x_BCD, head_VD, preferred_element_type=_wide(x_BCD))
    logits_BCV = constrain(logits_BCV, "batch", None, "vocab")
    ids_V = jnp.arange(len(head_VD))
    # A comparison instead of an index: it fuses, and it needs no gather over a sharded vocabulary.
    is_target_BCV = ids_V == targets_BC[..., None]
    return jnp.where(ids_V < vocab_size, logits_BCV, -jnp.inf), is_target_BCV


def _times_head(dlogits_BCV: jax.Array, head_VD: jax.Array) -> jax.Array:
    """dlogits head, (B, C, D), in dlogits' dtype."""
    head_VD = head_VD.astype(dlogits_BCV.dtype)
    if is_tensor_parallel():
        # The vocabulary is split already, and the partitioner can't split a loop over it.
        return _at_once(dlogits_BCV, head_VD)
    return jax.lax.platform_dependent(dlogits_BCV, head_VD, cpu=_in_blocks, default=_at_once)


def _at_once(dlogits_BCV: jax.Array, head_VD: jax.Array) -> jax.Array:
    return jnp.einsum("bcv,vd->bcd", dlogits_BCV, head_VD)


def _in_blocks(dlogits_BCV: jax.Array, head_VD: jax.Array) -> jax.Array:
    """Summed over BLOCK rows of the head at a time, in float32 at least.

    XLA's CPU product adds hundreds of terms one by one. The rows of dlogits add up to zero, the target's -1 against
    many small probabilities, and a trained head's rows are similar: after the target's row each of the others is below
    the last digit of the sum, and all of them are lost. Accelerators sum in tiles anyway.
    """

    def add(total_BCD, begin):
        block_BCV = jax.lax.dynamic_slice_in_dim(dlogits_BCV, begin, BLOCK, axis=2)
        rows_VD = jax.lax.dynamic_slice_in_dim(head_VD, begin, BLOCK)
        product = jnp.einsum("bcv,vd->bcd", block_BCV, rows_VD, preferred_element_type=total_BCD.dtype)
        return total_BCD + product, None

    start = jnp.zeros((*dlogits_BCV.shape[:2], head_VD.shape[1]), _wide(dlogits_BCV))
    total_BCD, _ = jax.lax.scan(add, start, jnp.arange(0, len(head_VD), BLOCK))
    return total_BCD.astype(dlogits_BCV.dtype)


def _normalizer_and_target(logits_BCV: jax.Array, is_target_BCV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of each row, with a last axis of 1: log sum exp, and the logit of the target (0 without one)."""
    if is_tensor_parallel():
        # The partitioner can shard a sum over the vocabulary, but not a reduction by a custom function.
        return _in_two_passes(logits_BCV, is_target_BCV)
    return jax.lax.platform_dependent(logits_BCV, is_target_BCV, cuda=_in_one_pass, default=_in_two_passes)


def _in_two_passes(logits_BCV: jax.Array, is_target_BCV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest logit, then the sum of exponentials: vectorised on CPU."""
    target_BC1 = jnp.sum(jnp.where(is_target_BCV, logits_BCV, 0.0), axis=-1, keepdims=True)
    return jax.nn.logsumexp(logits_BCV, axis=-1, keepdims=True), target_BC1


def _in_one_pass(logits_BCV: jax.Array, is_target_BCV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both at once, rescaling the sum when a larger logit comes (Milakov & Gimelshein 2018, "Online normalizer
    calculation for softmax"): on a GPU the logits are read from memory once less."""

    def join(a, b):
        (a_max, a_sum, a_target), (b_max, b_sum, b_target) = a, b
        largest = jnp.maximum(a_max, b_max)
        total = a_sum * jnp.exp(a_max - largest) + b_sum * jnp.exp(b_max - largest)
        return largest, total, a_target + b_target

    dtype = logits_BCV.dtype
    # The lowest finite number instead of -inf, because -inf minus itself is NaN.
    lowest = jnp.finfo(dtype).min.astype(dtype)
    start = lowest, jnp.zeros((), dtype), jnp.zeros((), dtype)
    rows = jnp.maximum(logits_BCV, lowest), jnp.ones_like(logits_BCV), jnp.where(is_target_BCV, logits_BCV, 0.0)
    largest, total, target = jax.lax.reduce(rows, start, join, (logits_BCV.ndim - 1,))
    return (largest + jnp.log(total))[..., None], target[..., None]


def _chunks(x_BTD: jax.Array, targets_BT: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """x as (n, B, C, D) and the targets as (n, B, C), filled up with targets that don't count."""
    B, T, D = x_BTD.shape
    C = _chunk_length(B, T, rows * _wide(x_BTD).itemsize)
    n = math.ceil(T / C)
    missing = n * C - T
    x_BTD = jnp.pad(x_BTD, ((0, 0), (0, missing), (0, 0)))
    targets_BT = jnp.pad(targets_BT, ((0, 0), (0, missing)), constant_values=IGNORE_INDEX)
    return x_BTD.reshape(B, n, C, D).transpose(1, 0, 2, 3), targets_BT.reshape(B, n, C).transpose(1, 0, 2)


def _chunk_length(B: int, T: int, bytes_of_token: int) -> int:
    """Tokens of a sequence in a chunk: as many as CHUNK_BYTES allow, in chunks of one length. If possible a power of
    two: tiles of matrix units are then full, and no chunk is padded."""
    most = max(1, min(T, CHUNK_BYTES // (bytes_of_token * B)))
    power = 1 << (most.bit_length() - 1)
    return power if most < T and T % power == 0 else math.ceil(T / math.ceil(T / most))


def _wide(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)
