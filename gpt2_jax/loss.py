"""The head and its cross-entropy.

Shapes: M tokens (batch and time flattened), D embedding, V vocabulary (padded).
"""

import jax
import jax.numpy as jnp

from gpt2_core.batches import IGNORED
from gpt2_jax.products import wide_einsum


def summed_cross_entropy(x_MD: jax.Array, wte_VD: jax.Array, targets_M: jax.Array, vocab_size: int) -> jax.Array:
    """Sum over the targets that aren't IGNORED of -log softmax(x wte^T)[target], in float32 at least.

    Rows of `wte` from `vocab_size` on are padding and get no probability.
    """
    logits_MV = wide_einsum("md,vd->mv", x_MD, wte_VD.astype(x_MD.dtype))
    ids_V = jnp.arange(wte_VD.shape[0])
    logits_MV = jnp.where(ids_V < vocab_size, logits_MV, -jnp.inf)
    # A masked sum in the place of an index: it fuses, and it needs no gather over a sharded vocabulary.
    target_logits_M = jnp.sum(jnp.where(ids_V == targets_M[:, None], logits_MV, 0.0), axis=-1)
    losses_M = jax.nn.logsumexp(logits_MV, axis=-1) - target_logits_M
    return jnp.sum(jnp.where(targets_M == IGNORED, 0.0, losses_M))
