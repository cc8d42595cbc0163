"""The head and its cross-entropy, fused: logits exist for one chunk of the tokens at a time, and never all together.

Shapes: B sequences, T time, D embedding, V vocabulary (padded). A chunk is C places of every sequence. S is the number
of ways in which the mesh splits the batch, of which each has b sequences: S x b = B; n chunks of C places make T. The
head comes once for each way (gpt2_jax.layers.Embedding.spread), and so does its gradient.
"""

import functools
import math

import jax
import jax.numpy as jnp

from gpt2_core.batches import IGNORED
from gpt2_jax.sharding import constrain, ways

# Of a chunk's float32 logits on one device. Larger chunks make the matrix products no faster on CPU or GPU; smaller
# ones read and write the head's gradient more often.
CHUNK_BYTES = 256 << 20


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def summed_cross_entropy(x_BTD: jax.Array, head_SVD: jax.Array, targets_BT: jax.Array, vocab_size: int) -> jax.Array:
    """Sum over the targets that aren't IGNORED of -log softmax(x head^T)[target], in float32 at least.

    The products take operands of x's dtype and accumulate in float32 at least. Rows of `head` from `vocab_size` on are
    padding and get no probability. Differentiated, the gradient is made along with the loss, while a chunk's logits are
    there: they are computed once, as without chunks.
    """

    def add(total, chunk):
        loss, _ = _chunk_loss(*chunk, head_SVD, vocab_size)
        return total + loss, None

    return jax.lax.scan(add, jnp.zeros((), _wide(x_BTD)), _chunks(x_BTD, targets_BT, head_SVD))[0]


def _forward(x_BTD: jax.Array, head_SVD: jax.Array, targets_BT: jax.Array, vocab_size: int):
    """The loss, and its gradients by x and by the head."""

    def add(totals, chunk):
        x_SbCD, targets_SbC = chunk
        loss, by_logits = _chunk_loss(x_SbCD, targets_SbC, head_SVD, vocab_size)
        by_logits_SbCV = by_logits().astype(x_SbCD.dtype)
        by_x_SbCD = jnp.einsum("sbcv,svd->sbcd", by_logits_SbCV, head_SVD.astype(x_SbCD.dtype))
        by_head_SVD = jnp.einsum("sbcv,sbcd->svd", by_logits_SbCV, x_SbCD, preferred_element_type=totals[1].dtype)
        return (totals[0] + loss, totals[1] + _split(by_head_SVD)), by_x_SbCD

    # Each way of the batch adds up its own: no chunk waits for another device.
    start = (jnp.zeros((), _wide(x_BTD)), _split(jnp.zeros(head_SVD.shape, _wide(x_BTD))))
    (loss, by_head_SVD), by_x_nSbCD = jax.lax.scan(add, start, _chunks(x_BTD, targets_BT, head_SVD))
    B, T, D = x_BTD.shape
    by_x_BTD = by_x_nSbCD.transpose(1, 2, 0, 3, 4).reshape(B, -1, D)[:, :T]
    return loss, (constrain(by_x_BTD, "batch", None, None), by_head_SVD.astype(head_SVD.dtype))


def _backward(vocab_size: int, grads, g: jax.Array):
    by_x_BTD, by_head_SVD = grads
    return (by_x_BTD * g.astype(by_x_BTD.dtype), by_head_SVD * g.astype(by_head_SVD.dtype), None)


summed_cross_entropy.defvjp(_forward, _backward)


def _chunk_loss(x_SbCD: jax.Array, targets_SbC: jax.Array, head_SVD: jax.Array, vocab_size: int):
    """The summed loss of a chunk, and a function that gives its gradient by the logits."""
    wide = _wide(x_SbCD)
    logits_SbCV = jnp.einsum("sbcd,svd->sbcv", x_SbCD, head_SVD.astype(x_SbCD.dtype), preferred_element_type=wide)
    logits_SbCV = constrain(logits_SbCV, "batch", None, None, "vocab")
    ids_V = jnp.arange(head_SVD.shape[1])
    logits_SbCV = jnp.where(ids_V < vocab_size, logits_SbCV, -jnp.inf)
    counts_SbC1 = (targets_SbC != IGNORED)[..., None]
    # A comparison in the place of an index: it fuses, and it needs no gather over a sharded vocabulary.
    is_target_SbCV = ids_V == targets_SbC[..., None]
    normalizer_SbC1 = jax.nn.logsumexp(logits_SbCV, axis=-1, keepdims=True)
    target_SbC1 = jnp.sum(jnp.where(is_target_SbCV, logits_SbCV, 0.0), axis=-1, keepdims=True)
    loss = jnp.sum(jnp.where(counts_SbC1, normalizer_SbC1 - target_SbC1, 0.0))

    def by_logits():
        by_logits_SbCV = jnp.exp(logits_SbCV - normalizer_SbC1) - is_target_SbCV
        return jnp.where(counts_SbC1, by_logits_SbCV, 0.0)

    return loss, by_logits


def _chunks(x_BTD: jax.Array, targets_BT: jax.Array, head_SVD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x as (n, S, b, C, D) and the targets as (n, S, b, C), filled up with targets that don't count."""
    B, T, D = x_BTD.shape
    S = head_SVD.shape[0]
    rows = head_SVD.shape[1] // ways("vocab")
    places = max(1, CHUNK_BYTES // (4 * rows * (B // S)))
    n = math.ceil(T / places)
    C = math.ceil(T / n)
    missing = n * C - T
    x_BTD = jnp.pad(x_BTD, ((0, 0), (0, missing), (0, 0)))
    targets_BT = jnp.pad(targets_BT, ((0, 0), (0, missing)), constant_values=IGNORED)
    x_nSbCD = x_BTD.reshape(S, B // S, n, C, D).transpose(2, 0, 1, 3, 4)
    targets_nSbC = targets_BT.reshape(S, B // S, n, C).transpose(2, 0, 1, 3)
    return constrain(x_nSbCD, None, "batch", None, None, None), constrain(targets_nSbC, None, "batch", None, None)


def _split(by_head_SVD: jax.Array) -> jax.Array:
    return constrain(by_head_SVD, "batch", "vocab", None)


def _wide(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)
